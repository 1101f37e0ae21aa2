"""What the log of a run says of its harms, read while it runs: `Seen`, fed by a thread; and the figures. Pure but for
the thread.

Notable choices
- A harm's time counts from just before its transaction. *Refused*: until the last actor has said so on
  `weights.acks`. *Passed over* (a version that is not newer): until an actor has taken a version that stands behind
  it on the log. *Returned*: until the arm's first answer by another version after the last by the harmful one.
- A harm by its rewards counts from the arm's first answer by it until the first by the version that was returned to;
  what it cost is over the requests of both arms between the two, as the learner's test has their rewards.
"""

import re
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from kafka import TopicPartition

from learner.reward_test import reward
from ops.results import Interval
from streams.clients import consumer
from streams.control import CONTROL_ARM, LEARNING_ARM, ControlState
from streams.events import (
    Command,
    Exposure,
    Sample,
    SemanticId,
    UnreadableError,
    command_decoder,
    decode,
    exposure_decoder,
    sample_decoder,
)
from streams.settings import KafkaSettings
from streams.topics import CONTROL, EXPOSURES, SAMPLES, WEIGHTS, WEIGHTS_ACKS
from streams.weights import Ack, Commit, ack_decoder, weights_decoder

SAMPLES_KEPT: Final = 2048
"""Of the learning arm, the newest, in full."""
PLAYS: Final = 3
"""Of a leaf, from which its mean share watched is told."""
RESAMPLES: Final = 2000
_COMPARED: Final = re.compile(r"over (\d+) of each")

Outcome = Literal["refused", "passed over", "returned", "stayed"]


class Answer(NamedTuple):
    """An exposure."""

    time_ms: int
    arm: str
    version: int


class Earned(NamedTuple):
    """A sample."""

    time_ms: int
    """Of its exposure."""
    arm: str
    version: int
    person: str
    reward: float


class Harm(NamedTuple):
    """A version that was put on the log and must not be served."""

    version: int
    at_ms: int
    """Just before its transaction."""
    behind: int | None = None
    """Of a replay: offset of `weights` after its records."""


@dataclass
class Seen:
    """All that the figures need."""

    answers: list[Answer] = field(default_factory=list)
    earned: list[Earned] = field(default_factory=list)
    commits: list[tuple[int, int]] = field(default_factory=list)
    """(offset on `weights`, version)."""
    acks: list[Ack] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    control: ControlState = field(default_factory=ControlState)
    watched: dict[SemanticId, list[float]] = field(default_factory=dict)
    """Of each leaf that was played, in either arm: plays, and the sum of the shares that were watched."""
    newest: deque[Sample] = field(default_factory=lambda: deque(maxlen=SAMPLES_KEPT))

    def take(self, topic: str, offset: int, value: bytes | None) -> None:
        """One record; what cannot be read is passed over."""
        if value is None:
            return
        with suppress(UnreadableError):
            if topic == EXPOSURES:
                event = decode(exposure_decoder, value)
                if isinstance(event, Exposure):
                    self.answers.append(Answer(event.time_ms, event.arm, event.policy_version))
            elif topic == SAMPLES:
                self._sample(decode(sample_decoder, value))
            elif topic == WEIGHTS:
                part = decode(weights_decoder, value)
                if isinstance(part, Commit):
                    self.commits.append((offset, part.version))
            elif topic == WEIGHTS_ACKS:
                self.acks.append(decode(ack_decoder, value))
            else:
                command = decode(command_decoder, value)
                self.control.apply(command)
                self.commands.append(command)

    def _sample(self, sample: Sample) -> None:
        if not sample.items:
            return
        person = sample.user.rpartition("-")[0]
        self.earned.append(
            Earned(sample.time_ms, sample.arm, sample.policy_version, person, reward(sample))
        )
        if sample.arm == LEARNING_ARM:
            self.newest.append(sample)
        for item in sample.items:
            if item.play_ms > 0:
                sums = self.watched.setdefault(item.sid, [0.0, 0.0])
                sums[0] += 1.0
                sums[1] += min(1.0, item.play_ms / max(1, item.duration_ms))

    def watched_least(self, part: float) -> list[SemanticId]:
        """Of the leaves that were played often enough to tell, this part with the smallest mean share watched."""
        means = {
            sid: watched / plays
            for sid, (plays, watched) in sorted(self.watched.items())
            if plays >= PLAYS
        }
        return sorted(means, key=lambda sid: means[sid])[: round(part * len(means))]

    def learning(self, since_ms: int = 0) -> list[Answer]:
        """The learning arm's answers since a time, by time."""
        found = [
            answer
            for answer in self.answers
            if answer.arm == LEARNING_ARM and answer.time_ms >= since_ms
        ]
        return sorted(found)

    def refusals(self, harm: Harm) -> list[Ack]:
        """Actors' words against a version since it came."""
        return [
            ack
            for ack in self.acks
            if ack.version == harm.version and not ack.applied and ack.applied_ms >= harm.at_ms
        ]

    def taken_behind(self, harm: Harm) -> Ack | None:
        """The first word of an actor that took a version which stands behind the harm on the log."""
        if harm.behind is None:
            return None
        behind = {version for offset, version in self.commits if offset >= harm.behind}
        taken = [
            ack
            for ack in self.acks
            if ack.applied and ack.version in behind and ack.version != harm.version
        ]
        return min(taken, key=lambda ack: ack.applied_ms, default=None)

    def answered(self, harm: Harm) -> Command | None:
        """The first command on the learning arm after a harm that sends it back from there."""
        for command in self.commands:
            if command.arm != LEARNING_ARM or command.time_ms < harm.at_ms:
                continue
            if command.action == "rollback" and command.version < harm.version <= command.upto:
                return command
            if command.action == "follow" and 0 < command.restored < harm.version:
                return command
        return None


def outcome(seen: Seen, harm: Harm, actors: int = 1) -> dict[str, Any]:
    """What became of a harm without labels: how it ended, after how long, and what viewers had of it."""
    since = seen.learning(harm.at_ms)
    places = [place for place, answer in enumerate(since) if answer.version == harm.version]
    found: dict[str, Any] = {"version": harm.version, "served": len(places)}
    ended: Outcome = "stayed"
    at_ms: int | None = None
    why = ""
    refusals = seen.refusals(harm)
    behind = seen.taken_behind(harm)
    if places:
        command = seen.answered(harm)
        if command is not None and places[-1] + 1 < len(since):
            ended, at_ms = "returned", since[places[-1] + 1].time_ms
            why = command.why
            found |= {"said_s": (command.time_ms - harm.at_ms) / 1000, "to": command.version}
    elif len({ack.actor for ack in refusals}) >= actors:
        ended, at_ms = "refused", max(ack.applied_ms for ack in refusals)
        why = refusals[0].reason
    elif behind is not None:
        ended, at_ms, why = "passed over", behind.applied_ms, "its number is not newer"
    seconds = None if at_ms is None else (at_ms - harm.at_ms) / 1000
    return {"outcome": ended, "seconds": seconds, **found, "why": why}


def by_rewards(seen: Seen, harm: Harm, seed: int = 0) -> dict[str, Any]:
    """What became of a harm that only its rewards tell: how long it served, and what it earned beside control."""
    since = seen.learning(harm.at_ms)
    began_ms = next((one.time_ms for one in since if one.version == harm.version), None)
    if began_ms is None:
        return {"outcome": "stayed", "seconds": None, "version": harm.version, "served": 0}
    command = seen.answered(harm)
    back = [one for one in since if command is not None and _sent_back(one, command)]
    ended_ms = back[0].time_ms if back else since[-1].time_ms
    harmful = [one for one in since if one.version >= harm.version and one.time_ms < ended_ms]
    upto = max((one.version for one in harmful), default=harm.version) + 1
    seconds = (ended_ms - began_ms) / 1000
    middle_ms = (began_ms + ended_ms) // 2
    spans = {
        "drop": (began_ms, ended_ms),
        "drop_first_half": (began_ms, middle_ms),
        "drop_second_half": (middle_ms, ended_ms),
    }
    drops = {
        name: drop_between(seen.earned, harm.version, upto, *span, seed=seed)
        for name, span in spans.items()
    }
    why = command.why if command is not None else ""
    compared = _COMPARED.search(why)
    return {
        "outcome": "returned" if back else "stayed",
        "seconds": seconds if back else None,
        "version": harm.version,
        "served": len(harmful),
        "served_by_it_alone": sum(answer.version == harm.version for answer in harmful),
        "versions_learned_from_it": upto - 1 - harm.version,
        "to": command.restored if command is not None else None,
        "comparisons": int(compared.group(1)) if compared else None,
        **drops,
        "requests_per_second": len(harmful) / seconds if seconds else None,
        "why": why,
    }


def _sent_back(answer: Answer, command: Command) -> bool:
    """Whether an answer is by what the command brought; an actor's own is pinned to the old version."""
    if command.action == "rollback":
        return answer.version == command.version
    return answer.version >= command.version


def drop_between(
    earned: Sequence[Earned], first: int, upto: int, began_ms: int, ended_ms: int, seed: int
) -> Interval | None:
    """By how much of control's reward the versions `first` to below `upto` earned less, for requests of that time.

    The interval is a bootstrap over persons, whose twins are in both arms. None where an arm has no requests.
    """
    chosen = [
        one
        for one in earned
        if began_ms <= one.time_ms < ended_ms
        and (one.arm == CONTROL_ARM or (one.arm == LEARNING_ARM and first <= one.version < upto))
    ]
    row = {person: at for at, person in enumerate(sorted({one.person for one in chosen}))}
    sums_APK = np.zeros((2, len(row), 2))
    for one in chosen:
        sums_APK[int(one.arm == LEARNING_ARM), row[one.person]] += (1.0, one.reward)
    if not sums_APK[:, :, 0].sum(1).all():
        return None
    rng = np.random.default_rng(seed)
    times_SP = rng.multinomial(len(row), np.full(len(row), 1 / len(row)), size=RESAMPLES)
    drawn = _drop(np.einsum("sp,apk->ask", times_SP, sums_APK))
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
    mean = float(_drop(sums_APK.sum(1, keepdims=True))[0])
    return Interval(mean=mean, low=float(low), high=float(high))


def _drop(sums_ASK: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        control_S, learning_S = sums_ASK[..., 1] / sums_ASK[..., 0]
        return 1.0 - learning_S / control_S


class Reader(threading.Thread):
    """Feeds a `Seen` from the beginning of the log, until `finish`; hold `lock` while looking at it."""

    def __init__(self, kafka: KafkaSettings) -> None:
        super().__init__(name="harm-log", daemon=True)
        self.seen = Seen()
        self.lock = threading.Lock()
        self._stopping = threading.Event()
        self._client = consumer(kafka.bootstrap, max_poll_records=5000)
        places = [TopicPartition(topic, 0) for topic in (CONTROL, WEIGHTS, WEIGHTS_ACKS)]
        for number in range(kafka.partitions):
            places += [TopicPartition(topic, number) for topic in (EXPOSURES, SAMPLES)]
        self._client.assign(places)
        self._client.seek_to_beginning()

    def run(self) -> None:
        """Poll until `finish`, and then to the end."""
        while not self._stopping.is_set():
            self._poll(100)
        while self._poll(1000):
            pass
        self._client.close()

    def finish(self) -> Seen:
        """Read what is left, and return all."""
        self._stopping.set()
        self.join()
        return self.seen

    def _poll(self, timeout_ms: int) -> int:
        batches = self._client.poll(timeout_ms=timeout_ms)
        with self.lock:
            for place, records in batches.items():
                for record in records:
                    self.seen.take(place.topic, record.offset, record.value)
        return len(batches)
