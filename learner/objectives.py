"""What a step minimises: GBPO per level, the streaming supervised loss, and an entropy bonus.

GBPO (OneRec-V2 report, "adaptive ratio clipping"): minimise -E[pi / pi_old' * A] with
pi_old' = max(pi_old, sg(pi)) for A >= 0 and max(pi_old, 1 - sg(pi)) for A < 0; sg stops the gradient. There is no
clip range and no KL term, and advantages are not normalised. So the factor on d(pi) is never above the
log-likelihood's 1/pi for positives, and never above the binary cross-entropy's 1/(1 - pi) for negatives.
Per level, not per item: an item's probability is about 1e-6, 1 - pi is 1, and a dislike would have no effect.
Exposures of another system carry no pi_old: it is sg(pi) then.

Legend: B requests, k targets, L levels, K codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """What a batch asks of the policy; padding has advantage 0 and is not supervised."""

    advantage_Bk: Tensor
    supervised_Bk: Tensor
    shown_Bk: Tensor
    logp_old_BkL: Tensor
    """Logged at exposure; NaN for exposures of another system."""


def gbpo_per_level(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
    """GBPO surrogate `[B, k]`, mean over the levels, to be minimised.

    `logp_BkL` are log-probabilities over the request's valid tree at the logged temperature, in nats.
    """
    pi_BkL = logp_BkL.exp()
    fixed_BkL = pi_BkL.detach()
    old_BkL = torch.where(logp_old_BkL.isnan(), fixed_BkL, logp_old_BkL.exp())
    positive_Bk1 = (advantage_Bk >= 0).unsqueeze(-1)
    bound_BkL = torch.maximum(old_BkL, torch.where(positive_Bk1, fixed_BkL, 1.0 - fixed_BkL))
    return -(pi_BkL / bound_BkL).mean(-1) * advantage_Bk


def supervised(logp_BkL: Tensor) -> Tensor:
    """Negative log-likelihood `[B, k]`, mean over the levels (report, "Lazy decoder": the loss)."""
    return -logp_BkL.mean(-1)


def entropy(logp_BkLK: Tensor) -> Tensor:
    """Entropy in nats `[B, k, L]` of masked log-probabilities; an impossible code adds nothing."""
    possible = logp_BkLK.isfinite()
    safe_BkLK = torch.where(possible, logp_BkLK, 0.0)
    return -(torch.where(possible, safe_BkLK.exp(), 0.0) * safe_BkLK).sum(-1)


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of `values` where `chosen`; 0 of none, so that a batch without targets adds no gradient."""
    weights = chosen.to(values.dtype)
    return (torch.where(chosen, values, 0.0)).sum() / weights.sum().clamp_min(1.0)
