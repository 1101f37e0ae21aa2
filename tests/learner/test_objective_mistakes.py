"""Mistakes that copies of these objectives make: each check holds for ours and fails on one with the mistake."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.batch import Batch, assemble
from learner.catalogue import Catalogue
from learner.decoder import LazyDecoder
from learner.masking import masked_log_softmax
from learner.objectives import CLIP, Objective, gbpo_per_level
from learner.settings import LearnSettings
from learner.step import StepMetrics, Trainer
from streams.events import Sample
from tests.learner.makers import SMALL, law, learnable, random_catalogue, random_model
from tests.learner.tiny import fresh_tiny

CODES, ROWS = 5, 64


# --- one probability for the whole sequence ---------------------------------------------------------


def of_the_sequence(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
    """Wrong: GBPO of the product of the levels' probabilities."""
    item_Bk1, old_Bk1 = logp_BkL.sum(-1, keepdim=True), logp_old_BkL.sum(-1, keepdim=True)
    return gbpo_per_level(item_Bk1, old_Bk1, advantage_Bk)


def a_dislike_is_felt_on_each_level(objective: Objective) -> None:
    """On policy its gradient is the binary cross-entropy's, level by level."""
    logits = torch.randn(1, 1, 3, 32, generator=torch.Generator().manual_seed(1)).double()

    def norms(loss_of: Callable[[Tensor], Tensor]) -> list[float]:
        moving = logits.clone().requires_grad_()
        loss = loss_of(torch.log_softmax(moving, -1)[..., 0]).sum()
        (gradient,) = torch.autograd.grad(loss, moving)
        of_levels: list[float] = gradient.flatten(0, 2).norm(dim=-1).tolist()
        return of_levels

    disliked = -torch.ones(1, 1, dtype=torch.float64)
    found = norms(lambda logp_BkL: objective(logp_BkL, logp_BkL.detach(), disliked))
    expected = norms(lambda logp_BkL: -torch.log1p(-logp_BkL.exp()).mean(-1))
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_dislike_is_lost_in_the_probability_of_a_sequence() -> None:
    a_dislike_is_felt_on_each_level(gbpo_per_level)
    with pytest.raises(AssertionError):
        a_dislike_is_felt_on_each_level(of_the_sequence)


# --- normalised advantages --------------------------------------------------------------------------


def normalised(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
    """Wrong: GRPO's advantages, (A - mean) / standard deviation of the group."""
    centred_Bk = advantage_Bk - advantage_Bk.mean(-1, keepdim=True)
    spread_B1 = advantage_Bk.std(-1, keepdim=True) + 1e-6
    return gbpo_per_level(logp_BkL, logp_old_BkL, centred_Bk / spread_B1)


def an_item_is_judged_by_itself(objective: Objective) -> None:
    """What the first item of a slate is pulled by does not depend on how the others were liked."""
    generator = torch.Generator().manual_seed(2)
    logp_BkL = -3.0 * torch.rand(1, 4, 3, generator=generator, dtype=torch.float64)
    pulled = []
    for others in ([1, 1, 1], [1, -1, 1], [-1, -1, -1], [0, 0, 0]):
        moving = logp_BkL.clone().requires_grad_()
        advantage_Bk = torch.tensor([[1.0, *others]]).double()
        loss_Bk = objective(moving, torch.full_like(moving, torch.nan), advantage_Bk)
        (gradient,) = torch.autograd.grad(loss_Bk[0, 0], moving)
        pulled.append(gradient[0, 0].tolist())
    assert pulled == [pytest.approx([-1 / 3] * 3)] * 4


def test_a_slate_of_likes_alone_is_lost_in_normalised_advantages() -> None:
    an_item_is_judged_by_itself(gbpo_per_level)
    with pytest.raises(AssertionError):
        an_item_is_judged_by_itself(normalised)


# --- another law at the learner than at serving -----------------------------------------------------


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return random_catalogue(CODES, 60, seed=1)


@pytest.fixture
def model() -> LazyDecoder:
    return random_model(SMALL, CODES, ROWS, seed=4)


def served_by(model: LazyDecoder, catalogue: Catalogue) -> list[Sample]:
    """Samples that carry this model's own law over their trees, at their temperatures."""
    samples = learnable(catalogue, 6, seed=5)
    for one in samples:
        of = law(model, one, catalogue)
        for item in one.items:
            if item.source == "policy":
                item.logp_levels = of[item.sid]
    return samples


def assembled(samples: list[Sample], catalogue: Catalogue) -> Batch:
    return assemble(samples, catalogue.valid, SMALL.context, ROWS)


def stepped(model: LazyDecoder, batch: Batch) -> StepMetrics:
    metrics = Trainer(model, LearnSettings(), 1e-9).step(batch)
    assert metrics is not None
    return metrics


def the_policy_that_served_has_ratio_one(model: LazyDecoder, batch: Batch) -> None:
    metrics = stepped(model, batch)
    assert metrics.ratio == pytest.approx(1.0, abs=1e-5)
    assert metrics.divergence < 1e-9


def test_a_learner_without_the_mask_has_wrong_ratios_from_the_start(
    model: LazyDecoder, catalogue: Catalogue
) -> None:
    batch = assembled(served_by(model, catalogue), catalogue)
    the_policy_that_served_has_ratio_one(model, batch)
    with pytest.raises(AssertionError):
        the_policy_that_served_has_ratio_one(
            model, batch._replace(mask_BkLK=torch.ones_like(batch.mask_BkLK))
        )


def test_a_learner_that_forgets_the_excluded_leaves_has_wrong_ratios(
    model: LazyDecoder, catalogue: Catalogue
) -> None:
    samples = served_by(model, catalogue)
    the_policy_that_served_has_ratio_one(model, assembled(samples, catalogue))
    for one in samples:
        one.excluded = b""
    with pytest.raises(AssertionError):
        the_policy_that_served_has_ratio_one(model, assembled(samples, catalogue))


def test_a_learner_at_another_temperature_has_wrong_ratios(
    model: LazyDecoder, catalogue: Catalogue
) -> None:
    batch = assembled(served_by(model, catalogue), catalogue)
    assert batch.temperature_B.min() < 0.8 < batch.temperature_B.max()
    the_policy_that_served_has_ratio_one(model, batch)
    with pytest.raises(AssertionError):
        the_policy_that_served_has_ratio_one(
            model, batch._replace(temperature_B=torch.ones_like(batch.temperature_B))
        )


def test_without_the_mask_every_third_level_is_outside_the_clip_range() -> None:
    """At the start of `tiny`, over the tree of 3,000 items: the shares by level."""
    catalogue = random_catalogue(32, 3000, seed=1)
    model = fresh_tiny(seed=1, user_rows=ROWS)
    batch = assemble(learnable(catalogue, 32, seed=1), catalogue.valid, model.preset.context, ROWS)
    with torch.no_grad():
        logits = model(model.process(batch.contexts), batch.sids_BkL)
        masked, open_law = (
            masked_log_softmax(logits, mask).gather(-1, batch.sids_BkL[..., None])[..., 0]
            for mask in (batch.mask_BkLK, torch.ones_like(batch.mask_BkLK))
        )
    outside_L = ((open_law - masked).abs() > math.log(1.0 + CLIP)).double().mean((0, 1))
    print("ratios outside the clip range by level without the mask:", outside_L.tolist())
    assert outside_L[0] == 0.0
    assert outside_L[2] > 0.99
