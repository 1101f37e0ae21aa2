"""Attention of few queries to many keys that are their own values: the lazy decoder's cross attention in training.

With S_kv = 1 a context position's key is its value (OneRec-V2 report, "Context processor"), and a request has 3 k queries
for hundreds of positions. torch's fused kernel for the CPU is made for the opposite: its backward fills gradients of keys
and of values apart, and autograd adds them up. Here both come from one product,

    d keys = [dS; P]^T [q; dO]     S = q K^T / sqrt(d), P = softmax(S), O = P K

which a CPU does in two thirds of the time. The scores are kept for the way back; there are few. Serving, other
devices, autocast and short contexts stay with torch's kernel.

Legend: B requests, G key/value heads, X queries of a head, N context positions, d d_head.
"""

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FROM_POSITIONS: Final = 128
"""Below, there is little to gain."""


def pays(keys_BGNd: Tensor, values_BGNd: Tensor) -> bool:
    """Whether `attend_shared` may and should be used."""
    return (
        values_BGNd is keys_BGNd
        and keys_BGNd.requires_grad
        and keys_BGNd.device.type == "cpu"
        and keys_BGNd.shape[2] >= FROM_POSITIONS
        and not torch.is_autocast_enabled("cpu")
    )


def attend_shared(q_BGXd: Tensor, keys_BGNd: Tensor, present_BN: Tensor) -> Tensor:
    """What the queries read, `[B, G, X, d]`; positions that are not present are not seen, one must be."""
    read_BGXd: Tensor = _Shared.apply(q_BGXd, keys_BGNd, present_BN)
    return read_BGXd


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BGXd: Tensor, keys_BGNd: Tensor, present_BN: Tensor) -> Tensor:
        ctx.scale = q_BGXd.shape[-1] ** -0.5
        scores_BGXN = (q_BGXd * ctx.scale) @ keys_BGNd.mT
        shares_BGXN = scores_BGXN.masked_fill_(~present_BN[:, None, None, :], -torch.inf).softmax(-1)
        ctx.save_for_backward(q_BGXd, keys_BGNd, shares_BGXN)
        read_BGXd: Tensor = shares_BGXN @ keys_BGNd
        return read_BGXd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_read_BGXd: Tensor) -> tuple[Tensor, Tensor, None]:
        q_BGXd, keys_BGNd, shares_BGXN = ctx.saved_tensors
        d_shares_BGXN = d_read_BGXd @ keys_BGNd.mT
        mean_BGX1 = (d_shares_BGXN * shares_BGXN).sum(-1, keepdim=True)
        d_scores_BGXN = (d_shares_BGXN - mean_BGX1) * shares_BGXN * ctx.scale
        weights = torch.cat([d_scores_BGXN, shares_BGXN], dim=2)
        d_keys_BGNd = weights.mT @ torch.cat([q_BGXd, d_read_BGXd], dim=2)
        return d_scores_BGXN @ keys_BGNd, d_keys_BGNd, None
