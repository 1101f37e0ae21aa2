"""The two ends of `dwell bench kills` as processes that may be killed at any moment: who writes and who reads.

The producer notes up to when everything was acknowledged, and begins there again: at least once, as a client with a
spool. The consumer keeps what it took and how far it has come in one file, written as one: what a learner's
checkpoint does.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import msgspec
from kafka import TopicPartition

from ops.kills_plan import LONGEST_MS, Plan
from ops.roles import end_with_parent
from streams.clients import consumer, producer
from streams.events import Sample, decode, encode, sample_decoder
from streams.topics import SAMPLES

PROGRESS: Final = "written-upto"
TAKEN: Final = "taken"
STEP_S: Final = 0.02


def write(bootstrap: str, folder: Path, plan: Plan) -> None:
    """Write what is planned when it is due; at SIGTERM no request is begun any more, and all else is written."""
    last_request = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: last_request.set())
    progress = folder / PROGRESS
    from_ms = int(progress.read_text()) if progress.exists() else plan.t0_ms
    client = producer(bootstrap, linger_ms=5, reconnect_backoff_max_ms=500)
    end: int | None = None
    sent: list[Any] = []
    now_ms = from_ms
    for due in plan.writes(from_ms):
        if end is None and last_request.is_set():
            end = max(plan.first_at(int(time.time() * 1000)), plan.first_at(now_ms) + 1)
        if end is not None and due.at_ms > plan.time_of(end) + LONGEST_MS:
            break
        if due.at_ms > now_ms:
            for future in sent:
                future.get(timeout=120)
            sent = []
            _note(progress, str(now_ms))
            while (now_ms := int(time.time() * 1000)) < due.at_ms:
                time.sleep(STEP_S)
                if last_request.is_set() and end is None:
                    break
        if end is not None and due.order[0] >= end:
            continue
        key = due.event.user.encode()
        sent.append(client.send(due.topic, encode(due.event), key))
    for future in sent:
        future.get(timeout=120)
    client.close()
    _note(folder / "requests", str(end))


def _note(path: Path, text: str) -> None:
    aside = path.with_suffix(".new")
    aside.write_text(text)
    aside.replace(path)


class Line(msgspec.Struct, array_like=True):
    """One sample as the consumer took it."""

    partition: int
    offset: int
    request: str


def taken(folder: Path) -> list[Line]:
    """What the consumer holds; a last line that was cut off by a kill does not count."""
    path = folder / TAKEN
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [msgspec.json.decode(line, type=Line) for line in whole.splitlines()]


def read(bootstrap: str, folder: Path, partitions: int) -> None:
    """Take every sample once, until killed or told to stop."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    held = taken(folder)
    upto = {line.partition: line.offset + 1 for line in held}
    client = consumer(bootstrap, reconnect_backoff_max_ms=500)
    places = [TopicPartition(SAMPLES, number) for number in range(partitions)]
    client.assign(places)
    for place in places:
        client.seek(place, upto.get(place.partition, 0))
    path = folder / TAKEN
    path.touch()
    with path.open("r+b") as out:
        out.truncate(out.read().rfind(b"\n") + 1)
        out.seek(0, os.SEEK_END)
        while not stopped.is_set():
            lines = []
            for batch in client.poll(timeout_ms=100).values():
                for record in batch:
                    sample: Sample = decode(sample_decoder, record.value)
                    lines.append(Line(record.partition, record.offset, sample.request))
            if lines:
                out.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
                out.flush()
                os.fsync(out.fileno())
    client.close()


def main() -> None:
    """`python -m ops.kills_parts write|read BOOTSTRAP FOLDER ...`."""
    end_with_parent()
    what, bootstrap, folder, *rest = sys.argv[1:]
    if what == "write":
        seed, t0_ms, rate = rest
        write(bootstrap, Path(folder), Plan(int(seed), int(t0_ms), float(rate)))
    else:
        read(bootstrap, Path(folder), int(rest[0]))


if __name__ == "__main__":
    main()
