"""The whole loop in one process, without Kafka or HTTP: the same cores, one after the other, under one seed.

For debugging, for tests and for evaluation. Time is virtual; requests that come within a window of 0.1 s are
decoded together; a version is served from the window after it was made. Nothing reads a clock, so the same seed
gives the same weights.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from actor.explore import Exploration
from actor.policy import ServedPolicy
from actor.recommend import decode, expose, prepare
from actor.users import Users
from learner.journal import Journal, Polled
from learner.policy import build, load_state, state_of
from learner.update import train
from ops.config import Config
from ops.served import Served
from ops.viewer import deliver, watch
from ops.warmup import WarmStart
from storage.kv import MemoryKv
from streams.blocks import State, digest_of
from streams.control import CONTROL_ARM, LEARNING_ARM
from streams.events import Exposure, Feedback, Sample, encode
from streams.intake import partition_of
from streams.partition import Output, Partition
from streams.state import LogRecord, PartitionState
from streams.topics import SAMPLES
from streams.weights import Manifest

WINDOW_MS = 100
TICK_LAG_MS = 500


@dataclass
class SerialRun:
    """What a serial run came to."""

    requests: int = 0
    samples: int = 0
    steps: int = 0
    versions: int = 1
    open: int = 0
    slots: int = 0
    filled: int = 0
    entropy: float = 0.0
    lines: list[Served] = field(default_factory=list)
    weights_digest: str = ""


@dataclass
class _Lane:
    """One partition with its committed state."""

    partition: Partition
    state: PartitionState
    offsets: Counter[str] = field(default_factory=Counter)

    def next(self, topic: str) -> int:
        """The offset that a record of the topic gets."""
        self.offsets[topic] += 1
        return self.offsets[topic] - 1

    def commit(self, output: Output) -> None:
        """What a batch brought about is now on the log."""
        self.state.apply(
            LogRecord(topic, self.next(topic), value, key)
            for topic, pairs in output.records()
            for key, value in pairs
        )


class Serial:
    """The loop's organs, wired by calls; `run` drives them."""

    def __init__(self, config: Config, start: WarmStart, seed: int, now_ms: int) -> None:
        self.result = SerialRun()
        self.on_version: Callable[[State], None] = lambda _: None
        """Told the state of each version."""
        self._config = config
        self._start = start
        self._now_ms = now_ms
        self._rng = np.random.default_rng([seed, 2])
        self._trainer = start.trainer
        self._catalogue = start.catalogue
        self._users = Users(config.actor)
        self._explore = Exploration.of(config.actor)
        self._journal = Journal({})
        self._version = 1
        self._policies = {
            CONTROL_ARM: self._frozen(),
            LEARNING_ARM: self._frozen(),
        }
        self._lanes = [self._lane(number) for number in range(config.kafka.partitions)]
        self._events: list[tuple[int, int, Feedback]] = []
        self._sequence = 0
        self._shown: dict[str, set[str]] = {}
        self._visits: dict[int, int] = {}
        self._busy_until_ms = np.zeros(len(start.twins), np.int64)
        self._first_waiting_ms: int | None = None
        self._published_ms = now_ms
        torch.set_num_threads(config.policy.threads)

    def run(self, requests: int, progress: Callable[[int, int], None]) -> SerialRun:
        """Serve `requests` requests, both arms together, and learn from what comes of them."""
        per_window = self._config.simulate.requests_per_s * WINDOW_MS / 1000 / 2
        owed = 0.0
        while self.result.requests < requests:
            owed += per_window
            pairs, owed = int(owed), owed - int(owed)
            idle = np.flatnonzero(self._busy_until_ms <= self._now_ms)
            persons = self._rng.choice(idle, size=min(pairs, len(idle)), replace=False)
            self._serve([int(person) for person in persons])
            progress(min(requests, self.result.requests), requests)
            self._now_ms += WINDOW_MS
            self._deliver()
            self._learn()
        self.result.open = sum(lane.partition.join.open for lane in self._lanes)
        self.result.versions = self._version
        self.result.weights_digest = digest_of(state_of(self._trainer.model))
        return self.result

    def _lane(self, number: int) -> _Lane:
        state = PartitionState(MemoryKv())
        lane = _Lane(None, state)  # type: ignore[arg-type]
        seeds = self._start.seeds[number]
        for history in seeds.histories:
            self._users.take_history(history.user, encode(history))
        lane.commit(Output(histories=seeds.histories, shaping=seeds.shaping))
        config = self._config
        lane.partition = Partition(config.join, config.shape, config.streams, state)
        return lane

    def _frozen(self) -> ServedPolicy:
        """The present weights as the next arm's policy: a copy, since training goes on."""
        state = state_of(self._trainer.model)
        self.on_version(state)
        progress = self._start.progress
        model = build(progress.preset, progress.codes, progress.user_rows)
        load_state(model, state)
        model.eval().requires_grad_(False)
        model.prepare()
        manifest = Manifest(
            version=self._version,
            lineage=progress.lineage,
            codebook=self._catalogue.codebook,
            preset=progress.preset,
            codes=progress.codes,
            user_rows=progress.user_rows,
            schema=[],
            digest="",
            size_bytes=0,
            chunks=0,
            journal=[],
            watermark_ms=0,
            created_ms=self._now_ms,
        )
        return ServedPolicy(self._version, manifest, model)

    def _serve(self, persons: list[int]) -> None:
        """Both twins of each person ask at once."""
        if not persons:
            return
        slate = self._config.simulate.slate
        for arm, policy in self._policies.items():
            prepared = []
            for person in persons:
                user = self._start.twins[person][arm]
                self.result.requests += 1
                prepared.append(
                    prepare(
                        f"r{self.result.requests:08d}",
                        user,
                        arm,
                        slate,
                        self._users,
                        self._catalogue,
                        policy.model.preset.context,
                        self._now_ms,
                        self._explore,
                        self._config.actor.author_cap,
                        self._config.actor.beam_width,
                    )
                )
            temperature = self._config.actor.temperature
            slates = decode(policy, prepared, temperature, self._rng)
            for row, (person, one) in enumerate(zip(persons, prepared, strict=True)):
                exposure = expose(
                    policy, one, row, slates, self._catalogue, temperature, self._rng, self._now_ms
                )
                self._exposed(exposure, person, slate)
        for person in persons:
            self._visits[person] = self._visits.get(person, 0) + 1

    def _exposed(self, exposure: Exposure, person: int, asked: int) -> None:
        items = [item.item for item in exposure.items]
        self._users.exposed(exposure.user, items)
        lane = self._lane_of(exposure.user)
        lane.partition.expose(exposure, lane.next("exposures"), self._now_ms)
        world = self._start.world
        viewing = watch(
            world, person, self._visits.get(person, 0), items, self._config.simulate.pace
        )
        until_ms = self._now_ms + round(viewing.lasts_s * 1000)
        self._busy_until_ms[person] = max(self._busy_until_ms[person], until_ms)
        for event in deliver(viewing.events, self._rng):
            at_ms = self._now_ms + round(event.at_s * 1000)
            self._sequence += 1
            feedback = Feedback(
                event=f"{exposure.request}-{event.number}",
                user=exposure.user,
                request=exposure.request,
                position=event.position,
                item=event.item,
                time_ms=at_ms,
                kind=event.kind,
                play_ms=event.play_ms,
                withdrawn=event.withdrawn,
            )
            heapq.heappush(self._events, (at_ms, self._sequence, feedback))
        before = self._shown.setdefault(exposure.user, set())
        self.result.slots += asked
        self.result.filled += len(items)
        self.result.lines.append(
            Served(
                person=world.person_ids[person],
                user=exposure.user,
                arm=exposure.arm,
                visit=self._visits.get(person, 0),
                time_ms=self._now_ms,
                request=exposure.request,
                policy_version=exposure.policy_version,
                asked=asked,
                items=items,
                satisfaction=sum(viewing.satisfaction),
                permuted=float(world.permuted_satisfaction(person, items).sum()),
                oracle=world.oracle(person, before),
                dwell_s=sum(viewing.dwell_ms) / 1000,
                seen=sum(dwell > 0 for dwell in viewing.dwell_ms),
                dislikes=viewing.dislikes,
                complete=True,
            )
        )
        before.update(items)

    def _deliver(self) -> None:
        """Feedback that has arrived by now, then ticks, then what the partitions make of it."""
        while self._events and self._events[0][0] <= self._now_ms:
            _, _, feedback = heapq.heappop(self._events)
            item = self._catalogue.items.get(feedback.item)
            self._users.feedback(feedback, item.duration_ms if item else 0)
            lane = self._lane_of(feedback.user)
            lane.partition.feed(feedback, lane.next("feedback"), self._now_ms)
        for number, lane in enumerate(self._lanes):
            for on_exposures in (True, False):
                lane.partition.tick(self._now_ms - TICK_LAG_MS, on_exposures, self._now_ms)
            self._commit(number, lane)

    def _commit(self, number: int, lane: _Lane) -> None:
        output = lane.partition.take()
        for offset, sample in enumerate(output.samples, lane.offsets[SAMPLES]):
            self._journal.add(Polled(number, offset, sample))
        for history in output.histories:
            self._users.take_history(history.user, encode(history))
        lane.commit(output)
        self.result.samples += len(output.samples)

    def _learn(self) -> None:
        """Steps as the live learner takes them, in virtual time."""
        learn = self._config.learn
        if self._journal.waiting and self._first_waiting_ms is None:
            self._first_waiting_ms = self._now_ms
        first = self._first_waiting_ms
        overdue = first is not None and self._now_ms - first >= learn.batch_wait_s * 1000
        if self._journal.trainable >= learn.batch or overdue:
            chosen: list[Sample] = self._journal.cut(learn.batch)
            self._first_waiting_ms = self._now_ms if self._journal.waiting else None
            if chosen:
                metrics = train(self._trainer, chosen, self._catalogue)
                self.result.steps += 1
                self.result.entropy = metrics.entropy if metrics else self.result.entropy
        due = self._now_ms - self._published_ms >= learn.publish_every_s * 1000
        if self._journal.entries and due:
            self._journal.take_entries()
            self._version += 1
            self._policies[LEARNING_ARM] = self._frozen()
            self._published_ms = self._now_ms

    def _lane_of(self, user: str) -> _Lane:
        return self._lanes[partition_of(user, self._config.kafka.partitions)]


def arms_of(lines: list[Served]) -> Mapping[str, list[Served]]:
    """Lines by arm."""
    return {arm: [line for line in lines if line.arm == arm] for arm in (CONTROL_ARM, LEARNING_ARM)}
