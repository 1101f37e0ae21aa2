"""The figures of a step that tell how an objective works."""

import math

import pytest
import torch

from learner.batch import Batch, assemble
from learner.catalogue import Catalogue
from learner.masking import masked_log_softmax
from learner.objectives import OBJECTIVES, divergence, mean_over, pull
from learner.settings import LearnSettings
from learner.step import StepMetrics, Trainer
from tests.learner.makers import SMALL, learnable, random_catalogue, random_model

CODES, ROWS = 5, 64


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return random_catalogue(CODES, 60, seed=1)


@pytest.fixture
def batch(catalogue: Catalogue) -> Batch:
    return assemble(learnable(catalogue, 8, seed=3), catalogue.valid, SMALL.context, ROWS)


def stepped(batch: Batch, objective: str) -> StepMetrics:
    trainer = Trainer(random_model(SMALL, CODES, ROWS, seed=4), LearnSettings(), 1e-9)
    trainer.objective = OBJECTIVES[objective]
    metrics = trainer.step(batch)
    assert metrics is not None
    return metrics


def logp_of(batch: Batch) -> torch.Tensor:
    """What the model of `stepped` gives the targets at the logged temperatures."""
    model = random_model(SMALL, CODES, ROWS, seed=4)
    with torch.no_grad():
        logits = model(model.process(batch.contexts), batch.sids_BkL)
    scaled = logits / batch.temperature_B[:, None, None, None]
    law = masked_log_softmax(scaled, batch.mask_BkLK)
    return law.gather(-1, batch.sids_BkL.unsqueeze(-1)).squeeze(-1)


def test_the_estimates_of_divergence_average_to_the_divergence() -> None:
    """Weighted by the old law, over all codes; and none is negative."""
    generator = torch.Generator().manual_seed(1)
    old, new = torch.log_softmax(torch.randn(2, 7, 32, generator=generator).double(), -1)
    estimates = divergence(new, old)
    expected = (old.exp() * (old - new)).sum(-1)
    assert torch.allclose((old.exp() * estimates).sum(-1), expected, rtol=1e-12)
    assert (estimates >= 0.0).all()
    assert divergence(new, new).abs().max() == 0.0


def test_the_reported_divergence_is_over_all_own_exposures(batch: Batch) -> None:
    """Also over those without advantage: choosing by reward would bias it."""
    found = stepped(batch, "gbpo_level").divergence
    difference = logp_of(batch).double() - batch.targets.logp_old_BkL.double()
    own = ~difference.isnan()
    assert (own & (batch.targets.advantage_Bk == 0).unsqueeze(-1)).any()
    estimates = difference.exp() - 1.0 - difference
    assert found == pytest.approx(float(estimates[own].mean()), rel=1e-4)


def test_a_batch_of_other_systems_exposures_has_no_divergence(batch: Batch) -> None:
    targets = batch.targets._replace(
        logp_old_BkL=torch.full_like(batch.targets.logp_old_BkL, torch.nan)
    )
    metrics = stepped(batch._replace(targets=targets), "gbpo_level")
    assert (metrics.divergence, metrics.ratio, metrics.bounded) == (0.0, 0.0, 0.0)
    assert metrics.pull_positive == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_chosen_objective_is_the_one_that_is_minimised(objective: str, batch: Batch) -> None:
    settings = LearnSettings(objective=objective, supervised=0.0, entropy=0.0)  # type: ignore[arg-type]
    trainer = Trainer(random_model(SMALL, CODES, ROWS, seed=4), settings, 1e-9)
    metrics = trainer.step(batch)
    assert metrics is not None
    targets = batch.targets
    losses = {
        name: float(
            mean_over(
                of(logp_of(batch), targets.logp_old_BkL, targets.advantage_Bk),
                targets.advantage_Bk != 0,
            )
        )
        for name, of in OBJECTIVES.items()
    }
    assert metrics.loss == metrics.loss_rl == pytest.approx(losses[objective], rel=1e-4)
    assert len({round(loss, 5) for loss in losses.values()}) == len(losses)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pull_and_clipped_share_are_those_of_the_objective(objective: str, batch: Batch) -> None:
    targets = batch.targets
    found = stepped(batch, objective)
    pull_BkL = pull(
        OBJECTIVES[objective], logp_of(batch), targets.logp_old_BkL, targets.advantage_Bk
    )
    positive, negative = targets.advantage_Bk > 0, targets.advantage_Bk < 0
    assert found.pull_positive == pytest.approx(float(pull_BkL[positive].mean()), rel=1e-4)
    assert found.pull_negative == pytest.approx(float(pull_BkL[negative].mean()), rel=1e-4)
    silent = (pull_BkL[positive | negative] == 0.0).float().mean()
    assert found.clipped == pytest.approx(float(silent), abs=1e-6)


def test_what_is_discarded_shows_in_the_clipped_share(batch: Batch) -> None:
    shares = {name: stepped(batch, name).clipped for name in OBJECTIVES}
    advantage_Bk = batch.targets.advantage_Bk
    dislikes = float((advantage_Bk < 0).sum() / (advantage_Bk != 0).sum())
    print(shares)
    assert shares["gbpo_level"] == 0.0
    assert shares["supervised"] == pytest.approx(dislikes)
    assert shares["ppo_clip"] == shares["ecpo"] > 0.0
    assert shares["dual_clip"] > shares["ppo_clip"]


def test_the_figures_are_numbers_where_there_are_no_negatives(catalogue: Catalogue) -> None:
    samples = learnable(catalogue, 4, seed=3)
    for one in samples:
        for item in one.items:
            item.advantage = max(0, item.advantage or 0)
    metrics = stepped(assemble(samples, catalogue.valid, SMALL.context, ROWS), "gbpo_level")
    assert metrics.pull_negative == 0.0
    assert all(math.isfinite(getattr(metrics, name)) for name in StepMetrics.__dataclass_fields__)
