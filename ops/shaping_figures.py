"""What shaping makes of a log, in figures. Pure.

Notable choices
- Dwell and play ratio are as the log has them, percentile and advantage (0 without target) as the streams gave them;
  only plays that were seen count.
- A play is censored by a window if it is longer: one row is one request of one slot.

Shapes: N plays, W windows.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ops.association import MEASURES, bins_of
from ops.results import Check
from streams.settings import JoinSettings, ShapeSettings

WINDOWS_S: Final = (30.0, 60.0, 120.0, 300.0, 600.0)
EDGES_S: Final = (10, 20, 40, 80, 160, 320)
"""Durations at which the censored share is split."""
CURVE_BINS: Final = 24
CENSORED_GOAL: Final = 0.05
ENOUGH: Final = 100
"""Plays below which a duration bucket's censored share is not held against the goal, and a population is thin."""

Floats = NDArray[np.float64]


def variables(rows: NDArray[np.void], plays: NDArray[np.void]) -> dict[str, Floats]:
    """Each variable of the plays `[N]`, by name; `rows` are the plays' rows of the log."""
    return {
        "dwell": rows["play_ms"].astype(float),
        "play_ratio": rows["play_ms"] / rows["duration_ms"],
        "percentile": plays["percentile"].astype(float),
        "advantage": plays["advantage"].astype(float),
        "duration": rows["duration_ms"].astype(float),
        "like": rows["like"].astype(float),
        "long_view": rows["long_view"].astype(float),
    }


def shares(plays: NDArray[np.void], settings: ShapeSettings) -> dict[str, Any]:
    """How much of a percentile is the user's own, and what became of the plays."""
    own = plays["own_plays"]
    target, advantage = plays["target"], plays["advantage"]
    return {
        "own_weight": {
            "mean": _mean(own / (own + settings.prior_plays)),
            "any_own": _mean(own > 0),
            "last_quarter": _mean((own / (own + settings.prior_plays))[-(len(own) // 4) :]),
        },
        "share": {
            "positive": _mean(target & (advantage > 0)),
            "zero": _mean(target & (advantage == 0)),
            "negative": _mean(target & (advantage < 0)),
            "without_target": _mean(~target),
            "censored": _mean(plays["censored"]),
            "supervised": _mean(plays["supervised"]),
        },
    }


def ties(values: Mapping[str, Floats], bucket: NDArray[np.integer]) -> dict[str, float]:
    """Shares of plays that equal another: in dwell within their bucket, in percentile anywhere."""
    pairs = np.stack([bucket.astype(float), values["dwell"]], axis=1)
    return {
        "dwell_in_bucket": _tied(np.unique(pairs, axis=0, return_inverse=True)[1]),
        "percentile": _tied(np.unique(values["percentile"], return_inverse=True)[1]),
        "full_plays": _mean(values["play_ratio"] >= 1),
    }


def _tied(groups: NDArray[np.integer]) -> float:
    sizes = np.bincount(groups.ravel())
    return float(sizes[sizes > 1].sum()) / max(1, int(sizes.sum()))


def literal(plays: NDArray[np.void]) -> dict[str, float]:
    """The report's percentile as written, without population, and the play itself in its history."""
    return {
        "at_one": _mean(plays["literal"] >= 1),
        "at_one_without_own": _mean(plays["literal"][plays["own_plays"] == 0] >= 1),
    }


def errors(plays: NDArray[np.void]) -> dict[str, Any]:
    """What the bounded state costs against the fold that keeps everything."""
    off = np.abs(plays["percentile"] - plays["exact_percentile"])
    warm = plays["population"] >= ENOUGH
    ours = _labels(plays["percentile"], plays["threshold"], plays["median"], plays)
    exact = _labels(
        plays["exact_percentile"], plays["exact_threshold"], plays["exact_median"], plays
    )
    return {
        "own_plays_cut_off": _mean(plays["own_dropped"] > 0),
        "own_plays_most": int((plays["own_plays"] + plays["own_dropped"]).max()),
        "percentile": _spread(off),
        f"percentile_after_{ENOUGH}_plays": _spread(off[warm]),
        "threshold": _spread(np.abs(plays["threshold"] - plays["exact_threshold"])),
        "median": _spread(np.abs(plays["median"] - plays["exact_median"])),
        "advantage_changed": _mean(ours[0] != exact[0]),
        "supervised_changed": _mean(ours[1] != exact[1]),
    }


def _labels(
    percentile: Floats, threshold: Floats, median: Floats, plays: NDArray[np.void]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Advantage +1 or not, and supervised or not."""
    positive = (percentile > threshold) & ~plays["dislike"]
    supervised = (percentile > median) & ~plays["dislike"] & (positive | ~plays["censored"])
    return positive, supervised


def _spread(values: Floats) -> dict[str, float]:
    if not len(values):
        return {"mean": np.nan, "p99": np.nan, "max": np.nan}
    return {
        "mean": float(values.mean()),
        "p99": float(np.quantile(values, 0.99)),
        "max": float(values.max()),
    }


def duration_names() -> list[str]:
    """Names of the duration buckets that `EDGES_S` part, such as `80_160s`."""
    inner = [f"{low}_{high}s" for low, high in pairwise(EDGES_S)]
    return [f"under_{EDGES_S[0]}s", *inner, f"over_{EDGES_S[-1]}s"]


def censored(
    play_ms: NDArray[np.integer],
    duration_ms: NDArray[np.integer],
    positive: NDArray[np.bool_],
    window_s: float,
) -> dict[str, Any]:
    """Shares of plays longer than each window: of all, of those with advantage +1, by duration.

    `window_s` is the window in force; it is among `windows_s` of the result.
    """
    windows = sorted({*WINDOWS_S, window_s})
    over_WN = play_ms[None, :] > np.array(windows)[:, None] * 1000
    bucket = np.searchsorted(np.array(EDGES_S) * 1000, duration_ms, side="right")
    return {
        "windows_s": windows,
        "all": _shares(over_WN),
        "positives": _shares(over_WN[:, positive]),
        "by_duration": {
            name: _shares(over_WN[:, bucket == k]) for k, name in enumerate(duration_names())
        },
        "plays_by_duration": {
            name: int((bucket == k).sum()) for k, name in enumerate(duration_names())
        },
    }


def _shares(over_WN: NDArray[np.bool_]) -> list[float]:
    return [_mean(one) for one in over_WN]


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def by_duration(values: Mapping[str, Floats]) -> dict[str, list[float]]:
    """Means by duration, and the share of plays in the top quartile of each measure of the whole log."""
    of_bin = bins_of(values["duration"], CURVE_BINS)
    count = np.bincount(of_bin)

    def mean(of: NDArray[Any]) -> list[float]:
        return [float(one) for one in np.bincount(of_bin, weights=of) / count]

    def top(name: str) -> list[float]:
        return mean(values[name] > np.quantile(values[name], 0.75))

    return {
        "plays": [int(one) for one in count],
        "duration_s": mean(values["duration"] / 1000),
        "dwell_s": mean(values["dwell"] / 1000),
        "play_ratio": mean(values["play_ratio"]),
        "percentile": mean(values["percentile"]),
        "top_dwell": top("dwell"),
        "top_play_ratio": top("play_ratio"),
        "positive": mean(values["advantage"] > 0),
    }


def own_weight_by_plays(
    plays: NDArray[np.void], user: NDArray[np.integer], prior_plays: float
) -> dict[str, list[float]]:
    """Mean own weight by how many plays the user has had with this one: 1, 2, 3 to 4, 5 to 8, ..."""
    order = np.argsort(user, kind="stable")
    first = np.searchsorted(user[order], user[order], side="left")
    nth = np.empty(len(user), np.int64)
    nth[order] = np.arange(len(user)) - first + 1
    _, of_bin = np.unique(np.ceil(np.log2(nth)), return_inverse=True)
    count = np.bincount(of_bin)
    weight = plays["own_plays"] / (plays["own_plays"] + prior_plays)
    return {
        "plays": [int(one) for one in count],
        "nth_play": [float(one) for one in np.bincount(of_bin, weights=nth) / count],
        "own_weight": [float(one) for one in np.bincount(of_bin, weights=weight) / count],
    }


def checks(results: Mapping[str, Any], join: JoinSettings) -> list[Check]:
    """One sample a request, censored by the window's rule, and whether shaping did what it is for."""
    share, window = results["censored"], min(join.window_s, join.cap_s)
    at = share["windows_s"].index(window)
    buckets = {
        name: shares_[at]
        for name, shares_ in share["by_duration"].items()
        if share["plays_by_duration"][name] >= ENOUGH
    }
    worst = max(buckets.values(), default=float("nan"))
    by_join, by_log = results["share"]["censored"], share["all"][at]
    with_duration = results["correlation"]["duration"]
    shaped = abs(with_duration["percentile"]["mean"])
    others: Sequence[float] = [abs(with_duration[one]["mean"]) for one in MEASURES[:2]]
    return [
        Check(
            "samples", results["samples"], "one a request", results["samples"] == results["exposed"]
        ),
        Check(
            "share.censored",
            by_join,
            f"{by_log:.4g} (plays longer than {window:g} s)",
            bool(np.isclose(by_join, by_log, equal_nan=True)),
        ),
        Check(
            f"censored.by_duration at {window:g} s, worst",
            worst,
            f"<= {CENSORED_GOAL}",
            not worst > CENSORED_GOAL,
        ),
        Check(
            "|correlation.duration.percentile|",
            shaped,
            f"< {min(others):.3g} (dwell and play ratio)",
            shaped < min(others),
            correctness=False,
        ),
    ]
