"""A sharded checkpoint holds what a whole one does, and says what is wrong with it."""

import re
from pathlib import Path

import numpy as np
import pytest

from learner.batch import assemble
from learner.checkpoint import (
    CheckpointError,
    Progress,
    differing,
    load,
    load_shards,
    to_bytes,
    to_folder,
)
from learner.policy import build
from learner.ranks import Ranks
from learner.semantic_ids import Codebooks, fit
from learner.settings import LearnSettings
from learner.step import Trainer
from tests.learner.makers import learnable, random_catalogue

CODES, ROWS = 5, 64
SETTINGS = LearnSettings()
PROGRESS = Progress(version=3, lineage="abc", preset="tiny", codes=CODES, user_rows=ROWS, steps=2)


@pytest.fixture
def learned() -> tuple[Trainer, Codebooks]:
    catalogue = random_catalogue(CODES, 60, seed=1)
    trainer = Trainer(build("tiny", CODES, ROWS), SETTINGS, SETTINGS.lr)
    for seed in (1, 2):
        samples = learnable(catalogue, 4, seed)
        trainer.step(assemble(samples, catalogue.valid, trainer.model.preset.context, ROWS))
    return trainer, fit(np.random.default_rng(1).normal(size=(50, 4)), CODES, 1)


@pytest.fixture
def folder(learned: tuple[Trainer, Codebooks], tmp_path: Path) -> Path:
    made = tmp_path / "v00000003.sharded"
    made.mkdir()
    to_folder(made, learned[0], PROGRESS, learned[1], Ranks())
    return made


def test_shards_hold_what_a_whole_checkpoint_does(
    learned: tuple[Trainer, Codebooks], folder: Path
) -> None:
    content = to_bytes(learned[0], PROGRESS, learned[1])
    assert differing(folder, content) == []
    for trainer, progress, codebooks in (
        load(folder, SETTINGS, SETTINGS.lr),
        load_shards(folder, SETTINGS, SETTINGS.lr, Ranks()),
    ):
        assert progress == PROGRESS
        assert to_bytes(trainer, progress, codebooks) == content


@pytest.mark.parametrize("damage", ["cut short", "no note", "no shards", "a shard too few"])
def test_damaged_shards_are_told_in_one_sentence(folder: Path, damage: str) -> None:
    (shard,) = folder.glob("*.safetensors")
    if damage == "cut short":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "no note":
        (folder / "progress.json").unlink()
    elif damage == "no shards":
        shard.unlink()
    else:
        whole = shard.read_bytes()
        shard.write_bytes(whole.replace(b"model.bos", b"model.xyz"))
    with pytest.raises(CheckpointError, match=re.escape(str(folder))) as caught:
        load(folder, SETTINGS, SETTINGS.lr)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=re.escape(str(folder))) as caught:
        load_shards(folder, SETTINGS, SETTINGS.lr, Ranks())
    assert "\n" not in str(caught.value)
