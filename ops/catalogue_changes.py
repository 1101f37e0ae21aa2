"""`dwell catalogue upsert` and `delete`: the catalogue changes while actors serve.

Notable choices
- The writer of an upsert assigns the semantic ID (contract of the policy, "The valid tree"): with the codebooks of
  the lineage's newest checkpoint here, or of the one named; theirs must be the digest that the catalogue has.
- Nothing is written unless all lines are good: entries are made first and put aside in a file of their own, so that
  memory holds a piece of them. They are written one after the other, not in a transaction: a crash half-way leaves
  the first of them written, and the same command may be given again.
- A deletion counts for an actor once it has applied it *and* answered what it had begun before; `--wait` waits for
  that word of every live actor (ops/present.py).
"""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, Final

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError
from rich.console import Console

from learner.checkpoint import CheckpointError, codebooks_of
from learner.semantic_ids import Codebooks
from learner.versions import CHECKPOINTS
from ops.admin import ensure_topics
from ops.catalogue import standing, unknown
from ops.config import Config
from ops.entries import Entries, Lineage
from ops.errors import UserError
from ops.present import wait
from ops.start import POLICY_FILE
from storage.checkpoints import Checkpoints
from streams.clients import producer
from streams.topics import CATALOGUE

PIECE: Final = 2048
"""Lines that are read, or records that are written, at once."""
STDIN: Final = "-"


@dataclass(frozen=True)
class Patience:
    """Whether and how long to wait for the actors."""

    wait: bool = False
    limit_s: float = 30.0


def upsert(config: Config, file: str, codebooks: Path | None, patience: Patience) -> int:
    """Add or replace the items of a file of JSON lines, or of standard input; the exit status.

    Raises `UserError`, and nothing was written, when a line is wrong.
    """
    console = Console()
    ensure_topics(config.kafka.bootstrap, config.kafka)
    with console.status("reading the catalogue"):
        here = standing(config)
    entries = Entries(lineage_of(config, here.catalogue.codebook, codebooks), here.entry)
    with _opened(file) as lines, TemporaryFile() as aside, console.status("") as status:
        numbered = enumerate(lines, start=1)
        while piece := list(islice(numbered, PIECE)):
            for entry in entries.take(piece):
                _put(aside, entry)
            status.update(f"checked {entries.lines:,} lines")
        if entries.faulty:
            for fault in entries.faults:
                console.print(fault, markup=False)
            wrong = f"{entries.faulty} of {entries.lines} lines of {file} are wrong"
            raise UserError(f"{wrong}: mend them; nothing was written.")
        if not entries.lines:
            raise UserError(f"{file} has no lines: a line is a JSON object, one for each item.")
        aside.seek(0)
        version = 0
        with _writing(config) as client:
            done = 0
            while batch := list(islice(_got(aside), PIECE)):
                version = _write(client, batch)
                done += len(batch)
                status.update(f"wrote {done:,} of {entries.lines:,} items")
        written = time.monotonic()
    console.print(f"{entries.lines} items are in the catalogue: version {version}")
    return _awaited(config, console, version, written, patience, "recommendable")


def delete(config: Config, items: list[str], patience: Patience) -> int:
    """Delete items; the exit status. Raises `UserError`, and nothing was written, when one was never there.

    Items that are deleted already are not deleted again, but waited for.
    """
    console = Console()
    ensure_topics(config.kafka.bootstrap, config.kafka)
    with console.status("reading the catalogue"):
        here = standing(config)
    never = [item for item in dict.fromkeys(items) if item not in here.last]
    if never:
        raise UserError(f"{unknown(never)} Nothing was deleted.")
    live = [item for item in dict.fromkeys(items) if here.last[item].value is not None]
    version = max(here.last[item].offset for item in items)
    if live:
        with _writing(config) as client:
            for start in range(0, len(live), PIECE):
                version = _write(client, [(item, None) for item in live[start : start + PIECE]])
    written = time.monotonic()
    before = len(set(items)) - len(live)
    already = f", {before} were deleted already" if before else ""
    console.print(f"{len(live)} items are deleted{already}: version {version}")
    return _awaited(config, console, version, written, patience, "gone")


def lineage_of(config: Config, codebook: str, named: Path | None) -> Lineage:
    """The lineage of a catalogue (`codebook` is empty where that is), with its codebooks where they are at hand.

    They are taken from a checkpoint, or start, that is named, else from the newest one in the data directory. Raises
    `UserError` when those named are others, and when nothing says which codebooks are the lineage's.
    """
    if named is not None:
        path = named / POLICY_FILE if (named / POLICY_FILE).is_file() else named
        try:
            books = codebooks_of(path)
        except CheckpointError as error:
            raise UserError(
                f"{error}: --codebooks takes a checkpoint, or a folder that `dwell pretrain` wrote."
            ) from None
        if codebook not in ("", books.digest()):
            raise UserError(
                f"{path} holds codebooks {books.digest()}, the catalogue uses {codebook}: name a checkpoint of the "
                "catalogue's lineage."
            )
        return Lineage(books.digest(), books.codes, books)
    for books in _at_hand(Path(config.storage.data_dir)):
        if codebook in ("", books.digest()):
            return Lineage(books.digest(), books.codes, books)
    if not codebook:
        raise UserError(
            "the catalogue is empty, and no checkpoint here says which codebooks are its: name one with --codebooks."
        )
    return Lineage(codebook, config.policy.codes, None)


def _at_hand(data_dir: Path) -> Iterator[Codebooks]:
    """Codebooks below a data directory, the newest checkpoint's first."""
    paths = []
    if (data_dir / CHECKPOINTS).is_dir():
        kept = Checkpoints(data_dir / CHECKPOINTS)
        paths = [kept.path(version) for version in reversed(kept.versions())]
    starts = [data_dir / name / POLICY_FILE for name in ("start", "pretrained")]
    for path in [*paths, *(start for start in starts if start.is_file())]:
        try:
            yield codebooks_of(path)
        except CheckpointError:
            continue  # a learner says so


def _awaited(
    config: Config, console: Console, version: int, began: float, patience: Patience, what: str
) -> int:
    """Wait for the actors where that was asked for; exit status 1 when one does not answer in time."""
    if not patience.wait:
        return 0
    silent_s = config.actor.max_catalogue_age_s
    with console.status("") as status:
        found = wait(
            config.kafka.bootstrap,
            version,
            patience.limit_s,
            silent_s,
            lambda behind: status.update(f"waiting for {', '.join(one.actor for one in behind)}"),
        )
    took_s = time.monotonic() - began
    for one in found.silent:
        console.print(
            f"{one.actor} fell silent at version {one.version}: it ended, or is cut off from Kafka and goes on "
            f"serving for at most {silent_s:g} s (actor.max_catalogue_age_s)",
            markup=False,
        )
    if found.behind:
        told = ", ".join(f"{one.actor} (at version {one.version})" for one in found.behind)
        console.print(
            f"version {version} is written, but not acknowledged after {took_s:.1f} s by: {told}",
            markup=False,
        )
        return 1
    if not found.live:
        console.print("no actor is live, so there is none to wait for")
        return 0
    where = f"on {len(found.live)} actor{'s' * (len(found.live) > 1)}"
    console.print(f"{what} {where}: {took_s:.3f} s after it was written")
    return 0


@contextmanager
def _writing(config: Config) -> Iterator[KafkaProducer]:
    client = producer(config.kafka.bootstrap, linger_ms=5, max_request_size=1 << 20)
    try:
        yield client
    except KafkaError as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"Kafka refused a change of the catalogue ({why}): what came before it is "
            "written; give the command again."
        ) from None
    finally:
        client.close()


def _write(client: KafkaProducer, batch: list[tuple[str, bytes | None]]) -> int:
    """Append records of the catalogue, and wait until Kafka has them; the offset of the last."""
    sent = [client.send(CATALOGUE, value, item.encode(), partition=0) for item, value in batch]
    return max(int(future.get(timeout=60).offset) for future in sent)


def _opened(file: str) -> AbstractContextManager[BinaryIO]:
    if file == STDIN:
        return nullcontext(sys.stdin.buffer)
    try:
        return Path(file).open("rb")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None


def _put(aside: BinaryIO, entry: tuple[str, bytes]) -> None:
    packed = msgspec.msgpack.encode(entry)
    aside.write(len(packed).to_bytes(4, "little") + packed)


def _got(aside: BinaryIO) -> Iterator[tuple[str, bytes | None]]:
    while length := aside.read(4):
        yield _entry.decode(aside.read(int.from_bytes(length, "little")))


_entry: Final = msgspec.msgpack.Decoder(tuple[str, bytes])
