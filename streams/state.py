"""What one partition remembers beyond its open requests' events, on local disk, as of a position in the log.

Three changelogs carry it: `shaping`, `histories` and, for the ids of closed requests, `samples` itself. The same
`apply` takes a record after its transaction has committed and when the log is read back after a crash, so an
aborted transaction leaves no trace and a lost disk costs a longer start only.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

from storage.kv import Kv
from streams.events import (
    BucketShaping,
    Held,
    LateStart,
    QuantileShaping,
    Shaping,
    UserShaping,
    decode,
    history_decoder,
    sample_decoder,
    shaping_decoder,
)
from streams.history import PackedHistory, packed_history_decoder
from streams.shape import UserPlays
from streams.topics import HISTORIES, SAMPLES, SHAPING

CHANGELOGS = (SHAPING, HISTORIES, SAMPLES)
_PREFIX = {SHAPING: b"s", HISTORIES: b"h"}


class LogRecord(NamedTuple):
    """A committed record of a changelog; without a value it deletes what stands under its key."""

    topic: str
    offset: int
    value: bytes | None
    key: bytes


class _Closed(msgspec.Struct):
    """What of a sample is remembered."""

    v: str
    request: str
    time_ms: int


_closed_decoder: Final = msgspec.msgpack.Decoder(_Closed)
_DECODERS: Final[dict[str, msgspec.msgpack.Decoder[Any]]] = {
    SHAPING: shaping_decoder,
    HISTORIES: history_decoder,
    SAMPLES: sample_decoder,
}


def read_back(topic: str, offset: int, value: bytes | None, key: bytes | None) -> LogRecord:
    """A record from the log, held against what it should be; raises `UnreadableError`."""
    if value is not None:
        decode(_DECODERS[topic], value)
    return LogRecord(topic, offset, value, key or b"")


def shaping_key(state: Shaping) -> str:
    """Compaction key of a record of `shaping`."""
    if isinstance(state, UserShaping):
        return f"user/{state.arm}/{state.user}"
    if isinstance(state, BucketShaping):
        return f"bucket/{state.arm}/{state.bucket}"
    if isinstance(state, LateStart):
        return late_key(state.offset)
    if isinstance(state, Held):
        return held_key(state.offset)
    return f"quantile/{state.arm}"


def late_key(offset: int) -> str:
    """Compaction key of the start of a late exposure."""
    return f"late/{offset}"


def held_key(offset: int) -> str:
    """Compaction key of a closed request that waits for older ones."""
    return f"held/{offset}"


class PartitionState:
    """Shaping, histories and closed ids of one partition over a `Kv`.

    Others may use `kv` under keys that begin with other letters than `p`, `s`, `h`, `c` and `t`.
    """

    def __init__(self, kv: Kv) -> None:
        self.kv = self._kv = kv

    def position(self, topic: str) -> int:
        """The next offset of a changelog that this state does not contain yet."""
        value = self._kv.get(b"p" + topic.encode())
        return int.from_bytes(value, "big") if value else 0

    def apply(self, records: Iterable[LogRecord]) -> None:
        """Take committed records, with their positions, in one atomic batch."""
        batch: dict[bytes, bytes | None] = {}
        upto: dict[str, int] = {}
        for record in records:
            if record.topic != SAMPLES:
                batch[_PREFIX[record.topic] + record.key] = record.value
            elif record.value is not None:
                sample = decode(_closed_decoder, record.value)
                batch |= _closed(sample.request, sample.time_ms)
            upto[record.topic] = record.offset + 1
        for topic, offset in upto.items():
            batch[b"p" + topic.encode()] = offset.to_bytes(8, "big")
        if batch:
            self._kv.write(batch)

    def plays(self, arm: str, user: str) -> UserPlays | None:
        """A user's committed plays by bucket."""
        value = self._kv.get(f"suser/{arm}/{user}".encode())
        if value is None:
            return None
        state = decode(shaping_decoder, value)
        return state.plays if isinstance(state, UserShaping) else None

    def populations(self) -> Iterator[Shaping]:
        """The committed state of the arms' populations."""
        for prefix in (b"sbucket/", b"squantile/"):
            for _, value in self._kv.scan(prefix):
                state = decode(shaping_decoder, value)
                assert isinstance(state, BucketShaping | QuantileShaping)
                yield state

    def late_starts(self) -> dict[int, int]:
        """Start by exposure offset of the open requests that came late."""
        found = {}
        for _, value in self._kv.scan(b"slate/"):
            state = decode(shaping_decoder, value)
            assert isinstance(state, LateStart)
            found[state.offset] = state.start_ms
        return found

    def held(self) -> dict[int, Held]:
        """Closed requests that wait for older ones, by exposure offset."""
        found = {}
        for _, value in self._kv.scan(b"sheld/"):
            state = decode(shaping_decoder, value)
            assert isinstance(state, Held)
            found[state.offset] = state
        return found

    def history(self, user: str) -> PackedHistory | None:
        """A user's committed history."""
        value = self._kv.get(b"h" + user.encode())
        return decode(packed_history_decoder, value) if value else None

    def is_closed(self, request: str) -> bool:
        """Whether a committed sample closed this request."""
        return self._kv.get(b"c" + request.encode()) is not None

    def forget_closed(self, before_ms: int, most: int = 10_000) -> int:
        """Drop ids of requests exposed before `before_ms`; returns how many, `most` a call."""
        batch: dict[bytes, bytes | None] = {}
        for key, _ in self._kv.scan(b"t"):
            if int.from_bytes(key[1:9], "big") >= before_ms or len(batch) >= 2 * most:
                break
            batch[key] = None
            batch[b"c" + key[9:]] = None
        if batch:
            self._kv.write(batch)
        return len(batch) // 2

    def close(self) -> None:
        """Release the store."""
        self._kv.close()


def _closed(request: str, time_ms: int) -> dict[bytes, bytes | None]:
    """An id, and an index of ids by time for forgetting."""
    time = time_ms.to_bytes(8, "big")
    return {b"c" + request.encode(): time, b"t" + time + request.encode(): b""}
