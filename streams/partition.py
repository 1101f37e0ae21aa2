"""One partition of the streams as a pure core: join, then shape, then the users' histories.

The transactional shell (streams/processor.py) and the serial runner feed it the same way; what a batch brought
about is taken with `take`. After a restart the shell reads the inputs from the offsets that the last
`OffsetNote` calls needed up to those committed, hands exposures to `reopen` and then feedback to `join.refeed`,
and calls `resume`.
"""

from dataclasses import dataclass, field

import msgspec

from streams.events import (
    Exposure,
    Feedback,
    LateStart,
    Sample,
    Shaping,
    encode,
)
from streams.history import PackedHistory, grown
from streams.join import Join, Joined
from streams.sequence import Sequence, joined_of
from streams.settings import JoinSettings, ShapeSettings, StreamsSettings
from streams.shape import Shape
from streams.state import PartitionState, held_key, late_key, shaping_key
from streams.topics import HISTORIES, SAMPLES, SHAPING


class OffsetNote(msgspec.Struct):
    """What the committed offsets do not say; rides in their metadata."""

    exposures_ms: int
    feedback_ms: int
    need_exposures: int
    need_feedback: int


@dataclass
class Output:
    """What one batch of input brought about, to be committed together."""

    samples: list[Sample] = field(default_factory=list)
    histories: list[PackedHistory] = field(default_factory=list)
    shaping: list[Shaping] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    """Keys of `shaping` that are no longer needed: starts of late exposures, requests that waited."""
    late: list[Feedback] = field(default_factory=list)
    """Feedback that came after its request was closed, where `join.late` is `side`."""

    def records(self) -> list[tuple[str, list[tuple[bytes, bytes | None]]]]:
        """What to append to each changelog: keys and values, in order."""
        return [
            (SAMPLES, [(sample.user.encode(), encode(sample)) for sample in self.samples]),
            (HISTORIES, [(each.user.encode(), encode(each)) for each in self.histories]),
            (
                SHAPING,
                [
                    *((shaping_key(one).encode(), encode(one)) for one in self.shaping),
                    *((key.encode(), None) for key in self.forgotten),
                ],
            ),
        ]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to commit but offsets."""
        return not (self.samples or self.histories or self.shaping or self.forgotten or self.late)


class Partition:
    """Join, shape and histories over one partition's committed state."""

    def __init__(
        self,
        join: JoinSettings,
        shape: ShapeSettings,
        streams: StreamsSettings,
        state: PartitionState,
    ) -> None:
        self._sequence = Sequence() if join.order == "exposure" else None
        self.join = Join(join, self._is_closed, state.kv)
        self.shape = Shape(shape, state.plays)
        self._settings = streams
        self._state = state
        self._samples: list[Sample] = []
        self._histories: dict[str, PackedHistory] = {}
        self._late_starts = state.late_starts()
        self._held = state.held()
        if self._held and self._sequence is None:
            self._sequence = Sequence()  # they waited under the other order: let them go on
        for population in state.populations():
            self.shape.restore(population)

    def expose(self, exposure: Exposure, offset: int, record_ms: int) -> None:
        """One exposure, in log order; the caller has asked `join.too_late`."""
        self.admit(self.join.expose(exposure, offset, record_ms))

    def feed(self, feedback: Feedback, offset: int, record_ms: int) -> None:
        """One feedback event, in log order."""
        joined = self.join.feed(feedback, offset, record_ms)
        if joined or self._sequence is not None:  # most events close nothing
            self.admit(joined)

    def tick(self, time_ms: int, on_exposures: bool, record_ms: int) -> None:
        """One tick, in log order."""
        self.admit(self.join.tick(time_ms, on_exposures, record_ms))

    def take(self) -> Output:
        """What came of the input since the last call; the caller commits it before going on."""
        late = self.join.late_changes
        changes: list[Shaping] = [
            LateStart(offset=offset, start_ms=start)
            for offset, start in late.items()
            if start is not None
        ]
        forgotten = [late_key(offset) for offset, start in late.items() if start is None]
        if self._sequence is not None:
            held = self._sequence.changes
            changes += [one for one in held.values() if one is not None]
            forgotten += [held_key(offset) for offset, one in held.items() if one is None]
            held.clear()
            self._sequence.settle()
        output = Output(
            self._samples,
            list(self._histories.values()),
            [*self.shape.take_changes(), *changes],
            forgotten,
            self.join.late,
        )
        self._samples, self._histories, self.join.late = [], {}, []
        self.join.closed.clear()
        self.join.settle()
        late.clear()
        return output

    def note(self, exposures_upto: int, feedback_upto: int) -> OffsetNote:
        """What to commit beside the offsets of the next records to be read."""
        need_exposures, need_feedback = self.join.needed(exposures_upto, feedback_upto)
        if self._sequence is not None:
            need_exposures = min(need_exposures, self._sequence.needed(exposures_upto))
        return OffsetNote(
            exposures_ms=self.join.exposures_ms,
            feedback_ms=self.join.feedback_ms,
            need_exposures=need_exposures,
            need_feedback=need_feedback,
        )

    def reopen(self, exposure: Exposure, offset: int, note: OffsetNote) -> None:
        """Take a needed exposure again; nothing closes until `resume`."""
        held = self._held.get(offset)
        if held is not None:
            assert self._sequence is not None
            self._sequence.restore(joined_of(held, exposure))
            return
        late_ms = self._late_starts.get(offset)
        horizon_ms = min(note.exposures_ms, note.feedback_ms) - self.join.times.horizon
        if late_ms is None and exposure.time_ms < horizon_ms:
            return  # it was too late, or its id has been forgotten since: an open one is younger
        self.join.reopen(exposure, offset, late_ms)

    def resume(self, note: OffsetNote, feedback_upto: int) -> None:
        """All that was needed has been taken: go on where the note was written."""
        self._late_starts.clear()
        self._held.clear()
        self.join.exposures_ms = note.exposures_ms
        self.join.feedback_ms = note.feedback_ms
        self.join.feedback_upto = feedback_upto
        self.join.counts.clear()
        self.join.late.clear()

    def admit(self, joined: list[Joined]) -> None:
        """Requests that are decided: by this join, or before the loop began (a log to start from)."""
        if self._sequence is not None:
            self._sequence.hold(joined)
            before_ms = self.join.watermark_ms - self.join.times.lateness
            joined = self._sequence.go_on(self.join.oldest_open, before_ms)
        for one in joined:
            sample = self.shape.shape(one)
            self._samples.append(sample)
            user = sample.user
            self._histories[user] = grown(
                self._histories.get(user) or self._state.history(user),
                sample,
                one,
                self._settings.history_behaviours,
                self._settings.history_shown,
            )

    def _is_closed(self, request: str) -> bool:
        waits = self._sequence is not None and request in self._sequence
        return waits or self._state.is_closed(request)
