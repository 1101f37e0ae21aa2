"""From a decided play to answers that have learned from it: the stages, read off the log of a run. Pure.

Notable choices
- Each learning sample passes: closable -> *joined* (its record is written) -> *stepped* (in a gradient) ->
  *published* (its version's commit is written) -> *applied* (an actor has swapped) -> *answers* (from here on 95 % of
  the learning arm's answers are of such a version). A stage's figure is the time since the one before.
- `total` counts to applied, as the policy's contract has it; `to_answers` to the last stage.
- 95 % of answers: the first answer from which on, of `ANSWERS` in a row, so many are new enough.
- All clocks are this machine's.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from streams.weights import Manifest

ANSWERS: Final = 20
MOST: Final = 19
STAGES: Final = ("joined", "stepped", "published", "applied", "answers")


@dataclass
class Run:
    """What the log of a run says of its times, all in ms."""

    samples: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """(partition, offset) of the learning arm's -> (closable, record written)."""
    manifests: list[Manifest] = field(default_factory=list)
    """Ascending."""
    committed: dict[int, int] = field(default_factory=dict)
    """Version -> commit written."""
    applied: dict[int, int] = field(default_factory=dict)
    """Version -> swapped, of the first actor that did."""
    answers: list[tuple[int, int]] = field(default_factory=list)
    """(time, version) of the learning arm's answers."""


def stages(run: Run, from_ms: int) -> dict[str, NDArray[np.float64]]:
    """Seconds of each stage for the samples that were closable after `from_ms` and have passed all of them."""
    applied_at = _Applied(run.applied)
    answered_at = _answered(sorted(run.answers), [one.version for one in run.manifests])
    rows = []
    for place, made_ms, version in _steps(run.manifests):
        if place not in run.samples or version not in run.committed:
            continue
        closable_ms, joined_ms = run.samples[place]
        applied_ms, answers_ms = applied_at(version), answered_at.get(version)
        if closable_ms < from_ms or applied_ms is None or answers_ms is None:
            continue
        rows.append(
            (
                closable_ms,
                joined_ms,
                made_ms,
                run.committed[version],
                applied_ms,
                max(applied_ms, answers_ms),
            )
        )
    times = np.array(rows, np.float64).reshape(-1, 1 + len(STAGES)) / 1000
    found = dict(zip(STAGES, np.diff(times, axis=1).T, strict=True))
    found["total"] = times[:, 4] - times[:, 0]
    found["to_answers"] = times[:, 5] - times[:, 0]
    return found


def _steps(manifests: Sequence[Manifest]) -> Iterator[tuple[tuple[int, int], int, int]]:
    """(partition, offset), when its step was made, and the version that has it."""
    for manifest in manifests:
        for entry in manifest.journal:
            for partition, first, upto in entry.ranges:
                for offset in range(first, upto):
                    yield (partition, offset), entry.made_ms, manifest.version


class _Applied:
    """When a version, or a later one that contains it, was applied."""

    def __init__(self, applied: dict[int, int]) -> None:
        self._versions = sorted(applied)
        self._first_ms: list[int] = []
        for version in reversed(self._versions):
            before = self._first_ms[-1] if self._first_ms else applied[version]
            self._first_ms.append(min(applied[version], before))
        self._first_ms.reverse()

    def __call__(self, version: int) -> int | None:
        place = bisect_right(self._versions, version - 1)
        return self._first_ms[place] if place < len(self._versions) else None


def _answered(answers: list[tuple[int, int]], versions: Sequence[int]) -> dict[int, int]:
    """Version -> time from which on most answers are of it or a later one; ascending, so one pass."""
    found: dict[int, int] = {}
    served = np.array([version for _, version in answers])
    place = 0
    for version in versions:
        while place + ANSWERS <= len(served):
            if (
                served[place] >= version
                and (served[place : place + ANSWERS] >= version).sum() >= MOST
            ):
                found[version] = answers[place][0]
                break
            place += 1
    return found
