"""The masked distribution that learner and actor share."""

import pytest
import torch

from learner.masking import masked_log_softmax


def test_probability_is_spread_over_the_valid_codes_alone() -> None:
    logits = torch.tensor([1.0, 9.0, 2.0, 3.0])
    mask = torch.tensor([True, False, True, False])
    logp = masked_log_softmax(logits, mask, 0.5)
    expected = torch.log_softmax(torch.tensor([2.0, 4.0]), dim=-1)
    assert torch.allclose(logp[mask], expected)
    assert logp[~mask].tolist() == [-torch.inf, -torch.inf]


def test_a_row_without_valid_codes_is_minus_infinity_and_has_no_gradient() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False] * 5, [True, False, True, False, True]])
    logp = masked_log_softmax(logits, mask, 1.0)
    assert torch.isneginf(logp[1]).all()
    torch.where(mask, logp, 0.0)[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1].abs().sum() == 0.0
    assert logits.grad[2, 1] == 0.0
    assert logits.grad[0].abs().sum() > 0.0


def test_values_at_closed_codes_do_not_matter() -> None:
    mask = torch.tensor([True, False, True])
    plain = masked_log_softmax(torch.tensor([1.0, 0.0, 2.0]), mask)
    broken = masked_log_softmax(torch.tensor([1.0, torch.nan, 2.0]), mask)
    assert torch.equal(plain, broken)


def test_float32_of_the_learner_agrees_with_float64() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 3.0 * torch.randn(200, 32, generator=generator)
    mask = torch.rand(200, 32, generator=generator) < 0.7
    for temperature in (1.0, 0.7, 3.0):
        learner = masked_log_softmax(logits, mask, temperature)
        actor = masked_log_softmax((logits / temperature).double(), mask)
        assert torch.allclose(actor.exp().sum(-1), torch.ones(200, dtype=torch.float64), 0, 1e-14)
        likely = mask & (actor > -8.0)
        assert (learner.double() - actor)[likely].abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        masked_log_softmax(torch.zeros(2), torch.ones(2, dtype=torch.bool), temperature)
