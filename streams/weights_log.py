"""The versions in the log, read back to its present end: for starts, commands and audits.

Notable choices
- The chain (`weights`) is read once, in order; an anchor is read where the chain does not lead to it, and where its
  delta cannot be taken. So a version counts when an actor could have served it.
- What is yielded is checked in full; a version that cannot be taken comes with its fault instead.
"""

from collections import deque
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field

from kafka import KafkaConsumer, TopicPartition

from streams.chain import Version, anchored, followed
from streams.clients import consumer, read, records
from streams.events import UnreadableError, decode
from streams.signing import Trust
from streams.topics import WEIGHTS, WEIGHTS_ANCHORS
from streams.weights import Assembler, Manifest, WeightError, weights_decoder

Found = tuple[Manifest, Version | WeightError]


@dataclass
class Anchors:
    """The full versions on `weights.anchors`."""

    manifests: dict[int, Manifest] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)
    """Where each one's manifest stands."""

    def before(self, version: int) -> int | None:
        """The newest at or before a version."""
        return max((one for one in self.manifests if one <= version), default=None)


def anchors(bootstrap: str) -> Anchors:
    """The anchors that have not expired."""
    found = Anchors()
    for record in records(bootstrap, WEIGHTS_ANCHORS):
        number, _, part = (record.key or b"").decode(errors="replace").partition("/")
        if part != "manifest" or not number.isdigit():
            continue
        found.manifests.pop(int(number), None)
        with suppress(UnreadableError):
            manifest = None if record.value is None else decode(weights_decoder, record.value)
            if isinstance(manifest, Manifest):
                found.manifests[int(number)] = manifest
                found.offsets[int(number)] = record.offset
    found.manifests = dict(sorted(found.manifests.items()))
    return found


def manifests_after(bootstrap: str, version: int) -> list[Manifest]:
    """The manifests of the versions after `version` that are still in the log, ascending."""
    found = {
        number: manifest
        for number, manifest in anchors(bootstrap).manifests.items()
        if number > version
    }
    for record in records(bootstrap, WEIGHTS):
        if record.value is None or not (record.key or b"").endswith(b"/manifest"):
            continue
        part = decode(weights_decoder, record.value)
        if isinstance(part, Manifest) and part.version > version:
            found[part.version] = part
    return [found[number] for number in sorted(found)]


def walk(
    bootstrap: str, trust: Trust | None = None, first: int = 0
) -> Generator[Found, None, None]:
    """Each version from the anchor at or before `first` on, ascending: with its state, or why it has none."""
    end = _end(bootstrap)  # before the anchors: those of all versions up to here are there then
    known = anchors(bootstrap)
    begin = known.before(first)
    waiting = deque(one for one in known.manifests if begin is None or one >= begin)
    chain_from = known.manifests[waiting[0]].chain if waiting else 0
    head: Version | None = None
    with (
        closing(consumer(bootstrap)) as client,
        closing(_wholes(bootstrap, chain_from, end, trust)) as chain,
    ):
        for manifest, content in chain:
            number = manifest.version
            while waiting and waiting[0] < number:
                found = _loaded(client, known, waiting.popleft(), trust)
                head = found[1] if isinstance(found[1], Version) else head
                yield found
            if (begin is not None and number < begin) or (head and number <= head.number):
                continue  # written again, it is passed over as by actors
            result = _taken(head, manifest, content)
            if waiting and waiting[0] == number:
                waiting.popleft()
                if isinstance(result, WeightError):
                    manifest, result = _loaded(client, known, number, trust)
            head = result if isinstance(result, Version) else head
            yield manifest, result
        for number in waiting:
            yield _loaded(client, known, number, trust)


def version_at(bootstrap: str, number: int, trust: Trust | None = None) -> Version:
    """One version; raises `WeightError` where the log does not lead to it."""
    with closing(walk(bootstrap, trust, number)) as found:
        for manifest, version in found:
            if manifest.version == number:
                if isinstance(version, WeightError):
                    raise version
                return version
    whole = "whole" if trust is None else "whole, and signed by whom we trust,"
    raise WeightError(f"version {number} is not {whole} in the log")


def _taken(head: Version | None, manifest: Manifest, content: bytes) -> Version | WeightError:
    """What a record of the chain makes of what stands before it."""
    number = manifest.version
    if head is None or not manifest.base:
        return WeightError(f"version {number}: no anchor is left that leads to it")
    try:
        return followed(head, manifest, content)
    except WeightError as error:
        return error


def _loaded(client: KafkaConsumer, known: Anchors, number: int, trust: Trust | None) -> Found:
    """An anchor, read by itself."""
    assembler = Assembler(trust)
    manifest = known.manifests[number]
    try:
        for record in read(client, WEIGHTS_ANCHORS, first=known.offsets[number]):
            whole = assembler.take(record.value)
            if whole is not None:
                if whole[0].version == number:
                    return manifest, anchored(*whole)
                break
    except WeightError as error:
        return manifest, error
    return manifest, WeightError(f"version {number} is not whole in the log")


def _end(bootstrap: str) -> int:
    """Where the chain ends now."""
    place = TopicPartition(WEIGHTS, 0)
    with closing(consumer(bootstrap)) as client:
        return int(client.end_offsets([place])[place])


def _wholes(
    bootstrap: str, first: int, last: int, trust: Trust | None
) -> Generator[tuple[Manifest, bytes], None, None]:
    """The versions of the chain between two offsets that can be put together."""
    assembler = Assembler(trust)
    with closing(records(bootstrap, WEIGHTS, first=first, last=last)) as chain:
        for record in chain:
            with suppress(WeightError):
                whole = assembler.take(record.value)
                if whole is not None:
                    yield whole
