"""Exposures and feedback on their way to Kafka: through the spool while Kafka is away.

Notable choices
- An event is durable when `send` returns: acknowledged by Kafka, or in the spool. What is not acknowledged in time
  goes to the spool together with all that is on its way, in the order in which it came; it may be on the log already.
  So the log may hold an event twice, never none of it, and the first copies of a user's events stand in their order.
- While the spool holds anything every new event goes through it, without waiting for Kafka. Under load it would never
  be found empty: while the last chunk is sent new events are held, then they go the direct way, or to the spool.
- Records are stamped when they are sent from the spool, not when they were put there: a record's timestamp is the
  time of writing (contract of the streams).
- What Kafka will not take ends the actor with a sentence; what is in the spool stays there for the next start.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from prometheus_client import Counter, Gauge

from actor.disk import DiskThread
from actor.producing import Call, Producing, Record, heard, passes, reason, refused
from storage.kv import StoreError
from storage.spool import Spool
from streams.topics import MAX_MESSAGE_BYTES

log = logging.getLogger("dwell.actor")

AWAY = Gauge("dwell_actor_kafka_away", "1 while new events go through the spool")
SPOOL_RECORDS = Gauge("dwell_actor_spool_records", "Events in the spool")
SPOOL_BYTES = Gauge("dwell_actor_spool_bytes", "Bytes in the spool")
SPOOL_OLDEST = Gauge(
    "dwell_actor_spool_oldest_timestamp_seconds",
    "When the oldest event of the spool came; 0 for none",
)
SPOOLED = Counter("dwell_actor_spooled_total", "Events put into the spool", ["topic"])
DRAINED = Counter("dwell_actor_drained_total", "Events sent from the spool", ["topic"])
REFUSED = Counter("dwell_actor_spool_refused_total", "Requests for whose events there was no room")

ACK_S: Final = 10.0
"""So long a drain waits for one chunk before it tries another producer."""
RETRY_S: Final = 0.5
CHUNK_RECORDS: Final = 1000
CHUNK_BYTES: Final = 1 << 20

_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Record)


class SpoolFullError(RuntimeError):
    """Kafka is away and there is no room left; the message says how much there was."""


class Outgoing:
    """The way of events from requests to Kafka; `open`, then run `keep` and `drain` until `close`."""

    def __init__(self, producing: Producing, spool: Spool, patience_s: float) -> None:
        self._producing = producing
        self._spool = spool
        self._patience_s = patience_s
        self._disk = DiskThread("spool")
        self._on_the_way: dict[Call, None] = {}
        self._queue: deque[Call] = deque()
        self._queued = asyncio.Event()
        self._away: asyncio.Future[None]
        """Done while events go through the spool."""
        self._gone = asyncio.Event()
        self._gone_since = 0.0
        self._given_up = False
        self._held: dict[Call, asyncio.Future[bool]] | None = None
        """Calls that wait for the last chunk, to be told whether they may go directly."""
        self._drained = 0

    async def open(self, away: bool = False) -> None:
        """Connect; raises `KafkaError`, and then there is nothing to close but the spool.

        `away`: Kafka does not answer; events go to the spool from the first one on, until `drain` finds it back.
        """
        self._away = asyncio.get_running_loop().create_future()
        self._given_up = away
        if not away:
            await self._producing.open()
        self._tell()
        if self._spool.count:
            (first,) = await self._disk.do(self._spool.oldest, 1, 1)
            SPOOL_OLDEST.set(_decoder.decode(first.record).time_ms / 1000)
            log.warning("%d events of an earlier run go first: %s", *self._what_is_kept())
        if away or self._spool.count:
            self._leave_direct_way()

    async def close(self) -> None:
        """Leave Kafka; what is in the spool stays there for the next start."""
        await self._producing.close()
        self._disk.end()
        if self._spool.count:
            log.warning("%d events wait for the next start: %s", *self._what_is_kept())

    @property
    def waiting(self) -> int:
        """Events in the spool, or on their way to it."""
        calls = [*self._queue, *(self._held or {})]
        return self._spool.count + sum(len(call.records) for call in calls)

    async def send(self, topic: str, records: Sequence[tuple[str, bytes]]) -> None:
        """Append (user, value) pairs to a topic; they are durable when this returns.

        Raises `SpoolFullError`, `StoreError` (the disk), `RefusedError` or `MessageSizeTooLargeError`: not durable.
        """
        for user, value in records:
            if len(user.encode()) + len(value) > MAX_MESSAGE_BYTES:
                raise MessageSizeTooLargeError(f"{len(value)} bytes for {topic}")
        now_ms = int(time.time() * 1000)
        call = Call([Record(now_ms, topic, user, value) for user, value in records])
        directly = not self._away.done() or await self._turn(call)
        if not directly or not await self._acknowledged(topic, call):
            await call.kept

    async def _turn(self, call: Call) -> bool:
        """Whether Kafka is back for this one; if not, it is on its way to the spool."""
        if self._held is None:
            self._put(call)
            return False
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._held[call] = turn
        return await turn

    async def _acknowledged(self, topic: str, call: Call) -> bool:
        """Send to Kafka: whether it has all of it; if not, it is on its way to the spool."""
        self._on_the_way[call] = None
        sending = asyncio.create_task(self._producing.send(call.records, call.acks))
        try:
            await asyncio.wait(
                (sending, self._away),
                timeout=self._patience_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if self._away.done():  # another saw it first, and has put this one too
                return False
            if not sending.done():
                self._go_away(f"no acknowledgement within {self._patience_s:g} s")
                return False
            error = sending.exception()
            if error is None:
                return True
            if not passes(error):
                raise refused(topic, error) if isinstance(error, KafkaError) else error
            self._go_away(reason(error))
            return False
        finally:
            self._on_the_way.pop(call, None)
            sending.cancel()
            sending.add_done_callback(heard)

    def _go_away(self, why: str) -> None:
        """From now on through the spool, beginning with all that is on its way, in order."""
        log.warning("Kafka is away (%s): events go to the spool %s", why, self._spool.folder)
        self._given_up = True
        self._leave_direct_way()
        for call in self._on_the_way:
            self._put(call)
        self._on_the_way.clear()

    def _leave_direct_way(self) -> None:
        self._away.set_result(None)
        self._gone.set()
        self._gone_since = time.monotonic()
        AWAY.set(1)

    def _come_back(self) -> None:
        self._away = asyncio.get_running_loop().create_future()
        self._gone.clear()
        AWAY.set(0)
        took_s = time.monotonic() - self._gone_since
        log.info("Kafka is back after %.1f s: %d events went from the spool", took_s, self._drained)
        self._drained = 0

    def _release(self, directly: bool) -> None:
        """What has been held goes to Kafka or to the spool, in the order in which it came."""
        held, self._held = self._held, None
        for call, turn in (held or {}).items():
            if turn.done():  # the request was broken off
                continue
            if not directly:
                self._put(call)
            turn.set_result(directly)

    def _put(self, call: Call) -> None:
        self._queue.append(call)
        self._queued.set()

    async def keep(self) -> None:
        """Write to the spool what comes for it; all that has come meanwhile shares one write."""
        while True:
            await self._queued.wait()
            calls = list(self._queue)
            left = [call.left() for call in calls]
            outcomes: list[Exception | None]
            was_empty = not self._spool.count
            try:
                groups = [[_encode(record) for record in records] for records in left]
                fitted = await self._disk.do(self._spool.append, groups)
                outcomes = [None if fits else self._full() for fits in fitted]
            except StoreError as error:
                log.error("%s", error)
                outcomes = [error] * len(calls)
            for call, records, outcome in zip(calls, left, outcomes, strict=True):
                self._queue.popleft()
                if outcome is None:
                    for record in records:
                        SPOOLED.labels(record.topic).inc()
                else:
                    REFUSED.inc()
                call.settle(outcome)
            if not self._queue:
                self._queued.clear()
            if was_empty:
                SPOOL_OLDEST.set(calls[0].records[0].time_ms / 1000)
            self._tell()

    async def drain(self) -> None:
        """Send what is in the spool, oldest first; raises `RefusedError` or `StoreError`."""
        quick = False
        while True:
            await self._gone.wait()
            caught_up = not self._queue and self._spool.count <= CHUNK_RECORDS
            last = quick and caught_up and not self._given_up
            back = quick = False
            try:
                if self._given_up:
                    await self._producing.replace()
                    self._given_up = False
                quick = await self._send_oldest(last)
                back = last and not self._queue and not self._spool.count
            except (KafkaError, OSError) as error:
                if not passes(error):
                    raise refused("the spool", error) from None
                if not self._given_up:
                    log.info("the spool tries another producer: %s", reason(error))
                self._given_up = True
            finally:
                if back:
                    self._come_back()
                    quick = False
                self._release(back)
            if self._given_up:
                await asyncio.sleep(RETRY_S)

    async def _send_oldest(self, last: bool) -> bool:
        """Send the oldest chunk, and forget it when Kafka has it; whether Kafka was quick.

        While it is the `last` one new events are held, so it has no longer than they may wait.
        """
        if last:
            self._held = {}
        chunk = await self._disk.do(self._spool.oldest, CHUNK_RECORDS, CHUNK_BYTES)
        if not chunk:
            return True
        records = [_decoder.decode(kept.record) for kept in chunk]
        SPOOL_OLDEST.set(records[0].time_ms / 1000)
        began = time.monotonic()
        async with asyncio.timeout(self._patience_s if last else ACK_S):
            await self._producing.send(records, [])
        took_s = time.monotonic() - began
        await self._disk.do(self._spool.drop, chunk[-1].number)
        self._drained += len(records)
        for record in records:
            DRAINED.labels(record.topic).inc()
        self._tell()
        return took_s < self._patience_s / 2

    def _tell(self) -> None:
        SPOOL_RECORDS.set(self._spool.count)
        SPOOL_BYTES.set(self._spool.size_bytes)
        if not self._spool.count:
            SPOOL_OLDEST.set(0)

    def _what_is_kept(self) -> tuple[int, object]:
        return self._spool.count, self._spool.folder

    def _full(self) -> SpoolFullError:
        room_mb = self._spool.most_bytes >> 20
        return SpoolFullError(
            f"Kafka is away and the spool is full (actor.spool_mb = {room_mb}): not acknowledged, try again later"
        )
