"""What the learning arm is worth against control: paired bootstraps over persons (twins).

Notable choices (formulas: the evidence contract, "What the figures mean")
- A figure is a sum over what was shown divided by the slots *asked for*: an empty slot counts 0, so
  an arm cannot gain by leaving out what it is unsure of.
- Persons are resampled, not requests: a person's requests resemble each other, and twins share
  their random numbers. Persons whose twins were not both served in the window are left out of both
  arms.
- The interval is the 2.5 % and 97.5 % quantile of the bootstrap; the mean is that of the whole
  sample. One run is one training seed: the interval does not speak of other seeds.
- What is not defined, such as a lift over a control arm that satisfied nobody, is NaN.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ops.results import Interval
from ops.served import Served

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Lift:
    """Two arms compared over the same persons; per slot asked for."""

    persons: int
    """Persons served in both arms, the only ones counted."""
    requests: dict[str, int]
    satisfaction: dict[str, Interval]
    dwell_s: dict[str, Interval]
    dislikes: dict[str, Interval]
    fill: dict[str, float]
    oracle: float
    """Mean over the requests of both arms."""
    lift_satisfaction: Interval
    lift_dwell: Interval
    permuted_satisfaction_lift: Interval
    gap_closed: Interval


_COLUMNS: Final = ("asked", "shown", "satisfaction", "permuted", "dwell_s", "dislikes", "oracle")
_ASKED, _SHOWN, _SATISFACTION, _PERMUTED, _DWELL, _DISLIKES, _ORACLE = range(len(_COLUMNS))


def last_quarter(
    lines: Sequence[Served], start_ms: int | None = None, end_ms: int | None = None
) -> list[Served]:
    """The requests of the last quarter of [start_ms, end_ms]; by default first to last line."""
    if not lines:
        return []
    start_ms = min(line.time_ms for line in lines) if start_ms is None else start_ms
    end_ms = max(line.time_ms for line in lines) if end_ms is None else end_ms
    since = start_ms + 0.75 * (end_ms - start_ms)
    return [line for line in lines if since <= line.time_ms <= end_ms]


def lift(
    control: Sequence[Served], learning: Sequence[Served], samples: int = 2000, seed: int = 0
) -> Lift | None:
    """Compare two arms' lines (choose them by `last_quarter`); None if no person is in both."""
    persons = sorted({line.person for line in control} & {line.person for line in learning})
    if not persons:
        return None
    row = {person: at for at, person in enumerate(persons)}
    sums_APK = np.stack([_sums(control, row), _sums(learning, row)])
    point = _figures(sums_APK.sum(axis=1, keepdims=True))
    drawn = _figures(np.einsum("sp,apk->ask", _resamples(len(persons), samples, seed), sums_APK))
    interval = {name: _interval(value, drawn[name]) for name, value in point.items()}

    def by_arm(name: str) -> dict[str, Interval]:
        return {arm: interval[f"{name}.{arm}"] for arm in ("control", "learning")}

    return Lift(
        persons=len(persons),
        requests={
            "control": sum(line.person in row for line in control),
            "learning": sum(line.person in row for line in learning),
        },
        satisfaction=by_arm("satisfaction"),
        dwell_s=by_arm("dwell"),
        dislikes=by_arm("dislikes"),
        fill={arm: interval[f"fill.{arm}"]["mean"] for arm in ("control", "learning")},
        oracle=interval["oracle"]["mean"],
        lift_satisfaction=interval["lift.satisfaction"],
        lift_dwell=interval["lift.dwell"],
        permuted_satisfaction_lift=interval["permuted.satisfaction_lift"],
        gap_closed=interval["gap_closed"],
    )


def spread(lines: Sequence[Served], catalogue: int) -> tuple[float, float]:
    """Coverage (distinct items shown / live catalogue) and Gini coefficient of the showings."""
    counts = np.unique([item for line in lines for item in line.items], return_counts=True)[1]
    if not len(counts):
        return 0.0, 0.0
    shown = np.zeros(max(catalogue, len(counts)))
    shown[-len(counts) :] = np.sort(counts)
    lorenz = np.cumsum(shown) / shown.sum()
    gini = 1 + (1 - 2 * lorenz.sum()) / len(shown)
    return len(counts) / catalogue, float(gini)


def _sums(lines: Sequence[Served], row: dict[str, int]) -> Floats:
    """[P, K]: each person's sums over the lines."""
    sums = np.zeros((len(row), len(_COLUMNS)))
    for line in lines:
        at = row.get(line.person)
        if at is not None:
            # The oracle is a mean per slot: weighted like the slots that it is compared with.
            sums[at] += (
                line.asked,
                len(line.items),
                line.satisfaction,
                line.permuted,
                line.dwell_s,
                line.dislikes,
                line.oracle * line.asked,
            )
    return sums


def _resamples(persons: int, samples: int, seed: int) -> Floats:
    """[S, P]: how often each person was drawn in each bootstrap sample."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            np.bincount(rng.integers(persons, size=persons), minlength=persons)
            for _ in range(samples)
        ]
    ).astype(np.float64)


def _figures(sums_ASK: Floats) -> dict[str, Floats]:
    """Every figure for each of the S samples; NaN or infinite where a denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        per_slot = sums_ASK / sums_ASK[..., [_ASKED]]
        both = sums_ASK.sum(axis=0)
        oracle = both[:, _ORACLE] / both[:, _ASKED]
        control, learning = per_slot
        figures = {
            "oracle": oracle,
            "lift.satisfaction": _relative(control, learning, _SATISFACTION),
            "lift.dwell": _relative(control, learning, _DWELL),
            "permuted.satisfaction_lift": _relative(control, learning, _PERMUTED),
            "gap_closed": (learning[:, _SATISFACTION] - control[:, _SATISFACTION])
            / (oracle - control[:, _SATISFACTION]),
        }
    for arm, values in (("control", control), ("learning", learning)):
        figures[f"satisfaction.{arm}"] = values[:, _SATISFACTION]
        figures[f"dwell.{arm}"] = values[:, _DWELL]
        figures[f"dislikes.{arm}"] = values[:, _DISLIKES]
        figures[f"fill.{arm}"] = values[:, _SHOWN]
    return figures


def _relative(control: Floats, learning: Floats, column: int) -> Floats:
    ratio: Floats = (learning[:, column] - control[:, column]) / control[:, column]
    return ratio


def _interval(point: Floats, drawn: Floats) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(point[0]) or not len(drawn):
        return Interval(mean=math.nan, low=math.nan, high=math.nan)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(mean=float(point[0]), low=float(low), high=float(high))
