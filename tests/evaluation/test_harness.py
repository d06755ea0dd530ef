"""Laws of the benchmarks: offline, kept when finished, told where they do not fit."""

import functools
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluation.exams import CATEGORIES, NUM, SUBJECTS, write, write_exams

from fedgraft.errors import ArtefactError, EvaluationError, NonFiniteError
from fedgraft.evaluation import harness
from fedgraft.evaluation.benchmarks import PAPER, PAPER_ROWS, chosen, find_files
from fedgraft.evaluation.harness import BenchmarkSettings, run_benchmarks
from fedgraft.evaluation.scorecard import Scorecard
from fedgraft.models import open_model, open_tokenizer
from fedgraft.testing import save_tiny
from fedgraft.weights.checkpoint import Checkpoint

CONTEXT = 560
SHORT = ("winogrande", "piqa")
"""Those that a context of 256 tokens is enough for."""


def never(*_: object) -> Any:
    raise AssertionError("this was not to be called")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something asked the network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exams(tmp_path_factory.mktemp("exams"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_context(save_tiny(tmp_path_factory.mktemp("models") / "tiny"), CONTEXT)


def with_context(folder: Path, tokens: int) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": tokens}))
    return folder


def run(
    model: Path,
    kept: Path,
    *names: str,
    open_network: Callable[..., Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Scorecard:
    return run_benchmarks(
        Checkpoint.open(model),
        arm="tiny",
        benchmarks=chosen(names or SHORT),
        settings=BenchmarkSettings(**settings),
        kept=kept,
        open_network=open_network or (lambda _: open_model(model)),
        say=say,
    )


def files(kept: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in kept.rglob("*-*.json")}


@pytest.fixture(scope="module")
def whole(
    model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Scorecard, Path]:
    """All nine by a model whose context is too short for three of them, and where they are kept."""
    kept = tmp_path_factory.mktemp("kept")
    return run(model, kept, *PAPER, data=data, fit=True), kept


def test_all_nine_give_the_papers_rows_without_asking_the_network(
    whole: tuple[Scorecard, Path],
) -> None:
    card, _ = whole
    assert set(PAPER_ROWS.values()) <= card.scores.keys()
    assert list(card.benchmarks) == list(PAPER)
    assert all(0 <= score.value <= 1 and score.num > 1 for score in card.scores.values())


def test_a_group_is_the_mean_over_its_questions_and_each_subject_stands_beside_it(
    whole: tuple[Scorecard, Path],
) -> None:
    card, _ = whole
    subjects = [card.scores[f"benchmark/mmlu/acc/{subject}"] for subject in SUBJECTS]
    assert [score.num for score in subjects] == [NUM, NUM // 2]
    mean = sum(score.value * score.num for score in subjects) / (NUM + NUM // 2)
    assert card.value("benchmark/mmlu/acc") == pytest.approx(mean)
    pro = [name for name in card.scores if name.startswith("benchmark/mmlu_pro/exact_match/")]
    assert len(pro) == len(CATEGORIES)


def test_what_each_question_gave_is_kept_and_makes_the_score(
    whole: tuple[Scorecard, Path],
) -> None:
    card, _ = whole
    assert card.outcomes.keys() == set(PAPER_ROWS.values())
    for name, kept in card.outcomes.items():
        assert sum(kept.sizes or [1] * kept.num_examples) == card.scores[name].num
        assert kept.value == pytest.approx(card.value(name), rel=1e-5)


def test_a_share_of_constraints_has_a_standard_error_over_prompts(
    whole: tuple[Scorecard, Path],
) -> None:
    score = whole[0].scores["benchmark/ifeval/inst_level_strict_acc"]
    assert score.num == NUM + NUM // 2
    assert 0 < score.value < 1
    assert 0 < score.stderr < 0.5


def test_what_did_not_fit_is_in_the_result(whole: tuple[Scorecard, Path]) -> None:
    asked = whole[0].benchmarks
    assert asked["gsm8k"].shortcomings == ""
    assert asked["piqa"].shortcomings == ""
    assert asked["ifeval"].answer_tokens_wanted == 1280
    assert "of 1,280 tokens" in asked["ifeval"].shortcomings
    assert asked["mmlu_pro"].num_shots == 0
    assert "0 of 5 shots, answers of " in asked["mmlu_pro"].shortcomings


def test_the_first_questions_of_mmlu_pro_are_shots_and_score_no_more(
    whole: tuple[Scorecard, Path],
) -> None:
    asked = whole[0].benchmarks["mmlu_pro"]
    assert asked.num_rows == asked.num_rows_held == len(CATEGORIES) * 2
    assert asked.shots_without_reasoning


def load(name: str, data: Path, cache: Path) -> dict[str, Any]:
    with harness._quiet(), harness._offline(asked=True):
        files = find_files(PAPER[name], data)
        return harness._load(PAPER[name], files, harness._manager(), cache)


def test_shots_from_the_head_show_the_answer_in_the_form_that_is_asked_for(
    data: Path, tmp_path: Path
) -> None:
    task = load("mmlu_pro", data, tmp_path / "cache")["tasks"]["mmlu_pro_law"]
    task.build_all_requests(limit=1)
    prompt = task.instances[0].args[0]
    assert prompt.count("Which is") == 6
    assert "think step by step. The answer is (A).\n\nQuestion:\nWhich is 1?" in prompt
    assert prompt.endswith(
        "Which is 5?\nOptions:\nA. zero\nB. one\nAnswer: Let's think step by step."
    )


def test_mmlu_pro_takes_its_shots_from_the_validation_file_where_there_is_one(
    tmp_path: Path,
) -> None:
    data = write_exams(tmp_path / "exams")
    rows = [json.loads(line) for line in (data / "mmlu_pro_test.jsonl").open()]
    reasoned = [row | {"cot_content": "A: Let's think step by step. Hm."} for row in rows]
    write(data / "mmlu_pro_validation.jsonl", reasoned)
    task = load("mmlu_pro", data, tmp_path / "cache")["tasks"]["mmlu_pro_law"]
    task.build_all_requests(limit=1)
    assert len(task.eval_docs) == 7
    assert "step by step. Hm.\n\n" in task.instances[0].args[0]


def test_a_subject_with_no_more_questions_than_shots_is_refused(tmp_path: Path) -> None:
    data = write_exams(tmp_path / "exams")
    file = data / "mmlu_pro_test.jsonl"
    rows = [json.loads(line) for line in file.open()]
    write(file, [row for n, row in enumerate(rows) if row["category"] != "law" or n % 7 < 5])
    with pytest.raises(EvaluationError, match="mmlu_pro_law: expected more than 5 questions"):
        load("mmlu_pro", data, tmp_path / "cache")


def test_a_file_that_holds_other_questions_at_the_same_time_of_change_is_read_again(
    tmp_path: Path,
) -> None:
    """As after unpacking an archive; `datasets` goes by the name and that time."""
    data = write_exams(tmp_path / "exams")
    file = data / "piqa_valid.jsonl"
    before = file.stat()
    asked = []
    for goal in ("Open door", "Close gate"):
        file.write_text(file.read_text().replace("Open door", goal))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        docs = load("piqa", data, tmp_path / "cache")["tasks"]["piqa"].validation_docs()
        asked.append(docs[0]["goal"])
    assert asked == ["Open door 0", "Close gate 0"]


def test_too_few_questions_to_show_first_are_refused(
    model: Path, data: Path, tmp_path: Path
) -> None:
    exams = shutil.copytree(data, tmp_path / "exams")
    file = exams / "gsm8k_train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(
        EvaluationError, match="gsm8k: expected 5 questions or more to show first, "
    ):
        run(model, tmp_path / "kept", "gsm8k", data=exams, fit=True)


def test_a_subject_of_one_question_has_no_standard_error_and_is_refused(
    model: Path, data: Path, tmp_path: Path
) -> None:
    exams = shutil.copytree(data, tmp_path / "exams")
    file = exams / "mmlu" / "anatomy_test.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    with pytest.raises(
        EvaluationError, match="mmlu_anatomy: expected 2 questions or more, found 1"
    ):
        run(model, tmp_path / "kept", "mmlu", data=exams, fit=True)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("hellaswag_val", '"label": "1"', '"label": "first"'),
        ("arc_easy_test", '"answerKey": "B"', '"answerKey": "Z"'),
        ("winogrande_xl_dev", '"option1": "the heron"', '"option1": null'),
        ("ifeval_input_data", "punctuation:no_comma", "punctuation:no_dash"),
        ("truthfulqa_mc", '"choices": ["Yes.", "No.", "At times."]', '"texts": []'),
    ],
)
def test_lines_with_what_nobody_expected_are_told_by_benchmark(
    name: str, before: str, after: str, model: Path, data: Path, tmp_path: Path
) -> None:
    exams = shutil.copytree(data, tmp_path / "exams")
    file = exams / f"{name}.jsonl"
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    (benchmark,) = [one for one in PAPER if name.startswith(one.removesuffix("_mc2"))]
    words = f"{benchmark}: expected questions in .*exams as lm-eval's task .*fetch its files again"
    with pytest.raises(EvaluationError, match=words):
        run(model, tmp_path / "kept", benchmark, data=exams, fit=True)


def test_a_subject_that_lm_eval_does_not_know_is_refused(tmp_path: Path, model: Path) -> None:
    data = write_exams(tmp_path / "exams")
    for split in ("test", "dev"):
        known = data / "mmlu" / f"anatomy_{split}.jsonl"
        known.rename(known.with_name(f"knitting_{split}.jsonl"))
    with pytest.raises(EvaluationError, match="lm-eval knows, found some of mmlu_knitting"):
        run(model, tmp_path / "kept", "mmlu", data=data)


def test_a_finished_benchmark_is_not_run_again_and_needs_no_model(
    whole: tuple[Scorecard, Path], model: Path, data: Path
) -> None:
    card, kept = whole
    before, said = files(kept), list[str]()
    again = run(model, kept, *PAPER, data=data, fit=True, open_network=never, say=said.append)
    assert again == card
    assert files(kept) == before
    assert said == [f"{name}: finished before" for name in PAPER]


def test_what_fitted_in_full_is_found_without_fit_and_what_did_not_is_not(
    whole: tuple[Scorecard, Path], model: Path, data: Path
) -> None:
    kept = whole[1]
    run(model, kept, "piqa", "gsm8k", data=data, open_network=never)
    with pytest.raises(AssertionError, match="not to be called"):
        run(model, kept, "ifeval", data=data, open_network=never)


@pytest.mark.parametrize(
    "change", ["weights", "template", "data", "limit", "chat_template", "precision", "lm_eval"]
)
def test_a_kept_result_is_only_that_of_the_same_weights_files_and_settings(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = write_exams(tmp_path / "exams"), save_tiny(tmp_path / "tiny")
    run(model, tmp_path / "kept", "winogrande", data=data)
    settings: dict[str, Any] = {}
    match change:
        case "weights":
            model = save_tiny(tmp_path / "other", seed=1)
        case "template":
            (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        case "data":
            lines = (data / "winogrande_xl_dev.jsonl").read_text().splitlines(keepends=True)
            (data / "winogrande_xl_dev.jsonl").write_text("".join(lines[1:]))
        case "limit":
            settings = {"limit": 2}
        case "chat_template":
            settings = {"chat_template": True}
        case "precision":
            settings = {"precision": "bfloat16"}
        case "lm_eval":
            monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.4.99")
    with pytest.raises(AssertionError, match="not to be called"):
        run(model, tmp_path / "kept", "winogrande", data=data, open_network=never, **settings)


def test_an_interrupted_evaluation_goes_on_with_the_next_benchmark(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, tmp_path / "whole", data=data)
    ran, once = list[str](), harness._run

    def interrupted(benchmark: Any, *args: Any, **named: Any) -> Any:
        if benchmark.name == SHORT[1]:
            raise KeyboardInterrupt
        return once(benchmark, *args, **named)

    def counted(benchmark: Any, *args: Any, **named: Any) -> Any:
        ran.append(benchmark.name)
        return once(benchmark, *args, **named)

    monkeypatch.setattr(harness, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "kept", data=data)
    assert [name.partition("-")[0] for name in files(tmp_path / "kept")] == [SHORT[0]]
    monkeypatch.setattr(harness, "_run", counted)
    assert run(model, tmp_path / "kept", data=data) == whole
    assert ran == [SHORT[1]]
    assert files(tmp_path / "kept") == files(tmp_path / "whole")


def test_a_result_that_was_half_written_is_none(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", never)
        with pytest.raises(AssertionError, match="not to be called"):
            run(model, tmp_path / "kept", "piqa", data=data)
    assert files(tmp_path / "kept") == {}


def test_a_broken_kept_result_is_refused_by_name(model: Path, data: Path, tmp_path: Path) -> None:
    run(model, tmp_path, "piqa", data=data)
    (file,) = tmp_path.rglob("piqa-*.json")
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ArtefactError, match="finished benchmark, found Invalid JSON"):
        run(model, tmp_path, "piqa", data=data)


def test_a_context_too_short_is_told_with_the_shots_that_fit_before_anything_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "_run", never)
    model = with_context(save_tiny(tmp_path / "tiny"), 360)
    with pytest.raises(EvaluationError) as refused:
        run(model, tmp_path / "kept", "piqa", "gsm8k", "ifeval", data=data)
    message = str(refused.value)
    assert "one that reads 360 tokens:" in message
    assert "gsm8k: with 5 shots and answers of up to 256 tokens 4 of 4 questions take" in message
    assert "what fits: 2 of 5 shots\n" in message
    assert "ifeval: with answers of up to 1,280 tokens" in message
    assert "piqa" not in message
    assert "Run what fits with --fit" in message
    assert not (tmp_path / "kept").exists() or files(tmp_path / "kept") == {}


def test_the_shots_that_fit_are_as_many_as_fit(data: Path, tmp_path: Path) -> None:
    """One token of context less, and one shot less is read."""
    said = list[str]()
    model = with_context(save_tiny(tmp_path / "tiny"), 360)
    fits = run(model, tmp_path / "kept", "gsm8k", data=data, fit=True, say=said.append)
    shots = fits.benchmarks["gsm8k"].num_shots
    assert 0 < shots < 5
    assert fits.benchmarks["gsm8k"].answer_tokens == 256
    assert said == [line for line in said if f"what fits: {shots} of 5 shots" in line] != []
    lengths = lengths_of(model, data, "gsm8k", shots)
    for context, expected in ((max(lengths) + 256, shots), (max(lengths) + 255, shots - 1)):
        with_context(model, context)
        card = run(model, tmp_path / "kept", "gsm8k", data=data, fit=True)
        assert card.benchmarks["gsm8k"].num_shots == expected


def lengths_of(model: Path, data: Path, name: str, shots: int) -> list[int]:
    tasks = list(load(name, data, model.with_name("cache"))["tasks"].values())
    settings = BenchmarkSettings(data=data)
    return harness._lengths(tasks, shots, None, open_tokenizer(model), settings)


def test_choices_may_fill_the_context_to_their_last_token_which_is_only_predicted(
    data: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "tiny")
    longest = max(lengths_of(model, data, "piqa", 0))
    run(with_context(model, longest - 1), tmp_path / "kept", "piqa", data=data)
    with pytest.raises(
        EvaluationError, match="piqa: with their choices 4 of 4 questions take more"
    ):
        run(with_context(model, longest - 2), tmp_path / "kept", "piqa", data=data)
    card = run(model, tmp_path / "kept", "piqa", data=data, fit=True)
    assert card.benchmarks["piqa"].num_cut > 0
    assert "without their beginning" in card.benchmarks["piqa"].shortcomings


def test_the_batch_size_does_not_matter(model: Path, data: Path, tmp_path: Path) -> None:
    one, many = (
        run(model, tmp_path / str(size), "truthfulqa_mc2", data=data, batch_size=size)
        for size in (1, 8)
    )
    assert one.value("benchmark/truthfulqa_mc2/acc") == pytest.approx(
        many.value("benchmark/truthfulqa_mc2/acc"), abs=1e-5
    )
    found = run(model, tmp_path / "found", "truthfulqa_mc2", data=data)
    assert found.benchmarks["truthfulqa_mc2"].batch_size == 64


def test_a_batch_is_smaller_where_questions_are_longer_or_the_vocabulary_is_larger() -> None:
    class Config:
        vocab_size = 150_000

        def get_text_config(self) -> "Config":
            return self

    assert harness._batch_size(Config(), 100) == 8
    assert harness._batch_size(Config(), 1_000_000) == 1


def test_questions_go_through_the_template_only_where_that_is_asked_for(
    model: Path, data: Path, tmp_path: Path
) -> None:
    plain = run(model, tmp_path, "truthfulqa_mc2", data=data)
    chat = run(model, tmp_path, "truthfulqa_mc2", data=data, chat_template=True)
    name = "benchmark/truthfulqa_mc2/acc"
    assert plain.value(name) != chat.value(name)
    assert [c.benchmarks["truthfulqa_mc2"].chat_template for c in (plain, chat)] == [False, True]


def test_a_model_without_a_template_is_not_asked_through_one(data: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(EvaluationError, match="expected a tokenizer with a chat template"):
        run(model, tmp_path / "kept", data=data, chat_template=True)


def test_a_limit_takes_the_first_questions_and_is_told(
    model: Path, data: Path, tmp_path: Path
) -> None:
    card = run(model, tmp_path, "winogrande", data=data, limit=2)
    assert card.scores["benchmark/winogrande/acc"].num == 2
    assert card.benchmarks["winogrande"].shortcomings == "2 of 4 questions"
    whole = run(model, tmp_path, "winogrande", data=data)
    kept, of_all = (one.outcomes["benchmark/winogrande/acc"] for one in (card, whole))
    assert (kept.num_examples, of_all.num_examples) == (2, 4)


def test_one_question_has_no_standard_error_and_is_refused(
    model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match="a limit of 2 questions or more, found 1"):
        run(model, tmp_path, data=data, limit=1)


@pytest.mark.parametrize(
    ("missing", "backend", "words"),
    [
        ("lm_eval", "transformers", r"found no lm_eval; .*pip install 'fedgraft\[bench\]'"),
        ("immutabledict", "transformers", r"found no immutabledict; .*'fedgraft\[bench\]'"),
        ("vllm", "vllm", "found it not installed; install it with: pip install vllm"),
    ],
)
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(
    missing: str,
    backend: Any,
    words: str,
    data: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    found: Callable[[str], Any] = lambda name: None if name == missing else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(EvaluationError, match=words):
        run(model, tmp_path, data=data, backend=backend)


def test_a_broken_model_is_refused_before_it_is_asked(
    model: Path, data: Path, tmp_path: Path
) -> None:
    network = open_model(model)
    with torch.no_grad():
        network.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(NonFiniteError, match="found NaN or Inf among its logits"):
        run(model, tmp_path, data=data, open_network=lambda _: network)


def test_a_nan_among_log_likelihoods_is_refused_by_question() -> None:
    samples = {"piqa": [{"doc_id": 3, "filtered_resps": [(-1.0, False), (float("nan"), False)]}]}
    with pytest.raises(NonFiniteError, match="found NaN for question 3 of piqa"):
        harness._refuse_nan(samples, "piqa")


def test_without_files_the_hub_is_asked_and_its_silence_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(EvaluationError, match="piqa: expected its data on the hub, found: "):
        run(model, tmp_path, "piqa")


def test_sentences_are_cut_as_nltk_cuts_them_without_its_download(tmp_path: Path) -> None:
    import nltk

    harness._provide_sentences(tmp_path)
    text = "Mr. J.P. Smith came at 3 p.m. on Jan. 5. It rained. Good!"
    assert len(nltk.sent_tokenize(text)) == 3


def test_lm_eval_is_left_as_it_was_found() -> None:
    import datasets.config
    import lm_eval.api.task
    import lm_eval.utils

    before = (lm_eval.api.task.tqdm, datasets.config.HF_HUB_OFFLINE)
    with harness._quiet(), harness._offline(asked=True):
        assert datasets.config.HF_HUB_OFFLINE is True
        assert isinstance(lm_eval.utils.env.from_string, functools._lru_cache_wrapper)
    assert (lm_eval.api.task.tqdm, datasets.config.HF_HUB_OFFLINE) == before
    assert not isinstance(lm_eval.utils.env.from_string, functools._lru_cache_wrapper)


def test_an_evaluation_that_failed_leaves_pythons_own_chance_to_chance(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    seen = []

    def fails(**_: object) -> None:
        seen.append(random.random())
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lm_eval, "evaluate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, tmp_path, "piqa", data=data)
    seeded = random.Random(harness.SEED)
    assert seen == [seeded.random()]
    assert random.random() != seeded.random()
