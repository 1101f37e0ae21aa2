"""`dwell insights`: the Faust application that sums the samples up into `insights`, for page, metrics and alerts.

Notable choices
- Approximate by nature: no decision and no gradient depends on it, so it is Faust at its plainest (sums in
  memory over `take`, published once a second). It keeps no table: what it publishes is its table, and after
  any interruption open windows are rebuilt from the log, which takes less code, disk and start-up time than a
  changelog and counts nothing twice.
- Faust's own commits are not used: they stop at each gap that a transaction's marker leaves in the offsets, and so
  advance by one transaction per commit interval (seen: 56 of 642 records, 27 s after the first). Committed is the
  offset that open windows still need, after all that depends on it is on the log.
- Faust reads at `read_committed` only under its exactly_once, which lost and doubled events in kill tests, so its
  consumer is made here. It fetches twice a second: a fetch for each transaction of the join cost 3 times the CPU.
- Faust may create no topic and needs none of its own: no changelog, no leader election, no replies, no web server.
- A Faust worker whose broker has gone may hang when told to stop: a watchdog ends the process in any case.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final, NoReturn

import faust
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import KafkaError
from faust.exceptions import ConsumerNotStarted, ProducerSendError
from faust.transport.drivers import aiokafka as driver
from faust.types import StreamT
from mode import CrashingSupervisor
from prometheus_client import Counter, Gauge, start_http_server

from streams.aioclients import leave
from streams.events import Insight, UnreadableError, decode, encode, sample_decoder
from streams.settings import KafkaSettings
from streams.topics import INSIGHTS, SAMPLES
from streams.windows import EventClock, Windows

INSIGHTS_GROUP: Final = "dwell-insights"
"""Consumer group, and Faust's application id."""

BATCH: Final = 1000
"""Most samples summed at once; a full batch means that there are more to come."""
TAKE_S: Final = 0.5
PUBLISH_S: Final = 1.0
IDLE_S: Final = 10.0
"""A partition that has brought no sample for this long holds back no window of the others."""
SESSION_S: Final = 6.0
"""A worker that has not been heard of for this long loses its partitions."""
REQUEST_S: Final = 10.0
LAST_WORD_S: Final = 1.0
"""A worker that was told to stop may take this long to publish what it has."""
STOP_S: Final = 4.0
"""A worker that was told to stop and has not ended after this long is ended."""

log = logging.getLogger("dwell.insights")

SAMPLES_READ = Counter("dwell_insights_samples", "Samples summed up", ["arm"])
LATE = Counter("dwell_insights_late_samples", "Samples whose window had been closed")
UNREADABLE = Counter("dwell_insights_unreadable_samples", "Records of samples that were skipped")
PUBLISHED = Counter("dwell_insights_published", "Records written to insights")
EVENT_TIME = Gauge("dwell_insights_event_time_seconds", "Event time all partitions have reached")
PLAY = Gauge(
    "dwell_insights_play_seconds_per_request", "Play time a request, last full window", ["arm"]
)
POSITIVE = Gauge(
    "dwell_insights_positive_ratio", "Positives among judged items, last full window", ["arm"]
)
DISLIKES = Gauge(
    "dwell_insights_dislike_ratio", "Dislikes among seen items, last full window", ["arm"]
)
DISTINCT = Gauge("dwell_insights_distinct_items", "Items shown, last full window", ["arm"])


class _Thread(driver.AIOKafkaConsumerThread):
    """Faust's thread around aiokafka's consumer, which is made here because Faust offers no say in it."""

    logger = logging.getLogger("faust.insights.thread")

    def _create_worker_consumer(self, transport: driver.Transport) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            bootstrap_servers=driver.server_list(transport.url, transport.default_port),
            client_id=INSIGHTS_GROUP,
            group_id=INSIGHTS_GROUP,
            partition_assignment_strategy=[RoundRobinPartitionAssignor],
            isolation_level="read_committed",
            auto_offset_reset="earliest",  # what the log no longer has is missed by no one
            enable_auto_commit=False,
            session_timeout_ms=int(SESSION_S * 1000),
            heartbeat_interval_ms=int(SESSION_S * 1000 / 3),
            rebalance_timeout_ms=int(SESSION_S * 1000),
            request_timeout_ms=int(REQUEST_S * 1000),
            fetch_min_bytes=1 << 20,
            fetch_max_wait_ms=int(TAKE_S * 1000),
        )


class _Consumer(driver.Consumer):
    logger = logging.getLogger("faust.insights.consumer")

    def _new_consumer_thread(self) -> driver.AIOKafkaConsumerThread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    async def commit_at(self, offsets: dict[int, int]) -> None:
        """Start again at these offsets of `samples`; raises `KafkaError`."""
        consumer = self._thread._ensure_consumer()
        places = {TopicPartition(SAMPLES, p): offset for p, offset in offsets.items()}
        await self._thread.call_thread(consumer.commit, places)


class _Transport(driver.Transport):
    Consumer = _Consumer


class Insights:
    """The Faust application `app` and what it counts; must be made in the event loop it is to run in.

    Windows of `window_s` seconds of event time are closed `grace_s` seconds after their end.
    """

    def __init__(
        self, bootstrap: str, data_dir: Path, window_s: float = 10.0, grace_s: float = 10.0
    ) -> None:
        self._window_s = window_s
        self._grace_s = grace_s
        self._publishing = asyncio.Lock()
        self._begin([])
        folder = data_dir / "insights"  # Faust insists on one, and leaves it empty
        folder.mkdir(parents=True, exist_ok=True)
        self.app = faust.App(
            INSIGHTS_GROUP,
            broker=";".join(f"kafka://{address}" for address in bootstrap.split(",")),
            datadir=folder,
            autodiscover=False,
            agent_supervisor=CrashingSupervisor,  # a restarted agent would go on after the failed batch
            web_enabled=False,
            topic_allow_declare=False,
            topic_disable_leader=True,
            stream_wait_empty=False,
            broker_session_timeout=SESSION_S,
            broker_request_timeout=REQUEST_S,
            producer_request_timeout=REQUEST_S,
        )
        self.app.transport = _Transport(self.app.conf.broker_consumer, self.app)
        self.app.on_rebalance_complete.connect(self._on_assigned)
        self.app.agent(
            self.app.topic(
                SAMPLES, key_type=bytes, value_type=bytes, value_serializer="raw", acks=False
            ),
            name="insights",
        )(self._sum_up)
        self.app.task(self._publish_regularly)

    def _begin(self, partitions: list[int]) -> None:
        """Faust reads these partitions from their committed offsets on."""
        self._windows = Windows(int(self._window_s * 1000), int(self._grace_s * 1000))
        self._clock = EventClock(partitions, IDLE_S, time.monotonic())
        self._behind = False
        self._committed: dict[int, int] = {}

    async def _on_assigned(self, *_: Any, **__: Any) -> None:
        assigned = self.app.consumer.assignment()
        self._begin(sorted(tp.partition for tp in assigned if tp.topic == SAMPLES))

    async def _sum_up(self, stream: StreamT[bytes]) -> None:
        async for batch in stream.take_events(BATCH, within=TAKE_S):
            for event in batch:
                if event.message.generation_id == self.app.consumer_generation_id:
                    self._add(event.message.partition, event.message.offset, event.value)
            self._behind = len(batch) == BATCH

    def _add(self, partition: int, offset: int, value: bytes | None) -> None:
        try:
            sample = decode(sample_decoder, value)
        except UnreadableError as error:
            UNREADABLE.inc()
            log.warning("%s, partition %d, offset %d: %s", SAMPLES, partition, offset, error)
            return
        late = self._windows.late
        if self._windows.add(partition, offset, sample):
            SAMPLES_READ.labels(sample.arm).inc()
        LATE.inc(self._windows.late - late)
        self._clock.observe(partition, sample.watermark_ms, time.monotonic())

    async def _publish_regularly(self) -> None:
        while not self.app.should_stop:
            await self.app.sleep(PUBLISH_S)
            await self.publish()

    async def publish(self) -> bool:
        """Put what has changed on the log, then commit; False: it failed, and the next call tries again."""
        async with self._publishing:
            windows, now_ms = self._windows, self._clock.now_ms(time.monotonic())
            report = windows.report(now_ms, with_open=not self._behind)
            try:
                await self._write(report)
                offsets = windows.settle()
                if windows is self._windows and offsets != self._committed:
                    await self.app.consumer.commit_at(offsets)
                    self._committed = offsets
            except (KafkaError, ProducerSendError, TimeoutError) as error:
                log.warning("insights cannot be written now: %r", error)
                return False
        PUBLISHED.inc(len(report))
        _show(now_ms, report)
        return True

    async def _write(self, report: list[Insight]) -> None:
        sent = []
        for insight in report:
            key = f"{insight.arm}/{insight.window_start_ms}".encode()
            send = self.app.producer.send(INSIGHTS, key, encode(insight), None, None, None)
            sent.append(asyncio.ensure_future(await asyncio.wait_for(send, REQUEST_S)))
        if sent:
            done, pending = await asyncio.wait(sent, timeout=REQUEST_S)
            for future in pending:
                future.add_done_callback(lambda late: late.cancelled() or late.exception())
            if pending:
                raise TimeoutError("no answer")
            for future in done:
                future.result()


def _show(now_ms: int | None, report: list[Insight]) -> None:
    """Gauges of what the last report says: the newest full window of each arm."""
    if now_ms is not None:
        EVENT_TIME.set(now_ms / 1000)
    for insight in report:
        if insight.final:
            PLAY.labels(insight.arm).set(insight.plays_ms / 1000 / insight.requests)
            POSITIVE.labels(insight.arm).set(insight.positives / max(1, insight.judged))
            DISLIKES.labels(insight.arm).set(insight.dislikes / max(1, insight.seen))
            DISTINCT.labels(insight.arm).set(insight.distinct_items)


def run(kafka: KafkaSettings, data_dir: Path, metrics_port: int) -> None:
    """Run until SIGTERM or SIGINT; must be called in the main thread of a process of its own, which it may end.

    Raises `ConnectionError` when Kafka cannot be reached or lacks the topics, and `OSError` when the port of the
    metrics is taken; either says so in a sentence. A failure later on is logged and ends the process.
    """
    try:
        server, _ = start_http_server(metrics_port, addr="127.0.0.1")
    except OSError as error:
        raise OSError(
            f"the metrics' port {metrics_port} cannot be used: {error.strerror}"
        ) from None
    print(f"metrics at http://127.0.0.1:{server.server_port}/metrics", file=sys.stderr)
    asyncio.run(_run(kafka.bootstrap, data_dir))


async def _run(bootstrap: str, data_dir: Path) -> None:
    loop, told = asyncio.get_running_loop(), asyncio.Event()

    def stop(_signum: int, _frame: object) -> None:
        _end_anyway(os.EX_OK)
        loop.call_soon_threadsafe(told.set)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    await _check(bootstrap)
    insights = Insights(bootstrap, data_dir)
    life = asyncio.create_task(_live(insights.app))
    end = asyncio.create_task(told.wait())
    await asyncio.wait((life, end), return_when=asyncio.FIRST_COMPLETED)
    if life.done():
        reason = life.exception() or insights.app.crash_reason
        log.critical("the insights application has failed: %r", reason)
        _end(os.EX_SOFTWARE)
    if not await _last_word(insights):
        log.warning("Kafka does not answer: stopped as it was, open windows will be rebuilt")
        _end(os.EX_OK)
    await insights.app.stop()


async def _last_word(insights: Insights) -> bool:
    """Publish what there is, and see that Kafka answers: without it Faust cannot stop in order."""
    consumer = insights.app.consumer
    try:
        async with asyncio.timeout(LAST_WORD_S):
            await consumer.highwaters(*consumer.assignment())
            return await insights.publish()
    except (TimeoutError, KafkaError, ConsumerNotStarted):
        return False


async def _live(app: faust.App) -> None:
    await app.start()
    await app.wait_until_stopped()


def _end(code: int) -> NoReturn:
    """End this process without waiting for Faust's threads."""
    logging.shutdown()
    os._exit(code)


def _end_anyway(code: int) -> None:
    """End this process `STOP_S` seconds from now, whatever it is doing then."""
    watchdog = threading.Timer(STOP_S, os._exit, (code,))
    watchdog.daemon = True
    watchdog.start()


async def _check(bootstrap: str) -> None:
    """Faust would wait for ever for a broker or topic that is not there."""
    client = AIOKafkaAdminClient(
        bootstrap_servers=bootstrap, request_timeout_ms=int(REQUEST_S * 1000)
    )
    try:
        await client.start()
        found = set(await client.list_topics())
    except KafkaError as error:
        raise ConnectionError(f"Kafka cannot be reached at {bootstrap}: {error}") from None
    finally:
        await leave(client.close())
    for topic in (SAMPLES, INSIGHTS):
        if topic not in found:
            raise ConnectionError(f"Kafka at {bootstrap} has no topic {topic}")
