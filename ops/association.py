"""How measures of a play go with duration, likes and long views. Pure.

Notable choices
- Correlations are Spearman's; ties take mid-ranks.
- `auc` is the probability that a liked (long-viewed) play stands above one that is not, ties counting half: it does
  not shrink with how rare likes are. `like_same_duration` compares only plays of like duration, so that a measure
  gains nothing by favouring the durations that are liked more.
- Intervals resample users, since a user's plays resemble each other, and rank anew each time.

Shapes: N plays, V variables, U users, S strata, M measures.
"""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ops.results import Interval

RESAMPLES: Final = 400
MEASURES: Final = ("dwell", "play_ratio", "percentile", "advantage")
AGAINST: Final = ("duration", "like", "long_view")
STRATA: Final = 100
"""Bins of duration within which plays are of like duration."""

Floats = NDArray[np.float64]


def associations(
    values: Mapping[str, Floats], user: NDArray[np.integer], seed: int, resamples: int = RESAMPLES
) -> dict[str, dict[str, dict[str, Interval]]]:
    """`correlation` and `auc` of each measure, by what it is held against.

    95 % intervals over users; what is not defined, such as a correlation with a constant, is NaN.
    """
    _, of_user = np.unique(user, return_inverse=True)
    users = int(of_user.max()) + 1
    whole = np.zeros(len(user), np.int64)
    like_duration = bins_of(values["duration"], STRATA)
    correlations = [_Correlation(values, against) for against in AGAINST]
    aucs = {
        "like": _Auc(values, "like", whole),
        "like_same_duration": _Auc(values, "like", like_duration),
        "long_view": _Auc(values, "long_view", whole),
    }
    named = [("correlation", name) for name in AGAINST] + [("auc", name) for name in aucs]
    under: list[Callable[[Floats], Floats]] = [one.under for one in correlations]
    under += [one.under for one in aucs.values()]

    def figures(weights_N: Floats) -> Floats:
        return np.stack([one(weights_N) for one in under])

    rng = np.random.default_rng(seed)
    point = figures(np.ones(len(user)))
    drawn = np.empty((resamples, *point.shape))
    for sample in range(resamples):
        times_U = np.bincount(rng.integers(users, size=users), minlength=users)
        drawn[sample] = figures(times_U[of_user].astype(float))
    found: dict[str, dict[str, dict[str, Interval]]] = {"correlation": {}, "auc": {}}
    for k, (kind, against) in enumerate(named):
        found[kind][against] = {
            measure: _interval(float(point[k, m]), drawn[:, k, m])
            for m, measure in enumerate(MEASURES)
        }
    return found


class _Ranked:
    """Values ready to be ranked under any weights."""

    def __init__(self, values_N: Floats) -> None:
        distinct, self._of = np.unique(values_N, return_inverse=True)
        self._distinct = len(distinct)

    def mid_ranks(self, weights_N: Floats) -> Floats:
        counts = np.bincount(self._of, weights=weights_N, minlength=self._distinct)
        ranks: Floats = (np.cumsum(counts) - counts / 2)[self._of]
        return ranks


class _Correlation:
    """Spearman's, of each measure with one variable."""

    def __init__(self, values: Mapping[str, Floats], against: str) -> None:
        self._ranked = [_Ranked(values[name]) for name in (*MEASURES, against)]

    def under(self, weights_N: Floats) -> Floats:
        """`[M]`, each play counting as often as its weight says."""
        ranks_VN = np.stack([ranked.mid_ranks(weights_N) for ranked in self._ranked])
        centred_VN = (ranks_VN - weights_N.sum() / 2) * np.sqrt(weights_N)
        norm_V = np.sqrt((centred_VN**2).sum(axis=1))
        with np.errstate(divide="ignore", invalid="ignore"):
            correlation_M: Floats = centred_VN[:-1] @ centred_VN[-1] / norm_V[:-1] / norm_V[-1]
        return correlation_M


class _Auc:
    """Area under the curve of each measure for one binary variable, over the pairs within a stratum."""

    def __init__(self, values: Mapping[str, Floats], of: str, stratum_N: NDArray[np.int64]) -> None:
        self._hit = values[of]
        self._stratum = stratum_N
        self._strata = int(stratum_N.max()) + 1
        self._ranked = []
        for name in MEASURES:
            distinct, place_N = np.unique(values[name], return_inverse=True)
            self._ranked.append(_Ranked((stratum_N * len(distinct) + place_N).astype(float)))

    def under(self, weights_N: Floats) -> Floats:
        """`[M]`, each play counting as often as its weight says."""
        hit_N = weights_N * self._hit
        total_S = np.bincount(self._stratum, weights=weights_N, minlength=self._strata)
        hits_S = np.bincount(self._stratum, weights=hit_N, minlength=self._strata)
        below_S = np.cumsum(total_S) - total_S
        rank_M = np.array([ranked.mid_ranks(weights_N) @ hit_N for ranked in self._ranked])
        with np.errstate(divide="ignore", invalid="ignore"):
            above_M = rank_M - (hits_S * (below_S + hits_S / 2)).sum()
            auc_M: Floats = above_M / (hits_S * (total_S - hits_S)).sum()
        return auc_M


def _interval(point: float, drawn: Floats) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(point) or not len(drawn):
        return Interval(mean=np.nan, low=np.nan, high=np.nan)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(mean=point, low=float(low), high=float(high))


def bins_of(values_N: Floats, bins: int) -> NDArray[np.int64]:
    """Bin of each value: about equally many in each, equal values together, none empty."""
    edges = np.unique(np.quantile(values_N, np.linspace(0, 1, bins + 1)[1:-1]))
    raw = np.searchsorted(edges, values_N, side="right")
    return np.unique(raw, return_inverse=True)[1].astype(np.int64)
