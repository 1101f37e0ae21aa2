"""The evaluation of the order of arrival: what it shuffles, and a run of it on a small log."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ops.eval_order import Made, difference, shuffled
from streams.events import Exposure, Feedback
from tests.ops.small_log import write_log
from tests.streams.makers import T0, exposure


def events() -> list[Exposure | Feedback]:
    return [exposure(f"r{n}", T0 + 10 * n, 1) for n in range(300)]


def test_every_event_comes_twice_within_the_lateness_and_not_in_order() -> None:
    said = shuffled(events(), 200.0, seed=1)
    assert set(Counter(event.request for event in said).values()) == {2}
    times = [event.time_ms for event in said]
    assert times != sorted(times)
    largest = 0
    for time_ms in times:
        assert time_ms > largest - 200, "later than the lateness allows"
        largest = max(largest, time_ms)
    assert said == shuffled(events(), 200.0, seed=1) != shuffled(events(), 200.0, seed=2)


def test_the_difference_of_two_orders_is_that_of_their_labels() -> None:
    def with_labels(*labels: tuple[float, int | None]) -> Made:
        return Made("", len(labels), np.zeros(1), {f"r{n}": [one] for n, one in enumerate(labels)})

    found = difference(with_labels((0.5, 0), (0.9, 1)), with_labels((0.4, 0), (0.7, 0)))
    assert found == pytest.approx(
        {
            "judged": 2,
            "other_advantage": 0.5,
            "positives_closing": 0.5,
            "positives_exposure": 0,
            "percentile_bias": 0.15,
            "percentile_shift": 0.15,
        }
    )


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_small_log_makes_the_same_samples(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    log = tmp_path / "log"
    write_log(log, 600, gap_ms=2000)
    command = [sys.executable, "-m", "ops.cli", "eval", "order", str(log), "--json", str(out)]
    done = subprocess.run(
        [*command, "--data-dir", str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())["results"]
    assert results["twice"] == 2 * results["events"]
    for order in ("exposure", "closing"):
        assert results[order]["straight"] == results[order]["shuffled"]
    assert results["exposure"]["straight"] != results["closing"]["straight"]
    assert results["closing"]["wait"] == {"mean_s": 0, "p99_s": 0}
    assert results["exposure"]["wait"]["mean_s"] > 0
    assert 0 < results["difference"]["percentile_shift"] < 0.5
