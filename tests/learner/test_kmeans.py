"""k-means of one level, over few points and over many."""

import numpy as np
import pytest
from numpy.typing import NDArray

from learner import kmeans
from learner.kmeans import cluster, distances, first_of_equal, means, planned
from learner.nearest import Nearest

Floats = NDArray[np.float64]


def blobs(points: int, width: int, topics: int, noise: float, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    topic = rng.normal(size=(topics, width))
    share = 1 / (np.arange(topics) + 3)
    drawn = rng.choice(topics, points, p=share / share.sum())
    return topic[drawn] + noise * rng.normal(size=(points, width))


def fitted(points: Floats, codes: int, seed: int = 1) -> tuple[NDArray[np.float32], Floats]:
    """Centroids, and each point's squared distance to its own."""
    table, code = cluster(points, codes, np.random.default_rng(seed), lambda _: None)
    assert np.array_equal(code, Nearest(table).code(points))
    return table, distances(points, table, code)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every input counts as large, with the fewest iterations."""
    monkeypatch.setattr(kmeans, "EXHAUSTIVE", 0)
    monkeypatch.setattr(kmeans, "FULL_ITERATIONS", (5, 5))


@pytest.mark.parametrize("noise", [0.1, 0.6])
def test_the_large_way_reconstructs_nearly_as_well_as_the_small_one(
    noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averaged over seeds, for either way's result is one of many local optima."""
    points = blobs(6000, 12, 300, noise)
    rng = np.random.default_rng(2)
    random = points[rng.choice(len(points), 64, replace=False)].astype(np.float32)
    drawn = distances(points, random, Nearest(random).code(points)).mean()
    small = np.mean([fitted(points, 64, seed)[1].mean() for seed in range(4)])
    monkeypatch.setattr(kmeans, "EXHAUSTIVE", 0)
    monkeypatch.setattr(kmeans, "FULL_ITERATIONS", (5, 5))
    large = np.mean([fitted(points, 64, seed)[1].mean() for seed in range(4)])
    assert large < 1.08 * small
    assert large < 0.8 * drawn, "it takes no fitting to be this good"


@pytest.mark.usefixtures("large")
def test_no_code_stays_idle_in_the_large_way() -> None:
    points = blobs(6000, 8, 5, 0.01)
    points[:3000] = points[0]  # half of the seeds' sample is one point
    table, _ = fitted(points, 128)
    code = Nearest(table).code(points)
    assert len(np.unique(code)) == 128


@pytest.mark.usefixtures("large")
def test_a_point_far_from_all_samples_still_gets_a_code_of_its_own() -> None:
    """It is repaired over all points: no sample need hold it."""
    points = np.repeat(blobs(50, 4, 5, 0.5), 100, axis=0)
    points = np.concatenate([points, [[50.0] * 4]])
    table, distance = fitted(points, 51)
    assert distance.max() < 1e-9
    assert len(np.unique(table, axis=0)) == 51


@pytest.mark.usefixtures("large")
def test_fewer_distinct_points_than_codes_are_found_exactly_in_the_large_way() -> None:
    points = np.repeat(np.eye(5), 30, axis=0)
    table, distance = fitted(points, 16)
    assert distance.max() == 0.0
    assert Nearest(table).code(points).max() < 5


@pytest.mark.usefixtures("large")
def test_the_large_way_is_the_same_under_a_seed_and_another_under_another() -> None:
    points = blobs(3000, 8, 20, 0.5)
    first = fitted(points, 32, seed=1)[0]
    assert np.array_equal(first, fitted(points, 32, seed=1)[0])
    assert not np.array_equal(first, fitted(points, 32, seed=2)[0])


@pytest.mark.usefixtures("large")
def test_the_large_way_does_not_depend_on_how_a_product_is_cut_into_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other pieces are other kernels and other roundings, as other threads would be."""
    points = blobs(3000, 8, 20, 0.5)
    first = fitted(points, 32)[0]
    monkeypatch.setattr("learner.nearest._PREPARED", 13)
    assert np.array_equal(first, fitted(points, 32)[0])


@pytest.mark.parametrize("points", [500, 8000])
def test_progress_comes_to_what_was_planned(points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "EXHAUSTIVE", 64 * 1000)
    told: list[int] = []
    cluster(blobs(points, 8, 20, 0.5), 64, np.random.default_rng(1), told.append)
    assert sum(told) == planned(points, 64)
    assert len(told) == (1 if points == 500 else 1 + 4 + 25 + 1)


def test_equal_points_are_counted_once() -> None:
    points = np.array([[1.0, 0.0], [1.0, -0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1e-300]])
    assert first_of_equal(points).tolist() == [True, False, True, False, True]
    many = blobs(20_000, 2, 20, 1.0).astype(np.float32).astype(np.float64)
    assert first_of_equal(many).sum() == len(np.unique(many, axis=0))


def test_a_mean_is_that_of_a_codes_points_and_an_idle_one_stays() -> None:
    points = np.array([[0.0, 2.0], [4.0, 0.0], [2.0, 4.0]])
    old = np.array([[9.0, 9.0], [8.0, 8.0], [7.0, 7.0]], dtype=np.float32)
    table, size = means(points, np.array([2, 0, 2]), old)
    assert table.tolist() == [[4.0, 0.0], [8.0, 8.0], [1.0, 3.0]]
    assert size.tolist() == [1, 0, 2]
