"""Steps of a learner of two ranks, one process each: `python -m tests.learner.two_ranks RANK PORT FOLDER`."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from learner.batch import Batch, assemble
from learner.decoder import LazyDecoder
from learner.presets import PRESETS
from learner.ranks import Ranks, gathered
from learner.settings import LearnSettings
from learner.step import StepMetrics, Trainer
from streams.events import Sample
from tests.learner.makers import learnable, random_catalogue

CODES, ROWS = 6, 16  # so few rows that users of both ranks share some
WORLD = 2
LR = 1e-2
PRESET = replace(PRESETS["tiny"], layers=3, context=8, experts=4, top=2, d_expert=32)
CATALOGUE = random_catalogue(CODES, 60, seed=1)


def policy() -> LazyDecoder:
    torch.manual_seed(3)
    return LazyDecoder(PRESET, CODES, ROWS)


def steps() -> Iterator[list[list[Sample]]]:
    """The samples of each rank, step by step; in one of them the second rank has none."""
    for number in range(5):
        samples = learnable(CATALOGUE, 9, seed=number)
        yield [samples, []] if number == 2 else [samples[:5], samples[5:]]


def batch(samples: list[Sample]) -> Batch:
    return assemble(samples, CATALOGUE.valid, PRESET.context, ROWS)


def terms_of(metrics: StepMetrics | None) -> list[float]:
    """What all ranks must agree about."""
    assert metrics is not None
    return [metrics.loss, metrics.loss_rl, metrics.loss_supervised, metrics.entropy]


def main(rank: int, port: str, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    ranks = Ranks.join()
    for shard in (False, True):
        trainer = Trainer(policy(), LearnSettings(shard=shard), LR, ranks)
        terms = [terms_of(trainer.step(batch(shares[rank]))) for shares in steps()]
        state = gathered(trainer.model) | {"terms": np.array(terms)}
        save_file(state, folder / f"{'shard' if shard else 'copy'}-{rank}.safetensors")
    ranks.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
