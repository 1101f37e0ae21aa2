"""What semantic IDs are worth."""

import numpy as np
import pytest

from learner.id_quality import quality, random_codebooks
from learner.semantic_ids import Codebooks, fit


def test_the_figures_of_ids_counted_by_hand() -> None:
    """Four items on a line, two codes: 0 and 10 at the first level, 0 and 1 after it."""
    tables = [np.array(values, dtype=np.float32)[:, None] for values in ([0, 10], [0, 1], [0, 1])]
    books = Codebooks((tables[0], tables[1], tables[2]))
    points = np.array([[0.0], [0.0], [11.0], [1.0]])
    sids = books.assign(points)
    assert sids.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]]
    found = quality(books, points, sids)
    first, second, third = found.levels
    assert (first.utilisation, second.utilisation, third.utilisation) == (1.0, 1.0, 0.5)
    assert first.entropy == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    assert second.entropy == pytest.approx(np.log(2))
    assert third.perplexity == 1.0
    assert (first.largest, second.largest, third.largest) == (1.5, 1.0, 2.0)
    # Of [0], [0], [11], [1]; then of 0, 0, 1, 1; then of 0 four times.
    assert first.largest_apart == pytest.approx(2 / 1.5)
    assert (second.largest_apart, third.largest_apart) == (1.0, 2.0)
    assert (first.gini, second.gini, third.gini) == (0.25, 0.0, 0.5)
    # The mean is 3, the squares of the deviations 9 + 9 + 64 + 4.
    assert first.reconstruction == pytest.approx(2 / 86)
    assert second.reconstruction == third.reconstruction == 0.0
    assert (found.distinct, found.sharing, found.largest_group) == (3, 0.5, 2)


def test_fitted_codebooks_are_better_than_ones_drawn_by_lot() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 12))[rng.integers(30, size=3000)]
    points += 0.4 * rng.normal(size=points.shape)
    of = [fit(points, 32, seed=1), random_codebooks(points, 32, seed=1)]
    fitted, random = (quality(books, points, books.assign(points)) for books in of)
    for ours, theirs in zip(fitted.levels, random.levels, strict=True):
        assert ours.utilisation == 1.0
        assert ours.reconstruction < 0.7 * theirs.reconstruction
        assert theirs.entropy < ours.entropy <= np.log(32)
    assert fitted.sharing < random.sharing


def test_centroids_drawn_by_lot_are_residuals_of_items() -> None:
    points = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    books = random_codebooks(points, 8, seed=1)
    rows = {tuple(row) for row in points.tolist()}
    assert all(tuple(row) in rows for row in books.centroids[0].tolist())
    nearest = np.array([np.abs(points - row).sum(axis=1).min() for row in books.centroids[1]])
    assert nearest.min() > 0.0, "the second level is made of items, not of residuals"
    assert books.digest() != random_codebooks(points, 8, seed=2).digest()


def test_items_that_are_all_equal_leave_nothing_to_explain() -> None:
    points = np.ones((5, 3))
    books = fit(points, 4, seed=0)
    found = quality(books, points, books.assign(points))
    assert [level.reconstruction for level in found.levels] == [0.0, 0.0, 0.0]
    assert (found.distinct, found.sharing, found.largest_group) == (1, 1.0, 5)


def test_without_items_there_is_nothing_to_measure() -> None:
    books = fit(np.ones((5, 3)), 4, seed=0)
    with pytest.raises(ValueError, match="no items"):
        quality(books, np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64))
