"""A lineage on a real broker: a catalogue, a start, and learners that come and go."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from learner.catalogue import Catalogue
from learner.checkpoint import Progress, load, to_bytes
from learner.policy import build, state_of
from learner.run import Learner
from learner.semantic_ids import Codebooks, fit
from learner.settings import LearnSettings, PolicySettings
from learner.step import Trainer
from learner.update import train
from streams.blocks import digest_of
from streams.clients import records
from streams.events import (
    Command,
    DeadLetter,
    Sample,
    dead_letter_decoder,
    decode,
    encode,
)
from streams.settings import KafkaSettings
from streams.topics import CATALOGUE, CONTROL, DEAD_LETTERS, SAMPLES
from streams.weights import Manifest
from streams.weights_log import manifests_after
from tests.learner.cluster import PARTITIONS, writing
from tests.learner.makers import learnable, random_catalogue, upsert

CODES, ROWS = 5, 64
POLICY = PolicySettings(codes=CODES, user_rows=ROWS)
STEPWISE = LearnSettings(batch=4, batch_wait_s=60.0, publish_every_s=0.0)
"""A step takes exactly four learning requests, however fast they come."""
HASTY = replace(STEPWISE, batch_wait_s=0.05)
ITEMS = 60


@dataclass(frozen=True)
class Lineage:
    """A cluster with a catalogue, and the checkpoint that a learner may start from."""

    kafka: KafkaSettings
    catalogue: Catalogue
    codebooks: Codebooks
    start: Path
    data_dir: Path

    def learner(self, settings: LearnSettings = STEPWISE) -> Learner:
        return Learner(self.kafka, POLICY, settings, self.data_dir)

    @contextmanager
    def started(self, settings: LearnSettings = STEPWISE) -> Iterator[Learner]:
        """A started learner, closed in the end."""
        learner = self.learner(settings)
        learner.start(self.start)
        try:
            yield learner
        finally:
            learner.close()

    def samples(self, requests: int, seed: int) -> list[Sample]:
        return learnable(self.catalogue, requests, seed)

    def write(self, samples: list[Sample]) -> None:
        """To the partitions by turns."""
        with writing(self.kafka) as client:
            for number, sample in enumerate(samples):
                partition = number % PARTITIONS
                client.send(SAMPLES, encode(sample), sample.user.encode(), partition=partition)

    def command(self, *commands: Command) -> None:
        with writing(self.kafka) as client:
            for command in commands:
                client.send(CONTROL, encode(command), partition=0)

    def letters(self) -> list[DeadLetter]:
        return [
            decode(dead_letter_decoder, record.value)
            for record in records(self.kafka.bootstrap, DEAD_LETTERS)
        ]


def made(kafka: KafkaSettings, folder: Path) -> Lineage:
    """A catalogue in the log, and a start beside it."""
    codebooks = fit(np.random.default_rng(1).normal(size=(50, 4)), CODES, 1)
    catalogue = random_catalogue(CODES, ITEMS, seed=1)
    with writing(kafka) as client:
        for item, entry in catalogue.items.items():
            value = upsert(item, entry.sid, codebooks.digest())
            client.send(CATALOGUE, value, item.encode(), partition=0)
    torch.manual_seed(11)
    model = build("tiny", CODES, ROWS)
    model.start_from_centroids(list(codebooks.centroids))
    start = folder / "start.safetensors"
    progress = Progress(version=0, lineage="abc", preset="tiny", codes=CODES, user_rows=ROWS)
    start.write_bytes(to_bytes(Trainer(model, STEPWISE, STEPWISE.lr), progress, codebooks))
    return Lineage(kafka, catalogue, codebooks, start, folder / "data")


def pin(arm: str, version: int) -> Command:
    return Command(id="1", time_ms=0, who="t", why="t", action="pin", arm=arm, version=version)


def until(true: Callable[[], bool], patience_s: float = 40.0) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


@contextmanager
def running(learner: Learner) -> Iterator[list[BaseException]]:
    """Run in a thread while inside; the list holds what ended it, if it ended by itself."""
    stop, ended = threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            learner.run(stop)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield ended
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


def accounted(manifests: list[Manifest]) -> dict[str, int]:
    """Sums over the journals, whose ranges must follow on one another."""
    place: dict[int, int] = {}
    sums = {"trained": 0, "control": 0, "without_target": 0, "condemned": 0}
    for manifest in manifests:
        for entry in manifest.journal:
            for partition, first, upto in entry.ranges:
                assert first == place.get(partition, 0)
                place[partition] = upto
            for what in sums:
                sums[what] += getattr(entry, what)
    return sums


def counts(**some: int) -> dict[str, int]:
    """What `accounted` gives; the rest is none."""
    return {"trained": 0, "control": 0, "without_target": 0, "condemned": 0} | some


def learn(learner: Learner, lineage: Lineage, samples: int) -> list[Manifest]:
    """Run until the journals in the log account for so many samples; the manifests."""

    def settled() -> bool:
        assert not ended, ended
        return sum(accounted(manifests_after(lineage.kafka.bootstrap, 0)).values()) >= samples

    with running(learner) as ended:
        until(settled)
    return manifests_after(lineage.kafka.bootstrap, 0)


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    assert "Error(" not in str(error), "a sentence, not a representation"
    return str(error)


def expected_digest(lineage: Lineage, groups: list[list[Sample]]) -> str:
    """The weights of a learner that takes these steps without ever stopping."""
    trainer, _, _ = load(lineage.start, STEPWISE, STEPWISE.lr)
    for group in groups:
        train(trainer, group, lineage.catalogue)
    return digest_of(state_of(trainer.model))
