"""The demonstration, small, as a user runs it: in its own processes on its own broker."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SMALL = [
    "--set=simulate.people=60",
    "--set=simulate.items=400",
    "--set=simulate.requests_per_s=40",
    "--set=pretrain.steps=20",
    "--set=actor.port=0",
]


def dwell(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ops.cli", *arguments]


def demo(data_dir: Path, seconds: float, json_file: Path) -> dict[str, Any]:
    """One run of the demonstration; its results."""
    done = subprocess.run(
        dwell(
            "up",
            "--demo",
            f"--for={seconds}",
            f"--data-dir={data_dir}",
            f"--json={json_file}",
            *SMALL,
        ),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads(json_file.read_text())["results"]
    return results


def processes_of(data_dir: Path, role: str = "") -> list[int]:
    """Processes whose command line names the data directory, of one role or all."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        of_role = not role or f"\0{role}\0".encode() in command
        if of_role and str(data_dir).encode() in command:
            found.append(int(entry.name))
    return found


def await_(true: Callable[[], object], patience_s: float = 60.0) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


def _another(data_dir: Path, dead: int) -> bool:
    found = processes_of(data_dir, "learner")
    return bool(found) and found != [dead]


def demo_with_kills(
    data_dir: Path, seconds: float, kills: int, json_file: Path, *settings: str
) -> dict[str, Any]:
    """A run of the demonstration whose learner is killed, evenly over it; its results."""
    options = (f"--for={seconds}", f"--data-dir={data_dir}", f"--json={json_file}")
    running = subprocess.Popen(
        dwell("up", "--demo", *options, *settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        served = data_dir / "simulator" / "served.jsonl"
        await_(lambda: running.poll() is not None or (served.exists() and served.stat().st_size))
        for _ in range(kills):
            time.sleep(seconds / (kills + 1))
            (dead,) = processes_of(data_dir, "learner")
            os.kill(dead, signal.SIGKILL)
            await_(partial(_another, data_dir, dead))
        output, _ = running.communicate(timeout=seconds + 150)
    finally:
        running.terminate()
    assert running.returncode == 0, output
    results: dict[str, Any] = json.loads(json_file.read_text())["results"]
    return results
