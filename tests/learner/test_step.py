"""One update: deterministic, and it moves what it should and nothing else."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learner.batch import Batch, assemble
from learner.catalogue import Catalogue
from learner.context import user_row
from learner.decoder import LazyDecoder
from learner.settings import LearnSettings
from learner.step import StepMetrics, Trainer
from tests.learner.makers import (
    SMALL,
    Shown,
    law,
    learnable,
    random_catalogue,
    random_model,
    sample,
)

CODES, ROWS = 5, 64


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return random_catalogue(CODES, 60, seed=1)


def batch_of(catalogue: Catalogue, seed: int, requests: int = 8) -> Batch:
    return assemble(learnable(catalogue, requests, seed), catalogue.valid, SMALL.context, ROWS)


def state_of(model: LazyDecoder) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def trained(catalogue: Catalogue, seeds: list[int]) -> tuple[Trainer, list[StepMetrics | None]]:
    trainer = Trainer(random_model(SMALL, CODES, ROWS, seed=4), LearnSettings(), 1e-2)
    return trainer, [trainer.step(batch_of(catalogue, seed)) for seed in seeds]


def test_the_same_batches_give_the_same_weights_and_figures(catalogue: Catalogue) -> None:
    one, figures = trained(catalogue, [1, 2, 3])
    two, again = trained(catalogue, [1, 2, 3])
    other, _ = trained(catalogue, [1, 3, 2])
    assert figures == again
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name
    assert not torch.equal(one.model.bos, other.model.bos)


def test_a_batch_without_a_target_changes_nothing(catalogue: Catalogue) -> None:
    trainer, _ = trained(catalogue, [1])
    before, momenta = state_of(trainer.model), copy.deepcopy(trainer.dense_optimiser.state_dict())
    samples = learnable(catalogue, 3, seed=2)
    for one in samples:
        for item in one.items:
            item.advantage, item.supervised = 0, False
    assert trainer.step(assemble(samples, catalogue.valid, SMALL.context, ROWS)) is None
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for place, moment in trainer.dense_optimiser.state_dict()["state"].items():
        assert torch.equal(moment["exp_avg"], momenta["state"][place]["exp_avg"])


def test_only_the_rows_of_the_batch_move_in_the_user_table(catalogue: Catalogue) -> None:
    trainer, _ = trained(catalogue, [1])  # momenta of u0 ... u7 are not zero from here on
    table = trainer.model.context.users.weight
    before = table.detach().clone()
    samples = learnable(catalogue, 3, seed=2)
    trainer.step(assemble(samples, catalogue.valid, SMALL.context, ROWS))
    moved = (table.detach() != before).any(dim=1).nonzero().squeeze(-1).tolist()
    assert moved == sorted({user_row(one.user, ROWS) for one in samples})
    assert len(moved) < len({user_row(f"u{number}", ROWS) for number in range(8)})


def test_a_step_lowers_the_loss_of_its_batch(catalogue: Catalogue) -> None:
    trainer = Trainer(random_model(SMALL, CODES, ROWS, seed=4), LearnSettings(), 3e-3)
    figures = [trainer.step(batch_of(catalogue, 1)) for _ in range(30)]
    assert figures[0] is not None
    assert figures[-1] is not None
    assert figures[-1].loss < figures[0].loss - 0.1


def test_positives_rise_and_negatives_fall_at_the_logged_temperature(catalogue: Catalogue) -> None:
    samples = learnable(catalogue, 6, seed=5)
    for one in samples:
        for item in one.items:
            item.supervised = False
    trainer = Trainer(random_model(SMALL, CODES, ROWS, seed=4), LearnSettings(entropy=0.0), 1e-3)

    def pulled() -> float:
        """Sum of the probabilities per level, positives minus negatives."""
        total = 0.0
        for one in samples:
            of = law(trainer.model, one, catalogue)
            for item in one.items:
                total += (item.advantage or 0) * float(torch.tensor(of[item.sid]).exp().sum())
        return total

    before = pulled()
    for _ in range(5):
        trainer.step(assemble(samples, catalogue.valid, SMALL.context, ROWS))
    assert pulled() > before + 0.05


def test_the_reported_terms_are_those_of_the_definition(catalogue: Catalogue) -> None:
    """GBPO at the logged temperature, likelihood at temperature 1, written out plainly."""
    samples = learnable(catalogue, 5, seed=6)
    model = random_model(SMALL, CODES, ROWS, seed=4)
    rl, likelihood = [], []
    ratios, bounded = [], []
    for one in samples:
        own = law(model, one, catalogue)
        plain_sample = copy.copy(one)
        plain_sample.temperature = 1.0
        plain = law(model, plain_sample, catalogue)
        for item in one.items:
            pi = torch.tensor(own[item.sid], dtype=torch.float64).exp()
            advantage = item.advantage or 0
            if advantage:
                old = (
                    torch.tensor(item.logp_levels, dtype=torch.float64).exp()
                    if item.logp_levels is not None
                    else pi
                )
                floor = pi if advantage > 0 else 1 - pi
                rl.append(float(-(pi / torch.maximum(old, floor)).mean() * advantage))
                if item.logp_levels is not None:
                    ratios += (pi / old).tolist()
                    bounded += (floor > old).tolist()
            if item.supervised:
                likelihood.append(-sum(plain[item.sid]) / 3)
    settings = LearnSettings(supervised=0.3, entropy=0.2)
    found = Trainer(model, settings, 1e-9).step(
        assemble(samples, catalogue.valid, SMALL.context, ROWS)
    )
    assert found is not None
    assert found.loss_rl == pytest.approx(sum(rl) / len(rl), abs=1e-5)
    assert found.loss_supervised == pytest.approx(sum(likelihood) / len(likelihood), abs=1e-5)
    assert found.loss == pytest.approx(
        found.loss_rl + 0.3 * found.loss_supervised - 0.2 * found.entropy, abs=1e-5
    )
    assert found.ratio == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert found.bounded == pytest.approx(sum(bounded) / len(bounded), abs=1e-6)
    slots = sum(len(one.items) for one in samples)
    assert found.positives == sum(i.advantage == 1 for o in samples for i in o.items) / slots
    assert found.negatives == sum(i.advantage == -1 for o in samples for i in o.items) / slots


def test_a_gradient_longer_than_the_clip_is_cut(catalogue: Catalogue) -> None:
    """With plain gradients: the step's own gradient, after clipping, has the clip's length."""
    settings = replace(LearnSettings(), clip=0.01)
    trainer = Trainer(random_model(SMALL, CODES, ROWS, seed=4), settings, 1e-3)
    found = trainer.step(batch_of(catalogue, 1))
    assert found is not None
    assert found.grad_norm > 0.01
    length = torch.stack([p.grad.norm() for p in trainer.dense if p.grad is not None]).norm()
    assert float(length) == pytest.approx(0.01, rel=1e-3)


def test_an_exposure_without_play_pulls_only_the_entropy(catalogue: Catalogue) -> None:
    """Served is not seen: a slot without target beside one with a target adds no likelihood."""
    samples = learnable(catalogue, 2, seed=7)
    trainer = Trainer(random_model(SMALL, CODES, ROWS, seed=4), LearnSettings(entropy=0.0), 1e-9)
    before = trainer.step(assemble(samples, catalogue.valid, SMALL.context, ROWS))
    for one in samples:
        sid = next(
            leaf
            for leaf in law(trainer.model, one, catalogue)
            if leaf not in {item.sid for item in one.items}
        )
        extra = sample("x", [Shown(sid)], one.catalogue_version).items[0]
        one.items = [*one.items, extra]
    after = trainer.step(assemble(samples, catalogue.valid, SMALL.context, ROWS))
    assert before is not None
    assert after is not None
    assert after.loss == pytest.approx(before.loss, abs=1e-5)


@pytest.mark.soak
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.timeout(600)
def test_compiling_changes_a_step_by_rounding_only(catalogue: Catalogue) -> None:
    plain, _ = trained(catalogue, [1, 2])
    settings = LearnSettings(compile=True)
    compiled = Trainer(random_model(SMALL, CODES, ROWS, seed=4), settings, 1e-2)
    for seed in (1, 2):
        compiled.step(batch_of(catalogue, seed))
    found, expected = state_of(compiled.model), state_of(plain.model)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-3) for name in expected)
