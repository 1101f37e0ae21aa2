"""The whole loop, as a user runs it: `dwell up --demo` in its own processes on its own broker."""

import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.ops.small_demo import SMALL, await_, demo, dwell, processes_of


@pytest.mark.timeout(400)
def test_a_run_learns_a_second_goes_on_and_a_killed_one_loses_nothing(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    first = demo(data_dir, 8, tmp_path / "first.json")
    assert first["requests"] > 100
    assert first["samples"] + first["open"] == first["requests"]
    assert (first["lost"], first["duplicated"]) == (0, 0)
    assert first["versions"] > 1
    assert first["freshness"]["count"] > 0
    assert first["fill"] > 0.99
    assert {"actor", "broker", "insights", "learner", "simulate", "streams"} <= set(
        first["cpu_seconds"]
    )

    running = subprocess.Popen(
        dwell("up", "--demo", "--for=60", f"--data-dir={data_dir}", *SMALL),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    served = data_dir / "simulator" / "served.jsonl"
    before = served.stat().st_size
    await_(lambda: served.stat().st_size > before)
    time.sleep(3)
    running.send_signal(signal.SIGKILL)
    running.wait()
    # whoever loses the supervisor ends by itself
    await_(lambda: processes_of(data_dir) == [], patience_s=30)

    third = demo(data_dir, 5, tmp_path / "third.json")
    assert third["versions"] > first["versions"]
    assert third["requests"] > first["requests"] + third["requests_this_run"]
    assert third["samples"] + third["open"] == third["requests"]
    assert (third["lost"], third["duplicated"]) == (0, 0)


def refused(*arguments: str) -> str:
    done = subprocess.run(
        dwell(*arguments), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_a_data_directory_in_use_is_refused_in_one_sentence(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = refused("up", "--demo", f"--data-dir={tmp_path}")
    assert "another dwell command" in said
    assert str(tmp_path) in said


def test_a_port_in_use_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused("up", "--demo", f"--data-dir={tmp_path}", f"--set=actor.port={port}")
    assert f"port {port}" in said
    assert not (tmp_path / "broker").exists()


def test_a_data_directory_of_another_cluster_is_refused_and_left_alone(
    tmp_path: Path, bootstrap: str
) -> None:
    (tmp_path / "cluster.json").write_text('{"cluster_id": "somebody-elses"}')
    said = refused("up", "--demo", f"--data-dir={tmp_path}", f"--bootstrap={bootstrap}")
    assert "somebody-elses" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.json", "lock"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.json", "lock"]


def test_up_without_a_policy_says_where_one_comes_from(tmp_path: Path) -> None:
    said = refused("up", f"--data-dir={tmp_path}", "--set=actor.port=0")
    assert "--start-from" in said
    assert "dwell pretrain" in said


def test_a_folder_that_is_no_start_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    said = refused(
        "up", f"--data-dir={tmp_path / 'd'}", f"--start-from={tmp_path}", "--set=actor.port=0"
    )
    assert "policy.safetensors is missing" in said
