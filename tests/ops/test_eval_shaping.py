"""`dwell eval shaping`: the fold over a log, its figures against slow references, its picture, and the command."""

import json
import math
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from ops.association import MEASURES, associations
from ops.cli import main
from ops.config import load
from ops.errors import UserError
from ops.eval_shaping import run
from ops.feedlog import EXPOSED, ROW, classify, open_log
from ops.shaping_figures import (
    by_duration,
    censored,
    errors,
    own_weight_by_plays,
    ties,
    variables,
)
from ops.shaping_fold import FOLDED, exact_cuts, fold
from ops.svg import Panel, Series, figure, round_up
from streams.settings import JoinSettings, ShapeSettings
from streams.shape import RunningQuantile
from tests.ops.small_log import BEGIN_MS, write_log

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("DWELL_LOG_DIR") or ROOT / "../shared/data/kuairand-pure")
SVG = "{http://www.w3.org/2000/svg}"


def rows_of(plays_ms: list[int], users: int = 3, gap_ms: int = 3_600_000) -> NDArray[np.void]:
    """Plays of one video of a minute, users in turn, an hour apart."""
    rows = np.zeros(len(plays_ms), ROW)
    rows["user"] = np.arange(len(rows)) % users
    rows["time_ms"] = BEGIN_MS + np.arange(len(rows)) * gap_ms
    rows["play_ms"] = plays_ms
    rows["duration_ms"] = 60_000
    return rows


def folded(
    rows: NDArray[np.void],
    window_s: float = 300.0,
    shape: ShapeSettings | None = None,
    partitions: int = 2,
) -> NDArray[np.void]:
    join = JoinSettings(window_s=window_s)
    return fold(rows, np.arange(len(rows)), join, shape or ShapeSettings(), partitions)


def values_of(seed: int, plays: int = 400) -> tuple[dict[str, NDArray[np.float64]], Any]:
    """Plays with many ties, and who played."""
    rng = np.random.default_rng(seed)
    values = {name: rng.integers(0, 9, plays).astype(float) for name in (*MEASURES, "duration")}
    values["dwell"] += values["duration"]
    for name in ("like", "long_view"):
        values[name] = (rng.random(plays) < 0.1 + 0.05 * values["dwell"]).astype(float)
    return values, rng.integers(0, 50, plays)


def auc(values: NDArray[np.float64], hit: NDArray[np.float64]) -> float:
    """Pair by pair."""
    pairs = [(a > b) + (a == b) / 2 for a in values[hit > 0] for b in values[hit == 0]]
    return float(np.mean(pairs))


# The fold


def test_each_request_of_the_log_is_judged_once_and_only_plays_are_seen(tmp_path: Path) -> None:
    counts = write_log(tmp_path, 300)
    rows = open_log(tmp_path).read_log().rows
    chosen = np.flatnonzero(classify(rows) == EXPOSED)
    out = fold(rows, chosen, JoinSettings(), ShapeSettings(), 4)
    assert len(out) == counts["exposed"]
    assert sorted(out["row"].tolist()) == chosen.tolist()
    assert (out["seen"] == (rows["play_ms"][out["row"]] > 0)).all()
    assert len(set(out["partition"].tolist())) == 4
    disliked = rows["hate"][out["row"]] & out["seen"]
    assert disliked.any()
    assert (out["advantage"][disliked] == -1).all()
    assert (out["advantage"][~disliked] >= 0).all()


def test_a_play_longer_than_the_window_is_censored_and_one_as_long_is_not() -> None:
    out = folded(rows_of([1_000, 59_999, 60_000, 60_001, 120_000]), window_s=60.0)
    assert out["censored"][np.argsort(out["row"])].tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("window_s", [300.0, 20.0])
def test_nothing_is_lost_while_plays_are_few_and_in_bins_of_their_own(window_s: float) -> None:
    plays_ms = [1000 * 2 ** int(k) for k in np.random.default_rng(3).integers(0, 6, 60)]
    out = folded(rows_of(plays_ms), window_s)
    assert out["censored"].any() == (window_s < 32)
    assert out["percentile"].tolist() == pytest.approx(out["exact_percentile"].tolist(), abs=1e-12)
    assert len(set(out["percentile"].tolist())) > 20
    assert not out["own_dropped"].any()


def test_a_play_that_still_went_on_is_not_among_the_users_own() -> None:
    out = folded(rows_of([60_000, 100_000, 80_000], users=1, gap_ms=30_000), partitions=1)
    by_row = out[np.argsort(out["row"])]
    assert by_row["literal"].tolist() == [1.0, 1.0, 1.0]  # the third begins as the first ends
    assert by_row["own_dropped"].tolist() == [0, 0, 0]
    after = folded(rows_of([60_000, 100_000, 50_000], users=1, gap_ms=30_001), partitions=1)
    assert after["literal"][np.argmax(after["row"])] == 0.5


def test_plays_that_are_forgotten_show_as_an_error() -> None:
    plays_ms = [1000 * 2 ** int(k) for k in np.random.default_rng(3).integers(0, 6, 60)]
    out = folded(rows_of(plays_ms), shape=ShapeSettings(plays_per_bucket=2))
    found = errors(out)
    # the first 3 plays of each of 3 users lose nothing; after those something is always missing
    assert found["own_plays_cut_off"] == pytest.approx(1 - 3 * 3 / 60)
    assert found["own_plays_most"] == 19
    assert found["percentile"]["mean"] > 0.02
    assert found["percentile"]["max"] < 1


def test_plays_that_share_a_bin_show_as_an_error_of_half_the_bin() -> None:
    # 20.0 and 20.2 s lie in one bin of 7 %: the longer one ranks .5 among the shorter ones, not 1
    out = folded(rows_of([20_000] * 8 + [20_200], users=9), partitions=1)
    last = out[np.argmax(out["row"])]
    assert last["percentile"] == pytest.approx(0.5)
    assert last["exact_percentile"] == pytest.approx(1.0)


def test_the_literal_percentile_calls_every_first_play_the_best() -> None:
    out = folded(rows_of([9_000, 8_000, 7_000, 6_000, 5_000, 9_500]))
    by_row = out["literal"][np.argsort(out["row"])].tolist()
    assert by_row == [1.0, 1.0, 1.0, 0.5, 0.5, 1.0]


def test_the_exact_cut_is_the_faded_quantile_of_all_that_was_learned() -> None:
    rng = np.random.default_rng(5)
    values, learned = rng.random(300), rng.random(300) < 0.9
    cuts = exact_cuts(values, learned, 0.75, memory=50)
    prior = np.array(RunningQuantile(50).weights)
    points = (np.arange(len(prior)) + 0.5) / len(prior)
    for n in (0, 1, 40, 299):
        before = learned[:n]
        age = before[::-1].cumsum()[::-1] - before  # learned values that came later
        weights = np.concatenate([prior, before * (1 + 1 / 50) ** (before.sum() - age - 1)])
        every = np.concatenate([points, values[:n]])
        order = np.argsort(every)
        share = np.cumsum(weights[order]) / weights.sum()
        assert cuts[n] == every[order][np.searchsorted(share, 0.75)]


def test_the_exact_cut_survives_the_rescaling_of_its_weights() -> None:
    values = np.tile([0.2, 0.4, 0.6, 0.8], 300)
    cuts = exact_cuts(values, np.ones(1200, bool), 0.75, memory=1)  # 2 ** 1200 is no number
    # the newest weighs half, the one before a quarter: the cut is the larger of the two
    assert cuts[100:].tolist() == [max(values[n - 1], values[n - 2]) for n in range(100, 1200)]


# The figures


def test_correlations_and_areas_are_those_of_slow_references() -> None:
    values, user = values_of(1)
    found = associations(values, user, seed=0, resamples=2)
    for measure in MEASURES:
        for against in ("duration", "like", "long_view"):
            expected = spearmanr(values[measure], values[against]).statistic
            mean = found["correlation"][against][measure]["mean"]
            assert mean == pytest.approx(expected, abs=1e-12)
        for of in ("like", "long_view"):
            mean = found["auc"][of][measure]["mean"]
            assert mean == pytest.approx(auc(values[measure], values[of]), abs=1e-12)


def test_within_one_duration_a_measure_gains_nothing_by_favouring_durations() -> None:
    rng = np.random.default_rng(2)
    duration = rng.integers(1, 6, 3000).astype(float)
    values = dict.fromkeys(MEASURES, duration + 0.1 * rng.random(3000))
    like = (rng.random(3000) < 0.1 * duration).astype(float)
    values |= {"duration": duration, "like": like, "long_view": like}
    found = associations(values, np.arange(3000), seed=0, resamples=50)["auc"]
    assert found["like"]["dwell"]["low"] > 0.6
    within = found["like_same_duration"]["dwell"]
    assert within["low"] < 0.5 < within["high"]
    assert within["high"] - within["low"] < 0.1


def test_intervals_resample_users_and_not_plays() -> None:
    values, user = values_of(3)
    once = associations(values, user, seed=4, resamples=60)["correlation"]["duration"]["dwell"]
    tenfold = {name: np.tile(value, 10) for name, value in values.items()}
    ten = associations(tenfold, np.tile(user, 10), seed=4, resamples=60)
    assert ten["correlation"]["duration"]["dwell"] == pytest.approx(once)
    assert once["low"] < once["mean"] < once["high"]
    alone = associations(values, np.zeros(len(user), int), seed=4, resamples=5)
    single = alone["correlation"]["duration"]["dwell"]
    assert single["low"] == pytest.approx(single["high"])


def test_what_is_not_defined_is_not_a_number() -> None:
    values, user = values_of(3)
    values["like"] = np.zeros(len(user))
    found = associations(values, user, seed=0, resamples=3)
    assert math.isnan(found["auc"]["like"]["dwell"]["mean"])
    assert math.isnan(found["correlation"]["like"]["dwell"]["mean"])
    assert math.isfinite(found["correlation"]["duration"]["dwell"]["mean"])


def test_the_censored_share_counts_longer_plays_by_window_and_duration() -> None:
    play_ms = np.array([10_000, 31_000, 61_000, 400_000, 30_000])
    duration_ms = np.array([5_000, 9_999, 10_000, 500_000, 320_000])
    positive = np.array([False, True, True, False, False])
    found = censored(play_ms, duration_ms, positive, window_s=45.0)
    assert found["windows_s"] == [30, 45, 60, 120, 300, 600]
    assert found["all"] == pytest.approx([0.6, 0.4, 0.4, 0.2, 0.2, 0])
    assert found["positives"] == pytest.approx([1, 0.5, 0.5, 0, 0, 0])
    assert found["by_duration"]["under_10s"] == pytest.approx([0.5, 0, 0, 0, 0, 0])
    assert found["by_duration"]["over_320s"] == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.5, 0])
    assert found["plays_by_duration"]["10_20s"] == 1
    assert sum(found["plays_by_duration"].values()) == 5


def test_a_curve_keeps_equal_durations_together_and_counts_every_play() -> None:
    values, _ = values_of(7, plays=999)
    curve = by_duration(values)
    assert curve["duration_s"] == pytest.approx([d / 1000 for d in range(9)])
    assert sum(curve["plays"]) == 999
    of_3 = values["duration"] == 3
    assert curve["plays"][3] == of_3.sum()
    assert curve["percentile"][3] == pytest.approx(values["percentile"][of_3].mean())
    top = values["dwell"] > np.quantile(values["dwell"], 0.75)
    assert curve["top_dwell"][3] == pytest.approx(top[of_3].mean())


def test_own_weight_is_told_by_how_many_plays_the_user_has_had() -> None:
    plays = np.zeros(6, FOLDED)
    plays["own_plays"] = [0, 0, 6, 6, 6, 18]
    user = np.array([1, 2, 1, 1, 2, 1])
    found = own_weight_by_plays(plays, user, prior_plays=6.0)
    assert found["plays"] == [2, 2, 2]
    assert found["nth_play"] == [1, 2, 3.5]
    assert found["own_weight"] == pytest.approx([0, 0.5, (0.5 + 0.75) / 2])


def test_dwell_ties_only_within_a_bucket() -> None:
    values, _ = values_of(1, plays=4)
    values |= {
        "dwell": np.array([5.0, 5.0, 5.0, 6.0]),
        "percentile": np.array([0.1, 0.2, 0.3, 0.1]),
        "play_ratio": np.array([0.5, 1.0, 1.2, 0.1]),
    }
    assert ties(values, np.array([0, 0, 1, 1])) == {
        "dwell_in_bucket": 0.5,
        "percentile": 0.5,
        "full_plays": 0.5,
    }


# The picture


def panel(**given: Any) -> Panel:
    series = [Series([10, 100], [0.2, 0.8], "#123456", "a < b")]
    values: dict[str, Any] = {
        "title": "dwell & more",
        "subtitle": "",
        "x_label": "s",
        "x_ticks": [10, 100],
        "top": 1.0,
        "series": series,
        "y_format": str,
    }
    return Panel(**{**values, **given})


def test_the_picture_is_well_formed_and_says_what_it_is_told() -> None:
    root = ET.fromstring(figure([panel(), panel()], 2, "a & b"))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts.count("dwell & more") == 2
    assert texts.count("a < b") == 2
    assert root.findtext(f"{SVG}title") == "a & b"


def test_a_line_goes_from_axis_to_axis_and_leaves_out_what_is_not_finite() -> None:
    series = [Series([10, 31.6, 100], [0.0, math.nan, 1.0], "#123456")]
    root = ET.fromstring(figure([panel(series=series)], 1, ""))
    lines = root.findall(f".//{SVG}polyline")
    assert len(lines) == 1
    points = [tuple(map(float, p.split(","))) for p in lines[0].get("points", "").split()]
    (x0, y0), (x1, y1) = points
    axis = [line for line in root.iter(f"{SVG}line") if line.get("y1") == f"{y0:.1f}"]
    assert (float(axis[0].get("x1", "")), float(axis[0].get("x2", ""))) == (x0, x1)
    assert y1 < y0  # up is more


@pytest.mark.parametrize(
    ("value", "end"), [(0.42, 0.5), (1.0, 1.0), (41.8, 50), (7, 8), (0, 1), (math.nan, 1)]
)
def test_an_axis_ends_at_a_round_number(value: float, end: float) -> None:
    assert round_up(value) == pytest.approx(end)


# The command


def evaluated(tmp_path: Path, rows: int, window_s: float) -> tuple[int, dict[str, Any], Path]:
    """Exit status, document and picture of a run over a small log."""
    write_log(tmp_path / "log", rows)
    config = load(sets=[f"join.window_s={window_s}"]).config
    paths = tmp_path / "r.json", tmp_path / "r.svg"
    status = run(config, tmp_path / "log", *paths)
    return status, json.loads(paths[0].read_text()), paths[1]


def test_the_command_reports_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    counts = write_log(tmp_path / "log", 400)
    asked = ["eval", "shaping", "log", "--json", "r.json", "--plot", "r.svg"]
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--set", "join.window_s=500"])
    assert not ended.value.code
    assert "correlation.duration.play_ratio" in capsys.readouterr().out
    document = json.loads(Path("r.json").read_text())
    results = document["results"]
    assert document["command"] == "dwell eval shaping"
    assert document["seeds"] == [0]
    assert results["exposed"] == results["samples"] == counts["exposed"]
    assert results["rows"] == 400
    assert 0 < results["plays"] < results["samples"]
    assert results["censored"]["positives"][0] > results["censored"]["all"][0] > 0
    panels = ET.parse("r.svg").getroot().findall(f".//{SVG}g")
    assert [len(one.findall(f".//{SVG}polyline")) for one in panels] == [1, 1, 1, 3, 3, 1]


def test_a_window_that_censors_too_much_fails(tmp_path: Path) -> None:
    status, document, _ = evaluated(tmp_path, 400, window_s=60.0)
    assert status == 1
    failed = {check["name"]: check["value"] for check in document["checks"] if not check["ok"]}
    assert failed["censored.by_duration at 60 s, worst"] > 0.05
    assert document["results"]["share"]["censored"] > 0.3


def test_every_key_of_the_results_is_documented(tmp_path: Path) -> None:
    _, document, _ = evaluated(tmp_path, 60, window_s=300.0)
    known = set(re.findall(r"`([a-z_0-9.]+)`", (ROOT / "docs/shaping.md").read_text()))
    documented = {part for name in known for part in name.split(".")}

    def keys(value: Any) -> set[str]:
        if not isinstance(value, dict) or value.keys() == {"mean", "low", "high"}:
            return set()
        return set(value).union(*(keys(one) for one in value.values()))

    found = keys(document["results"])
    assert len(found) > 50
    assert found - documented == set()


def test_a_user_is_told_what_is_missing(tmp_path: Path) -> None:
    config = load().config
    with pytest.raises(UserError, match=r"no log_standard_\*\.csv in"):
        run(config, tmp_path, None, None)
    with pytest.raises(UserError, match=r"--plot .*name a file in a folder that exists"):
        run(config, tmp_path, None, tmp_path / "nowhere" / "r.svg")
    write_log(tmp_path, 0)
    with pytest.raises(UserError, match="nothing to shape"):
        run(config, tmp_path, None, None)


def test_on_a_real_log_duration_tells_nothing_of_the_shaped_percentile() -> None:
    if not REAL.is_dir():
        pytest.skip(f"NO REAL LOG at {REAL}: set DWELL_LOG_DIR to a KuaiRand-Pure directory")
    rows = open_log(REAL).read_log().rows[:12_000]
    chosen = np.flatnonzero(classify(rows) == EXPOSED)
    out = fold(rows, chosen, JoinSettings(), ShapeSettings(), 1)
    plays = out[out["seen"]]
    seen = rows[plays["row"]]
    found = associations(variables(seen, plays), seen["user"], seed=0, resamples=50)
    with_duration = found["correlation"]["duration"]
    assert with_duration["play_ratio"]["high"] < -0.4
    assert with_duration["dwell"]["low"] > 0.05
    assert abs(with_duration["percentile"]["mean"]) < 0.03
    liked = found["auc"]["like_same_duration"]
    assert liked["percentile"]["low"] > 0.6
    assert abs(liked["percentile"]["mean"] - liked["dwell"]["mean"]) < 0.03
    assert errors(plays)["percentile_after_100_plays"]["p99"] < 0.04
