"""A start: the folder from which a new lineage begins, and its publication to a cluster.

`dwell pretrain` writes one, and the demonstration makes its own. It holds a policy (with codebooks), the
catalogue, and what `histories` and `shaping` begin with; the last two may be empty.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import msgspec

from ops.errors import UserError
from storage.checkpoints import write_atomically
from streams.clients import producer, records
from streams.control import CONTROL_ARM, DEFAULT_SHARES
from streams.events import Command, History, Shaping, Upsert, encode
from streams.history import PackedHistory
from streams.intake import partition_of
from streams.settings import KafkaSettings
from streams.state import shaping_key
from streams.topics import CATALOGUE, CONTROL, HISTORIES, SHAPING

POLICY_FILE = "policy.safetensors"
CATALOGUE_FILE = "catalogue.msgpack"
HISTORIES_FILE = "histories.msgpack"
SHAPING_FILE = "shaping.msgpack"

T = TypeVar("T")


class PlacedShaping(msgspec.Struct):
    """A record of `shaping` and the partition it belongs to."""

    partition: int
    state: Shaping


@dataclass(frozen=True)
class Start:
    """A folder written by `write`."""

    folder: Path

    @property
    def policy(self) -> Path:
        """The checkpoint for `dwell learner --start-from`."""
        return self.folder / POLICY_FILE

    @classmethod
    def at(cls, folder: Path) -> "Start":
        """Open a start; raises `UserError` naming what is missing."""
        for name in (POLICY_FILE, CATALOGUE_FILE, HISTORIES_FILE, SHAPING_FILE):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} is no start of a policy: {name} is missing; `dwell pretrain DIR` writes one."
                )
        return cls(folder)

    def catalogue(self) -> list[Upsert]:
        """The items."""
        return _read(self.folder / CATALOGUE_FILE, list[Upsert])

    def histories(self) -> list[History]:
        """The users' behaviours before the loop."""
        return _read(self.folder / HISTORIES_FILE, list[History])

    def shaping(self) -> list[PlacedShaping]:
        """Shaping state before the loop."""
        return _read(self.folder / SHAPING_FILE, list[PlacedShaping])


def write(
    folder: Path,
    checkpoint: bytes,
    catalogue: list[Upsert],
    histories: Sequence[History | PackedHistory],
    shaping: list[PlacedShaping],
) -> Start:
    """Write a start; the policy last, so that a folder cut short is noticed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (CATALOGUE_FILE, catalogue),
        (HISTORIES_FILE, histories),
        (SHAPING_FILE, shaping),
    ):
        write_atomically(folder / name, msgspec.msgpack.encode(content))
    write_atomically(folder / POLICY_FILE, checkpoint)
    return Start(folder)


def is_published(kafka: KafkaSettings) -> bool:
    """Whether a lineage has begun on this cluster: the publication's last record is on `control`."""
    return any(True for _ in records(kafka.bootstrap, CONTROL))


def publish(start: Start, kafka: KafkaSettings, histories: bool = True) -> None:
    """Put a start on a cluster: catalogue, histories, shaping, then the commands that begin the arms.

    May be repeated after a crash: all but the commands are upserts, and those are the last, together.
    """
    client = producer(kafka.bootstrap, linger_ms=5)
    try:
        for upsert in start.catalogue():
            client.send(CATALOGUE, encode(upsert), upsert.item.encode(), partition=0)
        if histories:
            for history in start.histories():
                place = partition_of(history.user, kafka.partitions)
                client.send(HISTORIES, encode(history), history.user.encode(), partition=place)
            for placed in start.shaping():
                key = shaping_key(placed.state).encode()
                client.send(SHAPING, encode(placed.state), key, partition=placed.partition)
        client.flush()
        for command in _first_commands():
            client.send(CONTROL, encode(command), partition=0)
        client.flush()
    finally:
        client.close()


def _first_commands() -> Iterable[Command]:
    now_ms = int(time.time() * 1000)
    why = "a new lineage begins"
    yield Command(
        id=uuid4().hex,
        time_ms=now_ms,
        who="start",
        why=why,
        action="shares",
        shares=dict(DEFAULT_SHARES),
    )
    yield Command(
        id=uuid4().hex,
        time_ms=now_ms,
        who="start",
        why=why,
        action="pin",
        arm=CONTROL_ARM,
        version=1,
    )


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
