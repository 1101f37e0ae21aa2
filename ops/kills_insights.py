"""What the insights made of the samples of `dwell bench kills`, held against the samples themselves.

Notable choices
- Insights are approximate: a sample that comes after its window was closed, because its partition was away for longer
  than the others were made to wait, is in no sum. How much that is under force is reported (`error`) and not judged.
- What must hold is that they are never stuck: every window that event time has left behind in all partitions is
  published as final. Windows that are still open at the end prove nothing and are left out.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from streams.clients import consumer, read
from streams.events import Insight, Sample, decode, insight_decoder, sample_decoder
from streams.settings import KafkaSettings
from streams.topics import INSIGHTS, SAMPLES
from streams.windows import Key, standing

WINDOW_MS: Final = 10_000
GRACE_MS: Final = 10_000
"""As in `streams.insights.Insights`."""
PATIENCE_S: Final = 60.0
"""Windows that are not final this long after everything was written are stuck."""
PAUSE_S: Final = 0.5


@dataclass(frozen=True)
class Truth:
    """Exact sums of the samples, by windows of event time (ms) and arm."""

    requests: Counter[Key]
    """Of the windows that are complete."""
    last_ms: int
    """Start of the last window that may be complete."""
    newest_ms: int
    """The largest watermark of a sample."""


def truth(samples: Iterable[tuple[int, Sample]]) -> Truth:
    """Sum up (partition, sample); raises `ValueError` where there is none."""
    requests: Counter[Key] = Counter()
    upto_ms: dict[int, int] = {}
    for partition, sample in samples:
        requests[sample.watermark_ms // WINDOW_MS * WINDOW_MS, sample.arm] += 1
        upto_ms[partition] = max(sample.watermark_ms, upto_ms.get(partition, 0))
    last_ms = min(upto_ms.values()) - WINDOW_MS - GRACE_MS
    complete = {key: count for key, count in requests.items() if key[0] <= last_ms}
    return Truth(Counter(complete), last_ms, max(upto_ms.values()))


def stuck(exact: Truth, insights: Iterable[Insight]) -> list[Key]:
    """Complete windows that are not final; `insights` in the order of the log."""
    final: dict[Key, bool] = {}
    for each in standing(insights):
        key = (each.window_start_ms, each.arm)
        final[key] = final.get(key, True) and each.final
    return sorted(key for key in exact.requests if not final.get(key, False))


def figures(exact: Truth, insights: list[Insight]) -> dict[str, Any]:
    """How the windows that stand differ from the exact sums; `insights` in the order of the log."""
    found: Counter[Key] = Counter()
    newest_ms = 0
    for each in standing(insights):
        newest_ms = max(newest_ms, each.window_start_ms + each.window_ms)
        if each.window_start_ms <= exact.last_ms:
            found[each.window_start_ms, each.arm] += each.requests
    samples = exact.requests.total()
    apart = (found - exact.requests).total() + (exact.requests - found).total()
    return {
        "windows": len(exact.requests),
        "stuck": len(stuck(exact, insights)),
        "requests": found.total(),
        "samples": samples,
        "error": apart / samples if samples else 0.0,
        "behind_s": max(0, exact.newest_ms - newest_ms) / 1000,
    }


def caught_up(kafka: KafkaSettings, check: Callable[[], None]) -> dict[str, Any]:
    """Wait until no window is stuck, at most `PATIENCE_S`; then the figures. `check` raises if there is no hope.

    To be called when the last sample has been written.
    """
    client = consumer(kafka.bootstrap)
    began = time.monotonic()
    try:
        exact = truth(
            (number, decode(sample_decoder, record.value))
            for number in range(kafka.partitions)
            for record in read(client, SAMPLES, number)
        )
        insights: list[Insight] = []
        upto = 0
        while True:
            for record in read(client, INSIGHTS, first=upto):
                insights.append(decode(insight_decoder, record.value))
                upto = record.offset + 1
            waited_s = time.monotonic() - began
            if not stuck(exact, insights) or waited_s > PATIENCE_S:
                return {**figures(exact, insights), "waited_s": waited_s}
            check()
            time.sleep(PAUSE_S)
    finally:
        client.close()
