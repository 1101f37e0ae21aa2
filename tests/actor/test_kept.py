"""What the copy holds: the same as the logs, whole or of no use."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actor.kept import COMMAND, HISTORY, ITEM, Change, Copy, CopyError, Cut
from actor.policy import Arms
from actor.restoring import restore, usable
from actor.settings import ActorSettings
from actor.users import Users
from learner.catalogue import Catalogue
from learner.decoder import LazyDecoder
from learner.policy import build, state_of
from storage.kv import RocksKv
from streams.blocks import blocked_state, digest_of
from streams.chain import Version
from streams.events import Command, History, SemanticId, encode
from streams.settings import KafkaSettings
from streams.signing import Signer, Trust, make_pair
from streams.weights import Manifest, Seal, WeightError, schema_of
from tests.actor.world import CODES, ROWS
from tests.learner.makers import CODEBOOK, random_model, upsert

KAFKA = KafkaSettings(bootstrap="here:1", partitions=2)
NOW_MS = 1_000_000


def cut(**more: object) -> Cut:
    known: dict[str, object] = {
        "cluster": "c1",
        "bootstrap": KAFKA.bootstrap,
        "partitions": KAFKA.partitions,
        "positions": [("catalogue", 0, 9)],
        "catalogue_version": 0,
        "complete_ms": NOW_MS,
    }
    return Cut(**(known | more))  # type: ignore[arg-type]


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Copy]:
    made = Copy(tmp_path / "copy")
    made.begin("c1")
    yield made
    made.close()


def item_change(offset: int, item: str, sid: SemanticId, born: int | None) -> Change:
    return Change(offset, upsert(item, sid, CODEBOOK, 20_000), born)


def sealed(version: int, codebook: str = CODEBOOK) -> tuple[Version, Seal]:
    model: LazyDecoder = random_model(build("tiny", 2, 1).preset, CODES, ROWS, seed=version)
    state = state_of(model)
    manifest = Manifest(
        version=version,
        lineage="l",
        codebook=codebook,
        preset="tiny",
        codes=CODES,
        user_rows=ROWS,
        schema=schema_of(state),
        digest=digest_of(state),
        base=version - 1,
        size_bytes=7,
        chunks=1,
        journal=[],
        watermark_ms=0,
        created_ms=0,
    )
    return Version(manifest, blocked_state(state)), Seal(encode(manifest), b"")


def filled(copy: Copy, version: int = 3, codebook: str = CODEBOOK) -> None:
    """A whole copy of two items and a version."""
    changes = {
        ITEM + b"a": item_change(4, "a", (0, 1, 2), 4),
        ITEM + b"b": item_change(5, "b", (0, 1, 3), 5),
        HISTORY + b"u": Change(2, encode(History(user="u", behaviours=[], shown=["a"]))),
    }
    copy.write(changes, cut(catalogue_version=7))
    copy.write_version(*sealed(version, codebook))
    copy.adopt()


def restored(copy: Copy, trust: Trust | None = None) -> tuple[Catalogue, Users, Arms]:
    moment = copy.cut()
    assert moment is not None
    hands = Catalogue(CODES), Users(ActorSettings()), Arms()
    restore(copy, moment, trust, *hands)
    return hands


def test_what_was_copied_is_restored(copy: Copy) -> None:
    filled(copy)
    catalogue, users, arms = restored(copy)
    assert sorted(catalogue.items) == ["a", "b"]
    assert catalogue.version == catalogue.valid.version == 7, "a deletion may have come last"
    assert users.shown("u") == {"a"}
    served = arms.served("learning")
    assert served is not None
    assert served.version == 3
    assert arms.ready


def test_a_copy_that_is_not_whole_is_none(tmp_path: Path) -> None:
    copy = Copy(tmp_path / "copy")
    copy.begin("c1")
    copy.write({}, cut())
    assert copy.cut() is None
    with pytest.raises(CopyError, match="none"):
        usable(copy, KAFKA, 600.0, NOW_MS)
    filled(copy)
    assert usable(copy, KAFKA, 600.0, NOW_MS).catalogue_version == 7
    copy.begin("c1")
    copy.write({ITEM + b"c": item_change(9, "c", (1, 1, 1), 9)}, cut(catalogue_version=9))
    copy.close()
    later = Copy(tmp_path / "copy")
    assert sorted(restored(later)[0].items) == ["a", "b"], "the one before counts until then"
    later.begin("c1")
    later.write({}, cut())
    later.adopt()
    moment = later.cut()
    assert moment is not None
    assert later.read(moment) == ([], [], [])
    later.close()


def test_a_copy_of_another_cluster_is_forgotten_at_once(copy: Copy) -> None:
    filled(copy)
    copy.begin("c2")
    assert copy.cut() is None
    assert copy.versions() == []


@pytest.mark.parametrize(
    ("kafka", "now_ms", "says"),
    [
        (KafkaSettings(bootstrap="there:1", partitions=2), NOW_MS, "it is of Kafka at here:1"),
        (KafkaSettings(bootstrap="here:1", partitions=3), NOW_MS, "kafka.partitions is 3"),
        (KAFKA, NOW_MS + 601_000, "601 s old, and after actor.max_catalogue_age_s = 600"),
    ],
)
def test_a_copy_of_something_else_or_of_long_ago_is_of_no_use(
    copy: Copy, kafka: KafkaSettings, now_ms: int, says: str
) -> None:
    filled(copy)
    with pytest.raises(CopyError, match=says):
        usable(copy, kafka, 600.0, now_ms)


def test_what_was_deleted_is_gone_and_what_came_back_is_there(copy: Copy) -> None:
    filled(copy)
    copy.write({ITEM + b"a": Change(8, None)}, cut(catalogue_version=8))
    assert sorted(restored(copy)[0].items) == ["b"]
    copy.write({ITEM + b"a": item_change(9, "a", (2, 2, 2), 9)}, cut(catalogue_version=9))
    catalogue, _, _ = restored(copy)
    assert catalogue.valid.sid_of("a") == (2, 2, 2)


def test_what_is_new_in_the_copy_is_what_is_new_in_the_log(copy: Copy) -> None:
    """The law of exploration depends on when items came: it must come out the same."""
    rng = np.random.default_rng(5)
    log = Catalogue(CODES)
    for offset in range(300):
        name = f"i{rng.integers(40)}"
        before = log.items.get(name)
        if before is not None and rng.random() < 0.2:
            log.take(offset, name.encode(), None)
            change = Change(offset, None)
        else:
            stays = before is not None and rng.random() < 0.6
            one, two, three = (int(code) for code in rng.integers(CODES, size=3))
            sid = before.sid if before is not None and stays else (one, two, three)
            value = upsert(name, sid, CODEBOOK, 20_000)
            log.take(offset, name.encode(), value)
            moved = before is None or before.sid != sid
            change = Change(offset, value, offset if moved else None)
        copy.write({ITEM + name.encode(): change}, cut(catalogue_version=offset))
    copy.write_version(*sealed(3))
    copy.adopt()
    catalogue, _, _ = restored(copy)
    assert catalogue.items == log.items
    for span in (1, 5, 20, 100, 300):
        ours, theirs = (one.valid.newborn(299, span).leaves() for one in (catalogue, log))
        assert np.array_equal(ours, theirs)
    assert np.array_equal(catalogue.valid.tree(299).leaves(), log.valid.tree(299).leaves())


def damaged(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("at", [3, 8, 40, -1, -5000])
def test_a_damaged_version_is_not_served(copy: Copy, tmp_path: Path, at: int) -> None:
    filled(copy)
    damaged(tmp_path / "copy" / "versions" / "000000000003", at)
    with pytest.raises(CopyError, match="version 3"):
        restored(copy)


def test_a_version_cut_short_is_not_served(copy: Copy, tmp_path: Path) -> None:
    filled(copy)
    path = tmp_path / "copy" / "versions" / "000000000003"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CopyError, match="version 3 is damaged"):
        restored(copy)


def test_a_version_of_another_codebook_is_not_served(copy: Copy) -> None:
    filled(copy, codebook="other")
    with pytest.raises(CopyError, match="version 3 is of codebook other, the catalogue of"):
        restored(copy)


@pytest.mark.parametrize("how", ["lost", "changed"])
def test_records_that_are_not_what_was_written_are_of_no_use(tmp_path: Path, how: str) -> None:
    copy = Copy(tmp_path / "copy")
    copy.begin("c1")
    filled(copy)
    copy.close()
    store = RocksKv(tmp_path / "copy" / "records")
    (key, value), *_ = [pair for pair in store.scan(b"") if pair[0].endswith(ITEM + b"a")]
    store.write({key: None if how == "lost" else value[:-1] + b"!"})
    store.close()
    again = Copy(tmp_path / "copy")
    with pytest.raises(CopyError, match="damaged"):
        restored(again)
    again.close()


def test_with_a_key_only_what_the_learner_signed_is_served(copy: Copy, tmp_path: Path) -> None:
    private, public = make_pair(tmp_path / "keys")
    _, foreign = make_pair(tmp_path / "foreign")
    filled(copy)
    with pytest.raises(CopyError, match="not signed"):
        restored(copy, Trust.read(public))
    version, seal = sealed(3)
    copy.write_version(version, Seal(seal.manifest, Signer(private).sign(seal.manifest)))
    assert restored(copy, Trust.read(public))[2].ready
    with pytest.raises(CopyError, match="not signed"):
        restored(copy, Trust.read(foreign))


def said(copy: Copy, *commands: Command) -> None:
    changes = {
        COMMAND + number.to_bytes(8): Change(number, encode(command))
        for number, command in zip(itertools.count(), commands, strict=False)
    }
    copy.write(changes, cut(catalogue_version=7))


def command(action: str, **more: object) -> Command:
    what: dict[str, object] = {"id": "", "time_ms": 0, "who": "", "why": "", "action": action}
    return Command(**(what | more))  # type: ignore[arg-type]


def test_each_arm_serves_what_control_says_or_waits(copy: Copy) -> None:
    filled(copy, version=5)
    said(copy, command("pin", arm="control", version=2))
    arms = restored(copy)[2]
    assert (arms.served("control"), arms.ready) == (None, False)
    copy.write_version(*sealed(2))
    arms = restored(copy)[2]
    assert [served.version for arm in ("control", "learning") if (served := arms.served(arm))] == [
        2,
        5,
    ]


def test_a_version_that_a_return_has_left_behind_is_not_served_again(copy: Copy) -> None:
    filled(copy, version=5)
    copy.write_version(*sealed(2))
    said(copy, command("rollback", arm="learning", version=2, upto=6))
    served = restored(copy)[2].served("learning")
    assert served is not None
    assert served.version == 2
    said(
        copy,
        command("rollback", arm="learning", version=2, upto=6),
        command("follow", arm="learning", version=7, restored=2),
    )
    served = restored(copy)[2].served("learning")
    assert served is not None
    assert served.version == 2


def test_versions_that_are_not_wanted_any_more_are_forgotten(copy: Copy) -> None:
    for version in (2, 3, 5):
        copy.write_version(*sealed(version))
    copy.keep({3, 9})
    assert copy.versions() == [3]
    with pytest.raises(FileNotFoundError):
        copy.version(2, None)
    with pytest.raises(WeightError):
        (copy.folder / "versions" / "000000000004").write_bytes(b"")
        copy.version(4, None)
