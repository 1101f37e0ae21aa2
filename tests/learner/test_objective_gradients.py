"""Gradients of every objective against closed forms, to 1e-6 in float64; and what rounding must not do to them.

w is the weight of the advantage on d log pi of a level, times the number of levels; the likelihood's is 1. Through
the softmax an objective's gradient at a level's logits is -A w (one-hot - p) / (levels x temperature).
"""

import math
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.masking import masked_log_softmax
from learner.objectives import (
    CLIP,
    DUAL_CLIP,
    ECPO_DELTA,
    OBJECTIVES,
    Objective,
    gbpo_per_item,
    gbpo_per_level,
    pull,
)
from learner.settings import LearnSettings

PER_LEVEL = [name for name in OBJECTIVES if name != "gbpo_item"]
EARLY = 1.0 + CLIP + ECPO_DELTA

logits = st.floats(-30.0, 13.0)
advantages = st.sampled_from([1.0, -1.0, 0.25, -2.0])


def closed_form(name: str, pi: float, old: float | None, advantage: float) -> float:
    """w of one level, or of an item for `gbpo_item`; `old` is None for another system's exposure."""
    ratio = pi / old if old is not None else 1.0
    held = old if old is not None else pi
    if name in ("gbpo_level", "gbpo_item"):
        return pi / max(held, pi if advantage > 0 else 1.0 - pi)
    if name == "supervised":
        return 1.0 if advantage > 0 else 0.0
    if name == "unlikelihood":
        return 1.0 if advantage > 0 else pi / (1.0 - pi) if pi < 1.0 - 1e-15 else 0.0
    if advantage > 0:
        return ratio if ratio <= 1.0 + CLIP else 0.0
    if name == "ecpo":
        ratio = min(ratio, EARLY)
    if name == "dual_clip" and ratio > DUAL_CLIP:
        return 0.0
    return ratio if ratio >= 1.0 - CLIP else 0.0


def weight(objective: Objective, pi: float, old: float | None, advantage: float) -> float:
    """w as autograd has it, of an item of one level."""
    logp = torch.tensor([[[pi]]], dtype=torch.float64).log()
    logp_old = torch.full_like(logp, math.nan if old is None else math.log(old))
    return float(pull(objective, logp, logp_old, torch.full((1, 1), advantage).double()))


def at_a_corner(pi: float, old: float) -> bool:
    corners = (1.0 - CLIP, 1.0 + CLIP, DUAL_CLIP)
    return any(math.isclose(pi / old, corner, rel_tol=1e-9) for corner in corners)


def sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


@pytest.mark.parametrize("name", OBJECTIVES)
@given(z=logits, z_old=logits, advantage=advantages)
def test_the_weight_of_own_exposures_is_the_closed_form(
    name: str, z: float, z_old: float, advantage: float
) -> None:
    pi, old = sigmoid(z), sigmoid(z_old)
    assume(not at_a_corner(pi, old) and abs(z - z_old) < 19.0)
    found = weight(OBJECTIVES[name], pi, old, advantage)
    assert found == pytest.approx(closed_form(name, pi, old, advantage), rel=1e-6, abs=0.0)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(z=logits, advantage=advantages)
def test_the_weight_of_another_systems_exposure_is_the_closed_form(
    name: str, z: float, advantage: float
) -> None:
    pi = sigmoid(z)
    found = weight(OBJECTIVES[name], pi, None, advantage)
    assert found == pytest.approx(closed_form(name, pi, None, advantage), rel=1e-6, abs=0.0)


@pytest.mark.parametrize("objective", [gbpo_per_level, gbpo_per_item])
@given(z=logits, z_old=st.none() | logits)
def test_gbpo_is_bounded_by_likelihood_and_binary_cross_entropy(
    objective: Objective, z: float, z_old: float | None
) -> None:
    pi = sigmoid(z)
    old = None if z_old is None else sigmoid(z_old)
    assert weight(objective, pi, old, 1.0) <= 1.0 + 1e-12
    cross_entropy = pi / (1.0 - pi)
    pushed = weight(objective, pi, old, -1.0)
    assert pushed <= cross_entropy * (1.0 + 1e-9)
    if old is None:
        assert weight(objective, pi, None, 1.0) == pytest.approx(1.0, rel=1e-12)
        # on d(pi): 1 / max(pi, 1 - pi), at most 2
        assert pushed / pi == pytest.approx(1.0 / max(pi, 1.0 - pi), rel=1e-9)
        assert pushed / pi <= 2.0 + 1e-9
    elif old <= 1.0 - pi:
        assert pushed == pytest.approx(cross_entropy, rel=1e-6)
    else:
        assert pushed == pytest.approx(pi / old, rel=1e-6)


@given(z=logits, z_old=logits)
def test_of_the_clipped_objectives_only_plain_ppo_is_unbounded(z: float, z_old: float) -> None:
    assume(abs(z - z_old) < 19.0)
    pi, old = sigmoid(z), sigmoid(z_old)
    assert weight(OBJECTIVES["ecpo"], pi, old, -1.0) <= EARLY + 1e-9
    assert weight(OBJECTIVES["dual_clip"], pi, old, -1.0) <= DUAL_CLIP + 1e-9
    if pi / old > DUAL_CLIP + 1e-6:
        assert weight(OBJECTIVES["ecpo"], pi, old, -1.0) == pytest.approx(EARLY)
        assert weight(OBJECTIVES["dual_clip"], pi, old, -1.0) == 0.0
        assert weight(OBJECTIVES["ppo_clip"], pi, old, -1.0) == pytest.approx(pi / old)


# --- through the softmax ----------------------------------------------------------------------------


class Case:
    """Random logits over random trees with temperature, own and other exposures, both signs."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (2, 3, 3, 6)
        self.logits_BkLK = 2.0 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.mask_BkLK = torch.rand(shape, generator=generator) < 0.6
        self.mask_BkLK[..., 0] = True  # the target
        self.temperature = float(0.5 + torch.rand(1, generator=generator))
        logp_BkL = self.logp(self.logits_BkLK)
        shift_BkL = torch.randn(logp_BkL.shape, generator=generator, dtype=torch.float64)
        self.old_BkL = (logp_BkL + shift_BkL).clamp_max(-1e-3)
        self.old_BkL[:, 2] = torch.nan
        self.advantage_Bk = torch.tensor([[1.0, -1.0, 1.0], [-0.5, 2.0, -1.0]]).double()

    def logp(self, logits_BkLK: Tensor) -> Tensor:
        return masked_log_softmax(logits_BkLK, self.mask_BkLK, self.temperature)[..., 0]

    def gradient(self, objective: Objective) -> Tensor:
        moving = self.logits_BkLK.clone().requires_grad_()
        loss = objective(self.logp(moving), self.old_BkL, self.advantage_Bk).sum()
        (found,) = torch.autograd.grad(loss, moving)
        return found


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_the_gradient_at_the_logits_is_the_weight_times_that_of_the_softmax(
    name: str, seed: int
) -> None:
    """Over the valid codes, at the temperature; an invalid code's logit is not touched."""
    case = Case(seed)
    pi_BkL, old_BkL = case.logp(case.logits_BkLK).exp(), case.old_BkL.exp()
    law_BkLK = masked_log_softmax(case.logits_BkLK, case.mask_BkLK, case.temperature).exp()
    expected = torch.zeros_like(case.logits_BkLK)
    for b, k, level in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)):
        advantage = float(case.advantage_Bk[b, k])
        if name == "gbpo_item":
            pi, old, levels = float(pi_BkL[b, k].prod()), float(old_BkL[b, k].prod()), 1
        else:
            pi, old, levels = float(pi_BkL[b, k, level]), float(old_BkL[b, k, level]), 3
        w = closed_form(name, pi, None if math.isnan(old) else old, advantage)
        one_hot = torch.zeros(6, dtype=torch.float64)
        one_hot[0] = 1.0
        expected[b, k, level] = (
            -advantage * w * (one_hot - law_BkLK[b, k, level]) / (levels * case.temperature)
        )
    found = case.gradient(OBJECTIVES[name])
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-12)
    assert (found[~case.mask_BkLK] == 0.0).all()


def frozen(name: str, logp: Tensor, at: Tensor, old: Tensor, advantage_Bk: Tensor) -> Tensor:
    """The surrogate as its formula is printed; `at` stands wherever it has a stop-gradient."""
    if name == "gbpo_item":
        logp, at, old = (x.sum(-1, keepdim=True) for x in (logp, at, old))
    old = torch.where(old.isnan(), at, old).exp()
    pi, fixed, A = logp.exp(), at.exp(), advantage_Bk.unsqueeze(-1)
    ratio = pi / old
    gain = torch.minimum(ratio * A, ratio.clamp(1.0 - CLIP, 1.0 + CLIP) * A)
    match name:
        case "gbpo_level" | "gbpo_item":
            gain = pi / torch.maximum(old, torch.where(A > 0, fixed, 1.0 - fixed)) * A
        case "ecpo":
            early = pi / torch.maximum(old, fixed / EARLY)
            pushed = torch.minimum(early * A, early.clamp(1.0 - CLIP, 1.0 + CLIP) * A)
            gain = torch.where(A > 0, gain, pushed)
        case "dual_clip":
            gain = torch.where(A > 0, gain, torch.maximum(gain, DUAL_CLIP * A))
        case "supervised":
            gain = torch.where(A > 0, logp * A, 0.0)
        case "unlikelihood":
            gain = torch.where(A > 0, logp * A, -(1.0 - pi).log() * A)
    return -gain.mean(-1)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", [1, 2])
def test_finite_differences_agree_with_the_stop_gradients_frozen(name: str, seed: int) -> None:
    case = Case(seed)
    at = case.logp(case.logits_BkLK)

    def surrogate(logits_BkLK: Tensor) -> Tensor:
        return frozen(name, case.logp(logits_BkLK), at, case.old_BkL, case.advantage_Bk)

    assert torch.allclose(
        surrogate(case.logits_BkLK), OBJECTIVES[name](at, case.old_BkL, case.advantage_Bk)
    )
    step, expected = 1e-6, torch.zeros_like(case.logits_BkLK)
    for place in range(case.logits_BkLK.numel()):
        shift = torch.zeros_like(case.logits_BkLK)
        shift.view(-1)[place] = step
        up, down = (surrogate(case.logits_BkLK + sign * shift).sum() for sign in (1, -1))
        expected.view(-1)[place] = (up - down) / (2 * step)
    found = case.gradient(OBJECTIVES[name])
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_gradient_through_the_bound_would_be_found(advantage: float) -> None:
    """The variant without stop-gradient: its bound moves with pi, and the identity above fails on it."""

    def leaking(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
        pi, old = logp_BkL.exp(), logp_old_BkL.exp()
        bound = torch.maximum(old, pi if advantage > 0 else 1.0 - pi)
        return -(pi / bound).mean(-1) * advantage_Bk

    expected = closed_form("gbpo_level", 0.4, 0.1, advantage)
    assert weight(gbpo_per_level, 0.4, 0.1, advantage) == pytest.approx(expected, rel=1e-6)
    assert weight(leaking, 0.4, 0.1, advantage) != pytest.approx(expected, rel=0.1)


# --- rounding ---------------------------------------------------------------------------------------

EXTREMES = [0.0, -1e-8, -1e-3, -1.0, -50.0, -95.0, -110.0, -1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_probabilities_give_finite_losses_and_gradients(
    name: str, dtype: torch.dtype
) -> None:
    now = torch.tensor([*EXTREMES, -torch.inf], dtype=dtype)
    before = torch.tensor([*EXTREMES, -torch.inf, torch.nan], dtype=dtype)
    logp, old, advantage = torch.cartesian_prod(
        now, before, torch.tensor([1.0, -1.0, 0.0], dtype=dtype)
    ).unbind(-1)
    logp = logp.reshape(-1, 1, 1).expand(-1, 1, 3).clone().requires_grad_()
    old, advantage = old.reshape(-1, 1, 1).expand(-1, 1, 3), advantage.reshape(-1, 1)
    loss = OBJECTIVES[name](logp, old, advantage)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[logp.isneginf()] == 0.0).all()
    assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_has_the_weights_of_float64_where_probabilities_underflow(name: str) -> None:
    grid = torch.tensor([-0.01, -3.0, -70.0, -85.0, -95.0, -110.0, -111.0, -200.0])
    logp, old, advantage = torch.cartesian_prod(grid, grid, torch.tensor([1.0, -1.0])).unbind(-1)
    inputs = logp.reshape(-1, 1, 1), old.reshape(-1, 1, 1), advantage.reshape(-1, 1)
    single = pull(OBJECTIVES[name], *inputs)
    double = pull(OBJECTIVES[name], *(x.double() for x in inputs)).float()
    assert torch.allclose(single, double, rtol=1e-4, atol=1e-15)
    assert (double > 0.5).any()


def test_the_default_is_the_printed_formula_to_the_last_bit() -> None:
    """Working around underflow changes no rounding where nothing underflows."""

    def printed(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
        pi_BkL = logp_BkL.exp()
        fixed_BkL = pi_BkL.detach()
        old_BkL = torch.where(logp_old_BkL.isnan(), fixed_BkL, logp_old_BkL.exp())
        positive_Bk1 = (advantage_Bk >= 0).unsqueeze(-1)
        bound_BkL = torch.maximum(old_BkL, torch.where(positive_Bk1, fixed_BkL, 1.0 - fixed_BkL))
        return -(pi_BkL / bound_BkL).mean(-1) * advantage_Bk

    generator = torch.Generator().manual_seed(1)
    for spread in (0.5, 2.0, 8.0):
        logits_BkLK = spread * torch.randn(64, 6, 3, 32, generator=generator)
        old_BkL = torch.log_softmax(
            logits_BkLK + 0.3 * torch.randn(logits_BkLK.shape, generator=generator), -1
        )[..., 0]
        old_BkL[:, 4:] = torch.nan
        advantage_Bk = torch.randint(-1, 2, (64, 6), generator=generator).float()
        found = []
        for objective in (printed, gbpo_per_level):
            moving = logits_BkLK.clone().requires_grad_()
            logp_BkL = torch.log_softmax(moving, -1)[..., 0]
            assert logp_BkL.min() > -80.0
            loss_Bk = objective(logp_BkL, old_BkL, advantage_Bk)
            (gradient,) = torch.autograd.grad(loss_Bk.sum(), moving)
            found.append((loss_Bk, gradient))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_item_without_advantage_pulls_nothing(name: str) -> None:
    case = Case(3)
    case.advantage_Bk[0] = 0.0
    found = case.gradient(OBJECTIVES[name])
    assert (found[0] == 0.0).all()
    assert found[1].abs().max() > 0.01


def test_a_level_without_alternative_adds_nothing_to_unlikelihood() -> None:
    """Its probability is one whatever the policy does: -log(1 - pi) would be infinite."""
    logp = torch.tensor([[[-0.5, -2.0, 0.0]]], requires_grad=True)
    loss = OBJECTIVES["unlikelihood"](
        logp, torch.full((1, 1, 3), torch.nan), torch.tensor([[-1.0]])
    )
    expected = -sum(math.log(1.0 - math.exp(x)) for x in (-0.5, -2.0)) / 3
    assert float(loss.detach()) == pytest.approx(expected)


def test_every_objective_can_be_chosen_and_the_default_is_gbpo_per_level() -> None:
    assert get_args(get_type_hints(LearnSettings)["objective"]) == tuple(OBJECTIVES)
    assert OBJECTIVES[LearnSettings().objective] is gbpo_per_level
