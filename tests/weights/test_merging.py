"""Methods against their papers' definitions, written out whole and in memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from tests.weights.checkpoints import nudged, random_tensors, save

from fedgraft.errors import ResidualError
from fedgraft.provenance import Record
from fedgraft.weights import merging
from fedgraft.weights.checkpoint import BLOCK_ELEMENTS, Array, Checkpoint, TensorInfo
from fedgraft.weights.family import Family, kind_of, layer_of
from fedgraft.weights.graft import graft
from fedgraft.weights.merging import PLAIN, Factors, LayerFactor, Method, combined
from fedgraft.weights.residual import extract

Floats = NDArray[np.float32]
NAME = "w"


class Held:
    """A residual of one tensor, in memory."""

    def __init__(self, numbers: Sequence[float] | Floats, block: int = 5, name: str = NAME) -> None:
        self.numbers = np.asarray(numbers, np.float32)
        self.block = block
        self.tensors = {
            name: TensorInfo(dtype="F32", shape=(self.numbers.size,), file=Path(), start=0)
        }

    def blocks(self, name: str, num_elements: int = BLOCK_ELEMENTS) -> Iterator[Array]:
        assert name in self.tensors
        for first in range(0, self.numbers.size, min(self.block, num_elements)):
            yield self.numbers[first : first + self.block].copy()


def merged(residuals: Sequence[Floats], scales: Sequence[float], method: Method) -> Floats:
    held = [Held(numbers) for numbers in residuals]
    return np.concatenate([block.copy() for block in combined(NAME, held, scales, method)])


def largest(numbers: Floats, first: int, last: int) -> Floats:
    """Keep what is in places first to last - 1, by magnitude."""
    order = np.argsort(-np.abs(numbers), kind="stable")[first:last]
    kept = np.zeros_like(numbers)
    kept[order] = numbers[order]
    return kept


def elected(residuals: Sequence[Floats], *, mean: bool) -> Floats:
    """TIES, algorithm 1: the sign of the sum, and the mean of those that have it."""
    stacked = np.stack(residuals)
    sign = np.where(stacked.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(stacked) == sign
    total = (stacked * agrees).sum(axis=0)
    divided: Floats = total / np.maximum(agrees.sum(axis=0), 1) if mean else total
    return divided


VECTORS = st.integers(1, 3).flatmap(
    lambda count: st.integers(1, 24).flatmap(
        lambda size: st.lists(
            st.lists(st.integers(-9, 9), min_size=size, max_size=size).map(
                lambda numbers: np.array(numbers, np.float32) / 8
            ),
            min_size=count,
            max_size=count,
        )
    )
)
SCALES = st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0])


@given(residuals=VECTORS, data=st.data())
def test_plain_is_the_sum_of_the_scaled(residuals: list[Floats], data: st.DataObject) -> None:
    scales = [data.draw(SCALES) for _ in residuals]
    expected = sum(np.float32(s) * r for s, r in zip(scales, residuals, strict=True))
    np.testing.assert_allclose(merged(residuals, scales, PLAIN), expected, rtol=1e-6)


@given(residuals=VECTORS, density=st.sampled_from([0.1, 0.5, 1.0]), data=st.data())
def test_ties_trims_elects_and_averages(
    residuals: list[Floats], density: float, data: st.DataObject
) -> None:
    scales = [data.draw(SCALES) for _ in residuals]
    trimmed = [
        np.float32(s) * largest(r, 0, max(1, int(density * r.size)))
        for s, r in zip(scales, residuals, strict=True)
    ]
    found = merged(residuals, scales, Method(name="ties", density=density))
    np.testing.assert_allclose(found, elected(trimmed, mean=True), rtol=1e-6)


@given(
    residuals=VECTORS, density=st.sampled_from([0.25, 0.5]), gamma=st.sampled_from([0, 0.1, 0.5])
)
def test_breadcrumbs_leaves_out_the_largest_and_the_smallest(
    residuals: list[Floats], density: float, gamma: float
) -> None:
    expected = np.zeros_like(residuals[0])
    for r in residuals:
        top = int(gamma * r.size)
        expected += largest(r, top, top + min(max(1, int(density * r.size)), r.size - top))
    method = Method(name="breadcrumbs", density=density, gamma=gamma)
    np.testing.assert_allclose(merged(residuals, [1.0] * len(residuals), method), expected)


@given(residuals=VECTORS, density=st.sampled_from([0.3, 0.5, 1.0]), seed=st.integers(0, 9))
def test_dare_drops_or_divides_by_the_density(
    residuals: list[Floats], density: float, seed: int
) -> None:
    method = Method(name="dare", density=density, seed=seed)
    chance = round(density * 2**16) / 2**16
    parts = [merged([r], [1.0], method) for r in residuals[:1]]
    for r, found in zip(residuals, parts, strict=False):
        kept = found != 0
        np.testing.assert_allclose(found[kept], r[kept] / np.float32(chance), rtol=1e-6)
    whole = merged(residuals, [1.0] * len(residuals), method)
    assert whole.tolist() == merged(residuals, [1.0] * len(residuals), method).tolist()
    voted = merged(
        residuals, [1.0] * len(residuals), method.model_copy(update={"name": "dare_ties"})
    )
    if len(residuals) == 1:
        assert voted.tolist() == whole.tolist()


def test_dare_keeps_the_share_and_the_mean_and_no_two_residuals_alike() -> None:
    ones = np.ones(100_000, np.float32)
    method = Method(name="dare", density=0.3, seed=7)
    first = merged([ones], [1.0], method)
    assert np.count_nonzero(first) / first.size == pytest.approx(0.3, abs=0.01)
    assert first.mean() == pytest.approx(1, abs=0.02)
    both = merged([ones, ones], [1.0, 1.0], method)
    alike = np.count_nonzero(both == 2 * both[both > 0].min()) / both.size
    assert alike == pytest.approx(0.09, abs=0.01)  # both kept, by chance alone
    reseeded = merged([ones], [1.0], method.model_copy(update={"seed": 8}))
    elsewhere = np.concatenate(
        [block.copy() for block in combined("v", [Held(ones, name="v")], [1.0], method)]
    )
    for other in (reseeded, elsewhere):
        assert np.mean((other != 0) == (first != 0)) == pytest.approx(0.58, abs=0.02)


def test_dare_keeps_few_where_few_are_asked_for() -> None:
    ones = Held(np.ones(1 << 22, np.float32), block=BLOCK_ELEMENTS)
    method = Method(name="dare", density=2**-16)
    num_kept = sum(np.count_nonzero(block) for block in combined(NAME, [ones], [1.0], method))
    assert 32 < num_kept < 96  # 64 on average


def test_dare_ties_sums_the_agreeing() -> None:
    residuals = [np.random.default_rng(n).normal(size=64).astype(np.float32) for n in range(3)]
    scales = [1.0, 0.5, -2.0]
    method = Method(name="dare_ties", density=0.5, seed=3)
    alone = [Held(r, block=64) for r in residuals]
    dropped = [
        np.float32(s) * next(iter(merging._kept(NAME, n, held, method))).copy()
        for n, (s, held) in enumerate(zip(scales, alone, strict=True))
    ]
    found = np.concatenate(
        [b.copy() for b in combined(NAME, [Held(r, block=64) for r in residuals], scales, method)]
    )
    np.testing.assert_allclose(found, elected(dropped, mean=False), rtol=1e-6)


@pytest.mark.parametrize("name", ["ties", "dare", "dare_ties", "breadcrumbs"])
def test_the_size_of_blocks_does_not_matter(name: merging.Name) -> None:
    residuals = [np.random.default_rng(n).normal(size=100).astype(np.float32) for n in range(2)]
    method = Method(name=name, density=0.4, seed=5)
    found = [
        np.concatenate(
            [
                b.copy()
                for b in combined(NAME, [Held(r, block) for r in residuals], [1.0, 0.5], method)
            ]
        ).tolist()
        for block in (8, 20, 100)
    ]
    assert found[0] == found[1] == found[2]


def test_one_residual_at_full_density_is_the_same_by_every_method() -> None:
    r = np.random.default_rng(0).normal(size=50).astype(np.float32)
    for name in ("ties", "dare", "dare_ties"):
        assert merged([r], [0.5], Method(name=name)).tolist() == (np.float32(0.5) * r).tolist()
    assert merged([r], [1.0], Method(name="breadcrumbs", gamma=0)).tolist() == r.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "expected a density above 0 and at most 1, found 0.0; it is the share"),
        ({"density": 2}, "expected a density above 0 and at most 1, found 2.0; it is the share"),
        ({"density": float("nan")}, "expected a density above 0 and at most 1, found nan"),
        ({"gamma": 1}, "expected a gamma of at least 0 and below 1, found 1.0; it is the share"),
        ({"gamma": -0.1}, "expected a gamma of at least 0 and below 1, found -0.1"),
        (
            {"name": "breadcrumbs", "density": 0.9, "gamma": 0.2},
            r"density \+ gamma of at most 1, found 0.9 \+ 0.2; .* Take a density of at most 0.8",
        ),
    ],
)
def test_impossible_parameters_are_refused_with_bound_and_remedy(
    settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ResidualError, match=message):
        Method(**settings)  # type: ignore[arg-type]


def test_a_method_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValidationError, match="'plain', 'ties', 'dare', 'dare_ties'"):
        Method(name="magic")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.embed_tokens.weight", "embedding", None),
        ("lm_head.weight", "output", None),
        ("model.norm.weight", "norm", None),
        ("model.layers.3.self_attn.q_proj.weight", "attention", 3),
        ("model.layers.3.self_attn.k_proj.bias", "attention", 3),
        ("model.layers.3.self_attn.q_norm.weight", "norm", 3),
        ("model.layers.12.mlp.down_proj.weight", "mlp", 12),
        ("model.layers.12.post_attention_layernorm.weight", "norm", 12),
        ("model.layers.0.block_sparse_moe.experts.2.w1.weight", "mlp", 0),
        ("transformer.h.7.attn.c_attn.weight", "attention", 7),
        ("rotary.inv_freq", "other", None),
    ],
)
def test_a_tensor_is_told_by_its_name(name: str, kind: str, layer: int | None) -> None:
    assert (kind_of(name), layer_of(name)) == (kind, layer)


def test_factors_multiply_by_kind_and_by_layer() -> None:
    spans = (LayerFactor(first=0, last=1, factor=0.5), LayerFactor(first=1, last=3, factor=4))
    factors = Factors(kinds={"mlp": 3, "embedding": 0}, layers=spans)
    assert factors.of("model.layers.0.mlp.up_proj.weight") == 1.5
    assert factors.of("model.layers.1.mlp.up_proj.weight") == 6
    assert factors.of("model.layers.1.self_attn.q_proj.weight") == 2
    assert factors.of("model.layers.4.self_attn.q_proj.weight") == 1
    assert factors.of("model.embed_tokens.weight") == 0


def test_factors_are_read_as_people_write_them() -> None:
    assert Factors.parse(["embedding=0", "0-5=0.5", "7=2"]) == Factors(
        kinds={"embedding": 0},
        layers=(LayerFactor(first=0, last=5, factor=0.5), LayerFactor(first=7, last=7, factor=2)),
    )
    for text in ("embedding", "bias=1", "1-x=2", "mlp=much", "mlp=nan", "-1=2"):
        with pytest.raises(ResidualError, match=f"found '{text}'; such as embedding=0 or 0-5=0.5"):
            Factors.parse([text])
    with pytest.raises(ResidualError, match=r"once for each of .* found 'mlp=2'"):
        Factors.parse(["mlp=1", "mlp=2"])


def test_a_factor_that_applies_to_nothing_is_refused(tmp_path: Path) -> None:
    base = random_tensors(tied=True)
    folders = [save(tmp_path / x, base, tie_word_embeddings=True) for x in ("base", "instruct")]
    family = Family.open(*folders)
    for text, message in (
        ("output=0", r"that the model has \(embedding, mlp, norm\), found output; an output layer"),
        ("2-9=0", "expected layers from 0 to 1, found 2 to 9; name the first and the last one"),
        ("1-0=0", "expected layers from 0 to 1, found 1 to 0"),
    ):
        with pytest.raises(ResidualError, match=message):
            graft(folders[0], family, tmp_path / "graft", factors=Factors.parse([text]))


def test_a_graft_takes_factors_and_methods(tmp_path: Path) -> None:
    base = random_tensors()
    family = Family.open(save(tmp_path / "base", base), save(tmp_path / "instruct", nudged(base)))
    residual = extract(family, tmp_path / "residual")
    factors = Factors(kinds={"embedding": 0, "mlp": 0.5})
    out = graft(tmp_path / "base", residual, tmp_path / "graft", scale=0.8, factors=factors)
    found = Checkpoint.open(out)
    for name, old in base.items():
        scale = np.float32(0.8 * factors.of(name))
        total = old.astype(np.float32) + scale * residual.read(name)
        assert found.read(name).tobytes() == total.astype(old.dtype).tobytes()
    record = Record.read(out)
    assert record
    assert record.settings == {
        "scale": 0.8,
        "factors": {"kinds": {"embedding": 0.0, "mlp": 0.5}, "layers": []},
    }
    method = Method(name="ties", density=0.25)
    sparse = Checkpoint.open(graft(tmp_path / "base", residual, tmp_path / "ties", method=method))
    for name, old in base.items():
        kept = largest(residual.read(name).reshape(-1), 0, int(0.25 * old.size))
        whole = old.astype(np.float32).reshape(-1) + kept
        assert sparse.read(name).tobytes() == whole.astype(old.dtype).tobytes()
