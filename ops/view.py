"""The terminal view of a running loop: a table refreshed each second, or a line each ten without a terminal."""

import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ops.monitor import MonitorThread
from ops.report import quantiles, rewards
from ops.served import Served, read_lines

PLAIN_EVERY_S = 10.0


def scrape(port: int) -> dict[str, float]:
    """The sums of a role's counters over their labels, and one entry `name:label` for each label value."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as answer:
            text = answer.read().decode()
    except (URLError, OSError):
        return {}
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("dwell_"):
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
                for value in sample.labels.values():
                    key = f"{sample.name}:{value}"
                    found[key] = found.get(key, 0.0) + sample.value
    return found


@dataclass
class View:
    """What is shown, and where it comes from."""

    monitor: MonitorThread
    streams_port: int
    served_file: Path
    catalogue: int
    console: Console = field(default_factory=Console)
    lines: list[Served] = field(default_factory=list)
    _offset: int = 0
    _events: tuple[float, float] = (0.0, 0.0)
    _rewards: Mapping[str, object] = field(default_factory=dict)
    _rewards_at: float = 0.0

    def __post_init__(self) -> None:
        _, self._offset = read_lines(self.served_file)

    def table(self, running_s: float) -> Table:
        """The present state as a table."""
        now = time.time()
        streams = scrape(self.streams_port)
        events = streams.get("dwell_streams_events_total", 0.0)
        before, at = self._events
        rate = (events - before) / max(1e-6, now - at) if at else 0.0
        self._events = events, now
        with self.monitor.lock:
            seen = self.monitor.monitor.seen
            version, published_ms = seen.version, seen.published_ms
            freshness, wait = quantiles(seen.freshness_s), quantiles(seen.label_wait_s)
            samples = sum(seen.samples.values())
        table = Table(title=f"dwell, running for {running_s:.0f} s", title_justify="left")
        table.add_column("figure")
        table.add_column("value", justify="right")
        age = f", {now - published_ms / 1000:.1f} s old" if published_ms else ""
        table.add_row("policy version", f"{version}{age}")
        table.add_row("events per second", f"{rate:,.0f}")
        joined, timed_out, late = (
            int(streams.get(f"dwell_streams_outcomes_total:{what}", 0))
            for what in ("closed_by_decided", "closed_by_deadline", "late_feedback")
        )
        table.add_row("joined / timed out / late", f"{joined:,} / {timed_out:,} / {late:,}")
        table.add_row("open requests", f"{int(streams.get('dwell_streams_open_requests', 0)):,}")
        table.add_row("samples", f"{samples:,}")
        table.add_row("label wait p50 / p99", f"{_s(wait.p50_s)} / {_s(wait.p99_s)}")
        table.add_row("freshness p50 / p99", f"{_s(freshness.p50_s)} / {_s(freshness.p99_s)}")
        for name, text in self._arms(now):
            table.add_row(name, text)
        return table

    def _arms(self, now: float) -> list[tuple[str, str]]:
        """Rewards by arm with their intervals, made anew every five seconds."""
        more, self._offset = read_lines(self.served_file, self._offset)
        self.lines += more
        if now - self._rewards_at > 5 and self.lines:
            self._rewards_at = now
            self._rewards = rewards(self.lines, self.catalogue)
        by_arm = self._rewards.get("by_arm")
        if not isinstance(by_arm, Mapping):
            return []
        rows = []
        for arm, figures in by_arm.items():
            for name in ("dwell_s", "satisfaction"):
                value = figures[name]
                text = f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
                rows.append((f"{name} per slot, {arm}", text))
        return rows


def watch(view: View, until: float, alive: object) -> None:
    """Show the view until the monotonic time `until`; `alive()` raises when a role has died."""
    started = time.monotonic()
    check = alive if callable(alive) else (lambda: None)
    if not view.console.is_terminal:
        printed = 0.0
        while (now := time.monotonic()) < until:
            check()
            if now - printed >= PLAIN_EVERY_S:
                printed = now
                table = view.table(now - started)
                cells = zip(*(column.cells for column in table.columns), strict=True)
                view.console.print("; ".join(f"{name} {value}" for name, value in cells))
            time.sleep(0.5)
        return
    with Live(console=view.console, auto_refresh=False, transient=True) as live:
        while (now := time.monotonic()) < until:
            check()
            live.update(view.table(now - started), refresh=True)
            time.sleep(1.0)


def _s(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s"
