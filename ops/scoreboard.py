"""Test-then-train on a log, block by block: the policy's lists beside those of the baselines.

Notable choices (contract of evidence, "Real logs")
- Two targets, each with baselines of its own: long views (baselines weigh long views only), and all rows.
- All are tested on a block before they learn from it. The baselines then learn all of it; the policy learns only
  what has closed, but sees in a request's context what its user did until then, as in serving.
- What is chosen (the best popularity, and our own settings) is chosen on the rows before `split_ms`, and scored
  on the rest.

Shapes: R rows, B rows of a block, K ranks.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ops.feedlog import DAY_MS, UTC_OFFSET_MS, Videos, WatchHistory
from ops.popularity import Baseline, LastItem, hits_at, popularities
from ops.results import Interval
from ops.scoring import difference

K: Final = 50
POLICY: Final = "policy"
POPULARITY: Final = "decayed_6h"
"""The popularity that the results also call `popularity`."""
LAST_ITEM: Final = "last_item"
PRIMARY: Final = "long_view"
TARGETS: Final = {PRIMARY: "recall_50", "all": "recall_50_all"}
"""What counts as a hit's row, and how its figures are called."""

_Mask = NDArray[np.bool_]


def split_of(first_ms: int) -> int:
    """The end of the log's first day: the viewers' midnight nearest to a day after its first row."""
    return round((first_ms + DAY_MS + UTC_OFFSET_MS) / DAY_MS) * DAY_MS - UTC_OFFSET_MS


class Scoreboard:
    """Hits of the policy and of the baselines on rows in order of time."""

    def __init__(self, rows: NDArray[np.void], videos: Videos, history: WatchHistory) -> None:
        """`rows` `[R]` are those that become requests."""
        self.done = 0
        """Rows tested so far."""
        self.number = {str(video): at for at, video in enumerate(videos.id.tolist())}
        """What `take` calls a video of the catalogue."""
        self._rows = rows
        self._item = videos.positions(rows["video"])
        self._baselines: dict[str, dict[str, Baseline]] = {}
        self._hits: dict[str, dict[str, _Mask]] = {}
        watched = videos.positions(history.video)
        for target in TARGETS:
            counted = watched[history.long] if target == PRIMARY else watched
            counts = np.bincount(counted[counted >= 0], minlength=len(videos.id))
            last = LastItem(len(videos.id), popularities(counts)[POPULARITY])
            last.seed(history.user, history.start, watched)
            self._baselines[target] = {**popularities(counts), LAST_ITEM: last}
            self._hits[target] = {
                name: np.zeros(len(rows), np.bool_) for name in (POLICY, *self._baselines[target])
            }

    def take(self, ranked_BK: NDArray[np.int64]) -> None:
        """Test the next B rows on the policy's lists `[B, K]` (videos by position) and the baselines'."""
        block = slice(self.done, self.done + len(ranked_BK))
        rows, item_B = self._rows[block], self._item[block]
        user_B = rows["user"].astype(np.int64)
        for target, hits in self._hits.items():
            hits[POLICY][block] = hits_at(K, ranked_BK, item_B)
            weight_B = rows["long_view"].astype(float) if target == PRIMARY else np.ones(len(rows))
            for name, baseline in self._baselines[target].items():
                hits[name][block] = hits_at(K, baseline.rank(user_B, K), item_B)
                baseline.learn(user_B, item_B, rows["time_ms"], weight_B)
        self.done = block.stop

    def recall(self, name: str, target: str = PRIMARY, when: _Mask | None = None) -> float:
        """Share of hits among the target's rows tested, or those of them `when`; not a number of none."""
        hits = self._hits[target][name][self._chosen(target, when)]
        return float(hits.mean()) if len(hits) else float("nan")

    def results(self, split_ms: int) -> dict[str, Any]:
        """Recall on the rows from `split_ms` on, and, for choosing, on those before."""
        late = self._rows["time_ms"] >= split_ms
        found: dict[str, Any] = {}
        for target, key in TARGETS.items():
            choosing = {
                name: np.nan_to_num(self.recall(name, target, ~late))
                for name in self._baselines[target]
                if name != LAST_ITEM
            }
            best = max(choosing, key=lambda name: (choosing[name], name == POPULARITY))
            found[key] = {**self._recalls(target, late), "best_popularity": best}
            found[f"{key}_first_day"] = self._recalls(target, ~late)
            found[f"{key}_gain"] = {
                f"over_{what}": self._gain(target, name, late)
                for what, name in (
                    ("popularity", POPULARITY),
                    ("best_popularity", best),
                    ("last_item", LAST_ITEM),
                )
            }
        return found

    def _recalls(self, target: str, when: _Mask) -> dict[str, float | int]:
        return {
            POLICY: self.recall(POLICY, target, when),
            "popularity": self.recall(POPULARITY, target, when),
            **{name: self.recall(name, target, when) for name in self._baselines[target]},
            "rows": int(self._chosen(target, when).sum()),
        }

    def _chosen(self, target: str, when: _Mask | None) -> _Mask:
        """Rows `[R]` tested, of the target, and `when`."""
        chosen: _Mask = np.arange(len(self._rows)) < self.done
        if target == PRIMARY:
            chosen &= self._rows["long_view"]
        return chosen if when is None else chosen & when

    def _gain(self, target: str, baseline: str, when: _Mask) -> Interval:
        chosen = self._chosen(target, when)
        hits = self._hits[target]
        return difference(hits[POLICY][chosen], hits[baseline][chosen], self._rows["user"][chosen])
