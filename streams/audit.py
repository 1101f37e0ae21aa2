"""Does every exposure have exactly one sample, and is it the right one? A pure core over one partition's logs.

Notable choices (contract of the evidence, "Audits")
- Outcomes are recomputed from the feedback below `feedback_upto` by the slow reference, not by the join.
- The shaping fold is replayed over the samples in offset order from what `shaping` held before the first of them:
  a state change that was lost or applied twice shows in the next percentile of that bucket.
- Closing was allowed if the sample's watermark had passed its decision by the lateness, and if the feedback below
  `feedback_upto` could have moved the watermark that far.
- Every input record that the join has committed stands on exactly one side: taken, or one dead letter.
- A late exposure's start cannot be told from the inputs alone; it is checked against what arrived before it.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from streams.decision import NEVER, Decision, JoinTimes
from streams.events import Exposure, Feedback, PositionOutcome, Sample, Shaping, Tick, UserShaping
from streams.join import Joined
from streams.reference import Rules, Verdict, verdict
from streams.settings import JoinSettings, ShapeSettings
from streams.shape import Shape
from streams.topics import EXPOSURES, FEEDBACK

EXAMPLES = 20


@dataclass(frozen=True)
class Entry:
    """One record of an input; `event` is None where intake refuses it."""

    offset: int
    written_ms: int
    event: Exposure | Feedback | Tick | None


@dataclass
class PartitionLogs:
    """What one partition's topics hold, each in offset order, and how far the join has committed."""

    exposures: list[Entry]
    feedback: list[Entry]
    samples: list[tuple[int, Sample]]
    letters: Counter[tuple[str, int]]
    """Dead letters by where they came from: (topic, offset)."""
    exposures_upto: int
    feedback_upto: int
    watermark_ms: int
    judged: range | None
    """Offsets of the exposures to judge; None for all. What stands before is known, so that repeats are."""
    seeds: list[Shaping] | None
    """What `shaping` began with; None if its beginning, or the samples', is no longer in the log."""


@dataclass
class Findings:
    """What an audit found; counts add up over partitions."""

    exposures: int = 0
    """Distinct requests exposed, dead letters apart."""
    samples: int = 0
    """Distinct requests with a sample."""
    lost: int = 0
    duplicated: int = 0
    wrong_label: int = 0
    """Samples whose outcome, closing, exposure or shaping is not what the log says."""
    open: int = 0
    late: int = 0
    """Feedback that came after its request was closed."""
    late_exposures: int = 0
    orphans: int = 0
    """Feedback without an exposure in the log."""
    unaccounted: int = 0
    """Input records that are neither taken nor exactly one dead letter."""
    shaping_checked: int = 0
    """Samples whose percentiles were recomputed."""
    dead_letters: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    """What is wrong, the first few in words."""

    def wrong(self, what: str) -> None:
        """Keep the first few."""
        if len(self.examples) < EXAMPLES:
            self.examples.append(what)


def audit(logs: PartitionLogs, join: JoinSettings, shape: ShapeSettings) -> Findings:
    """Hold every sample of a partition against its inputs; a millisecond or two a request."""
    found = Findings()
    times = JoinTimes.of(join)
    _account(found, logs)
    exposures = _first_exposures(logs)
    judged = {
        request: entry
        for request, entry in exposures.items()
        if logs.judged is None or entry.offset in logs.judged
    }
    found.exposures = len(judged)
    found.late_exposures = sum(
        sample.start_ms > sample.time_ms for _, sample in logs.samples if sample.request in judged
    )
    heard: dict[str, list[tuple[int, Feedback]]] = {}
    for entry in logs.feedback:
        if isinstance(entry.event, Feedback):
            heard.setdefault(entry.event.request, []).append((entry.offset, entry.event))
    found.orphans = sum(
        len(events) for request, events in heard.items() if request not in exposures
    )
    fold = None if logs.seeds is None else _fold(logs.seeds, shape)
    passed = Passed(logs)
    seen: set[str] = set()
    for offset, sample in logs.samples:
        if logs.judged is not None and sample.request not in judged:
            continue
        if sample.request in seen:
            found.duplicated += 1
            found.wrong(f"request {sample.request}: a second sample at offset {offset}")
            continue
        seen.add(sample.request)
        shown = judged.get(sample.request)
        events = heard.get(sample.request, [])
        found.late += sum(at >= sample.feedback_upto for at, _ in events)
        reason, fold = _judge(sample, shown, events, times, passed, fold)
        found.shaping_checked += fold is not None
        if reason:
            found.wrong_label += 1
            found.wrong(f"request {sample.request}, sample at offset {offset}: {reason}")
    found.samples = len(seen)
    for request, entry in judged.items():
        if request in seen:
            continue
        known = [event for at, event in heard.get(request, []) if at < logs.feedback_upto]
        ahead_ms = passed.exposures(entry.offset)
        assert isinstance(entry.event, Exposure)
        if entry.offset < logs.exposures_upto and overdue(
            entry.event, ahead_ms, known, times, logs.watermark_ms
        ):
            found.lost += 1
            found.wrong(f"request {request}, exposure at offset {entry.offset}: no sample")
        else:
            found.open += 1
    return found


def overdue(
    exposure: Exposure,
    ahead_ms: int,
    events: Iterable[Feedback],
    times: JoinTimes,
    watermark_ms: int,
) -> bool:
    """Whether an exposure without a sample should have one by this watermark.

    `ahead_ms` is the largest event time before it in its partition: a late exposure does not start after that.
    """
    start_ms = max(exposure.time_ms, ahead_ms - times.lateness)
    decided_ms = verdict(exposure, start_ms, events, rules_of(times)).decided_ms
    return decided_ms + times.lateness <= watermark_ms


def rules_of(times: JoinTimes) -> Rules:
    """The same times as the reference names them."""
    return Rules(times.window, times.cap, times.abandon, times.horizon)


def disagreement(sample: Sample, expected: Verdict) -> str:
    """Where a sample's outcome differs from the reference's; empty if nowhere."""
    if (sample.decided_ms, sample.closed_by) != (expected.decided_ms, expected.closed_by):
        return (
            f"{sample.closed_by} at {sample.decided_ms}, by the reference "
            f"{expected.closed_by} at {expected.decided_ms}"
        )
    for item in sample.items:
        other = expected.positions.get(item.position)
        mine = (item.outcome, item.play_ms, item.actions)
        if other is None or mine != (other.outcome, other.play_ms, other.actions):
            return f"position {item.position} is {mine}, by the reference {other}"
    return ""


class Passed:
    """How far the inputs had come by an offset: the largest event times before it."""

    def __init__(self, logs: PartitionLogs) -> None:
        self._events = [e.offset for e in logs.feedback if isinstance(e.event, Feedback)]
        self._end = logs.feedback[-1].offset + 1 if logs.feedback else 0
        self._offsets, self._largest = [], []
        for entries in (logs.exposures, logs.feedback):
            taken = [
                entry for entry in entries if entry.event is not None and not _refused(entry, logs)
            ]
            self._offsets.append([entry.offset for entry in taken])
            times = [entry.event.time_ms for entry in taken if entry.event is not None]
            self._largest.append(list(accumulate(times, max)))

    def exposures(self, offset: int) -> int:
        """Largest event time of `exposures` below an offset."""
        return self._below(0, offset)

    def feedback(self, offset: int) -> int:
        """Largest event time of `feedback` before the first event at or above an offset; ticks move on alone."""
        place = bisect_left(self._events, offset)
        return self._below(1, self._events[place] if place < len(self._events) else self._end)

    def _below(self, which: int, offset: int) -> int:
        place = bisect_left(self._offsets[which], offset)
        return self._largest[which][place - 1] if place else NEVER


def _refused(entry: Entry, logs: PartitionLogs) -> bool:
    return isinstance(entry.event, Exposure) and (EXPOSURES, entry.offset) in logs.letters


def _account(found: Findings, logs: PartitionLogs) -> None:
    """Each committed input record is taken, or one dead letter."""
    for topic, entries, upto in (
        (EXPOSURES, logs.exposures, logs.exposures_upto),
        (FEEDBACK, logs.feedback, logs.feedback_upto),
    ):
        for entry in entries:
            letters = logs.letters[(topic, entry.offset)]
            unreadable = entry.event is None
            allowed = isinstance(entry.event, Exposure)  # it may have been too late
            wrong = letters > 1 or (letters == 1 and not (unreadable or allowed))
            wrong |= unreadable and letters == 0 and entry.offset < upto
            if wrong:
                found.unaccounted += 1
                found.wrong(f"{topic} offset {entry.offset}: {letters} dead letters")


def _first_exposures(logs: PartitionLogs) -> dict[str, Entry]:
    """The first readable exposure of each request; what was refused as too late is none."""
    first: dict[str, Entry] = {}
    for entry in logs.exposures:
        if isinstance(entry.event, Exposure) and not _refused(entry, logs):
            first.setdefault(entry.event.request, entry)
    return first


def _fold(seeds: Sequence[Shaping], settings: ShapeSettings) -> Shape:
    plays = {(s.arm, s.user): s.plays for s in seeds if isinstance(s, UserShaping)}
    shape = Shape(settings, lambda arm, user: plays.get((arm, user)))
    for state in seeds:
        shape.restore(state)
    return shape


def _judge(
    sample: Sample,
    entry: Entry | None,
    events: list[tuple[int, Feedback]],
    times: JoinTimes,
    passed: Passed,
    fold: Shape | None,
) -> tuple[str, Shape | None]:
    """What is wrong with a sample, if anything; and the fold, which ends where it can no longer be followed."""
    if entry is None:
        return "its exposure is not in the log", None
    exposure = entry.event
    assert isinstance(exposure, Exposure)
    if reason := _copied(sample, entry, exposure):
        return reason, None
    if sample.start_ms != exposure.time_ms:
        latest_ms = passed.exposures(entry.offset) - times.lateness
        if not exposure.time_ms < sample.start_ms <= latest_ms:
            return f"started at {sample.start_ms}, which its arrival does not explain", None
    known = [event for offset, event in events if offset < sample.feedback_upto]
    forced = sample.closed_by == "memory"
    until = max(sample.watermark_ms, sample.start_ms) if forced else None
    expected = verdict(exposure, sample.start_ms, known, rules_of(times), until)
    if reason := disagreement(sample, expected):
        return reason, None
    if sample.watermark_ms < sample.decided_ms + times.lateness and not forced:
        return f"closed at watermark {sample.watermark_ms}, before it was certain", None
    if sample.watermark_ms > passed.feedback(sample.feedback_upto):
        return f"watermark {sample.watermark_ms} is ahead of the feedback it had read", None
    if fold is not None and not _same_shaping(sample, fold.shape(_joined(sample, entry, expected))):
        return "its percentiles or advantages are not what the samples before it give", None
    return "", fold


def _copied(sample: Sample, entry: Entry, exposure: Exposure) -> str:
    """What the sample should have copied from its exposure, and has not."""
    if sample.exposure_offset != entry.offset:
        return f"names exposure offset {sample.exposure_offset}, the first is at {entry.offset}"
    for name in (
        *("user", "time_ms", "arm", "policy_version", "catalogue_version", "decode_mode"),
        *("temperature", "context", "excluded"),
    ):
        if getattr(sample, name) != getattr(exposure, name):
            return f"{name} differs from its exposure's"
    for name in ("item", "sid", "position", "duration_ms", "source", "logp_levels"):
        if [getattr(i, name) for i in sample.items] != [getattr(i, name) for i in exposure.items]:
            return f"{name} of its items differs from its exposure's"
    return ""


def _joined(sample: Sample, entry: Entry, expected: Verdict) -> Joined:
    assert isinstance(entry.event, Exposure)
    last = {p: NEVER if f.last_ms is None else f.last_ms for p, f in expected.positions.items()}
    return Joined(
        exposure=entry.event,
        exposure_offset=entry.offset,
        start_ms=sample.start_ms,
        decision=Decision(
            sample.decided_ms,
            sample.closed_by,
            {
                item.position: PositionOutcome(
                    item.outcome, item.play_ms, last[item.position], item.actions
                )
                for item in sample.items
            },
        ),
        watermark_ms=sample.watermark_ms,
        closable_ms=sample.closable_ms,
        feedback_upto=sample.feedback_upto,
    )


def _same_shaping(sample: Sample, again: Sample) -> bool:
    return (sample.threshold, sample.median, sample.items) == (
        again.threshold,
        again.median,
        again.items,
    )
