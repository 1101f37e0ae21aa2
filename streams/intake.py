"""From a Kafka record to an event that the join may trust; everything else is a dead letter with a reason.

All checks are decidable from the log alone (value, partition, record timestamp), so an audit comes to the same
verdict. What passes cannot stop anything behind it: its sample fits into a record, its numbers are finite, its ids
are of bounded length.
"""

import math
from functools import lru_cache

from aiokafka.partitioner import murmur2

from streams.events import (
    BEHAVIOUR,
    LEVELS,
    Exposure,
    Feedback,
    ShownItem,
    Tick,
    UnreadableError,
    decode,
    exposure_decoder,
    feedback_decoder,
)

MAX_EVENT_BYTES = 250_000
"""Longer records are refused: a sample, which holds its exposure, must stay below Kafka's 1 MB."""
MAX_ITEMS = 1000
MAX_ID = 256
"""Characters of an id."""
MAX_LOGP = 1e-3
"""A log-probability may be above 0 by what float32 rounds, not more."""
_LOWEST = -math.inf
_U16 = 1 << 16
_U32 = 1 << 32


@lru_cache(maxsize=1 << 16)
def partition_of(user: str, partitions: int) -> int:
    """The partition of a user's records: Kafka's own murmur2 of the UTF-8 key."""
    return int((murmur2(user.encode()) & 0x7FFFFFFF) % partitions)


class Intake:
    """Reads the records of one partition."""

    def __init__(self, partition: int, partitions: int, max_skew_ms: int) -> None:
        self._partition = partition
        self._partitions = partitions
        self._max_skew_ms = max_skew_ms

    def exposure(self, value: bytes | None, record_ms: int) -> Exposure | Tick:
        """Read one record of `exposures`; raises `UnreadableError`."""
        _fits(value)
        event = decode(exposure_decoder, value)
        if not 0 <= event.time_ms <= record_ms + self._max_skew_ms:
            self._time(event.time_ms, record_ms)
        if type(event) is Exposure:
            if not (
                0 < len(event.request) <= MAX_ID
                and 0 < len(event.user) <= MAX_ID
                and 0 < len(event.arm) <= MAX_ID
            ):
                _ids(request=event.request, user=event.user, arm=event.arm)
            self._place(event.user)
            _shape_of(event)
        return event

    def feedback(self, value: bytes | None, record_ms: int) -> Feedback | Tick:
        """Read one record of `feedback`; raises `UnreadableError`."""
        _fits(value)
        event = decode(feedback_decoder, value)
        if not 0 <= event.time_ms <= record_ms + self._max_skew_ms:
            self._time(event.time_ms, record_ms)
        if type(event) is Feedback:
            if not (
                0 < len(event.event) <= MAX_ID
                and 0 < len(event.request) <= MAX_ID
                and 0 < len(event.user) <= MAX_ID
            ):
                _ids(event=event.event, request=event.request, user=event.user)
            self._place(event.user)
            if not 0 <= event.play_ms < _U32:
                raise UnreadableError("bad_value", f"play_ms is {event.play_ms}, allowed 0..2^32-1")
            if event.position < 0 and event.kind != "left":
                raise UnreadableError("bad_value", f"kind {event.kind} needs a position >= 0")
        return event

    def _time(self, time_ms: int, record_ms: int) -> None:
        if time_ms < 0:
            raise UnreadableError("bad_value", f"time_ms is {time_ms}, allowed >= 0")
        if time_ms > record_ms + self._max_skew_ms:
            ahead = time_ms - record_ms
            raise UnreadableError("future", f"event time is {ahead} ms ahead of its record")

    def _place(self, user: str) -> None:
        expected = partition_of(user, self._partitions)
        if expected != self._partition:
            raise UnreadableError(
                "wrong_partition", f"user {user!r} belongs to partition {expected} (murmur2)"
            )


def _fits(value: bytes | None) -> None:
    if value is not None and len(value) > MAX_EVENT_BYTES:
        raise UnreadableError("too_large", f"{len(value)} bytes, allowed {MAX_EVENT_BYTES}")


def _ids(**ids: str) -> None:
    for name, text in ids.items():
        if not text or len(text) > MAX_ID:
            raise UnreadableError(
                "bad_value", f"{name} has {len(text)} characters, allowed 1..{MAX_ID}"
            )


def _shape_of(exposure: Exposure) -> None:
    """What the structs cannot say about an exposure."""
    items = exposure.items
    if not items or len(items) > MAX_ITEMS:
        raise UnreadableError("bad_value", f"{len(items)} items, allowed 1..{MAX_ITEMS}")
    if len({item.position for item in items}) != len(items):
        raise UnreadableError("bad_value", "two items share a position")
    for item in items:
        if not _sound(item):
            _explain(item)
    if "/" in exposure.arm:
        raise UnreadableError("bad_value", f"arm is {exposure.arm!r}, allowed is a name without /")
    if not 0 < exposure.temperature < math.inf:
        raise UnreadableError("bad_value", f"temperature is {exposure.temperature}, allowed > 0")
    if len(exposure.context) % BEHAVIOUR.itemsize:
        raise UnreadableError(
            "bad_value", f"context is not whole {BEHAVIOUR.itemsize}-byte records"
        )
    if len(exposure.excluded) % (2 * LEVELS):
        raise UnreadableError("bad_value", "excluded is not whole semantic IDs")


def _sound(item: ShownItem) -> bool:
    """All that `_explain` would complain of, at once: most of an exposure's checks are these."""
    a, b, c = item.sid
    if not (
        0 < len(item.item) <= MAX_ID
        and item.position >= 0
        and 0 <= item.duration_ms < _U32
        and 0 <= a < _U16
        and 0 <= b < _U16
        and 0 <= c < _U16
    ):
        return False
    if item.logp_levels is None:
        return item.source != "policy"
    x, y, z = item.logp_levels
    return _LOWEST < x <= MAX_LOGP and _LOWEST < y <= MAX_LOGP and _LOWEST < z <= MAX_LOGP


def _explain(item: ShownItem) -> None:
    """Raise for what is wrong with an item."""
    _ids(item=item.item)
    where = f"of item {item.item!r}"
    if item.position < 0:
        raise UnreadableError("bad_value", f"position {where} is {item.position}, allowed >= 0")
    if not 0 <= item.duration_ms < _U32:
        raise UnreadableError(
            "bad_value", f"duration_ms {where} is {item.duration_ms}, allowed 0..2^32-1"
        )
    if not all(0 <= code < _U16 for code in item.sid):
        raise UnreadableError("bad_value", f"sid {where} is {item.sid}, allowed 0..65535 each")
    logp = item.logp_levels
    if logp is None:
        if item.source == "policy":
            raise UnreadableError("bad_value", f"logp_levels {where} of the policy is missing")
    elif not all(-math.inf < level <= MAX_LOGP for level in logp):
        raise UnreadableError("bad_value", f"logp_levels {where} is {logp}, allowed is finite <= 0")
