"""Results files and tables."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ops.config import Config
from ops.errors import UserError
from ops.results import (
    Check,
    Interval,
    exit_status,
    print_results,
    require_writable,
    write_results,
)

LIFT = Interval(mean=0.2, low=0.1, high=0.3)


def test_a_results_file_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    checks = [Check("lost", 0, "0", True), Check("freshness.p99_s", 3.0, "< 2.4", False, False)]
    write_results(path, "dwell up --demo", Config(), [7], {"lift": {"dwell": LIFT}}, checks)
    found = json.loads(path.read_text())
    assert list(found) == [
        *("command", "dwell_version", "machine", "config", "seeds", "results", "checks")
    ]
    assert found["command"] == "dwell up --demo"
    assert found["seeds"] == [7]
    assert found["results"] == {"lift": {"dwell": {"mean": 0.2, "low": 0.1, "high": 0.3}}}
    assert found["config"]["join"]["window_s"] == 300.0
    assert found["checks"] == [
        {"name": "lost", "value": 0, "goal": "0", "ok": True},
        {"name": "freshness.p99_s", "value": 3.0, "goal": "< 2.4", "ok": False},
    ]
    machine = found["machine"]
    assert machine["cores"] >= 1 and machine["memory_gib"] > 0 and machine["cpu"]
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_of_numpy_paths_and_what_is_not_finite_have_a_form(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results = {
        "count": np.int64(3),
        "mean": np.float32(0.5),
        "ok": np.True_,
        "levels": np.array([1.0, math.nan]),
        "ratio": math.inf,
        "folder": Path("D"),
    }
    write_results(path, "dwell", Config(), [], results, [])
    assert json.loads(path.read_text())["results"] == {
        "count": 3,
        "mean": 0.5,
        "ok": True,
        "levels": [1.0, None],
        "ratio": None,
        "folder": "D",
    }


def test_an_earlier_file_stays_whole_when_results_cannot_be_put_as_json(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("{}")
    with pytest.raises(TypeError, match="object has no form in JSON"):
        write_results(path, "dwell", Config(), [], {"x": object()}, [])
    assert path.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        write_results(tmp_path / "gone" / "r.json", "dwell", Config(), [], {}, [])
    with pytest.raises(UserError, match="this is a folder"):
        require_writable(tmp_path)
    require_writable(tmp_path / "r.json")


def test_only_a_failed_check_of_correctness_is_an_error() -> None:
    right = Check("lost", 0, "0", ok=True)
    slow = Check("freshness.p99_s", 3.0, "< 2.4", ok=False, correctness=False)
    wrong = Check("lost", 2, "0", ok=False)
    assert exit_status([]) == 0
    assert exit_status([right, slow]) == 0
    assert exit_status([right, wrong]) == 1


def test_the_table_for_people_shows_each_figure_and_each_check() -> None:
    out = io.StringIO()
    results = {"lift": {"dwell": LIFT}, "rows": 171671, "gap": math.nan, "link": "[red]x[/red]"}
    checks = [
        Check("lost", 2, "0", ok=False),
        Check("freshness.p99_s", 3.0, "< 2.4", ok=False, correctness=False),
    ]
    print_results(results, checks, Console(file=out, width=100))
    lines = [" ".join(line.replace("│", " ").split()) for line in out.getvalue().splitlines()]
    assert "lift.dwell 0.2 [0.1, 0.3]" in lines
    assert "rows 171,671" in lines
    assert "gap -" in lines
    assert "link [red]x[/red]" in lines
    assert "lost 2 0 failed" in lines
    assert "freshness.p99_s 3 < 2.4 missed" in lines
