"""`dwell catalogue` on a real broker, with actors that serve."""

import asyncio
import io
import json
import re
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actor.presence import PATIENCE_S
from learner.checkpoint import Progress, to_bytes
from learner.policy import build
from learner.semantic_ids import Codebooks, fit
from learner.settings import LearnSettings, PolicySettings
from learner.step import Trainer
from learner.versions import CHECKPOINTS
from ops import catalogue_changes, present
from ops.catalogue import show_all, show_one, standing
from ops.catalogue_changes import Patience, delete, lineage_of, upsert
from ops.config import Config
from ops.errors import UserError
from storage.checkpoints import Checkpoints
from storage.settings import StorageSettings
from streams.clients import producer, records
from streams.events import CatalogueAck, encode
from streams.topics import CATALOGUE, CATALOGUE_ACKS
from tests.actor.conftest import outage, own_broker, world
from tests.actor.world import CODES, ROWS, Actor, World, acting, until, user_of

__all__ = ("outage", "own_broker", "world")

WIDTH = 4
LEARNING = user_of("learning")
AT_ONCE = Patience()
WAITING = Patience(wait=True, limit_s=30.0)


@pytest.fixture(scope="module")
def books() -> Codebooks:
    return fit(np.random.default_rng(1).normal(size=(200, WIDTH)), CODES, 1)


@pytest.fixture(scope="module")
def checkpoint(books: Codebooks) -> bytes:
    progress = Progress(version=3, lineage="l", preset="tiny", codes=CODES, user_rows=ROWS)
    settings = LearnSettings()
    return to_bytes(Trainer(build("tiny", CODES, ROWS), settings, settings.lr), progress, books)


@pytest.fixture
def config(world: World, tmp_path: Path, checkpoint: bytes) -> Config:
    """A data directory with a checkpoint of the lineage."""
    Checkpoints(tmp_path / CHECKPOINTS).write(3, checkpoint)
    return replace(
        Config(),
        kafka=world.kafka,
        policy=PolicySettings(codes=CODES, user_rows=ROWS),
        storage=StorageSettings(data_dir=str(tmp_path)),
    )


def file_of(folder: Path, *lines: dict[str, Any]) -> str:
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def line(item: str, seed: int = 0, **more: object) -> dict[str, Any]:
    vector = np.random.default_rng(seed).normal(size=WIDTH)
    return {"item": item, "duration_ms": 20_000, "embedding": vector.tolist(), **more}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def on_the_log(config: Config) -> int:
    with closing(records(config.kafka.bootstrap, CATALOGUE)) as log:
        return len(list(log))


def test_a_new_catalogue_has_the_checkpoints_codebooks_and_ids(
    config: Config, tmp_path: Path, books: Codebooks, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line(f"i{n}", n, author="ann", tags=["x", "y"]) for n in range(10)]
    assert upsert(config, file_of(tmp_path, *lines), None, AT_ONCE) == 0
    assert "10 items are in the catalogue: version 9" in said(capsys)
    here = standing(config)
    assert here.catalogue.codebook == books.digest()
    for one in lines:
        entry = here.entry(one["item"])
        assert entry is not None
        vector = np.asarray(one["embedding"], "f4")
        assert entry.sid == tuple(books.assign(vector[None]).tolist()[0])
        assert (entry.author, entry.tags) == ("ann", ["x", "y"])
    assert show_all(config, 3) == 0
    told = said(capsys)
    assert "10 items" in told
    assert books.digest() in told
    assert show_one(config, "i4") == 0
    assert "4 numbers" in said(capsys)


def test_nothing_is_written_unless_all_lines_are_good(
    config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalogue_changes, "PIECE", 4)
    wrong = {**line("bad"), "embedding": [1.0]}
    lines = [*(line(f"i{n}", n) for n in range(9)), wrong, line("z"), {"item": "y"}]
    with pytest.raises(UserError, match=r"2 of 12 lines of .* are wrong: .* nothing was written"):
        upsert(config, file_of(tmp_path, *lines), None, AT_ONCE)
    told = said(capsys)
    assert "line 10, embedding: it has 1 numbers, the codebooks read 4" in told
    assert "line 12, duration_ms: it is missing" in told
    assert on_the_log(config) == 0
    assert upsert(config, file_of(tmp_path, *lines[:9]), None, AT_ONCE) == 0
    assert on_the_log(config) == 9


def test_lines_come_from_standard_input(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(json.dumps(line("in", 1)).encode())

    monkeypatch.setattr("sys.stdin", Stdin)
    assert upsert(config, "-", None, AT_ONCE) == 0
    assert standing(config).entry("in") is not None


@pytest.mark.parametrize("content", [None, ""])
def test_a_file_that_is_not_there_or_empty_is_one_sentence(
    config: Config, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "some.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=r"some\.jsonl (cannot be read: No such|has no lines)"):
        upsert(config, str(file), None, AT_ONCE)


def test_codebooks_of_another_lineage_are_refused_by_name(
    config: Config, world: World, tmp_path: Path
) -> None:
    path = Checkpoints(tmp_path / CHECKPOINTS).path(3)
    world.upsert(("a", (0, 0, 0)))
    with pytest.raises(UserError, match="the catalogue uses c0debook"):
        upsert(config, file_of(tmp_path, line("b")), path, AT_ONCE)
    with pytest.raises(UserError, match="1 of 1 lines"):
        upsert(config, file_of(tmp_path, line("b")), None, AT_ONCE)
    explicit = {"item": "b", "duration_ms": 1, "sid": [0, 0, 0]}
    assert upsert(config, file_of(tmp_path, explicit), None, AT_ONCE) == 0
    entry = standing(config).entry("b")
    assert entry is not None
    assert entry.codebook == "c0debook"
    with pytest.raises(UserError, match=r"--codebooks takes a checkpoint"):
        upsert(config, file_of(tmp_path, explicit), tmp_path / "gone", AT_ONCE)


def test_a_damaged_checkpoint_is_passed_over_and_none_at_all_is_said(
    config: Config, tmp_path: Path, books: Codebooks
) -> None:
    Checkpoints(tmp_path / CHECKPOINTS).write(4, b"rubbish")
    assert lineage_of(config, "", None).codebook == books.digest()
    nowhere = replace(config, storage=StorageSettings(data_dir=str(tmp_path / "other")))
    with pytest.raises(UserError, match="the catalogue is empty"):
        lineage_of(nowhere, "", None)


def test_a_deleted_item_is_told_of_and_one_that_never_was_stops_everything(
    config: Config, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.upsert(("a", (0, 0, 0)), ("b", (0, 0, 0)), ("c", (1, 0, 0)))
    with pytest.raises(UserError, match="'x', 'y' is not in the catalogue") as caught:
        delete(config, ["a", "x", "y"], AT_ONCE)
    assert "Nothing was deleted" in str(caught.value)
    assert standing(config).entry("a") is not None
    assert delete(config, ["a", "a"], AT_ONCE) == 0
    assert "1 items are deleted: version" in said(capsys)
    assert show_one(config, "a") == 0
    assert "a was deleted: version" in said(capsys)
    before = on_the_log(config)
    assert delete(config, ["a", "c"], AT_ONCE) == 0
    assert "1 items are deleted, 1 were deleted already" in said(capsys)
    assert on_the_log(config) == before + 1
    with pytest.raises(UserError, match="'gone' is not in the catalogue"):
        show_one(config, "gone")


def test_without_actors_there_is_nobody_to_wait_for(
    config: Config, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.upsert(("a", (0, 0, 0)))
    assert delete(config, ["a"], WAITING) == 0
    assert "no actor is live" in said(capsys)


async def serving(actor: Actor, stop: asyncio.Event, answers: list[tuple[float, set[str]]]) -> None:
    """Ask on and on; when each request began, and what it was shown."""
    number = 0
    while not stop.is_set():
        began = time.monotonic()
        answer = await actor.recommend(user_of("learning", number % 4), 6)
        assert answer.status == 200
        answers.append((began, {item["item"] for item in answer.json["items"]}))
        number += 1


async def test_a_new_item_is_soon_recommendable_and_a_deleted_one_never_again(
    config: Config,
    world: World,
    tmp_path: Path,
    books: Codebooks,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of two actors, while requests run. The new item shares its ID with another, whose leaf stays."""
    await asyncio.to_thread(
        upsert, config, file_of(tmp_path, *(line(f"i{n}", n) for n in range(12))), None, AT_ONCE
    )
    world.publish(1, codebook=books.digest())
    stop, answers = asyncio.Event(), list[tuple[float, set[str]]]()
    async with acting(world, exclude_shown=0) as one, acting(world, exclude_shown=0) as two:
        clients = [asyncio.create_task(serving(actor, stop, answers)) for actor in (one, two)]
        await until(lambda: len(answers) > 20)
        twin = {**line("i3", 3), "item": "new"}
        capsys.readouterr()
        status = await asyncio.to_thread(upsert, config, file_of(tmp_path, twin), None, WAITING)
        told = said(capsys)
        assert status == 0
        found = re.search(r"recommendable on 2 actors: (\d+\.\d+) s after it was written", told)
        assert found, told
        took_s = float(found[1])
        assert took_s < 5.0, told  # .14 on a machine with little else to do
        for actor in (one, two):
            assert "new" in actor.service._catalogue.items
        await until(lambda: any("new" in shown for _, shown in answers))

        assert await asyncio.to_thread(delete, config, ["new", "i5"], WAITING) == 0
        gone = time.monotonic()
        told = said(capsys)
        assert "gone on 2 actors" in told
        answers_then = len(answers)
        await until(lambda: len(answers) > answers_then + 60)
        stop.set()
        await asyncio.gather(*clients)
        catalogue = one.service._catalogue
        sid = tuple(books.assign(np.asarray([twin["embedding"]], "f4")).tolist()[0])
        key = (sid[0] * CODES + sid[1]) * CODES + sid[2]
        assert "i3" in catalogue.valid.members(key, catalogue.version)
        assert "new" not in catalogue.valid.members(key, catalogue.version)
        assert key in catalogue.valid.tree(catalogue.version).leaves()
    later = [shown for began, shown in answers if began >= gone]
    assert len(later) > 20
    assert not any({"new", "i5"} & shown for shown in later)
    assert any("i3" in shown for shown in later), "its leaf is still served"
    with capsys.disabled():
        print(f"\nupsert --wait on two serving actors: {took_s:.3f} s; {told}")


async def test_an_actor_that_does_not_answer_is_named_and_the_deletion_stands(
    config: Config, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.fill_catalogue()
    world.publish(1)

    def stuck() -> None:
        ack = CatalogueAck(actor="stuck:1", run="x", catalogue_version=2)
        dead = CatalogueAck(actor="dead:1", run="y", catalogue_version=2)
        with closing(producer(config.kafka.bootstrap)) as client:
            long_ago = int((time.time() - present.LIVE_S - 60) * 1000)
            client.send(CATALOGUE_ACKS, encode(dead), partition=0, timestamp_ms=long_ago)
            client.send(CATALOGUE_ACKS, encode(ack), partition=0)
            client.flush()

    async with acting(world):
        await asyncio.to_thread(stuck)
        patience = Patience(wait=True, limit_s=2.0)
        assert await asyncio.to_thread(delete, config, ["i1"], patience) == 1
        told = said(capsys)
        assert "not acknowledged after 2." in told
        assert "by: stuck:1 (at version 2)" in told
        assert "actor:1" not in told
        assert "dead:1 fell silent at version 2" in told
        assert "600 s (actor.max_catalogue_age_s)" in told
        assert standing(config).entry("i1") is None
        # Who asks again waits for the same deletion, and a silent actor is waited for no longer than it is live.
        long = Patience(wait=True, limit_s=present.LIVE_S + 10 * PATIENCE_S)
        before = on_the_log(config)
        assert await asyncio.to_thread(delete, config, ["i1"], long) == 0
        told = said(capsys)
        assert "stuck:1 fell silent" in told
        assert "gone on 1 actor:" in told
        assert on_the_log(config) == before
        assert show_all(config, 1) == 0
        assert "actor:1 has applied version" in said(capsys)
