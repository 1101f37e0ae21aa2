import numpy as np
import pytest
from numpy.typing import NDArray

from ops.csvtable import Malformed
from ops.errors import UserError
from ops.feedlog import Videos, WatchHistory
from ops.item_vectors import cooccurrence, item_vectors, ppmi


def videos_of(tags: list[tuple[str, ...]]) -> Videos:
    return Videos(
        id=np.arange(100, 100 + len(tags)),
        duration_ms=np.zeros(len(tags), np.int64),
        author=[""] * len(tags),
        tags=tags,
        malformed=Malformed(),
    )


def history_of(lists: list[list[int]]) -> WatchHistory:
    plays = np.array([video for some in lists for video in some], np.int64)
    return WatchHistory(
        user=np.arange(len(lists)),
        start=np.cumsum([0, *map(len, lists)]),
        video=plays,
        like=np.zeros(len(plays), np.bool_),
        long=np.zeros(len(plays), np.bool_),
        malformed=Malformed(),
    )


def two_worlds(n: int = 120) -> tuple[WatchHistory, Videos]:
    """Users watch either even or odd videos; the last six videos nobody watches."""
    rng = np.random.default_rng(0)
    lists = [(100 + 2 * rng.integers(0, n // 2, 20) + user % 2).tolist() for user in range(200)]
    tags = [("even",) if v % 2 == 0 else ("odd",) for v in range(n)]
    rest: list[tuple[str, ...]] = [("even",), ("odd", "new"), ("even", "odd"), ("new",), (), ("",)]
    return history_of(lists), videos_of(tags + rest)


def dense(item: list[int], start: list[int], window: int) -> list[list[float]]:
    counts = cooccurrence(np.array(item), np.array(start), 3, window)
    rows: list[list[float]] = counts.toarray().tolist()
    return rows


def test_cooccurrence_is_symmetric_and_counts_pairs_within_the_window() -> None:
    assert dense([0, 1, 2], [0, 3], 1) == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert dense([0, 1, 2], [0, 3], 2) == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_cooccurrence_does_not_cross_lists_nor_pair_an_item_with_itself() -> None:
    assert dense([0, 1, 1, 2], [0, 2, 4], 3) == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert dense([0, 0], [0, 2], 1) == [[0] * 3] * 3


def test_an_unknown_item_keeps_its_place_in_the_list() -> None:
    assert dense([0, -1, 2], [0, 3], 1) == [[0] * 3] * 3
    assert dense([0, -1, 2], [0, 3], 2)[0] == [0, 0, 1]


def test_a_window_may_be_longer_than_all_lists() -> None:
    assert dense([0, 1], [0, 2], 5)[0] == [0, 1, 0]
    assert dense([], [0], 5) == [[0] * 3] * 3


def test_ppmi_is_the_positive_part_of_the_log_ratio() -> None:
    counts = cooccurrence(np.array([0, 1, 0, 1, 0, 2, 1, 2]), np.array([0, 2, 4, 6, 8]), 3, 1)
    table = counts.toarray()
    p = table / table.sum()
    with np.errstate(divide="ignore"):
        ratio = np.log(p / np.outer(p.sum(1), p.sum(0)))
    assert np.allclose(ppmi(counts).toarray(), np.maximum(ratio, 0))


def test_items_watched_together_lie_together() -> None:
    history, videos = two_worlds()
    _, x = item_vectors(history, videos, dimensions=8)
    even, odd = x[0:120:2], x[1:120:2]
    assert (even @ even.mean(0) > even @ odd.mean(0)).all()
    assert (odd @ odd.mean(0) > odd @ even.mean(0)).all()


def test_vectors_come_in_the_order_of_the_videos_as_float32() -> None:
    history, videos = two_worlds()
    ids, x = item_vectors(history, videos)
    assert ids.tolist() == videos.id.tolist()
    assert x.shape == (126, 64)
    assert x.dtype == np.dtype(np.float32)


def test_watched_items_have_length_one_about_a_centre_near_zero() -> None:
    history, videos = two_worlds()
    x: NDArray[np.float32] = item_vectors(history, videos, dimensions=16)[1][:120]
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    assert np.linalg.norm(x.mean(0)) < 0.2


def test_an_unwatched_item_takes_the_mean_of_its_tags() -> None:
    history, videos = two_worlds()
    _, x = item_vectors(history, videos, dimensions=8)
    even, odd = x[0:120:2].mean(0), x[1:120:2].mean(0)
    assert np.allclose(x[120], even, atol=1e-6)
    assert np.allclose(x[121], odd, atol=1e-6)  # "new" is on no watched item
    assert np.allclose(x[122], (even + odd) / 2, atol=1e-6)
    assert not x[123:].any()


def test_the_same_seed_gives_the_same_bits() -> None:
    history, videos = two_worlds()
    first, again = (item_vectors(history, videos, 16, seed=3)[1] for _ in range(2))
    assert first.tobytes() == again.tobytes()


def test_the_seed_hardly_matters() -> None:
    history, videos = two_worlds()
    a, b = (item_vectors(history, videos, 4, seed=seed)[1] for seed in (1, 2))
    assert np.allclose(a @ a.T, b @ b.T, atol=1e-3)


def test_a_history_smaller_than_the_dimensions_leaves_the_rest_zero() -> None:
    _, x = item_vectors(history_of([[100, 101], [101, 102, 103]]), videos_of([("a",)] * 5))
    assert x.shape == (5, 64)
    assert np.isfinite(x).all()
    assert not x[:, 4:].any()
    assert x[:4].any(axis=1).all()


def test_many_items_of_low_rank_give_finite_vectors() -> None:
    pairs = [[100 + 2 * i, 101 + 2 * i] for i in range(60)]
    _, x = item_vectors(history_of(pairs * 2), videos_of([("a",)] * 120))
    assert np.isfinite(x).all()


@pytest.mark.parametrize("lists", [[], [[100]], [[100, 100]], [[999, 998]]])
def test_a_history_without_pairs_is_refused_in_one_sentence(lists: list[list[int]]) -> None:
    with pytest.raises(UserError, match=r"two different known videos.*watch_history"):
        item_vectors(history_of(lists), videos_of([("a",), ("b",)]))
