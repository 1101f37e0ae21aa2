"""Which partitions a streams process works on: a consumer group proposes, transactions decide.

Notable choices (contract of the streams, "Exactly once comes from Kafka transactions")
- Membership only says who should try. That one alone succeeds is the transactional id's doing: starting a
  partition's producer fences whoever held it, awake or not. So a partition that stays ours through a rebalance
  runs on, although the protocol takes all away for a moment.
- Members are static: one that comes back within `session_s` finds its partitions as they were, without a
  rebalance; one that does not loses them to the others.
- The group has offsets of its own, which are never used; nothing is fetched through it.
- A partition that somebody takes while the group says it is ours is given up until the group speaks again; if it
  does not, the process ends: somebody works on it from outside the group.
"""

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError
from prometheus_client import Gauge

from storage.heap import settle_heap
from streams.aioclients import begin, leave, leave_producer, tell_once
from streams.processor import PartitionProcessor
from streams.readback import OwnershipLostError, StreamsError
from streams.settings import JoinSettings, KafkaSettings, ShapeSettings, StreamsSettings
from streams.topics import EXPOSURES

log = logging.getLogger("dwell.streams")

OWNERS_GROUP: Final = "dwell-streams-owners"
OWNED = Gauge("dwell_streams_partitions", "Partitions that this process works on")


class Member(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """This process in the group; `assigned` is what the group proposed last, its `word`-th."""

    def __init__(self, kafka: KafkaSettings, streams: StreamsSettings) -> None:
        self.assigned: set[int] = set()
        self.word = 0
        self.spoken = asyncio.Event()
        self._name = streams.member
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=kafka.bootstrap,
            group_id=OWNERS_GROUP,
            group_instance_id=streams.member,
            session_timeout_ms=round(streams.session_s * 1000),
            heartbeat_interval_ms=round(streams.session_s * 250),
            max_poll_interval_ms=(1 << 31) - 1,
            enable_auto_commit=False,
            auto_offset_reset="latest",
        )

    async def start(self) -> None:
        """Join; raises `KafkaError`."""
        await begin(self._consumer.start())
        self._consumer.subscribe([EXPOSURES], listener=self)

    async def follow(self) -> None:
        """Stay a member; ends only with an error of the group."""
        try:
            while True:  # nothing comes this way but what is wrong with the membership
                await self._consumer.getmany(timeout_ms=1000)
        except KafkaError as error:
            raise StreamsError(
                f"the group {OWNERS_GROUP} refuses member {self._name!r}: {error!r}; does another process run "
                "under this name? Give each its own with --member"
            ) from None

    async def stop(self) -> None:
        """Leave without a word: a static member is expected back."""
        await leave(self._consumer.stop())

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Work goes on until somebody else has taken it over."""

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """The group has spoken."""
        self._consumer.pause(*assigned)
        self.assigned = {place.partition for place in assigned}
        self.word += 1
        self.spoken.set()


class Owner:
    """Keeps one processor running for each partition that the group proposes."""

    def __init__(
        self,
        kafka: KafkaSettings,
        join: JoinSettings,
        shape: ShapeSettings,
        streams: StreamsSettings,
        state_dir: Path,
    ) -> None:
        self._settings = (kafka, join, shape, streams, state_dir)
        self._patience_s = 2 * streams.session_s
        self._member = Member(kafka, streams)
        self._ticker = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, linger_ms=0)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._lost: dict[int, tuple[OwnershipLostError, int, float]] = {}
        """By partition: what was said, the group's word by then, and until when it may speak again."""

    async def run(self) -> None:
        """Work until cancelled; raises what stops a processor, or `StreamsError` for the membership."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(leave_producer, self._ticker)
            await begin(self._ticker.start())
            stack.push_async_callback(self._member.stop)
            await self._member.start()
            stack.push_async_callback(self._end_all)
            following = asyncio.create_task(self._member.follow())
            stack.callback(following.cancel)
            while True:
                await self._reconcile()
                spoken = asyncio.create_task(self._member.spoken.wait())
                waiting = [following, spoken, *self._running.values()]
                await asyncio.wait(waiting, timeout=1, return_when=asyncio.FIRST_COMPLETED)
                spoken.cancel()
                if following.done():
                    following.result()

    async def _reconcile(self) -> None:
        """Take note of what ended, and bring what runs in line with the group's last word."""
        self._member.spoken.clear()
        for partition, task in list(self._running.items()):
            if task.done():
                del self._running[partition]
                self._ended(partition, task)
        wanted = self._member.assigned
        await self._end(self._running.keys() - wanted)
        for partition in wanted - self._running.keys():
            if not self._given_up(partition):
                kafka, join, shape, streams, state_dir = self._settings
                processor = PartitionProcessor(partition, kafka, join, shape, streams, state_dir)
                self._running[partition] = asyncio.create_task(processor.run(self._ticker))
        OWNED.set(len(self._running))

    def _ended(self, partition: int, task: asyncio.Task[None]) -> None:
        try:
            task.result()
        except OwnershipLostError as error:
            log.warning("%s", error)
            until = time.monotonic() + self._patience_s
            self._lost[partition] = (error, self._member.word, until)

    def _given_up(self, partition: int) -> bool:
        """Whether the partition was taken from us since the group last spoke."""
        if partition not in self._lost:
            return False
        error, word, until = self._lost[partition]
        if word != self._member.word:
            del self._lost[partition]
            return False
        if time.monotonic() > until:
            raise error
        return True

    async def _end_all(self) -> None:
        await self._end(set(self._running))

    async def _end(self, partitions: set[int]) -> None:
        ending = [self._running.pop(p) for p in partitions & self._running.keys()]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)


async def own(
    kafka: KafkaSettings,
    join: JoinSettings,
    shape: ShapeSettings,
    streams: StreamsSettings,
    state_dir: Path,
) -> None:
    """Process what the group proposes to `streams.member`, with local state below `state_dir`, until cancelled.

    Raises `StreamsError` when its logs cannot be gone on with or the group refuses it, `StoreError` when its local
    state cannot be opened.
    """
    asyncio.get_running_loop().set_exception_handler(tell_once)
    settle_heap()
    await Owner(kafka, join, shape, streams, state_dir).run()
