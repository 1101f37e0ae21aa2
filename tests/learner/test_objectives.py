"""Gradient identities of the objectives, in float64, against closed forms (report, "adaptive ratio clipping")."""

import pytest
import torch
from torch import Tensor

from learner.masking import masked_log_softmax
from learner.objectives import entropy, gbpo_per_level, mean_over, supervised

OLD = torch.tensor([1e-6, 0.01, 0.2, 0.5, 0.8, 0.99, 1.0], dtype=torch.float64)
NOW = torch.tensor([1e-5, 0.02, 0.1, 0.4, 0.5, 0.7, 0.999], dtype=torch.float64)


def pairs() -> tuple[Tensor, Tensor]:
    """All pairs of pi_old and pi, `[B, 1, 3]` each (the same on all three levels)."""
    old, now = torch.cartesian_prod(OLD, NOW).unbind(-1)
    return (x.reshape(-1, 1, 1).expand(-1, 1, 3).clone() for x in (old, now))  # type: ignore[return-value]


def factor(old_BkL: Tensor, now_BkL: Tensor, advantage: float) -> Tensor:
    """What GBPO's gradient multiplies d(pi) of each level with, `[B, 1, 3]`."""
    pi = now_BkL.clone().requires_grad_()
    advantage_Bk = torch.full(pi.shape[:2], advantage, dtype=torch.float64)
    loss = gbpo_per_level(pi.log(), old_BkL.log(), advantage_Bk).sum()
    (found,) = torch.autograd.grad(loss, pi)
    return found * 3  # the surrogate is the mean over three levels


def test_a_positive_is_pulled_by_the_inverse_of_the_larger_probability() -> None:
    old, now = pairs()
    found = factor(old, now, 1.0)
    assert torch.allclose(found, -1.0 / torch.maximum(old, now), rtol=1e-12)
    assert (found.abs() <= 1.0 / now + 1e-9).all()
    assert (found.abs() < 0.9 / now).any(), "nothing was held back: the grid tests nothing"


def test_a_negative_is_pushed_by_the_inverse_of_the_larger_of_old_and_one_minus_pi() -> None:
    old, now = pairs()
    found = factor(old, now, -1.0)
    assert torch.allclose(found, 1.0 / torch.maximum(old, 1.0 - now), rtol=1e-12)
    assert (found <= 1.0 / (1.0 - now) + 1e-9).all()


def test_a_negative_has_the_gradient_of_binary_cross_entropy_where_old_is_small() -> None:
    old, now = pairs()
    pi = now.clone().requires_grad_()
    (cross_entropy,) = torch.autograd.grad(-torch.log1p(-pi).sum(), pi)
    same = old <= 1.0 - now
    assert same.any()
    assert not same.all()
    found = factor(old, now, -1.0)
    assert torch.allclose(found[same], cross_entropy[same], rtol=1e-12)
    assert (found[~same] < cross_entropy[~same]).all()


def test_a_positive_of_another_system_has_the_supervised_gradient() -> None:
    _, now = pairs()
    pi = now.clone().requires_grad_()
    (likelihood,) = torch.autograd.grad(3 * supervised(pi.log()).sum(), pi)
    assert torch.allclose(factor(torch.full_like(now, torch.nan), now, 1.0), likelihood, rtol=1e-12)


def test_a_negative_of_another_system_is_pushed_by_at_most_two() -> None:
    _, now = pairs()
    found = factor(torch.full_like(now, torch.nan), now, -1.0)
    assert torch.allclose(found, 1.0 / torch.maximum(now, 1.0 - now), rtol=1e-12)
    assert found.max() <= 2.0


def test_the_size_of_an_advantage_scales_its_gradient() -> None:
    old, now = pairs()
    assert torch.allclose(factor(old, now, -0.25), 0.25 * factor(old, now, -1.0), rtol=1e-12)
    assert factor(old, now, 0.0).abs().max() == 0.0


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_no_gradient_flows_through_the_bounds(advantage: float, foreign: bool) -> None:
    """Finite differences of the surrogate whose bounds are frozen at the present policy."""
    generator = torch.Generator().manual_seed(3)
    codes = 5
    logits = torch.randn(4, 2, 3, codes, generator=generator, dtype=torch.float64)
    mask = torch.rand(logits.shape, generator=generator) < 0.7
    mask[..., 0] = True
    target = torch.zeros(4, 2, 3, 1, dtype=torch.int64)
    old = -3.0 * torch.rand(4, 2, 3, generator=generator, dtype=torch.float64)
    if foreign:
        old = torch.full_like(old, torch.nan)
    advantages = torch.full((4, 2), advantage, dtype=torch.float64)

    def logp(at: Tensor) -> Tensor:
        return masked_log_softmax(at, mask, 0.8).gather(-1, target).squeeze(-1)

    pi = logp(logits).exp()
    bound = torch.maximum(
        torch.where(old.isnan(), pi, old.exp()), pi if advantage > 0 else 1.0 - pi
    )

    def frozen(at: Tensor) -> Tensor:
        return (-(logp(at).exp() / bound).mean(-1) * advantages).sum()

    moving = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(gbpo_per_level(logp(moving), old, advantages).sum(), moving)
    expected = torch.zeros_like(logits)
    step = 1e-6
    for place in range(logits.numel()):
        shift = torch.zeros_like(logits).view(-1)
        shift[place] = step
        shift = shift.view_as(logits)
        expected.view(-1)[place] = (frozen(logits + shift) - frozen(logits - shift)) / (2 * step)
    assert torch.allclose(found, expected, atol=1e-8)
    assert found.abs().max() > 0.01


def test_a_level_is_bounded_by_itself() -> None:
    old = torch.tensor([[[0.1, 0.9, 0.5]]], dtype=torch.float64)
    now = torch.tensor([[[0.6, 0.3, 0.5]]], dtype=torch.float64)
    expected = torch.tensor([[[-1 / 0.6, -1 / 0.9, -1 / 0.5]]], dtype=torch.float64)
    assert torch.allclose(factor(old, now, 1.0), expected)


def test_entropy_is_that_of_the_possible_codes_and_its_gradient_is_finite() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, True])
    found = entropy(masked_log_softmax(logits, mask))
    p = torch.softmax(logits.detach()[mask], -1)
    assert torch.allclose(found, -(p * p.log()).sum())
    (gradient,) = torch.autograd.grad(found, logits)
    assert torch.isfinite(gradient).all()
    assert gradient[1] == 0.0
    assert torch.allclose(gradient[mask], -p * (p.log() + found.detach()))


def test_the_entropy_of_a_single_possible_code_is_zero() -> None:
    mask = torch.tensor([False, True, False])
    assert entropy(masked_log_softmax(torch.randn(3), mask)) == 0.0


def test_a_mean_counts_only_what_was_chosen() -> None:
    values = torch.tensor([1.0, torch.inf, 3.0, torch.nan], requires_grad=True)
    chosen = torch.tensor([True, False, True, False])
    found = mean_over(values, chosen)
    assert found == 2.0
    found.backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.5, 0.0]


def test_a_mean_of_nothing_is_zero_and_pulls_nothing() -> None:
    values = torch.randn(4, requires_grad=True)
    found = mean_over(values, torch.zeros(4, dtype=torch.bool))
    assert found == 0.0
    found.backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.abs().sum() == 0.0
