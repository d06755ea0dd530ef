"""An inspection says of streamed tensors what arithmetic in memory says of whole ones."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.weights.checkpoints import TOKENS, Tensors, nudged, random_tensors, save

from fedgraft.errors import NonFiniteError, ResidualError
from fedgraft.weights import inspection as inspection_module
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.inspection import (
    LIMIT,
    LIMIT_AGAINST,
    NEAR,
    NUM_RUNS,
    Figures,
    Inspection,
    forecast,
    inspect,
    module_of,
)
from fedgraft.weights.residual import Residual, extract

EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def minus(a: Tensors, b: Tensors) -> Tensors:
    return {name: a[name].astype(np.float32) - b[name].astype(np.float32) for name in a}


def plus(a: Tensors, b: Tensors, factor: float = 1.0) -> Tensors:
    return {name: (a[name] + np.float32(factor) * b[name]).astype(np.float32) for name in a}


def norm(tensors: Tensors, names: list[str]) -> float:
    return float(np.linalg.norm(np.concatenate([tensors[name].ravel() for name in names])))


class Case:
    """A base, an instruct model and a newer base on disk, and what is inspected of them."""

    def __init__(self, folder: Path, base: Tensors, instruct: Tensors, newer: Tensors) -> None:
        self.tensors = base, minus(instruct, base), minus(newer, base)
        self.base = save(folder / "base", base)
        self.instruct = save(folder / "instruct", instruct)
        self.newer = save(folder / "newer", newer)
        self.residual = extract(Family.open(self.base, self.instruct), folder / "residual")

    def inspect(self) -> Inspection:
        return inspect(self.residual, self.base, newer_base=self.newer)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    base = random_tensors(dtype="F32")
    return Case(tmp_path, base, nudged(base), nudged(base, seed=2, size=5e-3))


def expected(case: Case, names: list[str], block: int) -> dict[str, float]:
    """The figures by their definitions, in memory."""
    base, residual, change = case.tensors
    product = sum(float(np.vdot(residual[name], change[name])) for name in names)
    large = opposed = 0
    for name in names:
        width = int(np.prod(residual[name].shape[1:]))
        size = width * max(1, block // width)
        pairs = zip(
            *(
                np.split(t[name].ravel(), range(size, t[name].size, size))
                for t in (residual, change)
            ),
            strict=True,
        )
        for r, d in pairs:
            both = (abs(r) > np.sqrt(np.mean(r**2))) & (abs(d) > np.sqrt(np.mean(d**2)))
            large += int(both.sum())
            opposed += int((both & (np.sign(r) != np.sign(d))).sum())
    return {
        "relative_norm": norm(residual, names) / norm(base, names),
        "change": norm(change, names) / norm(base, names),
        "cosine": product / norm(residual, names) / norm(change, names),
        "sign_conflict": opposed / large,
    }


def found(figures: Figures) -> dict[str, float | None]:
    assert figures.change
    return {
        "relative_norm": figures.relative_norm,
        "change": figures.change.relative_norm,
        "cosine": figures.change.cosine,
        "sign_conflict": figures.change.sign_conflict,
    }


@pytest.mark.parametrize("block", [20, 100, 1 << 16])
def test_streamed_figures_equal_those_in_memory(
    case: Case, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection_module, "BLOCK_ELEMENTS", block)
    result, names = case.inspect(), list(case.tensors[0])
    parts = {
        "whole": (result.whole, names),
        "layer": (result.layers[1], [n for n in names if ".1." in n]),
        "kind": (result.kinds["mlp"], [n for n in names if "mlp" in n]),
        "cell": (result.cells["mlp.up_proj"][1], [UP]),
        **{tensor.name: (tensor.figures, [tensor.name]) for tensor in result.tensors},
    }
    for figures, ours in parts.values():
        wanted = expected(case, ours, block)
        assert found(figures) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert figures.num_elements == sum(case.tensors[0][name].size for name in ours)


def test_a_base_that_became_the_instruct_model_changed_as_the_residual_says(tmp_path: Path) -> None:
    base = random_tensors(dtype="F32")
    instruct = nudged(base)
    whole = Case(tmp_path, base, instruct, instruct).inspect().whole
    assert found(whole)["cosine"] == pytest.approx(1, abs=1e-5)
    assert found(whole)["sign_conflict"] == 0
    assert found(whole)["change"] == whole.relative_norm


def test_a_base_that_went_the_other_way_is_all_conflict(tmp_path: Path) -> None:
    base = random_tensors(dtype="F32")
    instruct = nudged(base)
    newer = plus(base, minus(instruct, base), -2.0)
    whole = Case(tmp_path, base, instruct, newer).inspect().whole
    assert found(whole)["cosine"] == pytest.approx(-1, abs=1e-5)
    assert found(whole)["sign_conflict"] == 1
    assert whole.relative_norm
    assert found(whole)["change"] == pytest.approx(2 * whole.relative_norm, rel=1e-4)


def test_a_base_that_did_not_move_has_no_direction(tmp_path: Path) -> None:
    base = random_tensors(dtype="F32")
    whole = Case(tmp_path, base, nudged(base), base).inspect().whole
    assert found(whole) == {
        "relative_norm": whole.relative_norm,
        "change": 0,
        "cosine": None,
        "sign_conflict": None,
    }


def test_without_a_newer_base_nothing_is_said_of_a_change(case: Case) -> None:
    alone, beside = inspect(case.residual, case.base), case.inspect()
    assert alone.whole == beside.whole.model_copy(update={"change": None})
    assert all(tensor.figures.change is None for tensor in alone.tensors)
    assert alone.inputs.keys() == {"base", "residual"}


def matrices() -> dict[str, NDArray[np.float64]]:
    """Spectra of every sort: flat, one direction, a few, a few among many, falling."""
    generator = np.random.default_rng(0)

    def noise(*shape: int) -> NDArray[np.float64]:
        return generator.normal(size=shape)

    return {
        "flat": np.linalg.qr(noise(300, 200))[0],
        "noise": noise(300, 200),
        "one": np.outer(noise(300), noise(200)),
        "five": noise(300, 5) @ noise(5, 200),
        "spiked": noise(300, 200) + np.outer(noise(300), noise(200)),
        "falling": noise(300, 200) / np.arange(1, 201),
        "one column": noise(300, 1) * (np.arange(200) == 7),
    }


@pytest.mark.parametrize("kind", matrices())
def test_rank_and_strength_are_those_of_the_singular_values(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection_module, "BLOCK_ELEMENTS", 12_345)
    residual = matrices()[kind]
    base = random_tensors(num_layers=1, dtype="F32") | {UP: matrices()["flat"].astype(np.float32)}
    family = Family.open(
        save(tmp_path / "base", base),
        save(tmp_path / "instruct", base | {UP: (base[UP] + residual).astype(np.float32)}),
    )
    result = inspect(extract(family, tmp_path / "residual"), family.base)
    figures = result.cells["mlp.up_proj"][1]
    values = np.linalg.svd(residual, compute_uv=False)
    rank = np.square(values).sum() ** 2 / (values**4).sum()
    assert figures.effective_rank == pytest.approx(rank, rel=0.15)
    assert figures.strength is not None
    assert 0.75 * values[0] < figures.strength < 1.001 * values[0]
    assert result.kinds["embedding"].effective_rank is None
    assert result.kinds["embedding"].strength == 0


def test_the_forecast_rests_on_the_mean_strength_in_the_layers(case: Case) -> None:
    result = case.inspect()
    strengths = [
        tensor.figures.change.strength
        for tensor in result.tensors
        if tensor.layer is not None and tensor.figures.change and tensor.figures.change.strength
    ]
    assert len(strengths) == 2
    against = [
        tensor.figures.change.strength / tensor.figures.strength
        for tensor in result.tensors
        if tensor.layer is not None and tensor.figures.change and tensor.figures.strength
        if tensor.figures.change.strength
    ]
    assert len(against) == 2
    told = result.forecast
    assert told == forecast(told.strength, told.against_residual)
    assert told.strength == pytest.approx(np.mean(strengths), rel=1e-5)
    assert told.against_residual == pytest.approx(np.mean(against), rel=1e-4)


@pytest.mark.parametrize(
    ("strength", "outcome", "words"),
    [
        (0.0, "holds", "by 0.0% of the base's own, on average: expect the graft to hold"),
        (0.9 * LIMIT * (1 - NEAR), "holds", "expect the graft to hold at scale 1"),
        (LIMIT, "doubtful", "it may go either way; evaluate"),
        (1.1 * LIMIT * (1 + NEAR), "breaks", "lose instructions; pre-train again with a lower"),
        (None, "open", "Name a newer base"),
    ],
)
def test_a_forecast_says_what_to_expect_and_why(
    strength: float | None, outcome: str, words: str
) -> None:
    told = forecast(strength)
    assert told.outcome == outcome
    assert words in told.words
    assert f"In {NUM_RUNS} runs of the pocket family" in told.words


@pytest.mark.parametrize(
    ("strength", "against", "outcome", "words"),
    [
        (0.09, 0.6, "holds", "9.0% of the base's own, 0.60 times as far as the residual moves it"),
        (0.09, 3.0, "doubtful", "this residual is weaker than the one that the rule was learned"),
        (0.2, 0.3, "doubtful", "this residual is stronger than the one that the rule was learned"),
        (0.09, LIMIT_AGAINST, "doubtful", "it may go either way; evaluate the graft before all"),
        (0.2, 1.5, "breaks", "expect the graft to lose instructions"),
    ],
)
def test_nothing_is_promised_of_a_residual_that_is_weaker_or_stronger_than_the_known_one(
    strength: float, against: float, outcome: str, words: str
) -> None:
    told = forecast(strength, against)
    assert told.outcome == outcome
    assert words in told.words


def test_rows_belong_together_by_token_in_whatever_order_they_lie(
    case: Case, tmp_path: Path
) -> None:
    order = np.random.default_rng(3).permutation(len(TOKENS))
    moved = {
        name: np.concatenate([numbers[order], numbers[len(TOKENS) :]])
        if name in (EMBEDDING, "lm_head.weight")
        else numbers
        for name, numbers in plus(case.tensors[0], case.tensors[2]).items()
    }
    newer = save(tmp_path / "moved", moved, tokens=tuple(TOKENS[i] for i in order))
    result = inspect(case.residual, case.base, newer_base=newer)
    assert found(result.whole) == pytest.approx(found(case.inspect().whole), rel=1e-5)


def test_where_the_base_is_zero_no_share_of_it_is_told(tmp_path: Path) -> None:
    base = random_tensors(dtype="F32")
    base[UP] = np.zeros_like(base[UP])
    moved = nudged(base)
    figures = Case(tmp_path, base, moved, moved).inspect().cells["mlp.up_proj"][1]
    assert figures.change
    assert (figures.relative_norm, figures.strength) == (None, None)
    assert (figures.change.relative_norm, figures.change.strength) == (None, None)
    assert figures.effective_rank is not None


def test_a_row_whose_token_one_side_lacks_is_left_out(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection_module, "BLOCK_ELEMENTS", 20)
    newer = plus(case.tensors[0], case.tensors[2])
    fewer = {
        name: numbers[:16] if name in (EMBEDDING, "lm_head.weight") else numbers
        for name, numbers in newer.items()
    }
    short = save(tmp_path / "short", fewer, tokens=TOKENS[:16])
    result = inspect(case.residual, case.base, newer_base=short)
    ours = {name: [t[name][:16] for t in case.tensors] for name in (EMBEDDING,)}
    base, residual, change = ({EMBEDDING: part} for part in ours[EMBEDDING])
    figures = next(t.figures for t in result.tensors if t.name == EMBEDDING)
    assert figures.relative_norm == pytest.approx(
        norm(residual, [EMBEDDING]) / norm(base, [EMBEDDING]), rel=1e-4
    )
    assert found(figures)["change"] == pytest.approx(
        norm(change, [EMBEDDING]) / norm(base, [EMBEDDING]), rel=1e-4
    )


def test_numbers_that_are_not_restored_are_those_of_the_record(tmp_path: Path) -> None:
    base = random_tensors(dtype="BF16")
    base[UP][0, 0] = 1e30
    instruct = nudged(base)
    instruct[UP][0, 0] = 1.0
    family = Family.open(save(tmp_path / "base", base), save(tmp_path / "instruct", instruct))
    residual = extract(family, tmp_path / "residual")
    result = inspect(residual, family.base)
    assert result.whole.num_not_restored == result.cells["mlp.up_proj"][1].num_not_restored == 1
    assert result.layers[0].num_not_restored == 0
    assert result.cells["mlp.up_proj"][1].effective_rank is None, "squares beyond float32"


def test_a_form_whose_record_counts_none_has_none(case: Case) -> None:
    record = case.residual.record
    figures = {name: v for name, v in record.figures.items() if name != "not_restored"}
    case.residual.record = record.model_copy(update={"figures": figures})
    assert case.inspect().whole.num_not_restored is None


def test_another_base_than_the_one_subtracted_is_refused_by_hash(case: Case) -> None:
    with pytest.raises(ResidualError, match=r"newer: expected the base .* found .*; name that one"):
        inspect(case.residual, case.newer)


def test_another_model_is_refused_by_the_first_difference(case: Case, tmp_path: Path) -> None:
    other = save(tmp_path / "other", random_tensors(num_layers=3, dtype="F32"))
    with pytest.raises(ResidualError, match=r"does not fit .*layers\.2.*is missing in the second"):
        inspect(case.residual, case.base, newer_base=other)


def test_a_graft_is_no_newer_base(case: Case, tmp_path: Path) -> None:
    grafted = graft(case.newer, case.residual, tmp_path / "grafted", any_parent=True)
    with pytest.raises(ResidualError, match=r"grafted: .* found a graft .* came before"):
        inspect(case.residual, case.base, newer_base=grafted)


def test_nan_in_a_newer_base_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    broken = plus(case.tensors[0], case.tensors[2])
    broken[UP][3, 4] = np.nan
    place = save(tmp_path / "broken", broken)
    with pytest.raises(NonFiniteError, match=rf"broken: .* found NaN or infinity in .*'{UP}'"):
        inspect(case.residual, case.base, newer_base=place)


def test_a_damaged_residual_is_refused(case: Case) -> None:
    file = case.residual.path / "residual.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ResidualError, match="damaged or changed"):
        inspect(Residual.open(case.residual.path), case.base)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("model.layers.3.self_attn.q_proj.bias", "self_attn.q_proj.bias"),
        ("model.layers.11.mlp.experts.5.up_proj.weight", "mlp.experts.up_proj"),
        ("h.0.mlp.c_fc.weight", "mlp.c_fc"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_module_is_named_the_same_in_all_layers(name: str, module: str) -> None:
    assert module_of(name) == module
