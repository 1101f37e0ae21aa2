"""What an actor says on Kafka besides events: a producer whose records nobody's answer waits for."""

import asyncio

from aiokafka import AIOKafkaProducer
from aiokafka.structs import RecordMetadata

from streams.aioclients import begin, leave_producer


class Words:
    """Sends to topics of one partition, once connected."""

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self._producer: AIOKafkaProducer | None = None
        self._connected = asyncio.Event()

    async def connect(self) -> None:
        """Connect; raises `KafkaError`, and may be tried again."""
        if self._producer is not None:
            return
        producer = AIOKafkaProducer(bootstrap_servers=self._bootstrap)
        try:
            await begin(producer.start())
        except BaseException:
            await leave_producer(producer)
            raise
        self._producer = producer
        self._connected.set()

    async def send(self, topic: str, value: bytes) -> "asyncio.Future[RecordMetadata]":
        """Hand a record to the producer; waits for the connection, so a caller says how long. Raises `KafkaError`."""
        await self._connected.wait()
        assert self._producer is not None
        sent: asyncio.Future[RecordMetadata] = await self._producer.send(topic, value, partition=0)
        return sent

    async def leave(self) -> None:
        """Leave the cluster."""
        if self._producer is not None:
            await leave_producer(self._producer)
