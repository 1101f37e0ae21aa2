"""A checkpoint is whole or absent, and only those that may go are removed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.checkpoints import Checkpoints, write_atomically

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    """Versions 1 to 5."""
    made = Checkpoints(tmp_path / "checkpoints")
    for version in (3, 1, 5, 2, 4):
        made.write(version, b"%d" % version)
    return made


def test_versions_are_listed_in_order_with_their_contents(kept: Checkpoints) -> None:
    assert kept.versions() == [1, 2, 3, 4, 5]
    assert [kept.path(version).read_bytes() for version in (1, 5)] == [b"1", b"5"]


def test_versions_beyond_the_width_of_a_name_stay_in_order(tmp_path: Path) -> None:
    made = Checkpoints(tmp_path)
    for version in (99_999_999, 100_000_000, 2):
        made.write(version, b"")
    assert made.versions() == [2, 99_999_999, 100_000_000]


def test_writing_a_version_again_replaces_it(kept: Checkpoints) -> None:
    kept.write(3, b"again")
    assert kept.path(3).read_bytes() == b"again"
    assert kept.versions() == [1, 2, 3, 4, 5]


def test_pruning_keeps_the_newest_and_those_excepted(kept: Checkpoints) -> None:
    kept.prune(2, but={1})
    assert kept.versions() == [1, 4, 5]
    kept.prune(9)
    assert kept.versions() == [1, 4, 5]


def test_checkpoints_after_a_version_are_discarded_and_named(kept: Checkpoints) -> None:
    assert kept.discard_after(3) == [4, 5]
    assert kept.versions() == [1, 2, 3]
    assert kept.discard_after(3) == []


def test_files_of_others_are_left_alone(kept: Checkpoints, tmp_path: Path) -> None:
    others = [tmp_path / "checkpoints" / name for name in ("v3 (copy).safetensors", "notes.txt")]
    for other in others:
        other.write_text("mine")
    assert kept.versions() == [1, 2, 3, 4, 5]
    kept.discard_after(0)
    assert all(other.exists() for other in others)


def test_what_a_dead_process_left_half_written_is_no_version_and_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from storage.checkpoints import Checkpoints\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "Checkpoints(Path(sys.argv[1])).write(7, b'x' * 1000)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    assert Checkpoints(tmp_path).versions() == []
    Checkpoints(tmp_path).discard_after(0)
    assert list(tmp_path.iterdir()) == []


def test_shards_written_aside_are_a_version_once_they_are_put_in_place(kept: Checkpoints) -> None:
    for name in ("one", "two"):
        (kept.aside(6) / "lost").write_text(name)
    kept.place(6)
    (kept.aside(6) / "shard").write_text("mine")
    kept.place(6)
    assert kept.versions() == [1, 2, 3, 4, 5, 6]
    assert [file.name for file in kept.path(6).iterdir()] == ["shard"]


def test_shards_are_pruned_discarded_and_replaced_like_files(kept: Checkpoints) -> None:
    for version in (2, 6, 7):
        (kept.aside(version) / "shard").write_text("mine")
        kept.place(version)
    (kept.aside(8) / "shard").write_text("cut short")
    assert kept.discard_after(6) == [7]
    assert sorted(path.name for path in kept.path(6).parent.iterdir())[-1] == "v00000006.sharded"
    kept.write(6, b"whole")
    assert kept.path(6).read_bytes() == b"whole"
    kept.prune(1)
    assert [path.name for path in kept.path(6).parent.iterdir()] == ["v00000006.safetensors"]


def test_a_write_that_fails_leaves_the_old_content(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        kept.write(3, b"new")
    assert kept.path(3).read_bytes() == b"3"
    assert list(kept.path(3).parent.glob("*.tmp")) == []


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, steps = tmp_path / "file", []

    def flush(descriptor: int) -> None:
        folder = Path(f"/proc/self/fd/{descriptor}").readlink() == tmp_path
        steps.append(("folder" if folder else "file", target.exists()))

    monkeypatch.setattr(os, "fsync", flush)
    write_atomically(target, b"content")
    assert steps == [("file", False), ("folder", True)]
