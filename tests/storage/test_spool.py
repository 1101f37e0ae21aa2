"""The spool keeps what it took: in order, within its bound, whatever happens to its process."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rocksdict import Rdict, WriteBatch, WriteOptions

from storage.kv import StoreError
from storage.spool import Spool, spool_folder

ROOT = Path(__file__).parents[2]
ROOM = 1 << 20


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool", ROOM, sync=False)
    yield made
    made.close()


def records(spool: Spool, most: int = 1 << 30) -> list[bytes]:
    return [kept.record for kept in spool.oldest(most, 1 << 30)]


groups = st.lists(st.lists(st.binary(max_size=40), max_size=4), max_size=4)
works = st.lists(st.one_of(groups, st.integers(0, 6), st.just("restart")), max_size=12)


@settings(max_examples=40)
@given(works)
def test_a_spool_is_a_bounded_list_that_is_there_again(
    tmp_path_factory: pytest.TempPathFactory, works: list[list[list[bytes]] | int | str]
) -> None:
    folder, room = tmp_path_factory.mktemp("spool"), 200
    spool, expected = Spool(folder, room, sync=False), list[bytes]()

    def size(more: list[bytes]) -> int:
        return sum(len(one) + 8 for one in more)

    for work in works:
        if isinstance(work, list):
            taken = []
            for group in work:
                fits = not group or size(expected) + size(group) <= room
                taken.append(fits)
                expected += group if fits else []
            assert spool.append(work) == taken
        elif isinstance(work, int):
            oldest = spool.oldest(work + 1, 1 << 20)
            assert [kept.record for kept in oldest] == expected[: work + 1]
            if oldest:
                spool.drop(oldest[-1].number)
                del expected[: work + 1]
        else:
            spool.close()
            spool = Spool(folder, room, sync=False)
        assert (spool.count, spool.size_bytes) == (len(expected), size(expected))
    assert records(spool) == expected
    spool.close()


def test_the_order_is_that_of_appending_beyond_one_byte_of_numbers(spool: Spool) -> None:
    expected = [str(n).encode() for n in range(1000)]
    for n in range(0, 1000, 5):
        spool.append([expected[n : n + 2], expected[n + 2 : n + 5]])
    assert records(spool) == expected
    assert records(spool, most=3) == expected[:3]


def test_the_oldest_are_as_many_as_fit_and_one_at_least(spool: Spool) -> None:
    spool.append([[b"x" * 100, b"y" * 100, b"z"]])
    assert [len(kept.record) for kept in spool.oldest(9, 200)] == [100, 100]
    assert [len(kept.record) for kept in spool.oldest(9, 1)] == [100]


def test_a_group_for_which_there_is_no_room_is_refused_whole_and_a_drop_makes_room(
    tmp_path: Path,
) -> None:
    spool = Spool(tmp_path, 100, sync=False)
    assert spool.append([[b"a" * 40], [b"b" * 40, b"c" * 40], [b"d" * 40]]) == [True, False, True]
    assert spool.append([[b"e" * 40]]) == [False]
    assert records(spool) == [b"a" * 40, b"d" * 40]
    spool.drop(spool.oldest(1, 100)[0].number)
    assert spool.append([[b"e" * 40]]) == [True]
    assert records(spool) == [b"d" * 40, b"e" * 40]
    spool.close()


def test_a_spool_that_has_been_emptied_gives_back_its_space(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 64 << 20, sync=False)
    noise = b"".join(n.to_bytes(4) for n in range(1 << 16))
    for _ in range(80):
        spool.append([[noise]])
    assert spool.size_bytes == 80 * (len(noise) + 8)
    while chunk := spool.oldest(10, 4 << 20):
        spool.drop(chunk[-1].number)
    left = sum(file.stat().st_size for file in tmp_path.glob("*.sst"))
    spool.close()
    assert left < 1 << 20


def test_what_was_taken_survives_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from storage.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]), 1 << 20, sync=False)\n"
        "spool.append([[b'a', b'b'], [b'c']])\n"
        "spool.drop(spool.oldest(1, 1)[0].number)\n"
        "spool.append([[b'd']])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "spool")], cwd=ROOT)
    assert killed.returncode == -9
    spool = Spool(tmp_path / "spool", 1 << 20, sync=False)
    assert records(spool) == [b"b", b"c", b"d"]
    spool.append([[b"e"]])
    assert records(spool) == [b"b", b"c", b"d", b"e"]
    spool.close()


@pytest.mark.parametrize("sync", [False, True])
def test_an_append_is_flushed_to_the_disk_where_that_is_asked_for_and_a_drop_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    flushed: list[bool] = []
    real = Rdict.write

    def write(self: Rdict, batch: WriteBatch, options: WriteOptions | None = None) -> None:
        flushed.append(options is not None and options.sync)
        real(self, batch, options)

    monkeypatch.setattr(Rdict, "write", write)
    spool = Spool(tmp_path, ROOM, sync)
    spool.append([[b"a"]])
    spool.drop(0)
    spool.close()
    assert flushed == [sync, False]


def test_two_actors_of_one_name_do_not_share_a_spool(tmp_path: Path) -> None:
    folder = spool_folder(tmp_path, "actor")
    spool = Spool(folder, ROOM, sync=False)
    with pytest.raises(StoreError, match=f"{folder}.* another process"):
        Spool(spool_folder(tmp_path, "actor"), ROOM, sync=False)
    Spool(spool_folder(tmp_path, "other"), ROOM, sync=False).close()
    spool.close()
