"""A learner of several ranks makes the steps of one process on the same batches."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from learner.policy import state_of
from learner.ranks import Ranks, RanksError
from learner.settings import LearnSettings
from learner.step import Trainer
from ops.up import free_port
from streams.blocks import State
from tests.learner.two_ranks import LR, WORLD, batch, policy, steps, terms_of


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    """What each of two gloo processes came to, with a copy each and with a shard each."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.learner.two_ranks"]
    port = str(free_port())
    running = [
        subprocess.Popen(
            [*command, str(rank), port, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(WORLD)
    ]
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output.decode()
    return {path.stem: load_file(path) for path in folder.iterdir()}


def alone(together: bool) -> State:
    """One process on the same batches, whole or as the shares of the ranks."""
    trainer = Trainer(policy(), LearnSettings(), LR)
    terms = []
    for shares in steps():
        if together:
            metrics = trainer.step(batch([sample for share in shares for sample in share]))
        else:
            metrics = trainer.step(*(batch(share) for share in shares))
        terms.append(terms_of(metrics))
    return state_of(trainer.model) | {"terms": np.array(terms)}


def furthest(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.parametrize("held", ["copy", "shard"])
def test_two_ranks_give_the_weights_of_one_process(of_two: dict[str, State], held: str) -> None:
    """Bit for bit those of one that adds up the shares; within rounding those of one that takes them together.

    Adam divides by the root of what it has seen, so the rounding of a small gradient shows in the weights at full
    size: .1 of a step of `LR`, where a share left out moves them by whole steps.
    """
    assert furthest(of_two[f"{held}-0"], of_two[f"{held}-1"]) == 0.0
    assert furthest(of_two[f"{held}-0"], alone(together=False)) == 0.0
    assert furthest(of_two[f"{held}-0"], alone(together=True)) < 0.1 * LR


def test_a_share_left_out_shows(of_two: dict[str, State]) -> None:
    trainer = Trainer(policy(), LearnSettings(), LR)
    for shares in steps():
        trainer.step(batch(shares[0]))
    assert furthest(of_two["copy-0"], state_of(trainer.model) | {"terms": np.zeros(1)}) > LR


def test_ranks_own_all_partitions_once() -> None:
    owners = [[rank for rank in range(3) if Ranks(rank, 3).owns(n)] for n in range(8)]
    assert owners == [[n % 3] for n in range(8)]


def test_a_gpu_that_is_not_there_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RanksError, match=r"learn\.device is cuda, but torch finds no GPU"):
        Ranks.join("cuda")
    assert Ranks.join("auto").device == torch.device("cpu")


def test_a_process_that_nobody_else_was_started_with_is_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks.join()
    assert (ranks.rank, ranks.world) == (0, 1)
    assert ranks.everyone("me") == ["me"]
    assert torch.equal(ranks.total(torch.tensor([2, 3])), torch.tensor([2, 3]))
