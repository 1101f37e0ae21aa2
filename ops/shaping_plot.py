"""The picture of `dwell eval shaping`: what each measure makes of duration, and what each window censors. Pure."""

from collections.abc import Mapping
from typing import Any, Final

from ops.shaping_figures import EDGES_S, duration_names
from ops.svg import Panel, Series, figure, round_up

_DWELL, _RATIO, _SHAPED = "#9a6700", "#8250df", "#0969da"
_ALL, _LONG = "#656d76", "#bc4c00"
_TICKS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def plot(results: Mapping[str, Any], window_s: float) -> str:
    """SVG of the results of `dwell eval shaping`, `curves` among them; `window_s` is the window in force."""
    curve = results["curves"]["by_duration"]
    panels = [
        _by_duration(results, "dwell", "dwell_s", "Mean raw dwell (s)", _DWELL),
        _by_duration(results, "play_ratio", "play_ratio", "Mean play ratio", _RATIO),
        _by_duration(results, "percentile", "percentile", "Mean shaped percentile", _SHAPED),
        _top(curve),
        _censored(results["censored"], window_s),
        _own_weight(results),
    ]
    words = "; ".join(f"{panel.title}: {panel.subtitle}" for panel in panels)
    return figure(panels, 2, f"What shaping does to a feed log. {words}.")


def _by_duration(
    results: Mapping[str, Any], measure: str, key: str, title: str, colour: str
) -> Panel:
    curve = results["curves"]["by_duration"]
    with_duration = results["correlation"]["duration"][measure]["mean"]
    shaped = measure == "percentile"
    return Panel(
        title=title,
        subtitle=f"rank correlation with duration {_short(with_duration, '+')}",
        x_label="duration of the video (s)",
        x_ticks=_ticks(curve["duration_s"]),
        top=1.0 if shaped else round_up(max(curve[key])),
        series=[Series(curve["duration_s"], curve[key], colour)],
        y_format=_plain,
        mark_y=0.5 if shaped else None,
    )


def _top(curve: Mapping[str, Any]) -> Panel:
    lines = [("top_dwell", _DWELL, "dwell"), ("top_play_ratio", _RATIO, "play ratio")]
    lines.append(("positive", _SHAPED, "shaped: advantage +1"))
    return Panel(
        title="Who would be rewarded",
        subtitle="share of plays in the log's top quartile, by measure",
        x_label="duration of the video (s)",
        x_ticks=_ticks(curve["duration_s"]),
        top=round_up(max(max(curve[key]) for key, _, _ in lines)),
        series=[
            Series(curve["duration_s"], curve[key], colour, name) for key, colour, name in lines
        ],
        y_format=_percent,
        mark_y=0.25,
    )


def _censored(share: Mapping[str, Any], window_s: float) -> Panel:
    windows = share["windows_s"]
    lines = [
        (share["positives"], _SHAPED, "plays with advantage +1"),
        (share["all"], _ALL, "all plays"),
        (share["by_duration"][duration_names()[-1]], _LONG, f"videos over {EDGES_S[-1]} s"),
    ]
    drawn = [line for line in lines if line[0][0] == line[0][0]]
    return Panel(
        title="Plays that a window censors",
        subtitle="share of plays still going on when it ends",
        x_label="window (s)",
        x_ticks=windows,
        top=round_up(max(max(ys) for ys, _, _ in drawn)),
        series=[Series(windows, ys, colour, name) for ys, colour, name in drawn],
        y_format=_percent,
        mark_x=(window_s, "in force"),
    )


def _own_weight(results: Mapping[str, Any]) -> Panel:
    curve = results["curves"]["own_weight"]
    return Panel(
        title="How much of a percentile is the user's own",
        subtitle=f"own weight n / (n + prior), {_short(results['own_weight']['mean'])} in the mean",
        x_label="plays of the user so far",
        x_ticks=_ticks(curve["nth_play"]),
        top=round_up(max(curve["own_weight"])),
        series=[Series(curve["nth_play"], curve["own_weight"], _SHAPED)],
        y_format=_plain,
    )


def _ticks(xs: list[float]) -> list[float]:
    """Ticks around all values: the last one below and the first one above are the axis's ends."""
    low = max((tick for tick in _TICKS if tick <= min(xs)), default=_TICKS[0])
    high = min((tick for tick in _TICKS if tick >= max(xs)), default=_TICKS[-1])
    if low >= high:
        high = low * 2
    return [low, *(tick for tick in _TICKS if low < tick < high), high]


def _plain(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _short(value: float, sign: str = "-") -> str:
    """Two digits without the nought before the point."""
    return f"{value:{sign}.2f}".replace("0.", ".", 1).replace("-", "\N{MINUS SIGN}")
