"""One partition of the streams as a pure core: join, then shape, then the users' histories.

The transactional shell (streams/processor.py) and the serial runner feed it the same way; what a batch brought
about is taken with `take`.
"""

from dataclasses import dataclass, field

from streams.events import Behaviour, Exposure, Feedback, History, Sample, Shaping
from streams.join import Join, Joined
from streams.settings import JoinSettings, ShapeSettings, StreamsSettings
from streams.shape import Shape
from streams.state import PartitionState


@dataclass
class Output:
    """What one batch of input brought about, to be committed together."""

    samples: list[Sample] = field(default_factory=list)
    histories: list[History] = field(default_factory=list)
    shaping: list[Shaping] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is anything to commit but offsets."""
        return not (self.samples or self.histories or self.shaping)


class Partition:
    """Join, shape and histories over one partition's committed state."""

    def __init__(
        self,
        join: JoinSettings,
        shape: ShapeSettings,
        streams: StreamsSettings,
        state: PartitionState,
    ) -> None:
        self.join = Join(join, state.is_closed)
        self.shape = Shape(shape, state.plays)
        self._settings = streams
        self._state = state
        self._samples: list[Sample] = []
        self._histories: dict[str, History] = {}
        for population in state.populations():
            self.shape.restore(population)

    def expose(self, exposure: Exposure, offset: int, record_ms: int) -> None:
        """One exposure, in log order; the caller has asked `join.too_late`."""
        self.admit(self.join.expose(exposure, offset, record_ms))

    def feed(self, feedback: Feedback, offset: int, record_ms: int) -> None:
        """One feedback event, in log order."""
        self.admit(self.join.feed(feedback, offset, record_ms))

    def tick(self, time_ms: int, on_exposures: bool, record_ms: int) -> None:
        """One tick, in log order."""
        self.admit(self.join.tick(time_ms, on_exposures, record_ms))

    def take(self) -> Output:
        """What came of the input since the last call; the caller commits it before going on."""
        output = Output(self._samples, list(self._histories.values()), self.shape.take_changes())
        self._samples, self._histories = [], {}
        self.join.closed.clear()
        return output

    def admit(self, joined: list[Joined]) -> None:
        """Requests that are decided: by this join, or before the loop began (a log to start from)."""
        for one in joined:
            sample = self.shape.shape(one)
            self._samples.append(sample)
            self._histories[sample.user] = self._history(sample, one)

    def _history(self, sample: Sample, joined: Joined) -> History:
        """The user's history with this request: its final plays, and what was shown."""
        before = self._histories.get(sample.user) or self._state.history(sample.user)
        behaviours = list(before.behaviours) if before else []
        behaviours += [
            Behaviour(
                request=sample.request,
                position=item.position,
                item=item.item,
                end_ms=joined.decision.positions[item.position].last_ms,
                play_ms=item.play_ms,
                duration_ms=item.duration_ms,
                actions=item.actions,
            )
            for item in sample.items
            if item.outcome not in ("unseen", "censored")
        ]
        behaviours.sort(key=lambda behaviour: behaviour.end_ms)
        shown = list(before.shown) if before else []
        shown += [item.item for item in sample.items]
        return History(
            user=sample.user,
            behaviours=behaviours[-self._settings.history_behaviours :],
            shown=shown[-self._settings.history_shown :],
        )
