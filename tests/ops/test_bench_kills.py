"""The bench of kills: its truth, its ends, a short run of it, and (soak) the whole."""

import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType

from ops.admin import keep_changelog
from ops.bench_kills import KINDS, RATE, checks_of, kinds_of
from ops.kills_parts import TAKEN, taken
from ops.kills_plan import LONGEST_MS, Plan
from streams.events import Exposure
from streams.settings import JoinSettings, KafkaSettings
from streams.topics import SHAPING, topics

PLAN = Plan(seed=5, t0_ms=1_700_000_000_000, rate=40.0)


def test_a_producer_that_begins_again_says_the_same_from_there_on() -> None:
    whole = list(itertools.islice(PLAN.writes(PLAN.t0_ms), 6000))
    assert whole == sorted(whole)
    for place in (0, 700, 2500):
        from_ms = whole[place].at_ms
        again = list(itertools.islice(PLAN.writes(from_ms), 3000))
        expected = [write for write in whole if write.at_ms >= from_ms]
        assert again == expected[: len(again)]


def test_no_record_is_written_before_it_happened_or_later_than_the_longest() -> None:
    for number in range(1500):
        shown_ms = PLAN.time_of(number)
        for write in PLAN.request(number):
            assert write.event.time_ms <= write.at_ms <= shown_ms + LONGEST_MS


def test_the_truth_has_repeats_disorder_late_events_and_spools() -> None:
    writes = list(itertools.islice(PLAN.writes(PLAN.t0_ms), 12_000))
    assert max(Counter(repr(write.event) for write in writes).values()) == 2
    behind = [write.at_ms - write.event.time_ms for write in writes]
    assert sum(ms > 1000 for ms in behind) > 200
    assert any(a.event.time_ms > b.event.time_ms + 1000 for a, b in itertools.pairwise(writes))
    exposures = [write for write in writes if isinstance(write.event, Exposure)]
    assert max(Counter(write.at_ms for write in exposures).values()) > 10, "a drained spool"


def test_a_hundred_and_sixty_are_twenty_of_each_kind_or_more() -> None:
    kinds = Counter(kinds_of(160, seed=1))
    assert kinds == {kind: 20 * KINDS.count(kind) for kind in KINDS}
    assert kinds_of(50, 1) != kinds_of(50, 2)


def test_of_the_changelog_nothing_is_compacted_while_its_samples_are_kept(
    made_log: KafkaSettings,
) -> None:
    keep_changelog(made_log)
    before = next(topic.config for topic in topics(made_log) if topic.name == SHAPING)
    wanted = before | {"min.compaction.lag.ms": f"{made_log.retention_s * 1000:.0f}"}
    resource = ConfigResource(ConfigResourceType.TOPIC, SHAPING)
    give_up = time.monotonic() + 10
    with KafkaAdminClient(bootstrap_servers=made_log.bootstrap) as admin:
        while True:  # a broker applies in its own time what its controller has taken
            found = admin.describe_configs([resource], config_filter="all")["topic"][SHAPING]
            if {key: found[key]["value"] for key in wanted} == wanted:
                break
            assert time.monotonic() < give_up, {key: found[key]["value"] for key in wanted}


def test_a_line_that_a_kill_cut_off_was_not_taken(tmp_path: Path) -> None:
    (tmp_path / TAKEN).write_text('[0,1,"a"]\n[0,2,"b"]\n[0,3,')
    assert [line.request for line in taken(tmp_path)] == ["a", "b"]


def good() -> dict[str, Any]:
    return {
        **dict.fromkeys(("lost", "duplicated", "wrong_label", "unaccounted", "missing"), 0),
        "open": 0,
        "samples": 10,
        "learner": {"taken": 10, "twice": 0, "requests": 10},
        "insights": {"stuck": 0, "error": 0.5},
        "resume": {"worker": {"p99_s": 5.0}, "broker": {"p99_s": 20.0}},
    }


def test_whatever_is_wrong_fails_the_bench() -> None:
    assert all(check.ok for check in checks_of(good()))
    for name in ("lost", "duplicated", "wrong_label", "unaccounted", "missing", "open"):
        assert [c.name for c in checks_of({**good(), name: 1}) if not c.ok] == [name]
    for learner in ({"taken": 10, "twice": 1, "requests": 10}, {"twice": 0, "requests": 9}):
        assert not all(check.ok for check in checks_of({**good(), "learner": learner}))
    held_up = {**good(), "insights": {"stuck": 1, "error": 0.0}}
    assert [c.name for c in checks_of(held_up) if not c.ok] == ["insights.stuck"]
    slow = {"worker": {"p99_s": 10.0}, "broker": {"p99_s": 30.0}}
    missed = [check for check in checks_of({**good(), "resume": slow}) if not check.ok]
    assert [check.correctness for check in missed] == [False, False]


def bench(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    out = folder / "results.json"
    command = [sys.executable, "-m", "ops.cli", "bench", "kills", "--kills", str(kills)]
    more = ["--seed", str(seed), "--data-dir", str(folder / "data"), "--json", str(out)]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(out.read_text())["results"])


def holds(results: dict[str, Any], kills: int) -> None:
    assert sum(results["disturbances"].values()) == kills
    assert results["samples"] == results["exposures"] == results["requests"] > 40 * kills
    assert results["late_exposures"] > 0
    assert results["shaping_checked"] > 0.5 * results["samples"]
    insights = results["insights"]
    assert insights["windows"] > 0
    assert insights["error"] < 0.1, "approximate, but of the same samples"


@pytest.mark.timeout(300)
def test_a_few_kills_lose_double_and_mislabel_nothing(tmp_path: Path) -> None:
    """Nor does the audit of the run that is past, as a whole or by time."""
    results = bench(tmp_path, 5, seed=3)
    holds(results, 5)
    assert set(results["disturbances"]) == set(KINDS[:5])
    whole = audited(tmp_path)
    assert {name: results[name] for name in whole if name != "journal"} == {
        name: value for name, value in whole.items() if name != "journal"
    }
    written = (tmp_path / "data" / "bench-kills" / "requests").stat().st_mtime
    last = datetime.fromtimestamp(written - LONGEST_MS / 1000)
    half = last - timedelta(seconds=results["requests"] / RATE / 2)
    later = audited(tmp_path, "--since", half.isoformat("T", "seconds"))
    assert 0 < later["exposures"] < whole["exposures"]
    assert later["samples"] == later["exposures"]
    assert later["shaping_checked"] == later["wrong_label"] == later["lost"] == 0


def audited(folder: Path, *more: str) -> dict[str, Any]:
    out = folder / "audit.json"
    command = [sys.executable, "-m", "ops.cli", "audit", "samples", "--json", str(out), *more]
    where = ["--data-dir", str(folder / "data" / "bench-kills")]
    done = subprocess.run([*command, *where], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(out.read_text())["results"])


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_and_sixty_kills_lose_double_and_mislabel_nothing(tmp_path: Path) -> None:
    results = bench(tmp_path, 160, seed=4)
    holds(results, 160)
    assert min(results["disturbances"].values()) >= 20


def test_windows_of_the_bench_fit_its_truth() -> None:
    """A request can be decided by its events: the cap is longer than its plays."""
    from ops.kills_plan import JOIN

    assert isinstance(JOIN, JoinSettings)
    last = max(
        max(write.event.time_ms for write in PLAN.request(n)) - PLAN.time_of(n) for n in range(500)
    )
    assert last < JOIN.cap_s * 1000
