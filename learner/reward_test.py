"""Whether the learning arm earns less than control: a sequential test that may be asked at any time. Pure.

Notable choices (docs/guard.md has what it can see, and how fast)
- A request's reward is what was watched of what was shown: mean over slots of play / duration, at most 1; 0 for what
  was not seen or was disliked. Percentiles and advantages will not do: each arm is shaped by its own past.
- Requests of the two arms are compared as they come: d in [-1, 1] is the mean of the waiting ones of the learning arm
  less that of control's. If learning is not worse, E d >= 0 given all before, and 1 - b d is a fair bet or a bad one
  for each stake b in (0, 1): whatever the laws of the rewards, nobody gets rich by it.
- The test is an e-detector (Shin, Ramdas, Rinaldo, "E-detectors", 2024) of Shiryaev-Roberts type: each comparison
  opens a new bet of 1, so what went well long ago does not hide a drop, R <- (R + 1)(1 - b d). Mixed over stakes, so
  that small drops and large ones are both seen. Without harm the mean number of comparisons before an alarm is at
  least the threshold.
- When the drop began is where the best bet began (its CUSUM). That is an estimate: the return goes to before twice
  as long ago; not to before single requests that closed late, for their versions may be minutes older.
"""

from collections import deque
from typing import Final, NamedTuple

import numpy as np

from streams.control import CONTROL_ARM, LEARNING_ARM
from streams.events import ACTION_BITS, Sample

STAKES: Final = np.array([0.02, 0.05, 0.1, 0.2, 0.4, 0.8])
LATE: Final = 0.05
"""Part of the comparisons since then whose versions, the oldest, do not count."""
REMEMBERED: Final = 50_000
"""Comparisons back to which the beginning of a drop can be placed."""


class Drop(NamedTuple):
    """The learning arm earns less."""

    version: int
    """The newest version that is older than the drop can be; 0 where that is not known."""
    comparisons: int
    """Since it began, by estimate."""
    learning: float
    """Mean reward since then."""
    control: float


class RewardTest:
    """`see` the samples of both arms in the order of the log."""

    def __init__(self, threshold: float) -> None:
        """`threshold` is the least mean number of comparisons between false alarms."""
        self.threshold = threshold
        self.start_again()

    def start_again(self) -> None:
        """Forget all, after a return."""
        self._waiting: dict[str, list[tuple[float, int]]] = {LEARNING_ARM: [], CONTROL_ARM: []}
        self._detectors = np.zeros(len(STAKES))
        self._bets = np.zeros(len(STAKES))
        """Logarithms: each stake's best bet, and how many comparisons ago it began."""
        self._ages = np.zeros(len(STAKES), np.int64)
        self._seen: deque[tuple[int, float, float]] = deque(maxlen=REMEMBERED)

    @property
    def evidence(self) -> float:
        """What is compared with the threshold."""
        return float(self._detectors.mean())

    def see(self, sample: Sample) -> Drop | None:
        """Take one sample; the drop, if that is now plain. Other arms are passed over."""
        mine = self._waiting.get(sample.arm)
        if mine is None or not sample.items:
            return None
        mine.append((reward(sample), sample.policy_version))
        if not all(self._waiting.values()):
            return None
        learning, control = (
            float(np.mean([value for value, _ in self._waiting[arm]]))
            for arm in (LEARNING_ARM, CONTROL_ARM)
        )
        version = min(version for _, version in self._waiting[LEARNING_ARM])
        for waiting in self._waiting.values():
            waiting.clear()
        return self._compare(version, learning, control)

    def _compare(self, version: int, learning: float, control: float) -> Drop | None:
        self._seen.append((version, learning, control))
        factors = 1.0 - STAKES * (learning - control)
        self._detectors = (self._detectors + 1.0) * factors
        self._ages = np.where(self._bets > 0.0, self._ages, 0) + 1
        self._bets = np.maximum(self._bets, 0.0) + np.log(factors)
        return self._drop() if self.evidence >= self.threshold else None

    def _drop(self) -> Drop:
        age = int(self._ages[self._bets.argmax()])
        recent = list(self._seen)
        since = recent[-age:]
        whole = len(recent) < REMEMBERED or 2 * age <= len(recent)
        served = sorted(version for version, _, _ in recent[-2 * age :])
        oldest = served[int(LATE * len(served))]
        return Drop(
            version=max(0, oldest - 1) if whole else 0,
            comparisons=age,
            learning=float(np.mean([learning for _, learning, _ in since])),
            control=float(np.mean([control for _, _, control in since])),
        )


def reward(sample: Sample) -> float:
    """What a request earned, 0 to 1."""
    earned = [
        0.0
        if item.actions & ACTION_BITS["dislike"]
        else min(1.0, max(0, item.play_ms) / max(1, item.duration_ms))
        for item in sample.items
    ]
    return sum(earned) / len(earned)
