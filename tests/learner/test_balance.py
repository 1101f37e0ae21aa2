"""Codes of bounded size."""

import numpy as np
import pytest
from numpy.typing import NDArray

from learner import kmeans
from learner.balance import balance
from learner.kmeans import cluster, distances
from learner.nearest import Nearest
from learner.semantic_ids import Codebooks, fit

Floats = NDArray[np.float64]


def uneven(points: int, width: int = 8, seed: int = 0) -> Floats:
    """A dense heart and a wide halo: k-means gives the heart large codes and the halo small ones."""
    rng = np.random.default_rng(seed)
    spread = np.where(rng.random(points) < 0.7, 0.3, 2.0)
    return spread[:, None] * rng.normal(size=(points, width))


@pytest.mark.parametrize("most", [1.1, 1.5, 2.0])
@pytest.mark.parametrize("sampled", [False, True])
def test_no_code_holds_more_than_the_bound(
    most: float, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampled:
        monkeypatch.setattr(kmeans, "EXHAUSTIVE", 0)
        monkeypatch.setattr(kmeans, "SAMPLE", 20)
    points = uneven(4000)
    rng = np.random.default_rng(1)
    table, code = cluster(points, 40, rng, lambda _: None)
    assert np.bincount(code).max() > 2.0 * 100, "nothing to bound"
    balanced = balance(points, table, most, rng, lambda _: None)
    size = np.bincount(balanced.code_N, minlength=40)
    assert size.max() <= most * 100
    assert size.min() > 0
    assert (balanced.penalty_K >= 0).all()
    # What is found alone is what was counted.
    alone = Nearest(balanced.table_KD, balanced.penalty_K).code(points)
    assert np.array_equal(alone, balanced.code_N)


def test_a_looser_bound_costs_less_reconstruction_and_none_costs_nothing() -> None:
    points = uneven(4000)
    table, code = cluster(points, 40, np.random.default_rng(1), lambda _: None)
    error = [distances(points, table, code).mean()]
    for most in (20.0, 2.0, 1.5, 1.1):
        rng = np.random.default_rng(2)
        balanced = balance(points, table, most, rng, lambda _: None)
        error.append(distances(points, balanced.table_KD, balanced.code_N).mean())
        assert (balanced.penalty_K > 0).any() == (most < 20.0)
    plain, *bounded = error
    assert bounded[0] <= plain
    assert bounded == sorted(bounded)
    assert bounded[2] < 1.35 * plain


def test_equal_items_count_once_and_do_not_make_the_auction_run_for_ever() -> None:
    points = uneven(2000)
    points[:700] = points[0]
    rng = np.random.default_rng(1)
    table, _ = cluster(points, 20, rng, lambda _: None)
    balanced = balance(points, table, 1.5, rng, lambda _: None)
    counted = kmeans.first_of_equal(points)
    size = np.bincount(balanced.code_N[counted], minlength=20)
    assert size.max() <= 1.5 * 1301 / 20
    assert np.bincount(balanced.code_N).max() >= 700


def test_balanced_codebooks_are_bounded_on_each_level_and_kept_whole() -> None:
    points = uneven(3000)
    books = fit(points, 30, seed=1, balanced=1.5)
    sids = books.assign(points)
    for level in range(3):
        assert np.bincount(sids[:, level], minlength=30).max() <= 150
    tensors = books.to_tensors()
    assert sorted(tensors) == [
        f"{name}.{level}" for name in ("codebook", "penalty") for level in range(3)
    ]
    again = Codebooks.from_tensors(tensors)
    assert again.digest() == books.digest()
    assert np.array_equal(again.assign(points), sids)
    # The penalties are part of what the digest names.
    assert books.digest() != Codebooks(books.centroids).digest()
    del tensors["penalty.2"]
    with pytest.raises(ValueError, match=r"no penalty\.2"):
        Codebooks.from_tensors(tensors)


def test_a_balanced_item_gets_the_same_id_alone_and_among_others() -> None:
    points = uneven(3000)
    books = fit(points, 30, seed=1, balanced=1.2)
    together = books.assign(points)
    for row in range(0, 3000, 300):
        assert books.assign(points[row : row + 1]).tolist() == [together[row].tolist()]


def test_fitting_balanced_twice_gives_the_same_digest() -> None:
    points = uneven(1000)
    assert (
        fit(points, 16, seed=3, balanced=1.5).digest()
        == fit(points, 16, seed=3, balanced=1.5).digest()
    )


def test_penalties_of_another_number_are_refused_by_name() -> None:
    tables = (np.zeros((4, 2), dtype=np.float32),) * 3
    with pytest.raises(ValueError, match="4 codes need 3 tables of as many penalties"):
        Codebooks(tables, (np.zeros(4, dtype=np.float32),) * 2)


def test_a_bound_below_the_mean_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not 0\.9 times"):
        fit(uneven(50), 4, seed=0, balanced=0.9)
