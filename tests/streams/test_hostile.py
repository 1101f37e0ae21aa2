"""Hostile records among good ones, on a real broker: each is one dead letter, and the next record is unharmed."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ops.admin import ensure_topics
from ops.audit_samples import audit_samples
from ops.broker import EmbeddedBroker
from ops.config import Config
from streams.clients import records
from streams.events import Exposure, dead_letter_decoder, decode, encode
from streams.intake import MAX_EVENT_BYTES
from streams.settings import KafkaSettings
from streams.topics import DEAD_LETTERS, EXPOSURES, FEEDBACK
from tests.streams.live import LONG, running, until, users_of, write, writer
from tests.streams.makers import T0
from tests.streams.shell import busy_arrivals

FAR = T0 + 1_000_000_000
STRANGE: list[Any] = [
    None,
    -1,
    1 << 40,
    -(1 << 62),
    1e308,
    "",
    "x" * 300,
    b"\xff",
    [],
    {},
    [[]],
    True,
    [1, 2],
]


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[KafkaSettings]:
    with EmbeddedBroker(tmp_path / "hostile") as broker:
        settings = KafkaSettings(bootstrap=broker.bootstrap, partitions=2)
        ensure_topics(settings.bootstrap, settings)
        yield settings


def hostile(value: bytes, rng: random.Random) -> bytes | None:
    """A good record made bad, mostly."""
    match rng.randrange(9):
        case 0:
            return value[: rng.randrange(len(value))]
        case 1:
            flipped = bytearray(value)
            for _ in range(rng.randint(1, 4)):
                flipped[rng.randrange(len(flipped))] = rng.randrange(256)
            return bytes(flipped)
        case 2:
            return rng.randbytes(rng.randrange(200))
        case 3:
            return rng.choice([None, b"", b"\xc0", b"{}", b"[" * 500])
        case 4:
            fields = msgspec.msgpack.decode(value)
            fields[rng.choice([*fields, "new"])] = rng.choice(STRANGE)
            return msgspec.msgpack.encode(fields)
        case 5:
            fields = msgspec.msgpack.decode(value)
            fields["v"] = rng.choice(["2.0", "99.1", "", "one", "1.9"])
            return msgspec.msgpack.encode(fields)
        case 6:
            fields = msgspec.msgpack.decode(value)
            fields["time_ms"] = rng.choice([-5, 1 << 50, 4_000_000_000_000])
            return msgspec.msgpack.encode(fields)
        case 7:
            fields = msgspec.msgpack.decode(value)
            fields["user"] = f"stranger-{rng.randrange(100)}"
            return msgspec.msgpack.encode(fields)
        case _:
            return value + rng.randbytes(rng.randrange(1, 9))


async def attacked(kafka: KafkaSettings, folder: Path, seed: int, bad: int) -> None:
    rng = random.Random(seed)
    sent: dict[tuple[str, int, int], bytes | None] = {}
    good: set[str] = set()
    async with AsyncExitStack() as stack:
        producer = await stack.enter_async_context(writer(kafka))
        tasks = [await stack.enter_async_context(running(kafka, p, folder)) for p in range(2)]
        for batch in range(0, bad, 200):
            waiting = []
            for partition in range(2):
                users = users_of(partition, 2)
                arrivals = busy_arrivals(rng.randrange(1 << 30), 10)
                for event in arrivals:
                    if isinstance(event, int):
                        continue
                    event.user = rng.choice(users)
                    event.request = f"{batch}/{partition}/{event.request}"
                    topic = EXPOSURES if isinstance(event, Exposure) else FEEDBACK
                    good |= {event.request} if topic == EXPOSURES else set()
                    value, key = encode(event), event.user.encode()
                    await producer.send(topic, value, key, partition=partition)
                for _ in range(100):
                    event = rng.choice([e for e in arrivals if not isinstance(e, int)])
                    topic = EXPOSURES if isinstance(event, Exposure) else FEEDBACK
                    value_ = hostile(encode(event), rng)
                    future = await producer.send(topic, value_, b"key", partition=partition)
                    waiting.append((topic, partition, value_, future))
            for topic, partition, value_, future in waiting:
                sent[(topic, partition, (await future).offset)] = value_
        huge = b"\x81" + b"x" * MAX_EVENT_BYTES
        last = await producer.send_and_wait(FEEDBACK, huge, b"key", partition=0)
        sent[(FEEDBACK, 0, last.offset)] = huge
        for partition in range(2):
            await write(producer, partition, [FAR, FAR + 1])
        config = Config(kafka=kafka, join=LONG)
        await until(lambda: settled(config, good))
        assert not any(task.done() for task in tasks)
    found = audit_samples(config)
    faults = (found.lost, found.duplicated, found.wrong_label, found.unaccounted)
    assert faults == (0, 0, 0, 0), found.examples
    letters = [
        decode(dead_letter_decoder, record.value)
        for record in records(kafka.bootstrap, DEAD_LETTERS)
    ]
    assert len(letters) > 0.6 * bad
    origins = Counter((each.topic, each.partition, each.offset) for each in letters)
    assert max(origins.values()) == 1
    for letter in letters:
        origin = (letter.topic, letter.partition, letter.offset)
        assert letter.reason and letter.detail
        if origin in sent:
            assert letter.value == (sent[origin] or b"")[:MAX_EVENT_BYTES]
        else:
            assert letter.reason == "too_late", "a good record became a dead letter"
    reasons = {letter.reason for letter in letters}
    assert reasons >= {"malformed", "unknown_major", "wrong_partition", "future", "too_large"}


async def settled(config: Config, good: set[str]) -> bool:
    """Whether the join has read everything, and nothing is open."""
    found = audit_samples(config)
    return found.open == 0 and found.exposures + found.dead_letters["too_late"] >= len(good)


async def test_two_thousand_hostile_records(kafka: KafkaSettings, tmp_path: Path) -> None:
    await attacked(kafka, tmp_path / "state", seed=1, bad=2000)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_hundred_thousand_hostile_records(kafka: KafkaSettings, tmp_path: Path) -> None:
    await attacked(kafka, tmp_path / "state", seed=2, bad=100_000)
