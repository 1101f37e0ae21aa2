"""The bench of the join: its load, and (soak) a small run of the whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ops.bench_join import EVENTS, FAST, ITEMS, USERS, request
from streams.decision import JoinTimes, decide


def test_a_request_is_one_exposure_and_plays_that_all_end() -> None:
    shown, feedback = request(7, 1000)
    assert 1 + len(feedback) == EVENTS
    decision = decide(shown, 1000, feedback, JoinTimes.of(FAST))
    assert decision.closed_by == "decided"
    assert {each.outcome for each in decision.positions.values()} == {"ended"}
    assert len(decision.positions) == ITEMS
    assert len({event.event for event in feedback}) == len(feedback)


def test_requests_differ_and_users_come_back() -> None:
    assert request(1, 0)[0].request != request(USERS + 1, 0)[0].request
    assert request(1, 0)[0].user == request(USERS + 1, 0)[0].user


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_small_run_counts_every_sample(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "ops.cli", "bench", "join", "--json", str(out)]
    more = ["--requests", "500", "--waiting", "2000", "--data-dir", str(tmp_path / "data")]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())["results"]
    assert results["workers_1"]["samples"] == results["workers_2"]["samples"] == 500
    assert results["ratio_to_faust_table"] > 3
    assert list(results["waiting"]) == ["200", "2000"]
    assert all(each["recovery_s"] < 60 for each in results["waiting"].values())
