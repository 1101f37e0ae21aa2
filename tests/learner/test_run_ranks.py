"""A learner of two ranks on a real broker: one journal, one line of versions, and any number of ranks goes on."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from learner.checkpoint import load
from learner.ranks import Ranks
from learner.recovery import RunLog, follow
from learner.run import Learner, LearnerError, share_out
from learner.versions import CHECKPOINTS
from ops.up import free_port
from storage.checkpoints import Checkpoints
from streams.events import Command
from streams.weights import Manifest
from tests.learner.cluster import published
from tests.learner.lineage import (
    HASTY,
    POLICY,
    STEPWISE,
    Lineage,
    accounted,
    counts,
    learn,
    one_line,
    until,
)


@contextmanager
def two(lineage: Lineage, held: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Both ranks, running."""
    command = [sys.executable, "-m", "tests.learner.two_learners"]
    port = str(free_port())
    where = [lineage.kafka.bootstrap, str(lineage.start), str(lineage.data_dir), held]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port, *where],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def manifests(lineage: Lineage) -> list[Manifest]:
    return [manifest for manifest, _ in published(lineage.kafka)]


def taken(lineage: Lineage) -> int:
    return sum(accounted(manifests(lineage)).values())


def made_again(lineage: Lineage) -> int:
    """How many versions come out again from the start and the journals."""
    trainer, progress, _ = load(lineage.start, STEPWISE, STEPWISE.lr)
    count = 0
    with closing(RunLog.of(lineage.kafka, progress)) as run:
        for manifest, digest in follow(trainer, progress, manifests(lineage), run):
            assert digest == manifest.digest
            count += 1
    return count


def test_two_ranks_share_the_partitions_and_one_goes_on_after_them(lineage: Lineage) -> None:
    """With shards; the checkpoints of two are read by two, and by one."""
    lineage.write(lineage.samples(24, seed=1))
    with two(lineage, "shard") as ranks:
        until(lambda: taken(lineage) >= 24 or any(rank.poll() is not None for rank in ranks))
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        said = [rank.communicate(timeout=30)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    steps = [entry for manifest in manifests(lineage) for entry in manifest.journal]
    assert {entry.ranks for entry in steps} == {2}
    assert any(len({partition for partition, _, _ in entry.ranges}) == 2 for entry in steps)
    last = Checkpoints(lineage.data_dir / CHECKPOINTS).path(len(manifests(lineage)))
    assert last.is_dir()
    lineage.write(lineage.samples(8, seed=2))
    with two(lineage, "shard"):  # from what two left behind
        until(lambda: taken(lineage) >= 32)
    lineage.write(lineage.samples(8, seed=3))
    with lineage.started(HASTY) as learner:
        versions = learn(learner, lineage, 40)
    assert [manifest.version for manifest in versions] == list(range(1, len(versions) + 1))
    assert accounted(versions) == counts(trained=40, control=0, without_target=0)
    assert made_again(lineage) == len(versions)


def test_a_rank_that_dies_ends_the_others_in_one_sentence_and_loses_nothing(
    lineage: Lineage,
) -> None:
    lineage.write(lineage.samples(8, seed=1))
    with two(lineage, "copy") as ranks:
        until(lambda: taken(lineage) >= 8 or any(rank.poll() is not None for rank in ranks))
        ranks[1].kill()
        said, _ = ranks[0].communicate(timeout=30)
    assert ranks[0].returncode == 3, said
    assert said.strip().splitlines()[-1].startswith("ended: rank 0: another of the 2 ranks")
    lineage.write(lineage.samples(8, seed=2))
    with two(lineage, "copy"):
        until(lambda: taken(lineage) >= 16)
    assert made_again(lineage) == len(manifests(lineage))


@pytest.mark.parametrize("held", ["shard", pytest.param("copy", marks=pytest.mark.soak)])
def test_all_ranks_go_back_to_the_same(lineage: Lineage, held: str) -> None:
    lineage.write(lineage.samples(24, seed=1))
    with two(lineage, held) as ranks:
        until(lambda: taken(lineage) >= 24 or any(rank.poll() is not None for rank in ranks), 120)
        last = len(manifests(lineage))
        back = Command(
            id="1",
            time_ms=0,
            who="t",
            why="t",
            action="rollback",
            arm="learning",
            version=2,
            upto=3,
        )
        lineage.command(back)
        until(
            lambda: len(manifests(lineage)) > last or any(rank.poll() is not None for rank in ranks)
        )
        restored = manifests(lineage)[last]
        assert (restored.restored, restored.digest) == (2, manifests(lineage)[1].digest)
        later = lineage.samples(12, seed=2)
        for sample in later[::3]:
            sample.policy_version = 3
        lineage.write(later)
        until(lambda: taken(lineage) >= 36 or any(rank.poll() is not None for rank in ranks), 120)
        assert [rank.poll() for rank in ranks] == [None, None]
    assert accounted(manifests(lineage)) == counts(trained=32, condemned=4)
    assert made_again(lineage) == len(manifests(lineage))


def test_more_ranks_than_partitions_are_refused(lineage: Lineage) -> None:
    with pytest.raises(LearnerError, match="3 ranks share 2 partitions") as caught:
        Learner(lineage.kafka, POLICY, HASTY, lineage.data_dir, Ranks(0, 3))
    one_line(caught.value)


@pytest.mark.parametrize(
    ("has", "most", "shares"),
    [
        ([70], 64, [64]),
        ([10], 64, [64]),
        ([10, 20], 64, [64, 64]),
        ([100, 100], 64, [32, 32]),
        ([10, 100], 64, [10, 54]),
        ([100, 0, 100], 64, [32, 1, 32]),
        ([5, 100, 30], 64, [5, 30, 29]),
    ],
)
def test_ranks_share_a_step_by_what_they_have(has: list[int], most: int, shares: list[int]) -> None:
    assert share_out(has, most) == shares
