"""The open requests of one partition: those touched lately in memory, all others on local disk.

Notable choices
- Resident memory does not grow with the number of open requests: beyond `most_hot`, those not touched for longest
  go to the partition's store between two batches, packed, and come back when an event or their time asks for them.
- What is on disk is scratch. After a restart it is dropped, and open requests are rebuilt from the log as if there
  had been none: a second authority beside the log would have to be kept in step with it.
- A request's next look is a heap entry while it is in memory, and a key in order of time while it is not.
- How far back the log is still needed is kept by blocks of offsets, not by request: an answer may be a block older
  than the oldest open request, which costs a restart a few records more.
"""

import heapq
from collections import OrderedDict
from itertools import islice
from typing import Final

import msgspec

from storage.kv import Kv
from streams.decision import FOREVER, NEVER, Decision, event_order
from streams.events import Exposure, Feedback

_REQUEST: Final = b"o"
_DUE: Final = b"d"
_LOADED_AT_ONCE: Final = 256
_DROPPED_AT_ONCE: Final = 10_000
OFFSET_BLOCK: Final = 256
"""Offsets counted together."""


class OpenRequest:
    """A request that waits for feedback, or feedback that waits for its exposure."""

    __slots__ = (
        *("begun", "check_ms", "decision", "events", "exposure", "exposure_offset"),
        *("feedback_offset", "ids", "in_order", "late", "looked_ms", "start_ms"),
    )

    def __init__(self) -> None:
        self.exposure: Exposure | None = None
        self.exposure_offset = -1
        self.feedback_offset = -1
        """Of the first event."""
        self.start_ms = NEVER
        self.late = False
        """Whether the start is later than the exposure's own time."""
        self.check_ms = FOREVER
        """The watermark at which to look again."""
        self.looked_ms = FOREVER
        """The watermark for which the present look was asked."""
        self.events: list[Feedback] = []
        self.ids: set[str] = set()
        self.begun: dict[int, int] = {}
        """Earliest play event by position."""
        self.decision: Decision | None = None
        """What the events so far make of it, where that has been asked."""
        self.in_order = True

    def add(self, event: Feedback) -> None:
        """One event more."""
        if self.events and event.time_ms <= self.events[-1].time_ms:
            self.in_order = False
        self.events.append(event)
        self.ids.add(event.event)
        self.decision = None

    def ordered(self) -> list[Feedback]:
        """The events in `event_order`."""
        if not self.in_order:
            self.events.sort(key=event_order)
            self.in_order = True
        return self.events


class _Packed(msgspec.Struct, array_like=True):
    """An `OpenRequest` on disk."""

    exposure: Exposure | None
    exposure_offset: int
    feedback_offset: int
    start_ms: int
    late: bool
    check_ms: int
    events: list[Feedback]
    begun: dict[int, int]


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_Packed)


def _packed(request: OpenRequest) -> bytes:
    return _encoder.encode([getattr(request, name) for name in _Packed.__struct_fields__])


def _unpacked(value: bytes) -> OpenRequest:
    packed, request = _decoder.decode(value), OpenRequest()
    for name in _Packed.__struct_fields__:
        setattr(request, name, getattr(packed, name))
    request.ids = {event.event for event in request.events}
    request.in_order = False
    return request


class OffsetFloor:
    """The smallest of a changing set of offsets, rounded down to whole blocks; added in ascending order."""

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}

    def add(self, offset: int) -> None:
        """One offset more."""
        block = offset // OFFSET_BLOCK
        self._blocks[block] = self._blocks.get(block, 0) + 1

    def remove(self, offset: int) -> None:
        """One that had been added."""
        block = offset // OFFSET_BLOCK
        left = self._blocks[block] - 1
        if left:
            self._blocks[block] = left
        else:
            del self._blocks[block]

    def floor(self, upto: int) -> int:
        """No offset in the set is smaller; `upto` of an empty set."""
        first = next(iter(self._blocks), None)
        return upto if first is None else min(upto, first * OFFSET_BLOCK)


class OpenRequests:
    """Open requests by id, and when to look at each again. `kv` is used under the keys `o...` and `d...`."""

    def __init__(self, kv: Kv, most_hot: int) -> None:
        self._kv = kv
        self._most_hot = most_hot
        self._hot: OrderedDict[str, OpenRequest] = OrderedDict()
        self._cold = 0
        self._cold_due_ms = FOREVER
        self._checks: list[tuple[int, str]] = []
        self.next_ms = FOREVER
        """No request asks to be looked at before this watermark."""
        self._drop_scratch()

    def __len__(self) -> int:
        return len(self._hot) + self._cold

    def get(self, name: str) -> OpenRequest | None:
        """An open request, which now counts as touched."""
        request = self._hot.get(name)
        if request is not None:
            self._hot.move_to_end(name)
        elif self._cold:
            value = self._kv.get(_REQUEST + name.encode())
            if value is not None:
                request = self._load({name: value})[name]
        return request

    def new(self, name: str) -> OpenRequest:
        """Open a request; there is none of this name."""
        request = self._hot[name] = OpenRequest()
        return request

    def remove(self, name: str) -> None:
        """It is no longer open; it is in memory, for it has just been looked at."""
        del self._hot[name]

    def look_at(self, name: str, request: OpenRequest, check_ms: int) -> None:
        """Look at it once the watermark is there; only the earliest such wish counts."""
        if check_ms < request.check_ms:
            request.check_ms = check_ms
            heapq.heappush(self._checks, (check_ms, name))
            if check_ms < self.next_ms:
                self.next_ms = check_ms

    def due(self, watermark_ms: int) -> tuple[str, OpenRequest] | None:
        """The request that asked for the earliest look of all up to this watermark; its wish is fulfilled."""
        while True:
            hot_ms = self._checks[0][0] if self._checks else FOREVER
            self.next_ms = min(hot_ms, self._cold_due_ms)
            if self.next_ms > watermark_ms:
                return None
            if self._cold_due_ms <= hot_ms:
                self._load_due(watermark_ms)
                continue
            check_ms, name = heapq.heappop(self._checks)
            request = self._hot.get(name)
            if request is not None and request.check_ms == check_ms:
                request.looked_ms, request.check_ms = check_ms, FOREVER
                return name, request

    def settle(self) -> None:
        """Between two batches: put away what has not been touched for longest."""
        if len(self._hot) <= self._most_hot:
            return
        batch: dict[bytes, bytes | None] = {}
        while len(self._hot) > self._most_hot:
            name, request = self._hot.popitem(last=False)
            key = name.encode()
            batch[_REQUEST + key] = _packed(request)
            batch[_due_key(request.check_ms, key)] = b""
            self._cold += 1
            self._cold_due_ms = min(self._cold_due_ms, request.check_ms)
        self._kv.write(batch)
        if len(self._checks) > 2 * len(self._hot) + _LOADED_AT_ONCE:
            self._checks = [check for check in self._checks if check[1] in self._hot]
            heapq.heapify(self._checks)

    def _load(self, values: dict[str, bytes]) -> dict[str, OpenRequest]:
        """Take packed requests off the disk."""
        loaded = {name: _unpacked(value) for name, value in values.items()}
        batch: dict[bytes, bytes | None] = {}
        for name, request in loaded.items():
            key = name.encode()
            batch[_REQUEST + key] = None
            batch[_due_key(request.check_ms, key)] = None
            heapq.heappush(self._checks, (request.check_ms, name))
        self._kv.write(batch)
        self._hot.update(loaded)
        self._cold -= len(loaded)
        if not self._cold:
            self._cold_due_ms = FOREVER
        return loaded

    def _load_due(self, watermark_ms: int) -> None:
        """Load the next few that are due, in order of time."""
        values: dict[str, bytes] = {}
        self._cold_due_ms, after = FOREVER, self._cold_due_ms
        for key, _ in self._kv.scan(_DUE, _due_key(after, b"")):
            due_ms = int.from_bytes(key[1:9], "big") + NEVER
            if due_ms > watermark_ms or len(values) >= _LOADED_AT_ONCE:
                self._cold_due_ms = due_ms
                break
            name = key[1 + 8 :]
            value = self._kv.get(_REQUEST + name)
            assert value is not None  # both are written and deleted together
            values[name.decode()] = value
        self._load(values)

    def _drop_scratch(self) -> None:
        for prefix in (_REQUEST, _DUE):
            while batch := dict.fromkeys(
                key for key, _ in islice(self._kv.scan(prefix), _DROPPED_AT_ONCE)
            ):
                self._kv.write(batch)


def _due_key(check_ms: int, name: bytes) -> bytes:
    return _DUE + (check_ms - NEVER).to_bytes(8, "big") + name
