import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ops import feedlog
from ops.popularity import (
    BeforeLog,
    LastItem,
    Popularity,
    hits_at,
    popularities,
    prequential_hits,
    recall_at,
)

REAL = Path(
    os.environ.get("DWELL_LOG_DIR") or Path(__file__).parents[2] / "../shared/data/kuairand-pure"
)
HOUR_MS = 3_600_000


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def learn(ranker: Popularity | LastItem, user: list[int], item: list[int]) -> None:
    ranker.learn(ints(*user), ints(*item), np.arange(len(item)), np.ones(len(item)))


def test_cumulative_popularity_ranks_by_count() -> None:
    popularity = Popularity(4, None)
    popularity.add(ints(2, 2, 1), ints(0, 10**9, 5))
    assert popularity.top(2).tolist() == [2, 1]


def test_weight_halves_in_a_half_life() -> None:
    popularity = Popularity(3, 3600)
    popularity.add(ints(0, 0, 0), ints(0, 0, 0))
    popularity.add(ints(1), ints(HOUR_MS))
    assert popularity.top(2).tolist() == [0, 1]  # 1.5 against 1
    popularity.add(ints(1), ints(2 * HOUR_MS))
    assert popularity.top(2).tolist() == [1, 0]  # 0.75 against 1.5


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10 * HOUR_MS)), min_size=1),
    st.integers(1, 5),
)
def test_decay_is_the_sum_of_powers_however_rows_are_blocked(
    rows: list[tuple[int, int]], block: int
) -> None:
    popularity = Popularity(5, 7200)
    for low in range(0, len(rows), block):
        some = rows[low : low + block]
        popularity.add(ints(*[item for item, _ in some]), ints(*[time for _, time in some]))
    weight = [
        sum(2.0 ** ((time - 10 * HOUR_MS) / (2 * HOUR_MS)) for item, time in rows if item == i)
        for i in range(5)
    ]
    ranked = popularity.top(5).tolist()
    for better, worse in pairwise(ranked):
        assert weight[better] >= weight[worse] * (1 - 1e-9)


def test_years_between_rows_neither_overflow_nor_lose_the_new() -> None:
    popularity = Popularity(3, 3600)
    popularity.add(ints(0), ints(0))
    popularity.add(ints(1), ints(10**12))
    popularity.add(ints(2), ints(5))
    assert popularity.top(1).tolist() == [1]


def test_weights_of_rows_count() -> None:
    popularity = Popularity(3, None)
    popularity.add(ints(0, 1, 1), ints(0, 0, 0), np.array([3.0, 1.0, 0.0]))
    assert popularity.top(2).tolist() == [0, 1]


def test_a_prior_ranks_until_there_are_rows() -> None:
    popularity = Popularity(3, 3600, prior=ints(1, 500, 900))
    assert popularity.top(2).tolist() == [2, 1]
    popularity.add(ints(0, 0), ints(0, 0))
    assert popularity.top(3).tolist() == [0, 2, 1]


def test_equals_rank_by_number_and_a_list_may_be_longer_than_the_items() -> None:
    popularity = Popularity(3, None)
    assert popularity.top(2).tolist() == [0, 1]
    assert popularity.top(9).tolist() == [0, 1, 2]
    assert popularity.rank(ints(7, 8), 4).tolist() == [[0, 1, 2, -1]] * 2


def test_unknown_items_and_empty_blocks_add_nothing() -> None:
    popularity = Popularity(2, 60)
    popularity.add(ints(), ints())
    popularity.add(ints(-1, -1, 1), ints(0, 0, 0))
    assert popularity.top(1).tolist() == [1]


def test_popularity_before_the_log_does_not_learn() -> None:
    before = BeforeLog(ints(1, 5, 3))
    learn(before, [1] * 99, [0] * 99)
    assert before.top(3).tolist() == [1, 2, 0]


def test_the_five_popularities_go_their_own_ways() -> None:
    five = popularities(ints(0, 0, 9, 0))
    assert list(five) == ["before", "cumulative", "decayed_1h", "decayed_6h", "decayed_24h"]
    item, hour = ints(*[0] * 100, *[1] * 10, 3), [0] * 100 + [12] * 10 + [24]
    for popularity in five.values():
        popularity.learn(item, item, ints(*hour) * HOUR_MS, np.ones(111))
    best = {name: int(popularity.top(1)[0]) for name, popularity in five.items()}
    assert best == {
        "before": 2,
        "cumulative": 0,
        "decayed_1h": 3,
        "decayed_6h": 0,  # 100 / 16 against 10 / 4 and 1
        "decayed_24h": 0,
    }


def test_recall_counts_targets_among_the_first_k() -> None:
    ranked = np.array([[1, 2, 3], [1, 2, 3], [4, -1, -1], [4, -1, -1]])
    target = ints(3, 2, 4, -1)
    assert hits_at(3, ranked, target).tolist() == [True, True, True, False]
    assert recall_at(2, ranked, target) == 0.5
    assert np.isnan(recall_at(2, ranked[:0], target[:0]))


def test_a_block_is_scored_before_it_is_learned() -> None:
    item = ints(0, 0, 1, 1, 1)
    weight, zero = np.ones(5), np.zeros(5, np.int64)
    hits = prequential_hits(Popularity(3, None), zero, item, np.arange(5), weight, 2, 1)
    assert hits.tolist() == [True, True, False, False, False]  # item 0 ranks first untaught
    hits = prequential_hits(Popularity(3, None), zero, item[::-1], np.arange(5), weight, 2, 1)
    assert hits.tolist() == [False, False, True, False, False]


def test_items_near_the_last_one_rank_by_how_often() -> None:
    last = LastItem(6, Popularity(6, None))
    last.seed(ints(7, 8, 9), ints(0, 3, 5, 6), ints(1, 2, 3, 1, 2, 1))
    assert last.rank(ints(9), 3).tolist() == [[2, 3, -1]]  # last item 1: twice near 2, once near 3
    assert last.rank(ints(7), 3).tolist() == [[1, 2, -1]]


def test_the_log_moves_the_last_item_and_adds_pairs() -> None:
    last = LastItem(6, Popularity(6, None))
    last.seed(ints(7, 8), ints(0, 2, 4), ints(1, 2, 1, 2))
    learn(last, [8, 7], [4, 1])
    assert last.rank(ints(8), 2).tolist() == [[1, 2]]  # last item 4, watched after 1 and 2
    assert last.rank(ints(7), 3).tolist() == [[2, 4, -1]]  # a pair of the log weighs five


def test_a_user_without_a_last_item_gets_what_is_popular() -> None:
    last = LastItem(6, Popularity(6, None))
    learn(last, [1, 2, 3], [5, 5, 4])
    assert last.rank(ints(99), 2).tolist() == [[5, 4]]


def test_an_item_watched_twice_in_a_row_is_not_near_itself() -> None:
    last = LastItem(3, Popularity(3, None))
    learn(last, [1, 1, 1, 1], [0, 0, -1, 1])
    assert last.rank(ints(1), 3).tolist() == [[0, -1, -1]]


def test_decayed_popularity_reaches_its_known_recall_on_the_real_log() -> None:
    if not REAL.is_dir():
        pytest.skip(f"NO REAL LOG at {REAL}: set DWELL_LOG_DIR to a KuaiRand-Pure directory")
    files = feedlog.open_log(REAL)
    videos, rows = files.read_videos(), files.read_log().rows
    rows = rows[feedlog.classify(rows) == feedlog.EXPOSED]
    user, item = rows["user"].astype(np.int64), videos.positions(rows["video"])
    decayed = Popularity(len(videos.id), 6 * 3600)
    weight = np.ones(len(rows))
    hits = prequential_hits(decayed, user, item, rows["time_ms"], weight, 1024, 50)
    assert hits.mean() == pytest.approx(0.162, abs=0.002)
    assert hits[rows["long_view"]].mean() == pytest.approx(0.180, abs=0.002)
