"""The policy's distribution over the valid children of a node, over whole levels: learner and audit share it.

The division by the temperature happens in the logits' own dtype. The actor, who has lists of children instead of
masks, divides there, too, and then normalises in float64 (actor/search.py), because a law that is drawn from must
sum to one far closer than float32 does. The two agree within float32 rounding: 1e-6 nats down to log-probabilities
of -8.
"""

import torch
from torch import Tensor


def masked_log_softmax(logits_XK: Tensor, mask_XK: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `[..., K]` over the codes where the mask holds; -inf elsewhere.

    A row without any valid code is -inf throughout (padding) and has gradient zero. Raises
    `ValueError` on a temperature that is not positive.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    closed_XK = ~mask_XK
    scaled_XK = (logits_XK / temperature).masked_fill(closed_XK, -torch.inf)
    logp_XK = torch.log_softmax(scaled_XK, dim=-1)
    # A row without valid codes is NaN here; filling it stops the NaN on the way back, too.
    return logp_XK.masked_fill(closed_XK, -torch.inf)
