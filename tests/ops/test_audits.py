"""A past run, audited: its learning made again gives every version to the last bit, and so does its serving."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from learner.versions import CHECKPOINTS
from storage.checkpoints import Checkpoints
from tests.ops.small_demo import SMALL, demo_with_kills, dwell

MOVING = [
    "--set=simulate.churn_per_s=20",
    "--set=actor.explore_slots=1",
    "--set=actor.patience_s=60",  # a busy machine must not make fallback slates here
]


def audited(data_dir: Path, json_file: Path, audit: str = "replay") -> tuple[int, dict[str, Any]]:
    """Exit status and results of an audit."""
    done = subprocess.run(
        dwell("audit", audit, f"--data-dir={data_dir}", f"--json={json_file}"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert json_file.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(json_file.read_text())["results"]


@pytest.mark.timeout(400)
def test_a_run_whose_learner_was_killed_over_a_moving_catalogue_is_made_again_to_the_last_bit(
    tmp_path: Path,
) -> None:
    data_dir = tmp_path / "data"
    run = demo_with_kills(data_dir, 20, 2, tmp_path / "up.json", *SMALL, *MOVING)
    assert run["restarts"] == {"learner": 2}
    assert (run["lost"], run["duplicated"]) == (0, 0)
    status, found = audited(data_dir, tmp_path / "audit.json")
    assert (status, found["equal"], found["differs"]) == (0, True, [])
    assert (found["first"], found["versions"]) == (1, run["versions"] - 1)
    assert found["steps"] > 5
    assert found["checkpoints"] >= 1

    status, found = audited(data_dir, tmp_path / "propensity.json", "propensity")
    assert (status, found["wrong"], found["not_at_hand"]) == (0, [], {})
    assert found["exposures"] == run["requests"]
    assert found["max_difference_nats"] < 1e-5
    assert (found["drawn_again"], found["bit_equal"]) == (run["requests"], 1.0)
    assert found["versions"] >= 2
    assert found["catalogue_changes"] > 50

    checkpoints = Checkpoints(data_dir / CHECKPOINTS)
    nudge(checkpoints.path(checkpoints.versions()[0]))
    status, found = audited(data_dir, tmp_path / "again.json")
    assert (status, found["equal"], found["versions"]) == (1, False, 1)
    assert "version 2: digest" in found["differs"][0]


def nudge(path: Path) -> None:
    """One weight of a checkpoint, by a little."""
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["model.bos"][0] += 1e-4
    save_file(tensors, path, meta)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_ten_kills_in_two_minutes_change_nothing(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    run = demo_with_kills(data_dir, 120, 10, tmp_path / "up.json", "--set=actor.port=0")
    assert run["restarts"] == {"learner": 10}
    assert (run["lost"], run["duplicated"]) == (0, 0)
    status, found = audited(data_dir, tmp_path / "audit.json")
    assert (status, found["equal"]) == (0, True)
    assert found["versions"] == run["versions"] - 1
