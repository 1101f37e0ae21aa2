"""Baselines that a policy must beat on a real log: popularity, and the user's last item.

Notable choices
- Test-then-train with the policy's lag: a block of rows is scored by what was known before it, and
  learned at the barrier behind it (contract of evidence, "Real logs"). A baseline then learns all
  exposures of the block, also those whose plays have not ended: that favours the baselines.
- Decay multiplies all weights by the same factor, so a ranking does not depend on the time of
  asking; weights are kept as of the latest row and scaled down when a later one comes.
- The watch history enters cumulative and decayed popularity with the weight of one row in all: it
  ranks what the log has not shown yet. At full weight it buries the log: cumulative recall@50 over
  KuaiRand-Pure falls from .145 to .109.
- Weights are the caller's: 1 for every row when all rows are the target, 1 for long views only
  when these are. The best of the five is the stronger bar with its own target's weights.
- Last-item co-occurrence ranks by counts. PPMI, which is good for neighbourhoods, is far worse at
  prediction: it prefers the rare. Counts of the history alone would be a straw man too, so the log's
  pairs are added, five times as heavy (of 1, 5 and 50 the best on the log's first day).

Shapes: B rows of a block, K ranks.
"""

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Final, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ops.item_vectors import cooccurrence

HALF_LIVES_S: Final = {"1h": 3_600.0, "6h": 21_600.0, "24h": 86_400.0}
WINDOW: Final = 10
LOG_WEIGHT: Final = 5.0


class Baseline(Protocol):
    """What can be tested, then trained."""

    def rank(self, user_B: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """The k best items `[B, K]` for each user, best first; -1 where there are no more."""

    def learn(
        self,
        user_B: NDArray[np.int64],
        item_B: NDArray[np.int64],
        time_ms_B: NDArray[np.int64],
        weight_B: NDArray[np.float64],
    ) -> None:
        """Take up a block of rows in order of time."""


class Popularity:
    """Weights of items that halve every `half_life_s` seconds of event time, or never (`None`).

    `prior [n_items]` ranks items before there are rows; scaled to the weight of one row in all.
    """

    def __init__(
        self,
        n_items: int,
        half_life_s: float | None,
        prior: NDArray[np.integer | np.floating] | None = None,
    ) -> None:
        self._half_life_ms = None if half_life_s is None else half_life_s * 1000
        self._weight = np.zeros(n_items)
        self._at_ms: int | None = None
        if prior is not None and prior.sum() > 0:
            self._weight += prior / prior.sum()

    def add(
        self,
        item_B: NDArray[np.int64],
        time_ms_B: NDArray[np.int64],
        weight_B: NDArray[np.float64] | None = None,
    ) -> None:
        """Add rows, in any order of time; items below 0 are left out."""
        if not len(item_B):
            return
        weight_B = np.ones(len(item_B)) if weight_B is None else weight_B
        if self._half_life_ms is not None:
            latest = int(time_ms_B.max())
            if self._at_ms is None:
                self._at_ms = int(time_ms_B.min())  # as if the prior had come then
            if latest > self._at_ms:
                self._weight *= 2.0 ** ((self._at_ms - latest) / self._half_life_ms)
                self._at_ms = latest
            weight_B = weight_B * 2.0 ** ((time_ms_B - self._at_ms) / self._half_life_ms)
        known = item_B >= 0
        self._weight += np.bincount(
            item_B[known], weights=weight_B[known], minlength=len(self._weight)
        )

    def top(self, k: int) -> NDArray[np.int64]:
        """The k heaviest items, heaviest first, of equals the first; all if there are fewer."""
        return _heaviest(self._weight, k)

    def rank(self, user_B: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """The same list `[B, K]` for everybody."""
        return np.broadcast_to(_pad(self.top(k), k), (len(user_B), k))

    def learn(
        self,
        user_B: NDArray[np.int64],
        item_B: NDArray[np.int64],
        time_ms_B: NDArray[np.int64],
        weight_B: NDArray[np.float64],
    ) -> None:
        """Add a block of rows."""
        del user_B
        self.add(item_B, time_ms_B, weight_B)


class BeforeLog(Popularity):
    """Popularity in the watch history, never updated."""

    def __init__(self, prior: NDArray[np.integer | np.floating]) -> None:
        super().__init__(len(prior), None, prior)

    def learn(
        self,
        user_B: NDArray[np.int64],
        item_B: NDArray[np.int64],
        time_ms_B: NDArray[np.int64],
        weight_B: NDArray[np.float64],
    ) -> None:
        """Learns nothing."""


class LastItem:
    """Items by how often they stood near the user's last item, in the history and in the log.

    A user without a last item gets the list of `fallback`, which learns the same rows.
    """

    def __init__(
        self,
        n_items: int,
        fallback: Popularity,
        window: int = WINDOW,
        log_weight: float = LOG_WEIGHT,
    ) -> None:
        self._before = sp.csr_array((n_items, n_items))
        self._since = sp.csr_array((n_items, n_items))
        self._scratch = np.zeros(n_items)
        self._recent: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=window))
        self._fallback = fallback
        self._window = window
        self._log_weight = log_weight

    def seed(
        self, user: NDArray[np.int64], start: NDArray[np.int64], item: NDArray[np.int64]
    ) -> None:
        """Take up the watch history: user k's items are `item[start[k]:start[k + 1]]`."""
        self._before = cooccurrence(item, start, self._before.shape[0], self._window)
        bounds = start.tolist()
        for k, who in enumerate(user.tolist()):
            tail = item[max(bounds[k], bounds[k + 1] - self._window) : bounds[k + 1]]
            self._recent[who].extend(tail[tail >= 0].tolist())

    def rank(self, user_B: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """The k items `[B, K]` most often near each user's last one, then -1."""
        lists: dict[int, NDArray[np.int64]] = {-1: _pad(self._fallback.top(k), k)}
        ranked_BK = np.empty((len(user_B), k), np.int64)
        for b, user in enumerate(user_B.tolist()):
            recent = self._recent.get(user)
            last = recent[-1] if recent else -1
            if last not in lists:
                lists[last] = _pad(self._near(last, k), k)
            ranked_BK[b] = lists[last]
        return ranked_BK

    def learn(
        self,
        user_B: NDArray[np.int64],
        item_B: NDArray[np.int64],
        time_ms_B: NDArray[np.int64],
        weight_B: NDArray[np.float64],
    ) -> None:
        """Add the pairs of each row with its user's recent items; every row counts as watched."""
        self._fallback.learn(user_B, item_B, time_ms_B, weight_B)
        left: list[int] = []
        right: list[int] = []
        for user, item in zip(user_B.tolist(), item_B.tolist(), strict=True):
            if item < 0:
                continue
            recent = self._recent[user]
            near = [other for other in recent if other != item]
            left += near
            right += [item] * len(near)
            recent.append(item)
        ends = np.array(left + right, np.int64), np.array(right + left, np.int64)
        weights = np.full(len(ends[0]), self._log_weight)
        new = sp.csr_array(sp.coo_array((weights, ends), shape=self._since.shape))
        self._since = sp.csr_array(self._since + new)

    def _near(self, item: int, k: int) -> NDArray[np.int64]:
        before, count = _row(self._before, item)
        since, more = _row(self._since, item)
        self._scratch[before] = count
        self._scratch[since] += more
        weight = self._scratch[before]
        self._scratch[before] = 0
        new = since[self._scratch[since] > 0]
        near = np.concatenate([before, new])
        weight = np.concatenate([weight, self._scratch[new]])
        self._scratch[since] = 0
        return near[_heaviest(weight, k)]


def popularities(history_counts: NDArray[np.integer]) -> dict[str, Popularity]:
    """The five popularities of the contract of evidence, by name."""
    n_items = len(history_counts)
    return {
        "before": BeforeLog(history_counts),
        "cumulative": Popularity(n_items, None, history_counts),
        **{
            f"decayed_{name}": Popularity(n_items, half_life_s, history_counts)
            for name, half_life_s in HALF_LIVES_S.items()
        },
    }


def blocks(n_rows: int, barrier: int) -> Iterable[slice]:
    """Rows between two barriers."""
    return (slice(low, min(low + barrier, n_rows)) for low in range(0, n_rows, barrier))


def prequential_hits(
    baseline: Baseline,
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    time_ms: NDArray[np.int64],
    weight: NDArray[np.float64],
    barrier: int,
    k: int,
) -> NDArray[np.bool_]:
    """Whether each row's item was among the k ranked before its block; learns block by block."""
    hits = np.zeros(len(item), np.bool_)
    for block in blocks(len(item), barrier):
        hits[block] = hits_at(k, baseline.rank(user[block], k), item[block])
        baseline.learn(user[block], item[block], time_ms[block], weight[block])
    return hits


def hits_at(k: int, ranked_BK: NDArray[np.int64], target_B: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each target is among the first k of its list; an unknown target (-1) never is."""
    found: NDArray[np.bool_] = (ranked_BK[:, :k] == target_B[:, None]).any(axis=1)
    return found & (target_B >= 0)


def recall_at(k: int, ranked_BK: NDArray[np.int64], target_B: NDArray[np.int64]) -> float:
    """Share of targets among the first k of their lists; not a number without targets."""
    return float(hits_at(k, ranked_BK, target_B).mean()) if len(target_B) else float("nan")


def _row(counts: sp.csr_array, row: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The columns that are not 0 in a row, and their counts."""
    low, high = int(counts.indptr[row]), int(counts.indptr[row + 1])
    return counts.indices[low:high].astype(np.int64), counts.data[low:high]


def _heaviest(weight: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    if k < len(weight):
        least = np.partition(weight, len(weight) - k)[len(weight) - k]
        some = np.flatnonzero(weight >= least)
    else:
        some = np.arange(len(weight))
    return some[np.argsort(-weight[some], kind="stable")][:k]


def _pad(items: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    padded = np.full(k, -1, np.int64)
    padded[: len(items)] = items
    return padded
