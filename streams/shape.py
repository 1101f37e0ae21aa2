"""Duration-aware shaping: dwell becomes a percentile among plays of like duration, and that an advantage. Pure.

OneRec-V2 report, section on duration-aware reward shaping: bucket F(d) = floor(log_beta(d + eps)), percentile of
a play in the user's own history of that bucket, +1 above the top-quartile cut, -1 on a dislike, otherwise 0.
Where the report is silent:
- A thin history is shrunk to the population's bucket: q = (less + equal/2 + prior * q_population) / (n + prior).
  Read literally (<=, own play included, no prior) every cold user's first play would be positive.
- Ties take the mid-rank, else the many full plays tie at q = 1 and a strict `>` drops them all.
- The cut is a running quantile, not a batch's: its memory fades by 1/e each `threshold_memory` percentiles.
- Only the past counts: own plays that ended before the exposure; population and cut from earlier samples of the
  partition and arm. All items of a request are judged before any of them enters the state.
- A censored play is +1 if its percentile so far passes the cut, else without target; it enters no history.
- The supervised loss takes plays above the running median without dislike ("q_median").
State is bounded: `plays_per_bucket` plays a user and bucket, about 130 bins a population bucket (7 % wide), 256
bins of percentiles.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import numpy as np

from streams.events import (
    ACTION_BITS,
    BucketShaping,
    PositionOutcome,
    QuantileShaping,
    Sample,
    SampleItem,
    Shaping,
    ShownItem,
    UserShaping,
)
from streams.join import Joined
from streams.settings import ShapeSettings

QUANTILE_BINS = 256
_BLOCK = 16
_PRIOR_WEIGHT = 64.0  # a uniform prior: the first cut is the quantile itself, and fades
_RESCALE_AT = 1e12
_LOG_PLAY_BIN = math.log(1.07)
_EPS_S = 1e-6

UserPlays = dict[int, list[tuple[int, int]]]
LoadPlays = Callable[[str, str], UserPlays | None]


@lru_cache(maxsize=1 << 14)  # durations are the catalogue's
def duration_bucket(duration_ms: int, base: float) -> int:
    """F(d) of the report, d in seconds."""
    return math.floor(math.log(duration_ms / 1000.0 + _EPS_S, base))


def play_bin(play_ms: int) -> int:
    """Bin of a population's histogram: 0.1 s linear near zero, then 7 % wide."""
    return int(math.log1p(play_ms / 100.0) / _LOG_PLAY_BIN)


class RunningQuantile:
    """Quantiles of a stream of numbers in [0, 1] in constant memory, older ones fading exponentially.

    `weights` are those of `QUANTILE_BINS` bins, `weight` that of the next number. The sums of blocks of bins are kept
    beside them, each always summed anew: so they are the same whether they grew or were restored.
    """

    def __init__(
        self, memory: int, weights: Sequence[float] | None = None, weight: float = 1.0
    ) -> None:
        self.weight = weight
        self._growth = 1.0 + 1.0 / memory
        self._set(weights or [_PRIOR_WEIGHT / QUANTILE_BINS] * QUANTILE_BINS)

    def add(self, value: float) -> None:
        """Later values weigh more by a factor, which is the same as letting earlier ones fade."""
        number = min(QUANTILE_BINS - 1, int(value * QUANTILE_BINS))
        self.weights[number] += self.weight
        block = number // _BLOCK
        self._blocks[block] = sum(self.weights[block * _BLOCK : (block + 1) * _BLOCK])
        self.weight *= self._growth
        if self.weight > _RESCALE_AT:
            self._set([weight / self.weight for weight in self.weights])
            self.weight = 1.0

    def at(self, *quantiles: float) -> list[float]:
        """For each quantile the value below which so much of the weight lies, linear within a bin."""
        upto_block = list(accumulate(self._blocks))
        found = []
        for quantile in quantiles:
            target = quantile * upto_block[-1]
            block = bisect_left(upto_block, target)
            below = upto_block[block - 1] if block else 0.0
            number = block * _BLOCK
            while below + self.weights[number] < target and (number + 1) % _BLOCK:
                below += self.weights[number]
                number += 1
            share = min(1.0, (target - below) / self.weights[number])
            found.append((number + share) / QUANTILE_BINS)
        return found

    def _set(self, weights: Sequence[float]) -> None:
        self.weights = list(weights)
        self._blocks = [
            sum(self.weights[first : first + _BLOCK]) for first in range(0, QUANTILE_BINS, _BLOCK)
        ]


class Histogram:
    """The plays of one duration bucket by bin; counts are whole numbers, so their sums are exact in any order."""

    __slots__ = ("counts", "total")

    def __init__(self, counts: dict[int, float] | None = None) -> None:
        self.counts: list[float] = []
        self.total = 0.0
        for number, count in (counts or {}).items():
            self.add(number, count)

    def add(self, number: int, count: float = 1.0) -> None:
        """Plays of one bin more."""
        if number >= len(self.counts):
            self.counts.extend([0.0] * (number + 1 - len(self.counts)))
        self.counts[number] += count
        self.total += count

    def below(self, number: int) -> float:
        """Plays of smaller bins, and half of those of this one."""
        counts = self.counts
        return sum(counts[:number]) + (0.5 * counts[number] if number < len(counts) else 0.0)

    def by_bin(self) -> dict[int, float]:
        """The bins that are not empty."""
        return {number: count for number, count in enumerate(self.counts) if count}


@dataclass
class Population:
    """What is kept of all users of one arm in one partition."""

    quantile: RunningQuantile
    buckets: dict[int, Histogram] = field(default_factory=dict)
    """By duration bucket."""

    def percentile(self, bucket: int, play_ms: int) -> tuple[float, float]:
        """Mid-rank of a play among the population's, and how many those are; 0.5 of none."""
        plays = self.buckets.get(bucket)
        if plays is None:
            return 0.5, 0.0
        return plays.below(play_bin(play_ms)) / plays.total, plays.total

    def add(self, bucket: int, play_ms: int) -> None:
        """One play more."""
        plays = self.buckets.get(bucket)
        if plays is None:
            plays = self.buckets[bucket] = Histogram()
        plays.add(play_bin(play_ms))


class Shape:
    """The fold over the samples of one partition, in offset order.

    `load` gives a user's committed plays; what was touched since the last commit is kept here and taken by the
    shell with `take_changes`.
    """

    def __init__(self, settings: ShapeSettings, load: LoadPlays) -> None:
        self.settings = settings
        self.populations: dict[str, Population] = {}
        self._load = load
        self._users: dict[tuple[str, str], UserPlays] = {}
        self._changed_buckets: set[tuple[str, int]] = set()
        self._changed_arms: set[str] = set()

    def restore(self, state: Shaping) -> None:
        """Take one record of the changelog (users are read through `load`)."""
        if isinstance(state, BucketShaping):
            self._population(state.arm).buckets[state.bucket] = Histogram(state.counts)
        elif isinstance(state, QuantileShaping):
            weights = np.frombuffer(state.weights, dtype="<f8").tolist()
            quantile = RunningQuantile(self.settings.threshold_memory, weights, state.weight)
            self._population(state.arm).quantile = quantile

    def shape(self, joined: Joined) -> Sample:
        """Judge one closed request and let it enter the state."""
        exposure = joined.exposure
        population = self._population(exposure.arm)
        threshold, median = population.quantile.at(self.settings.threshold_quantile, 0.5)
        plays = self._plays(exposure.arm, exposure.user)
        items = [
            self._judge(
                item,
                joined.decision.positions[item.position],
                plays,
                exposure.time_ms,
                population,
                threshold,
                median,
            )
            for item in exposure.items
        ]
        for item in items:
            if item.percentile is not None and item.outcome != "censored":
                self._users[(exposure.arm, exposure.user)] = plays
                self._learn(exposure.arm, item, joined.decision.positions[item.position], plays)
        return Sample(
            request=exposure.request,
            user=exposure.user,
            time_ms=exposure.time_ms,
            arm=exposure.arm,
            policy_version=exposure.policy_version,
            catalogue_version=exposure.catalogue_version,
            decode_mode=exposure.decode_mode,
            temperature=exposure.temperature,
            context=exposure.context,
            excluded=exposure.excluded,
            items=items,
            threshold=threshold,
            median=median,
            start_ms=joined.start_ms,
            decided_ms=joined.decision.decided_ms,
            closed_by=joined.decision.closed_by,
            watermark_ms=joined.watermark_ms,
            closable_ms=joined.closable_ms,
            exposure_offset=joined.exposure_offset,
            feedback_upto=joined.feedback_upto,
        )

    def take_changes(self) -> list[Shaping]:
        """What changed since the last call, as changelog records."""
        changes: list[Shaping] = [
            UserShaping(arm=arm, user=user, plays=plays)
            for (arm, user), plays in self._users.items()
        ]
        changes += [
            BucketShaping(
                arm=arm, bucket=bucket, counts=self.populations[arm].buckets[bucket].by_bin()
            )
            for arm, bucket in sorted(self._changed_buckets)
        ]
        for arm in sorted(self._changed_arms):
            quantile = self.populations[arm].quantile
            packed = np.array(quantile.weights, dtype="<f8").tobytes()
            changes.append(QuantileShaping(arm=arm, weights=packed, weight=quantile.weight))
        self._users.clear()
        self._changed_buckets.clear()
        self._changed_arms.clear()
        return changes

    def _population(self, arm: str) -> Population:
        if arm not in self.populations:
            self.populations[arm] = Population(RunningQuantile(self.settings.threshold_memory))
        return self.populations[arm]

    def _plays(self, arm: str, user: str) -> UserPlays:
        plays = self._users.get((arm, user))
        return plays if plays is not None else (self._load(arm, user) or {})

    def _judge(
        self,
        shown: ShownItem,
        position: PositionOutcome,
        plays: UserPlays,
        time_ms: int,
        population: Population,
        threshold: float,
        median: float,
    ) -> SampleItem:
        item = SampleItem(
            item=shown.item,
            sid=shown.sid,
            position=shown.position,
            duration_ms=shown.duration_ms,
            source=shown.source,
            logp_levels=shown.logp_levels,
            outcome=position.outcome,
            play_ms=position.play_ms,
            actions=position.actions,
        )
        if position.outcome == "unseen":
            return item  # served is not seen: no target
        item.bucket = duration_bucket(shown.duration_ms, self.settings.bucket_base)
        own = [play for end, play in plays.get(item.bucket, ()) if end < time_ms]
        q_population, item.population = population.percentile(item.bucket, item.play_ms)
        own.sort()
        less = bisect_left(own, item.play_ms)
        equal = bisect_right(own, item.play_ms) - less
        prior = self.settings.prior_plays
        item.own_plays = len(own)
        q = (less + 0.5 * equal + prior * q_population) / (len(own) + prior)
        item.percentile = q
        if item.actions & ACTION_BITS["dislike"]:
            item.advantage = -1
        elif q > threshold:
            item.advantage = 1
            item.supervised = q > median
        elif position.outcome != "censored":
            item.advantage = 0
            item.supervised = q > median
        return item

    def _learn(
        self, arm: str, item: SampleItem, position: PositionOutcome, plays: UserPlays
    ) -> None:
        assert item.bucket is not None and item.percentile is not None
        population = self._population(arm)
        population.add(item.bucket, item.play_ms)
        population.quantile.add(item.percentile)
        self._changed_buckets.add((arm, item.bucket))
        self._changed_arms.add(arm)
        history = plays.setdefault(item.bucket, [])
        insort(history, (position.last_ms, item.play_ms))
        del history[: -self.settings.plays_per_bucket]
