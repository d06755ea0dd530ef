"""The scale that is chosen without labels: what is measured, and what the rule makes of it."""

import gc
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluation.lessons import LESSONS, PAGES, Taught

from fedgraft.errors import EvaluationError, NonFiniteError, ResidualError
from fedgraft.evaluation import closeness
from fedgraft.evaluation.closeness import (
    PROMPTS,
    ScaleChoice,
    ScaleTrial,
    best_of,
    choose_scale,
    divergence,
    listen,
    load_prompts,
    search,
)
from fedgraft.evaluation.perplexity import document_perplexity
from fedgraft.models import open_model
from fedgraft.testing import tiny_model
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Message, prompt_ids
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.residual import Difference, Residual, extract

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUESTIONS = [asked for asked, _ in LESSONS]
DOCUMENTS = [Document(id=str(n), text=text, source="pages") for n, text in enumerate(PAGES)]
NUM_NEW = 24
SHORT = {"prompts": QUESTIONS, "max_new_tokens": NUM_NEW}


@pytest.fixture(scope="module")
def company(taught: Taught, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `base`, the `instruct` that was taught, their `residual`; `newer` has read the pages."""
    folder = tmp_path_factory.mktemp("company")
    save(tiny_model(hidden_size=64), taught.tokenizer, folder / "base")
    save(taught.model, taught.tokenizer, folder / "instruct")
    save(reader(taught.tokenizer), taught.tokenizer, folder / "newer")
    extract(Family.open(folder / "base", folder / "instruct"), folder / "residual")
    return folder


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reader(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """The base after a few steps on the pages."""
    model = tiny_model(hidden_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(15):
        for page in PAGES:
            ids = torch.tensor([tokenizer.encode(page)])
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def asked(
    tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str] = QUESTIONS
) -> list[list[int]]:
    return [prompt_ids(tokenizer, [Message(role="user", content=q)]) for q in questions]


def chosen(company: Path, **changes: object) -> ScaleChoice:
    given = {
        "target": company / "newer",
        "residual": Residual.open(company / "residual"),
        "base": company / "base",
        "documents": DOCUMENTS,
        **SHORT,
        **changes,
    }
    return choose_scale(**given)  # type: ignore[arg-type]


def test_models_may_be_named_as_on_the_hub(company: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, **_: object) -> str:
        return str(company / name.removeprefix("acme/"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    named = {"target": "acme/newer", "base": "acme/base", "instruct": "acme/instruct"}
    short: dict[str, object] = {"scales": (1.0,)}
    plain = chosen(company, instruct=company / "instruct", **short)
    assert chosen(company, **named, **short).trials == plain.trials


@pytest.mark.parametrize("instruct", [True, False])
def test_one_model_is_in_memory_at_a_time(
    company: Path, monkeypatch: pytest.MonkeyPatch, instruct: bool
) -> None:
    seen: list[weakref.ref[object]] = []

    def opened(path: Path) -> object:
        gc.collect()
        assert [ref for ref in seen if ref() is not None] == []
        model = open_model(path)
        seen.append(weakref.ref(model))
        return model

    monkeypatch.setattr(closeness, "open_model", opened)
    chosen(company, scales=(1.0,), instruct=company / "instruct" if instruct else None)
    assert len(seen) == 2 + instruct


def trial(scale: float, nats: float, kept: float = 1.0) -> ScaleTrial:
    return ScaleTrial(scale=scale, divergence=nats, bits_per_byte=1.0, kept=kept)


def test_divergence_is_the_mean_over_tokens_of_the_kullback_leibler_divergence(
    taught: Taught,
) -> None:
    """By its definition, over the whole vocabulary, one answer at a time, read afresh."""
    other = tiny_model(hidden_size=64)
    answers = listen(
        taught.model, taught.tokenizer, asked(taught.tokenizer), max_new_tokens=NUM_NEW
    )
    nats = []
    for answer, (_, said) in zip(answers, LESSONS, strict=True):
        spoken = taught.tokenizer.decode(answer.ids[answer.num_prompt :], skip_special_tokens=True)
        assert spoken == said
        with torch.inference_mode():
            p, q = (
                model(input_ids=torch.tensor([answer.ids]), use_cache=False)
                .logits[0, answer.num_prompt - 1 : -1]
                .double()
                .log_softmax(-1)
                for model in (taught.model, other)
            )
        assert int(p[-1].argmax()) == answer.ids[-1], "the end of the turn counts"
        nats += (p.exp() * (p - q)).sum(-1).tolist()
    assert divergence(other, answers) == pytest.approx(sum(nats) / len(nats), rel=1e-4)
    assert divergence(taught.model, answers) == pytest.approx(0, abs=1e-6)


def test_merging_unlikely_tokens_never_makes_it_larger_and_hardly_smaller(
    taught: Taught, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, tokenizer = tiny_model(hidden_size=64), taught.tokenizer
    found = []
    for num_named in (1, 4, 32, 10_000):
        monkeypatch.setattr(closeness, "NUM_NAMED", num_named)
        answers = listen(taught.model, tokenizer, asked(tokenizer), max_new_tokens=NUM_NEW)
        found.append(divergence(other, answers))
    assert found == sorted(found)
    assert found[2] > 0.95 * found[3]


def test_batches_do_not_change_a_divergence(
    taught: Taught, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, tokenizer = tiny_model(hidden_size=64), taught.tokenizer
    found = []
    for batch_tokens in (1, 10_000):
        monkeypatch.setattr(closeness, "BATCH_TOKENS", batch_tokens)
        answers = listen(taught.model, tokenizer, asked(tokenizer), max_new_tokens=NUM_NEW)
        found.append(divergence(other, answers))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_what_is_measured_at_a_scale_is_what_the_graft_on_disk_shows(
    company: Path, taught: Taught, tmp_path: Path
) -> None:
    choice = chosen(company, scales=[0.5, 1.0])
    answers = listen(
        taught.model, taught.tokenizer, asked(taught.tokenizer), max_new_tokens=NUM_NEW
    )
    bits = dict(choice.bits_per_byte)
    for found in choice.trials:
        out = graft(
            company / "newer",
            company / "residual",
            tmp_path / str(found.scale),
            scale=found.scale,
            any_parent=True,
        )
        model = open_model(out)
        read = document_perplexity(model, taught.tokenizer, DOCUMENTS).bits_per_byte
        assert found.divergence == pytest.approx(divergence(model, answers), rel=1e-4)
        assert found.bits_per_byte == pytest.approx(read, rel=1e-5)
        gained = (bits["instruct"] - read) / (bits["base"] - bits["newer base"])
        assert found.kept == pytest.approx(gained, rel=1e-4)
    assert choice.num_answers == len(QUESTIONS)
    assert choice.num_tokens == sum(answer.num_tokens for answer in answers)
    for role, folder in (("base", "base"), ("newer base", "newer"), ("instruct", "instruct")):
        read = document_perplexity(
            open_model(company / folder), taught.tokenizer, DOCUMENTS
        ).bits_per_byte
        assert bits[role] == pytest.approx(read, rel=1e-5), role


def test_base_and_residual_stand_for_the_instruct_model(company: Path) -> None:
    added = chosen(company, scales=[1.0])
    named = chosen(company, scales=[1.0], instruct=company / "instruct")
    assert added.scale == named.scale == 1.0
    assert added.trials[0].divergence == pytest.approx(named.trials[0].divergence, rel=1e-3)


def test_a_family_that_is_not_extracted_will_do(company: Path) -> None:
    family = Difference(Family.open(company / "base", company / "instruct"))
    assert chosen(company, scales=[1.0], residual=family) == chosen(company, scales=[1.0])


def test_nothing_is_written(company: Path) -> None:
    before = sorted(company.rglob("*"))
    chosen(company, scales=[0.8])
    assert sorted(company.rglob("*")) == before


@given(st.floats(0.3, 1.5))
def test_finer_steps_come_within_an_eighth_of_the_grid_of_the_closest_scale(best: float) -> None:
    found = search(lambda scale: trial(scale, (scale - best) ** 2), closeness.SCALES, 0.8)
    assert [t.scale for t in found] == sorted({t.scale for t in found})
    assert abs(best_of(found, 0.8).scale - best) <= 0.025 + 1e-9


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(-1, 2)), min_size=1), st.floats(0, 1))
def test_what_keeps_too_little_is_chosen_only_where_nothing_keeps_enough(
    measured: list[tuple[float, float]], keep: float
) -> None:
    trials = [trial(scale, *found) for scale, found in enumerate(measured)]
    best = best_of(trials, keep)
    rivals = [t for t in trials if t.kept >= keep] or trials
    assert best in rivals
    assert best.divergence == min(t.divergence for t in rivals)


def choice_of(*trials: ScaleTrial, scale: float) -> ScaleChoice:
    return ScaleChoice(
        scale=scale, keep=0.8, trials=trials, bits_per_byte={}, num_answers=1, num_tokens=9
    )


def test_the_reason_is_said_in_a_sentence() -> None:
    three = (trial(0.5, 0.9, 1.1), trial(1.0, 0.25, 0.875), trial(1.5, 0.2, 0.3))
    assert choice_of(*three, scale=1.0).why == (
        "scale 1 stays closest to the instruct model's answers (0.250 nats a token, and keeps 88% "
        "of what continued pre-training gained) of the scales that keep at least 80%"
    )
    poor = (trial(0.5, 0.9, 0.4), trial(1.0, 0.25, 0.3))
    assert choice_of(*poor, scale=1.0).why == (
        "no scale keeps 80% of what continued pre-training gained; scale 1 stays closest to the "
        "instruct model's answers (0.250 nats a token, and keeps 30% of what continued "
        "pre-training gained); it is the last one tried on its side"
    )


def test_a_target_that_reads_the_text_no_better_than_the_base_is_refused(company: Path) -> None:
    with pytest.raises(EvaluationError, match=r"expected held-out text that it reads better than"):
        chosen(company, target=company / "base")


@pytest.mark.parametrize(("role", "wrong"), [("base", "newer"), ("instruct", "base")])
def test_other_parents_are_refused_by_hash(company: Path, role: str, wrong: str) -> None:
    with pytest.raises(ResidualError, match=rf"{wrong}: expected the {role} model blake3:\w+ that"):
        chosen(company, **{role: company / wrong})


@pytest.mark.parametrize("scales", [[], [1.0, math.nan], [math.inf]])
def test_scales_must_be_finite(company: Path, scales: list[float]) -> None:
    with pytest.raises(EvaluationError, match="expected finite scales to try, found"):
        chosen(company, scales=scales)


def test_a_broken_model_is_not_close(taught: Taught) -> None:
    answers = listen(
        taught.model, taught.tokenizer, asked(taught.tokenizer), max_new_tokens=NUM_NEW
    )
    broken = tiny_model(hidden_size=64)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="scale 3: expected a finite divergence"):
        divergence(broken, answers, label="scale 3")


def test_the_prompts_that_ship_are_a_few_dozen_different_plain_requests() -> None:
    prompts = load_prompts(PROMPTS)
    assert 24 <= len(prompts) == len(set(prompts)) <= 60
    assert all(prompt.isascii() and len(prompt) < 120 for prompt in prompts)


def test_prompts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="expected a text file in UTF-8 with a prompt a line"):
        load_prompts(tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(EvaluationError, match="expected a text file in UTF-8 with a prompt a line"):
        load_prompts(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(EvaluationError, match="expected a prompt a line, found none"):
        load_prompts(tmp_path / "empty.txt")
