"""Cuts the stream of samples into steps, and writes down what each step took.

A step takes a prefix of what was polled, partition by partition, so every sample offset stands in exactly one
range of the journals, with its disposition. What it trains on stands in the order of the log, not of arrival: sums of
floats depend on the order, and the ranges are all that is left of a step. Pure: the shell polls, waits and publishes.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streams.control import LEARNING_ARM, is_condemned
from streams.events import Sample
from streams.weights import StepEntry


@dataclass(frozen=True)
class Polled:
    """One sample and where it stands."""

    partition: int
    offset: int
    sample: Sample | None
    """None for a record that could not be read."""


class Journal:
    """Samples waiting for a step, and the entries since the last publication."""

    def __init__(self, offsets: dict[int, int], condemned: Sequence[tuple[int, int]] = ()) -> None:
        """`condemned` are the versions (first, last) whose samples are dropped; whoever gave the list may add."""
        self.offsets = dict(offsets)
        self._condemned = condemned
        self.entries: list[StepEntry] = []
        self.watermark_ms = 0
        self._waiting: deque[Polled] = deque()
        self._trainable = 0

    @property
    def waiting(self) -> int:
        """Samples not yet taken."""
        return len(self._waiting)

    @property
    def trainable(self) -> int:
        """Waiting requests of the learning arm."""
        return self._trainable

    def add(self, polled: Polled) -> None:
        """Take a polled sample; its offset must not be below what was taken before."""
        self._waiting.append(polled)
        self._trainable += _learns(polled)

    def cut(self, batch: int) -> list[Sample]:
        """The samples of `cut_polled`."""
        return [polled.sample for polled in self.cut_polled(batch) if polled.sample is not None]

    def cut_polled(self, batch: int) -> list[Polled]:
        """The next step's samples: a prefix with at most `batch` of the learning arm; journals it.

        Only learning exposures with a target train; the others are accounted for.
        """
        before = dict(self.offsets)
        taken: list[Polled] = []
        learning = 0
        while self._waiting and learning < batch:
            polled = self._waiting.popleft()
            taken.append(polled)
            learning += _learns(polled)
            self.offsets[polled.partition] = polled.offset + 1
            if polled.sample is not None:
                self.watermark_ms = max(self.watermark_ms, polled.sample.watermark_ms)
        self._trainable -= learning
        chosen, entry = sort_out(taken, self._condemned)
        entry.ranges = [
            (partition, before.get(partition, 0), upto)
            for partition, upto in sorted(self.offsets.items())
            if upto != before.get(partition, 0)
        ]
        self.entries.append(entry)
        return chosen

    def set_aside(self, count: int) -> None:
        """Of those chosen last, `count` turned out to be of no use."""
        self.entries[-1].trained -= count
        self.entries[-1].without_target += count

    def take_entries(self) -> list[StepEntry]:
        """The entries since the last publication."""
        entries, self.entries = self.entries, []
        return entries


def undo(entries: Iterable[StepEntry]) -> None:
    """What these steps trained on came to nothing."""
    for entry in entries:
        entry.trained, entry.condemned = 0, entry.condemned + entry.trained


def sort_out(
    taken: Iterable[Polled], condemned: Sequence[tuple[int, int]] = ()
) -> tuple[list[Polled], StepEntry]:
    """What of a step's samples trains, in the order of the log, and the disposition of all.

    Those that a version of the `condemned` ranges served do not.
    """
    entry = StepEntry(ranges=[], trained=0, control=0, without_target=0)
    chosen: list[Polled] = []
    for polled in sorted(taken, key=lambda polled: (polled.partition, polled.offset)):
        sample = polled.sample
        if sample is not None and not _learns(polled):
            entry.control += 1
        elif sample is None or not any(item.advantage or item.supervised for item in sample.items):
            entry.without_target += 1
        elif is_condemned(sample.policy_version, condemned):
            entry.condemned += 1
        else:
            entry.trained += 1
            chosen.append(polled)
    return chosen, entry


def merged(by_rank: Sequence[list[StepEntry]]) -> list[StepEntry]:
    """The entries of the steps that ranks made together, each rank's in the same order."""
    return [
        StepEntry(
            ranges=sorted(place for part in parts for place in part.ranges),
            trained=sum(part.trained for part in parts),
            control=sum(part.control for part in parts),
            without_target=sum(part.without_target for part in parts),
            condemned=sum(part.condemned for part in parts),
            ranks=len(parts),
            made_ms=max(part.made_ms for part in parts),
        )
        for parts in zip(*by_rank, strict=True)
    ]


def _learns(polled: Polled) -> bool:
    return polled.sample is not None and polled.sample.arm == LEARNING_ARM
