"""Says when learning goes astray: the entropy falls below a floor, the divergence rises above a ceiling. Pure.

It warns and changes nothing; refusing a version is the guard's. Both figures are fading means over about 16 steps,
for one batch's divergence is noisy (its estimator has a heavy tail). A crossing is told once, and again only after
the figure has come back by a tenth of its limit.

The defaults, in nats and as means over the levels at `tiny`: the reference runs (section 2) start at an entropy of
2.5 and stay at 1.5 while satisfaction is at its best, and those that collapsed under dislikes alone ended at .02. The
floor of .5 is a third of 1.5 and more than twenty times the last. The ceiling of .5 is ten times what the
demonstration's loop has (docs/objectives.md); there a typical level has become e^.5 = 1.6 times less likely than it
was when it was served, and most ratios are outside PPO's clip range.
"""

from typing import Final

from learner.settings import LearnSettings
from learner.step import StepMetrics

_MEMORY: Final = 16.0
"""Steps."""
_BACK: Final = 0.1


class Watch:
    """The state of the two figures; `see` each step in order."""

    def __init__(self, settings: LearnSettings) -> None:
        self._entropy = _Limit(settings.entropy_floor, below=True)
        self._divergence = _Limit(settings.divergence_ceiling, below=False)

    def see(self, metrics: StepMetrics) -> list[str]:
        """Warnings, each a sentence, of what this step has crossed."""
        found = []
        if self._entropy.crossed_by(metrics.entropy):
            found.append(
                f"the policy's entropy has fallen to {self._entropy.mean:.2g} nats a level, below "
                f"learn.entropy_floor = {self._entropy.limit:g}: slates are becoming alike; look at pull_negative "
                "and coverage, raise learn.entropy, or roll back"
            )
        if self._divergence.crossed_by(metrics.divergence):
            found.append(
                f"the policy has moved {self._divergence.mean:.2g} nats a level (KL) from what was served, above "
                f"learn.divergence_ceiling = {self._divergence.limit:g}: look at staleness, or lower learn.lr"
            )
        return found


class _Limit:
    """A fading mean against one limit; what is not a number is beyond it."""

    def __init__(self, limit: float, below: bool) -> None:
        self.limit = limit
        self.mean = 0.0
        self._below = below
        self._started = False
        self._beyond = False

    def crossed_by(self, value: float) -> bool:
        """Take the next value; whether the mean has just gone beyond the limit."""
        self.mean += (value - self.mean) / (_MEMORY if self._started else 1.0)
        self._started = True
        was_beyond, reach = self._beyond, _BACK if self._beyond else 0.0
        if self._below:
            self._beyond = not self.mean >= self.limit * (1.0 + reach)
        else:
            self._beyond = not self.mean <= self.limit * (1.0 - reach)
        return self._beyond and not was_beyond
