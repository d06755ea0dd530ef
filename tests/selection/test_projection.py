"""Like examples of two clients get like points where one map serves all, and only there."""

import logging
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgraft.errors import NonFiniteError, SelectionError
from fedgraft.selection.features import Features
from fedgraft.selection.projection import (
    ALIGNED,
    Batch,
    Name,
    Points,
    Projection,
    project,
    shared_map,
)

LAYERS, HIDDEN = 3, 8
OWN = [Projection(name=name, num_dimensions=2) for name in ("pca", "kernel_pca", "tsne")]
SHARED = [
    Projection(name=name, num_dimensions=4, scaling=scaling)
    for name in sorted(ALIGNED)
    for scaling in ("none", "unit", "standard")
]
named = pytest.mark.parametrize("projection", SHARED, ids=lambda p: f"{p.name}-{p.scaling}")


def drawn(count: int, seed: int = 0) -> Features:
    """Examples whose layers differ in size, as a model's do."""
    rng = np.random.default_rng(seed)
    sizes = np.array([1.0, 5.0, 40.0])[:, None]
    features: Features = rng.standard_normal((count, LAYERS, HIDDEN)) * sizes + 1
    return features.astype(np.float32)


def made(projection: Projection, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    anchors = drawn(12, seed=99)
    return shared_map(projection, num_layers=LAYERS, hidden=HIDDEN, seed=seed, anchors=anchors)


def batches(features: Features, seed: int = 0) -> Iterator[Batch]:
    """The features in batches of several sizes, in any order."""
    places = np.random.default_rng(seed).permutation(len(features))
    for place in np.array_split(places, 4):
        yield place, features[place]


@named
def test_an_aligned_point_depends_on_its_own_example_alone(projection: Projection) -> None:
    features, shared = drawn(40), made(projection)
    points = project(features, projection, shared=shared)
    assert points.shape == (40, 4)
    assert points.dtype == np.float32
    alone = np.concatenate([project(features[[i]], projection, shared=shared) for i in range(40)])
    np.testing.assert_allclose(points, alone, rtol=1e-6, atol=1e-6)
    others = drawn(40, seed=1)
    others[7] = features[3]  # another client's example that is equal
    np.testing.assert_allclose(
        project(others, projection, shared=shared)[7], points[3], rtol=1e-6, atol=1e-6
    )


@named
def test_batches_in_any_order_are_the_whole(projection: Projection) -> None:
    features, shared = drawn(600), made(projection)
    whole = project(features, projection, shared=shared)
    np.testing.assert_allclose(
        project(batches(features), projection, shared=shared), whole, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("projection", OWN, ids=lambda p: p.name)
def test_a_fit_does_not_know_the_order_of_examples(projection: Projection) -> None:
    features = drawn(30)
    order = np.random.default_rng(1).permutation(30)
    points = project(features, projection)
    assert points.shape == (30, 2)
    assert np.ptp(points, axis=0).min() > 0
    assert (project(features[order], projection) == points[order]).all()
    assert (project(batches(features), projection) == points).all()


def test_two_clients_own_fits_share_no_space_and_an_aligned_map_is_one() -> None:
    """The fault of the paper's idea: the same example, seen by two clients, lands elsewhere."""
    both = drawn(1)
    one = np.concatenate([both, drawn(29, seed=1)])
    other = np.concatenate([both, drawn(29, seed=2)])
    paper = Projection(name="tsne", num_dimensions=2, scaling="none")
    apart = np.linalg.norm(project(one, paper)[0] - project(other, paper)[0])
    assert apart > 1.0
    aligned = Projection(num_dimensions=2)
    shared = made(aligned)
    points = [project(features, aligned, shared=shared)[0] for features in (one, other)]
    np.testing.assert_allclose(points[0], points[1], rtol=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), scaling=st.sampled_from(["none", "unit"]))
def test_random_keeps_distances(seed: int, scaling: str) -> None:
    """All 45 distances of ten examples within a quarter at 512 dimensions: 8 deviations."""
    projection = Projection.model_validate({"num_dimensions": 512, "scaling": scaling})
    features = drawn(10, seed=3)
    points = project(features, projection, shared=made(projection, seed))
    rows = features.astype(np.float64)
    if scaling == "unit":
        rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    before, after = distances(rows.reshape(10, -1)), distances(points)
    np.testing.assert_allclose(after, before, rtol=0.25)


def test_random_keeps_squared_distances_in_the_mean() -> None:
    projection = Projection(num_dimensions=16, scaling="none")
    features = drawn(2, seed=4)
    before = distances(features.reshape(2, -1))[0] ** 2
    after = [
        distances(project(features, projection, shared=made(projection, seed)))[0] ** 2
        for seed in range(400)
    ]
    error = np.sqrt(2 / 16 / 400)
    assert abs(np.mean(after) / before - 1) < 4 * error


def distances(points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Of all pairs."""
    rows = points.astype(np.float64)
    first, second = np.triu_indices(len(rows), 1)
    found: NDArray[np.float64] = np.linalg.norm(rows[first] - rows[second], axis=1)
    return found


def test_the_seed_alone_makes_the_random_map() -> None:
    projection = Projection(num_dimensions=4)
    maps = [
        shared_map(projection, num_layers=LAYERS, hidden=HIDDEN, seed=seed, anchors=anchors)
        for seed, anchors in ((1, None), (1, drawn(5)), (2, None))
    ]
    assert set(maps[0]) == {"weight"}
    assert maps[0]["weight"].shape == (LAYERS, HIDDEN, 4)
    assert (maps[0]["weight"] == maps[1]["weight"]).all()
    assert not np.isclose(maps[0]["weight"], maps[2]["weight"]).any()
    layers = maps[0]["weight"].reshape(LAYERS, -1)
    assert np.abs(np.corrcoef(layers) - np.eye(LAYERS)).max() < 0.6  # each layer draws its own


@named
def test_a_map_is_float32_and_made_alike_twice(projection: Projection) -> None:
    one, other = made(projection), made(projection)
    assert all(tensor.dtype == np.float32 for tensor in one.values())
    assert {name: t.tobytes() for name, t in one.items()} == {
        name: t.tobytes() for name, t in other.items()
    }


def test_a_random_map_of_a_real_size_needs_little_more_memory_than_itself() -> None:
    """As wide as Qwen2-0.5B's features, 25 x 896; a whole map in float64 would be twice as much."""
    shared_map(Projection(), num_layers=1, hidden=8, seed=0)  # what numpy loads at the first call
    tracemalloc.start()
    shared = shared_map(Projection(), num_layers=25, hidden=896, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * shared["weight"].nbytes


def test_batches_pass_by_without_being_kept() -> None:
    shared = shared_map(Projection(), num_layers=4, hidden=256, seed=0)
    size = 64 * 4 * 256 * 4

    def stream() -> Iterator[Batch]:
        for number in range(40):
            rng = np.random.default_rng(number)
            features = rng.standard_normal((64, 4, 256), dtype=np.float32)
            yield np.arange(64) + 64 * number, features

    tracemalloc.start()
    points = project(stream(), Projection(), shared=shared)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert points.shape == (2560, 16)
    assert peak < 6 * size  # 40 batches came


def test_features_in_a_file_are_read_in_place(tmp_path: Path) -> None:
    features = drawn(300)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    shared = made(Projection())
    one = project(mapped, Projection(), shared=shared)
    assert (one == project(features, Projection(), shared=shared)).all()


def aligned_to(points: Points, to: Points) -> Points:
    """Columns turned so that each points the way of the other's."""
    turned: Points = points * np.sign((points * to).sum(axis=0))
    return turned


def test_a_linear_kernel_is_pca_and_rbf_is_not() -> None:
    """Released as kernel PCA, with the kernel left at linear."""
    features = drawn(25)

    def settled(name: Name, kernel: str = "rbf") -> Projection:
        given = {"name": name, "kernel": kernel, "num_dimensions": 3, "scaling": "none"}
        return Projection.model_validate(given)

    pca = project(features, settled("pca"))
    linear = project(features, settled("kernel_pca", "linear"))
    np.testing.assert_allclose(aligned_to(linear, pca), pca, rtol=1e-4, atol=1e-3)
    rbf = project(features, settled("kernel_pca"))
    scaled = rbf * np.linalg.norm(pca) / np.linalg.norm(rbf)
    assert np.abs(aligned_to(scaled, pca) - pca).max() > 0.2 * np.abs(pca).max()


def test_rbf_kernel_pca_is_sklearns_with_the_median_heuristic() -> None:
    from sklearn.decomposition import KernelPCA

    features = drawn(25)
    rows = features.reshape(25, -1)
    gamma = 1 / np.median(distances(rows) ** 2)
    expected = KernelPCA(n_components=3, kernel="rbf", gamma=gamma).fit_transform(rows)
    for chosen in (None, float(gamma)):
        settled = Projection(name="kernel_pca", num_dimensions=3, scaling="none", gamma=chosen)
        points = project(features, settled)
        np.testing.assert_allclose(aligned_to(points, expected), expected, rtol=1e-3, atol=1e-4)


def test_anchors_are_the_principal_components_of_the_anchors() -> None:
    from sklearn.decomposition import PCA

    anchors, features = drawn(20, seed=5), drawn(30, seed=6)
    projection = Projection(name="anchors", num_dimensions=4, scaling="none")
    shared = shared_map(projection, num_layers=LAYERS, hidden=HIDDEN, seed=0, anchors=anchors)
    expected = PCA(4).fit(anchors.reshape(20, -1)).transform(features.reshape(30, -1))
    points = project(features, projection, shared=shared)
    np.testing.assert_allclose(aligned_to(points, expected), expected, rtol=1e-3, atol=1e-3)


def test_inner_products_of_nystroem_points_are_the_kernel_where_all_anchors_serve() -> None:
    """Exactly so between anchors; between others as sklearn's Nystroem on the same landmarks."""
    from sklearn.kernel_approximation import Nystroem
    from sklearn.metrics.pairwise import rbf_kernel

    anchors, features = drawn(12, seed=5), drawn(30, seed=6)
    gamma = 1e-4
    settled = Projection(name="nystroem", num_dimensions=12, scaling="none", gamma=gamma)
    shared = shared_map(settled, num_layers=LAYERS, hidden=HIDDEN, seed=0, anchors=anchors)
    points = project(anchors, settled, shared=shared).astype(np.float64)
    rows = anchors.reshape(12, -1).astype(np.float64)
    np.testing.assert_allclose(points @ points.T, rbf_kernel(rows, gamma=gamma), atol=1e-3)
    theirs = Nystroem(gamma=gamma, n_components=12, random_state=0).fit(rows)
    expected = theirs.transform(features.reshape(30, -1).astype(np.float64))
    found = project(features, settled, shared=shared).astype(np.float64)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-3)


def test_directions_that_the_anchors_do_not_span_are_left_at_zero() -> None:
    anchors = np.repeat(drawn(2, seed=5), 6, axis=0)
    projection = Projection(name="nystroem", num_dimensions=4)
    shared = shared_map(projection, num_layers=LAYERS, hidden=HIDDEN, seed=0, anchors=anchors)
    points = project(drawn(9), projection, shared=shared)
    assert np.isfinite(points).all()
    assert (points[:, 2:] == 0).all()
    assert (points[:, :2] != 0).all()


def test_unit_scaling_forgets_how_long_a_layer_is_and_leaves_zero_at_zero() -> None:
    projection = Projection(num_dimensions=4)
    shared, features = made(projection), drawn(10)
    longer = features * np.array([3.0, 0.5, 100.0], np.float32)[:, None]
    points = project(features, projection, shared=shared)
    np.testing.assert_allclose(project(longer, projection, shared=shared), points, atol=1e-5)
    features[4] = 0
    assert (project(features, projection, shared=shared)[4] == 0).all()


@pytest.mark.parametrize("name", ["pca", "random", "anchors", "nystroem"])
def test_standard_scaling_forgets_units_and_what_does_not_vary(name: Name) -> None:
    projection = Projection(name=name, num_dimensions=3, scaling="standard")
    rng = np.random.default_rng(7)
    units = rng.uniform(0.5, 20, (LAYERS, HIDDEN)).astype(np.float32)
    offset = rng.uniform(-5, 5, (LAYERS, HIDDEN)).astype(np.float32)

    def points(change: bool) -> Points:
        anchors, features = drawn(12, seed=8), drawn(20, seed=9)
        anchors[:, 1, 3] = 4.0
        if name == "pca":
            features[:, 1, 3] = 4.0  # its own examples are the measure
        if change:
            anchors, features = anchors * units + offset, features * units + offset
        shared = shared_map(projection, num_layers=LAYERS, hidden=HIDDEN, seed=0, anchors=anchors)
        return project(features, projection, shared=shared)

    one = points(change=False)
    np.testing.assert_allclose(aligned_to(points(change=True), one), one, rtol=1e-3, atol=1e-3)
    if name == "random":
        shared = made(projection)
        shared["deviation"][1, 3] = 0
        features = drawn(5)
        before = project(features, projection, shared=shared)
        features[:, 1, 3] += 1000
        assert (project(features, projection, shared=shared) == before).all()


def test_our_perplexity_is_what_opentsne_makes_of_the_papers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """min(30, n - 1) ends as (n - 1) / 3, which openTSNE logs; ours asks for that at once."""
    from openTSNE import TSNE

    with caplog.at_level(logging.WARNING):
        project(drawn(20), Projection(name="tsne", num_dimensions=2, scaling="none"))
        assert not caplog.records

    def fitted(perplexity: float) -> NDArray[np.float64]:
        fit = TSNE(perplexity=perplexity, neighbors="exact", n_jobs=1, random_state=0)
        return np.asarray(fit.fit(drawn(20).reshape(20, -1).astype(np.float64)))

    assert (fitted(min(30, 19)) == fitted(min(30, 19 / 3))).all()
    assert "Using perplexity 6.33" in caplog.text


@pytest.mark.parametrize("name", ["tsne", "pca", "kernel_pca"])
@pytest.mark.parametrize("scaling", ["none", "unit", "standard"])
def test_examples_that_nothing_tells_apart_are_points_at_zero(name: Name, scaling: str) -> None:
    given = {"name": name, "num_dimensions": 2, "scaling": scaling}
    projection = Projection.model_validate(given)
    for count in (0, 1):
        assert (project(drawn(count), projection) == np.zeros((count, 2))).all()
    equal = np.repeat(drawn(1), 9, axis=0)
    assert (project(equal, projection) == np.zeros((9, 2))).all()
    for count in (2, 3):
        points = project(drawn(count), projection)
        assert (points == 0).all() == (name == "tsne")
        assert np.isfinite(points).all()
    for count in (4, 5, 7):
        assert np.isfinite(project(drawn(count), projection)).all()
    several = np.concatenate([equal, drawn(3, seed=1)])
    assert np.isfinite(project(several, projection)).all()


def test_examples_that_differ_in_length_alone_are_equal_at_length_one() -> None:
    lengths = np.array([1.0, 2.0, 4.0, 8.0, 16.0], np.float32)[:, None, None]
    projection = Projection(name="tsne", num_dimensions=2)
    assert (project(drawn(1) * lengths, projection) == 0).all()


def test_dimensions_that_a_fit_does_not_have_are_zero() -> None:
    points = project(drawn(4), Projection(name="pca", num_dimensions=16))
    assert points.shape == (4, 16)
    assert (points[:, 3:] == 0).all()
    assert np.ptp(points[:, :3], axis=0).min() > 0


@named
def test_an_aligned_projection_of_no_examples_is_no_points(projection: Projection) -> None:
    shared = made(projection)
    assert project(drawn(0), projection, shared=shared).shape == (0, 4)
    assert project(iter(()), projection, shared=shared).shape == (0, 4)


def test_own_projections_share_nothing() -> None:
    for name in set(get_args(Name)) - ALIGNED:
        projection = Projection(name=name, num_dimensions=2)
        assert shared_map(projection, num_layers=2, hidden=4, seed=0) == {}


@pytest.mark.parametrize("name", ["pca", "random"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused_by_example(name: Name, bad: float) -> None:
    projection = Projection(name=name, num_dimensions=2)
    shared = made(projection)
    features = drawn(300)
    features[277, 1, 2] = bad
    for form in (features, batches(features)):
        with pytest.raises(
            NonFiniteError,
            match=r"example 277: expected finite features, found NaN or Inf in layer 1 .* leave",
        ):
            project(form, projection, shared=shared)


def test_anchors_that_are_no_numbers_are_refused() -> None:
    anchors = drawn(20)
    anchors[3, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="example 3: expected finite features"):
        shared_map(
            Projection(name="anchors"), num_layers=LAYERS, hidden=HIDDEN, seed=0, anchors=anchors
        )


@pytest.mark.parametrize(
    ("projection", "count", "words"),
    [
        (Projection(name="anchors"), 16, "expected features of at least 17 anchor texts"),
        (Projection(name="nystroem"), 15, "expected features of at least 16 anchor texts"),
        (Projection(scaling="standard"), 1, "at least 2 anchor texts for 'random' in 16 dim"),
        (Projection(scaling="standard"), None, "'standard' scaling, found 0; give the server"),
    ],
)
def test_a_map_without_enough_anchors_is_refused(
    projection: Projection, count: int | None, words: str
) -> None:
    anchors = None if count is None else drawn(count)
    with pytest.raises(SelectionError, match=words):
        shared_map(projection, num_layers=LAYERS, hidden=HIDDEN, seed=0, anchors=anchors)
    assert projection.needs_anchors
    assert not Projection().needs_anchors


def test_features_and_maps_of_other_sizes_are_refused() -> None:
    projection = Projection(num_dimensions=4)
    shared = made(projection)
    wider = np.zeros((5, LAYERS, HIDDEN + 1), np.float32)
    with pytest.raises(
        SelectionError, match=r"expected features \[examples, 3, 8\], found \[5, 3, 9\]; take the"
    ):
        project(wider, projection, shared=shared)
    with pytest.raises(SelectionError, match=r"\[examples, layers, hidden\], found \[5, 24\]"):
        project(drawn(5).reshape(5, -1), Projection(name="pca"))
    with pytest.raises(SelectionError, match=r"\[examples, 3, 8\], found \[5, 3, 9\]"):
        project(iter([(np.arange(5), drawn(5)), (np.arange(5, 10), wider)]), Projection(name="pca"))
    with pytest.raises(SelectionError, match=r"\[examples, 3, 8\], found \[5, 3, 9\]"):
        shared_map(
            Projection(name="anchors", num_dimensions=2),
            num_layers=LAYERS,
            hidden=HIDDEN,
            seed=0,
            anchors=wider,
        )
    with pytest.raises(
        SelectionError,
        match=r"tensor 'weight' as float32 \[3, 8, 5\] for 5 dimensions, found float32 \[3, 8, 4\]",
    ):
        project(drawn(5), Projection(num_dimensions=5), shared=shared)
    with pytest.raises(SelectionError, match="found float64"):
        project(drawn(5), projection, shared={"weight": shared["weight"].astype(np.float64)})
    with pytest.raises(SelectionError, match=r"'weight' as float32 .* found float32 \[3\]"):
        project(drawn(5), projection, shared={"weight": np.zeros(3, np.float32)})
    with pytest.raises(
        SelectionError,
        match="map of the tensors centre, weight for the projection 'anchors' with 'unit' scaling, "
        "found weight; make it",
    ):
        project(drawn(5), Projection(name="anchors", num_dimensions=4), shared=shared)
    with pytest.raises(SelectionError, match="found none; make it with `shared_map` and give eve"):
        project(drawn(5), projection)
    with pytest.raises(NonFiniteError, match="finite numbers in the map's tensor 'weight'"):
        project(drawn(5), projection, shared={"weight": shared["weight"] * np.float32(np.nan)})


@pytest.mark.parametrize("name", ["pca", "random"])
@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([0, 1, 1], "found 3 numbers, 2 of them different, the largest 1"),
        ([0, 1, 3], "expected each of 3 examples once in the batches, .* the largest 3; give"),
        ([0, 1], "found 2 numbers"),
    ],
)
def test_examples_that_come_twice_or_not_at_all_are_refused(
    name: Name, places: list[int], words: str
) -> None:
    projection = Projection(name=name, num_dimensions=2)
    with pytest.raises(SelectionError, match=words):
        project(iter([(np.array(places), drawn(3))]), projection, shared=made(projection))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_dimensions": 0}, "expected num_dimensions of a projection from 1 on, found 0"),
        ({"perplexity": 0.5}, "expected perplexity of a projection from 1 on, found 0.5; raise it"),
        ({"perplexity": float("nan")}, "expected perplexity .* found nan"),
        ({"num_neighbours": 0}, "expected num_neighbours"),
        ({"gamma": 0.0}, "expected a gamma above 0, found 0.0; leave it out"),
        ({"name": "tsne"}, "t-SNE in 1 or 2 dimensions, .* num_dimensions: 16; say 2, or name"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        Projection.model_validate(given)


def test_umap_that_is_not_installed_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(SelectionError, match=r"pip install 'fedgraft\[umap\]'"):
        project(drawn(10), Projection(name="umap", num_dimensions=2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # umap's own, on what it does without threads
def test_umap_fits_few_examples_and_many_in_any_order() -> None:
    pytest.importorskip("umap")
    for count, d in ((0, 2), (3, 2), (4, 2), (5, 16), (19, 16), (60, 16)):
        projection = Projection(name="umap", num_dimensions=d)
        features = drawn(count)
        points = project(features, projection)
        assert points.shape == (count, d)
        assert np.isfinite(points).all()
        assert points.any() == (count > 3)
        order = np.random.default_rng(1).permutation(count)
        assert (project(features[order], projection) == points[order]).all()
    assert (project(np.repeat(drawn(1), 9, axis=0), projection) == 0).all()
