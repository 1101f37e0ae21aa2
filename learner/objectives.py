"""What a step minimises: one of seven objectives, the streaming supervised loss, and an entropy bonus.

An objective is a function `(logp_BkL, logp_old_BkL, advantage_Bk) -> loss_Bk`; `OBJECTIVES` names them. In all
- pi = exp(logp), a level's probability over the request's valid tree at the logged temperature; sg stops a gradient;
  r = pi / pi_old; w is the weight of an item's advantage on d log pi, so that d loss = -A w d log pi: the likelihood
  has w = 1, the plain policy gradient w = r.
- Each level is judged by itself and the item's loss is the mean over its levels (the report's "for a specific
  token"), but for `gbpo_per_item`. The report does not say on which of the two its PPO, ECPO and dual-clip were run:
  per level here too, so that the bound alone differs.
- NaN in logp_old marks another system's exposure: pi_old = sg(pi), so r = 1 (OneRec-V2 report, section on adaptive
  ratio clipping). Advantages are not normalised, there is no KL term.
- Computed so that small probabilities do no harm in float32: quotients of probabilities are formed from logarithms or
  lifted before they underflow; a level with logp = -inf (padding without valid codes) has a constant loss.

Legend: B requests, k targets, L levels, K codes.
"""

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]

CLIP: Final = 0.2
"""Half-width of PPO's clip range; V1's report does not give its own."""
ECPO_DELTA: Final = 0.1
DUAL_CLIP: Final = 3.0
_UNDERFLOW: Final = -80.0
"""exp(-87) is float32's smallest normal number."""
_FURTHEST: Final = 20.0
"""Nats between pi and pi_old at which a ratio stands still; far beyond every clip range."""


class Targets(NamedTuple):
    """What a batch asks of the policy; padding has advantage 0 and is not supervised."""

    advantage_Bk: Tensor
    supervised_Bk: Tensor
    shown_Bk: Tensor
    logp_old_BkL: Tensor
    """Logged at exposure; NaN for exposures of another system."""


def gbpo_per_level(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
    """GBPO, the default (OneRec-V2 report, section on adaptive ratio clipping): `-mean(pi / pi_old' A)`.

    pi_old' = max(pi_old, sg(pi)) for A >= 0, max(pi_old, 1 - sg(pi)) for A < 0. So w = pi / pi_old': at most the
    likelihood's 1 for positives, at most the binary cross-entropy's pi / (1 - pi) for negatives.
    """
    logp_BkL, old_BkL = _known(logp_BkL, logp_old_BkL)
    positive_Bk1 = (advantage_Bk >= 0).unsqueeze(-1)
    # A positive's quotient has no scale: both are lifted where the larger would underflow.
    larger_BkL = torch.maximum(logp_BkL.detach(), old_BkL)
    lift_BkL = torch.where(positive_Bk1 & (larger_BkL < _UNDERFLOW), larger_BkL, 0.0)
    pi_BkL = (logp_BkL - lift_BkL).exp()
    fixed_BkL = pi_BkL.detach()
    rest_BkL = (1.0 - fixed_BkL).clamp_min(torch.finfo(pi_BkL.dtype).eps)
    bound_BkL = torch.maximum(
        (old_BkL - lift_BkL).exp(), torch.where(positive_Bk1, fixed_BkL, rest_BkL)
    )
    return -(pi_BkL / bound_BkL).mean(-1) * advantage_Bk


def gbpo_per_item(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
    """GBPO by the letter of the formula, for comparison: pi is the item's, the product over its levels.

    An item's pi is about 1e-6, so 1 - pi is about 1, w about 1e-6, and a dislike has no effect. A positive's w is 1
    on each level, not 1/L: three times the pull of the reading per level. One level of another system makes the
    item another system's.
    """
    item_Bk1, old_Bk1 = (x_BkL.sum(-1, keepdim=True) for x_BkL in (logp_BkL, logp_old_BkL))
    return gbpo_per_level(item_Bk1, old_Bk1, advantage_Bk)


def ppo_clip(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
    """PPO (Schulman et al. 2017, equation 7): `-mean(min(r A, clip(r, 1 - e, 1 + e) A))`, e = .2.

    A > 0: w = r up to 1 + e, nothing above. A < 0: w = r from 1 - e on, without a bound above.
    """
    ratio_BkL = _ratio(*_known(logp_BkL, logp_old_BkL))
    return -_clipped(ratio_BkL, advantage_Bk).mean(-1)


def ecpo(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
    """ECPO (OneRec report, V1, "Early-Clipped GRPO"): PPO with a bound on the ratio of negatives.

    For A < 0 pi_old' = max(pi_old, sg(pi) / (1 + e + delta)), e = .2, delta = .1: w = min(r, 1 + e + delta) from
    r = 1 - e on. Nothing is discarded above, and nothing grows; but w does not fall with pi. For A > 0 it is PPO.
    """
    logp_BkL, old_BkL = _known(logp_BkL, logp_old_BkL)
    early_BkL = logp_BkL.detach() - math.log(1.0 + CLIP + ECPO_DELTA)
    negative_Bk1 = (advantage_Bk < 0).unsqueeze(-1)
    bound_BkL = torch.where(negative_Bk1, torch.maximum(old_BkL, early_BkL), old_BkL)
    return -_clipped(_ratio(logp_BkL, bound_BkL), advantage_Bk).mean(-1)


def dual_clip(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
    """Dual-clip PPO (Ye et al. 2020, section "Dual-clip PPO"): for A < 0 PPO's `min(...)` is at least c A, c = 3.

    A < 0: w = r from 1 - e to c, nothing above: a dislike of what the policy has come to like thrice as much is
    discarded. For A > 0 it is PPO.
    """
    ratio_BkL = _ratio(*_known(logp_BkL, logp_old_BkL))
    gain_BkL = _clipped(ratio_BkL, advantage_Bk)
    advantage_Bk1 = advantage_Bk.unsqueeze(-1)
    kept_BkL = torch.maximum(gain_BkL, DUAL_CLIP * advantage_Bk1)
    return -torch.where(advantage_Bk1 < 0, kept_BkL, gain_BkL).mean(-1)


def supervised_only(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
    """Likelihood of the positives, `-mean(log pi) A` for A > 0 (report, "Lazy decoder"): w = 1, and 0 for dislikes.

    The arm to hold the others against: same targets, same weight of the streaming supervised loss.
    """
    logp_BkL, _ = _known(logp_BkL, logp_old_BkL)
    return supervised(logp_BkL) * advantage_Bk.clamp_min(0.0)


def with_unlikelihood(logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
    """Likelihood of positives, unlikelihood of dislikes (Welleck et al. 2019): `-mean(log(1 - pi)) |A|`.

    A < 0: w = pi / (1 - pi), the binary cross-entropy's, whatever pi_old was. A level where pi rounds to 1 (often
    one whose node has a single child) adds nothing: there is nowhere for its probability to go.
    """
    logp_BkL, _ = _known(logp_BkL, logp_old_BkL)
    pi_BkL = logp_BkL.exp()
    certain_BkL = pi_BkL > 1.0 - torch.finfo(pi_BkL.dtype).eps
    unlikelihood_BkL = -torch.log1p(-torch.where(certain_BkL, 0.0, pi_BkL))
    return torch.where(
        advantage_Bk > 0,
        supervised(logp_BkL) * advantage_Bk,
        -unlikelihood_BkL.mean(-1) * advantage_Bk,
    )


OBJECTIVES: Final[dict[str, Objective]] = {
    "gbpo_level": gbpo_per_level,
    "gbpo_item": gbpo_per_item,
    "ppo_clip": ppo_clip,
    "ecpo": ecpo,
    "dual_clip": dual_clip,
    "supervised": supervised_only,
    "unlikelihood": with_unlikelihood,
}


def supervised(logp_BkL: Tensor) -> Tensor:
    """Negative log-likelihood `[B, k]`, mean over the levels (report, "Lazy decoder": the loss)."""
    return -logp_BkL.mean(-1)


def entropy(logp_BkLK: Tensor) -> Tensor:
    """Entropy in nats `[B, k, L]` of masked log-probabilities; an impossible code adds nothing."""
    possible = logp_BkLK.isfinite()
    safe_BkLK = torch.where(possible, logp_BkLK, 0.0)
    return -(torch.where(possible, safe_BkLK.exp(), 0.0) * safe_BkLK).sum(-1)


def divergence(logp_BkL: Tensor, logp_old_BkL: Tensor) -> Tensor:
    """Estimates of KL(old || new) in nats `[B, k, L]`, in float64; its mean over draws from the old law is unbiased.

    The estimator `r - 1 - log r` (k3 of Schulman, "Approximating KL divergence", 2020): never negative, and of less
    variance than -log r. NaN where logp_old is.
    """
    difference_BkL = logp_BkL.double() - logp_old_BkL.double()
    return torch.expm1(difference_BkL) - difference_BkL


def pull(
    objective: Objective, logp_BkL: Tensor, logp_old_BkL: Tensor, advantage_Bk: Tensor
) -> Tensor:
    """The weight w of each level on its d log pi, times L `[B, k, L]`; the likelihood's is 1. NaN where A = 0."""
    leaf_BkL = logp_BkL.detach().requires_grad_()
    with torch.enable_grad():
        loss = objective(leaf_BkL, logp_old_BkL, advantage_Bk).sum()
        (gradient_BkL,) = torch.autograd.grad(loss, leaf_BkL)
    return -gradient_BkL * logp_BkL.shape[-1] / advantage_Bk.unsqueeze(-1)


def mean_over(values: Tensor, chosen: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean of `values` where `chosen`; 0 of none, so that a batch without targets adds no gradient.

    `count` is that of all ranks where these are the values of one: then it is this one's share of the mean.
    """
    count = chosen.to(values.dtype).sum() if count is None else count
    return torch.where(chosen, values, 0.0).sum() / count.clamp_min(1.0)


def _known(logp_BkL: Tensor, logp_old_BkL: Tensor) -> tuple[Tensor, Tensor]:
    """log pi and log pi_old: sg(pi) for another system's, both constant where pi is impossible."""
    possible_BkL = logp_BkL > -torch.inf
    logp_BkL = torch.where(possible_BkL, logp_BkL, 0.0)
    own_BkL = possible_BkL & ~logp_old_BkL.isnan()
    return logp_BkL, torch.where(own_BkL, logp_old_BkL, logp_BkL.detach())


def _ratio(logp_BkL: Tensor, old_BkL: Tensor) -> Tensor:
    return (logp_BkL - old_BkL).clamp(-_FURTHEST, _FURTHEST).exp()


def _clipped(ratio_BkL: Tensor, advantage_Bk: Tensor) -> Tensor:
    """PPO's pessimistic gain, to be maximised."""
    advantage_Bk1 = advantage_Bk.unsqueeze(-1)
    held_BkL = ratio_BkL.clamp(1.0 - CLIP, 1.0 + CLIP)
    return torch.minimum(ratio_BkL * advantage_Bk1, held_BkL * advantage_Bk1)
