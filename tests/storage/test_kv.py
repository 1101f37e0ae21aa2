"""Both stores behave alike, and the one on disk keeps what it was given."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.kv import Kv, MemoryKv, RocksKv, StoreError

ROOT = Path(__file__).parents[2]

keys = st.binary(max_size=3)
batches = st.lists(st.dictionaries(keys, st.none() | st.binary(max_size=4), max_size=6), max_size=8)


@pytest.fixture(params=["memory", "disk"])
def kv(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kv]:
    made: Kv = MemoryKv() if request.param == "memory" else RocksKv(tmp_path / "store")
    yield made
    made.close()


@settings(max_examples=40)
@given(batches, keys)
def test_both_stores_answer_alike(
    tmp_path_factory: pytest.TempPathFactory, writes: list[dict[bytes, bytes | None]], prefix: bytes
) -> None:
    memory, disk = MemoryKv(), RocksKv(tmp_path_factory.mktemp("kv") / "store")
    for batch in writes:
        memory.write(batch)
        disk.write(batch)
        for key in batch:
            assert memory.get(key) == disk.get(key)
    assert list(memory.scan(prefix)) == list(disk.scan(prefix))
    assert list(memory.scan(b"")) == list(disk.scan(b""))
    disk.close()


def test_an_absent_key_is_none_and_an_empty_value_is_not(kv: Kv) -> None:
    kv.write({b"a": b"", b"b": None})
    assert kv.get(b"a") == b""
    assert kv.get(b"b") is None
    assert kv.get(b"c") is None


def test_a_scan_yields_what_has_the_prefix_in_the_order_of_the_keys(kv: Kv) -> None:
    kv.write(dict.fromkeys((b"a", b"b\xff", b"b", b"b\x00", b"c", b"ba"), b"1"))
    assert [key for key, _ in kv.scan(b"b")] == [b"b", b"b\x00", b"ba", b"b\xff"]
    assert list(kv.scan(b"d")) == []


def test_a_scan_shows_the_store_as_it_was_when_it_began(kv: Kv) -> None:
    kv.write({b"a": b"1", b"b": b"2", b"c": b"3"})
    scan = kv.scan(b"")
    assert next(scan) == (b"a", b"1")
    kv.write({b"b": None, b"c": b"9", b"d": b"4"})
    assert list(scan) == [(b"b", b"2"), (b"c", b"3")]


def test_deleting_what_is_not_there_is_nothing(kv: Kv) -> None:
    kv.write({b"a": None})
    kv.write({})
    assert list(kv.scan(b"")) == []


def test_a_store_on_disk_is_there_again(tmp_path: Path) -> None:
    for count in range(3):
        kv = RocksKv(tmp_path / "deep" / "store")
        assert len(list(kv.scan(b""))) == count
        kv.write({bytes([count]): b"x"})
        kv.close()


def test_what_was_written_survives_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from storage.kv import RocksKv\n"
        "kv = RocksKv(Path(sys.argv[1]))\n"
        "kv.write({b'a': b'1', b'b': b'2'})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], cwd=ROOT)
    assert killed.returncode == -9
    kv = RocksKv(tmp_path / "store")
    assert dict(kv.scan(b"")) == {b"a": b"1", b"b": b"2"}
    kv.close()


def test_a_store_in_use_is_refused_by_name(tmp_path: Path) -> None:
    kv = RocksKv(tmp_path / "store")
    with pytest.raises(StoreError, match=f"{tmp_path / 'store'}.* another process"):
        RocksKv(tmp_path / "store")
    kv.close()


def test_a_folder_that_cannot_be_a_store_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(StoreError, match=str(tmp_path / "file")):
        RocksKv(tmp_path / "file")
