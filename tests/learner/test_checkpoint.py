"""A checkpoint holds everything that the next step depends on, or says what is wrong with its file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from learner.batch import Batch, assemble
from learner.catalogue import Catalogue
from learner.checkpoint import FORMAT, CheckpointError, Progress, fits, load, to_bytes
from learner.policy import build
from learner.semantic_ids import Codebooks, fit
from learner.settings import LearnSettings, PolicySettings
from learner.step import Trainer
from tests.learner.makers import learnable, random_catalogue

CODES, ROWS = 5, 64
LEARN = LearnSettings()
LR = 3e-3


@pytest.fixture(scope="module")
def codebooks() -> Codebooks:
    return fit(np.random.default_rng(1).normal(size=(50, 4)), CODES, 1)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return random_catalogue(CODES, 60, seed=1)


def fresh(codebooks: Codebooks) -> Trainer:
    torch.manual_seed(11)
    model = build("tiny", CODES, ROWS)
    model.start_from_centroids(list(codebooks.centroids))
    return Trainer(model, LEARN, LR)


def batch_of(catalogue: Catalogue, trainer: Trainer, seed: int) -> Batch:
    return assemble(
        learnable(catalogue, 4, seed), catalogue.valid, trainer.model.preset.context, ROWS
    )


def progress() -> Progress:
    return Progress(
        version=3,
        lineage="abc",
        preset="tiny",
        codes=CODES,
        user_rows=ROWS,
        steps=2,
        catalogue_version=59,
        watermark_ms=17,
        offsets={0: 5, 3: 1 << 40},
    )


@pytest.fixture
def saved(tmp_path: Path, codebooks: Codebooks, catalogue: Catalogue) -> tuple[Path, Trainer]:
    trainer = fresh(codebooks)
    for seed in (1, 2):
        trainer.step(batch_of(catalogue, trainer, seed))
    torch.rand(3)
    path = tmp_path / "v3.safetensors"
    path.write_bytes(to_bytes(trainer, progress(), codebooks))
    return path, trainer


def test_a_learner_that_resumes_has_the_weights_of_one_that_never_stopped(
    saved: tuple[Path, Trainer], catalogue: Catalogue
) -> None:
    path, going_on = saved
    noise = [torch.rand(4)]
    for seed in (3, 4, 5):
        going_on.step(batch_of(catalogue, going_on, seed))
        noise.append(torch.rand(2))
    torch.manual_seed(999)  # whatever else the new process did before
    resumed, _, _ = load(path, LEARN, LR)
    again = [torch.rand(4)]
    for seed in (3, 4, 5):
        resumed.step(batch_of(catalogue, resumed, seed))
        again.append(torch.rand(2))
    for name, value in going_on.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert all(torch.equal(one, two) for one, two in zip(noise, again, strict=True))


@pytest.mark.parametrize("part", ["dense.0.exp_avg", "dense.0.step", "rows.0.exp_avg_sq"])
def test_every_moment_of_the_optimisers_matters(
    part: str, saved: tuple[Path, Trainer], catalogue: Catalogue, tmp_path: Path
) -> None:
    """What the test above compares would differ if one moment were lost."""
    path, going_on = saved
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    tensors[part] = torch.ones_like(tensors[part])
    damaged = tmp_path / "damaged.safetensors"
    save_file(tensors, damaged, metadata=meta)
    resumed, _, _ = load(damaged, LEARN, LR)
    for trainer in (going_on, resumed):
        trainer.step(batch_of(catalogue, trainer, 2))
    states = zip(
        going_on.model.state_dict().values(), resumed.model.state_dict().values(), strict=True
    )
    assert not all(torch.equal(one, two) for one, two in states)


def test_progress_and_codebooks_come_back(
    saved: tuple[Path, Trainer], codebooks: Codebooks
) -> None:
    _, found, books = load(saved[0], LEARN, LR)
    assert found == progress()
    assert books.digest() == codebooks.digest()


def test_the_checkpoint_of_an_untrained_policy_loads(tmp_path: Path, codebooks: Codebooks) -> None:
    path = tmp_path / "start.safetensors"
    path.write_bytes(to_bytes(fresh(codebooks), progress(), codebooks))
    trainer, _, _ = load(path, LEARN, LR)
    assert trainer.dense_optimiser.state_dict()["state"] == {}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def rubbish(path: Path) -> None:
    path.write_bytes(b"this is no checkpoint, whatever its name says")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def rewritten(path: Path, tensors: dict[str, torch.Tensor | None], **meta: str | None) -> None:
    with safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        notes = dict(file.metadata())
    for name, value in tensors.items():
        if value is None:
            del kept[name]
        else:
            kept[name] = value
    for note, text in meta.items():
        if text is None:
            del notes[note]
        else:
            notes[note] = text
    save_file(kept, path, metadata=notes)


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def other_format(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        note = file.metadata()[FORMAT]
    rewritten(path, {}, **{FORMAT: None, "dwell-checkpoint-9": note})


def no_progress(path: Path) -> None:
    rewritten(path, {}, **{FORMAT: None})


def bad_progress(path: Path) -> None:
    rewritten(path, {}, **{FORMAT: '{"version": "three"}'})


def unknown_preset(path: Path) -> None:
    note = '{"version":1,"lineage":"l","preset":"huge","codes":5,"user_rows":64}'
    rewritten(path, {}, **{FORMAT: note})


def other_codes(path: Path) -> None:
    note = '{"version":1,"lineage":"l","preset":"tiny","codes":6,"user_rows":64}'
    rewritten(path, {}, **{FORMAT: note})


def no_weight(path: Path) -> None:
    rewritten(path, {"model.bos": None})


def no_random_state(path: Path) -> None:
    rewritten(path, {"random_state": None})


def bad_random_state(path: Path) -> None:
    rewritten(path, {"random_state": torch.zeros(3)})


def no_codebook(path: Path) -> None:
    rewritten(path, {"codebooks.codebook.1": None})


def no_moment(path: Path) -> None:
    rewritten(path, {"dense.0.exp_avg": None})


def no_row_moment(path: Path) -> None:
    rewritten(path, {"rows.0.exp_avg_sq": None})


def moment_of_nothing(path: Path) -> None:
    rewritten(path, {"dense.9999.exp_avg": torch.zeros(2)})


def wrong_moment(path: Path) -> None:
    rewritten(path, {"dense.0.exp_avg": torch.zeros(2)})


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        rubbish,
        empty,
        missing,
        folder,
        foreign,
        other_format,
        no_progress,
        bad_progress,
        unknown_preset,
        other_codes,
        no_weight,
        no_random_state,
        bad_random_state,
        no_codebook,
        no_moment,
        no_row_moment,
        moment_of_nothing,
        wrong_moment,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_or_foreign_file_is_refused_by_name(
    damage: object, saved: tuple[Path, Trainer]
) -> None:
    path, _ = saved
    assert callable(damage)
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        load(path, LEARN, LR)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


def test_a_checkpoint_of_another_policy_says_what_to_configure(tmp_path: Path) -> None:
    policy = PolicySettings(codes=CODES, user_rows=ROWS)
    fits(tmp_path, progress(), policy)
    for other in (replace(policy, codes=6), replace(policy, user_rows=65)):
        with pytest.raises(CheckpointError, match="set \\[policy\\] accordingly") as caught:
            fits(tmp_path, progress(), other)
        assert str((other.preset, other.codes, other.user_rows)) in str(caught.value)
