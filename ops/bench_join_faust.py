"""The baseline of `dwell bench join`: a Faust agent that updates a table once an event. Its rate goes into a file."""

import os
import sys
import time
from pathlib import Path

import faust

from streams.topics import EXPOSURES, FEEDBACK


def main() -> None:
    """`python -m ops.bench_join_faust BOOTSTRAP FOLDER EVENTS FILE`."""
    bootstrap, folder, events, rate = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    app = faust.App(
        "bench-faust",
        broker=f"kafka://{bootstrap}",
        datadir=folder / "faust",
        store="memory://",
        topic_partitions=4,
        topic_disable_leader=True,
        autodiscover=False,
        web_enabled=False,
    )
    counts = app.Table("counts", default=int, partitions=4)
    inputs = app.topic(
        EXPOSURES, FEEDBACK, key_type=bytes, value_type=bytes, value_serializer="raw"
    )
    seen: list[float] = []

    @app.agent(inputs)  # type: ignore[untyped-decorator]
    async def count(stream: faust.StreamT[bytes]) -> None:
        async for key, _ in stream.items():  # noqa: PERF102 (not a dict)
            counts[key] += 1
            seen.append(time.monotonic())
            if len(seen) == events:
                Path(rate).write_text(str((events - 1) / (seen[-1] - seen[0])))
                os._exit(0)  # Faust takes its time

    worker = faust.Worker(app, loglevel="ERROR")
    worker.execute_from_commandline()


if __name__ == "__main__":
    main()
