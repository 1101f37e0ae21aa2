"""Residual k-means."""

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from learner.kmeans import refine
from learner.semantic_ids import Codebooks, fit


def blobs(items: int, width: int, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(20, width))
    return topics[rng.integers(20, size=items)] + 0.5 * rng.normal(size=(items, width))


def reconstruction(books: Codebooks, sids: NDArray[np.int64], levels: int) -> NDArray[np.float64]:
    points = np.zeros((len(sids), books.width))
    for level in range(levels):
        points += books.centroids[level][sids[:, level]]
    return points


def test_each_level_explains_part_of_what_the_levels_before_left() -> None:
    points = blobs(1000, 16)
    books = fit(points, 16, seed=1)
    sids = books.assign(points)
    errors = [
        float(((points - reconstruction(books, sids, levels)) ** 2).sum()) for levels in (1, 2, 3)
    ]
    total = float(((points - points.mean(0)) ** 2).sum())
    assert errors[0] < 0.6 * total
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("items", "codes", "error"),
    [(3000, 32, (0.19459, 0.13555, 0.09379)), (4000, 256, (0.14239, 0.06924, 0.03346))],
)
def test_small_catalogues_are_reconstructed_as_well_as_by_whole_iterations(
    items: int, codes: int, error: tuple[float, float, float]
) -> None:
    """The figures are of k-means++ and 25 iterations over all items in float64, seed 1."""
    points = blobs(items, 16)
    books = fit(points, codes, seed=1)
    sids = books.assign(points)
    deviation = float(((points - points.mean(0)) ** 2).sum())
    for levels, whole in enumerate(error, 1):
        left = float(((points - reconstruction(books, sids, levels)) ** 2).sum())
        assert left / deviation < 1.005 * whole


def test_the_decoded_is_the_sum_of_the_first_codes_centroids() -> None:
    books = fit(blobs(300, 8), 8, seed=1)
    sids = books.assign(blobs(20, 8))
    for levels in (1, 2, 3):
        assert np.array_equal(books.decode(sids, levels), reconstruction(books, sids, levels))


def test_a_catalogue_is_assigned_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    points = blobs(500, 8)
    books = fit(points, 16, seed=1)
    whole = books.assign(points)
    monkeypatch.setattr("learner.semantic_ids._PIECE", 33)
    assert np.array_equal(books.assign(points), whole)
    assert fit(points, 16, seed=1).digest() == books.digest()


def test_progress_is_told_level_by_level() -> None:
    told: list[tuple[str, int, int]] = []
    fit(blobs(300, 4), 8, seed=1, balanced=1.5, tell=lambda *one: told.append(one))
    assert [what for what, *_ in told if "balance" not in what] == ["level 1", "level 2", "level 3"]
    assert any(what == "level 2, balance" for what, *_ in told)
    assert all(0 < done <= in_all for _, done, in_all in told)


def test_a_code_is_the_nearest_centroid_of_the_residual() -> None:
    points = blobs(300, 8)
    books = fit(points, 8, seed=1)
    sids = books.assign(points)
    residual = points.copy()
    for level in range(3):
        table = books.centroids[level].astype(float)
        for row in range(len(points)):
            assert sids[row, level] == ((residual[row] - table) ** 2).sum(1).argmin()
        residual -= table[sids[:, level]]


def test_every_code_of_every_level_is_used() -> None:
    sids = fit(blobs(500, 8), 32, seed=1).assign(blobs(500, 8))
    for level in range(3):
        assert len(np.unique(sids[:, level])) == 32


def test_idle_centroids_are_put_to_use_wherever_they_start() -> None:
    points = blobs(60, 4)
    far = np.full((16, 4), 1e6)  # equal and far away: all but one would stay idle for ever
    centroids = refine(points, far)
    nearest = ((points[:, None] - centroids) ** 2).sum(-1).argmin(1)
    assert len(np.unique(nearest)) == 16
    # Also where each point needs a centroid of its own.
    assert sorted(map(tuple, refine(points, np.full((60, 4), 1e6)))) == sorted(map(tuple, points))


def test_fewer_distinct_items_than_codes_are_told_apart_exactly() -> None:
    points = np.repeat(np.eye(5), 3, axis=0)
    books = fit(points, 32, seed=0)
    sids = books.assign(points)
    assert np.array_equal(reconstruction(books, sids, 3), points)
    assert len(np.unique(sids, axis=0)) == 5
    assert all(len(np.unique(sids[i : i + 3], axis=0)) == 1 for i in range(0, 15, 3))
    # Surplus centroids repeat the first one and never win over it.
    assert sids.max() < 5


def test_one_item_is_enough() -> None:
    sids = fit(np.ones((1, 4)), 4, seed=0).assign(np.ones((2, 4)))
    assert sids.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_fitting_twice_gives_the_same_digest_and_another_seed_another() -> None:
    points = blobs(500, 16)
    first = fit(points, 16, seed=7)
    assert first.digest() == fit(points, 16, seed=7).digest()
    assert first.digest() != fit(points, 16, seed=8).digest()
    assert len(first.digest()) == 32


def test_an_item_gets_the_same_id_alone_and_among_others() -> None:
    points = blobs(5000, 16).astype(np.float32)
    books = fit(points, 32, seed=1)
    together = books.assign(points)
    for row in range(0, 5000, 250):
        assert books.assign(points[row : row + 1]).tolist() == [together[row].tolist()]


def test_tensors_carry_the_codebooks_unchanged() -> None:
    books = fit(blobs(100, 4), 8, seed=1)
    tensors = books.to_tensors()
    again = Codebooks.from_tensors({**tensors, "something.else": np.zeros(1, np.float32)})
    assert again.digest() == books.digest()
    del tensors["codebook.1"]
    with pytest.raises(ValueError, match=r"no codebook\.1"):
        Codebooks.from_tensors(tensors)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (np.zeros((0, 4)), "no embeddings"),
        (np.zeros(4), "shape"),
        (np.array([[1.0, np.nan]]), "not finite"),
    ],
)
def test_unusable_embeddings_are_refused_by_name(points: NDArray[np.float64], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fit(points, 4, seed=0)


def test_embeddings_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="width 5, the codebooks read 4"):
        fit(blobs(50, 4), 4, seed=0).assign(np.zeros((1, 5)))


def test_no_items_get_no_ids() -> None:
    assert fit(blobs(50, 4), 4, seed=0).assign(np.zeros((0, 4))).shape == (0, 3)


def test_a_catalogue_is_tokenised_within_seconds() -> None:
    points = blobs(7583, 64)
    begin = time.process_time()
    fit(points, 32, seed=1).assign(points)
    assert time.process_time() - begin < 5.0
