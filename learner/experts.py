"""A mixture of experts in place of a block's FFN: one shared expert and the best few of many routed ones.

OneRec-V2 report, "Lazy decoder block": 53 routed experts, one shared, top-3, balanced without an auxiliary loss in
the manner of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). There, and here:
- An expert's score is sigmoid(router x). The `top` experts by score + bias are chosen; the gate is the raw score,
  normalised over the chosen. So the bias decides who works, never how loud, and gets no gradient.
- After each step the bias of an expert that saw less than the mean moves up by a fixed rate, of one that saw more
  down by it. The bias is part of the policy's state: published, and in checkpoints. The loads are not: they are
  zero between steps. The sigmoid is our choice (the report names the method, not the function).
- Scores are computed in float32 also under autocast: in bfloat16 near ties would fall differently at the actor.

Positions are sorted by expert, each expert multiplies its own, and the results are sorted back; none is dropped.

Legend: T positions, D d_model, X routed experts, F width of an expert, c choices of a position (`top`).
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learner.layers import Layer
from learner.presets import Preset

BALANCE_RATE: Final = 1e-3
"""What a bias moves by after a step; DeepSeek-V3's."""


class Experts(nn.Module):
    """Routed and shared experts; each is a SwiGLU."""

    bias: Tensor
    """Added to the scores when experts are chosen; float32, moved by `balance`."""
    load: Tensor
    """Positions that each expert saw in training since the last `balance`; not part of the state."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        if not 0 < preset.top <= preset.experts:
            raise ValueError(f"top {preset.top} of {preset.experts} experts: take 1 to all of them")
        self.top = preset.top
        width, hidden = preset.d_model, preset.d_expert
        self.router = nn.Linear(width, preset.experts, bias=False)
        self.into = nn.Parameter(torch.empty(preset.experts, 2 * hidden, width))
        self.out = nn.Parameter(torch.empty(preset.experts, width, hidden))
        self.shared_in = nn.Linear(width, 2 * hidden, bias=False)
        self.shared_out = nn.Linear(hidden, width, bias=False)
        nn.init.uniform_(self.into, -(width**-0.5), width**-0.5)  # as nn.Linear starts
        nn.init.uniform_(self.out, -(hidden**-0.5), hidden**-0.5)
        self.register_buffer("bias", torch.zeros(preset.experts))
        self.register_buffer(
            "load", torch.zeros(preset.experts, dtype=torch.int64), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        x_TD = x.reshape(-1, x.shape[-1])
        chosen_Tc, gate_Tc = self.route(x_TD)
        expert_n = chosen_Tc.flatten()
        load_X = torch.bincount(expert_n, minlength=len(self.bias))
        if self.training and torch.is_grad_enabled():
            self.load += load_X
        order_n = expert_n.argsort(stable=True)
        back_n = torch.empty_like(order_n)
        back_n[order_n] = torch.arange(len(order_n), device=order_n.device)
        # Once per choice and permuted, rather than gathered: its gradient is then the inverse permutation and a sum
        # in a fixed order.
        x_nD = x_TD.repeat_interleave(self.top, dim=0)[order_n]
        groups = x_nD.split(load_X.tolist())  # type: ignore[no-untyped-call]
        y_nD = torch.cat(
            [
                _swiglu(group, into, out)
                for group, into, out in zip(groups, self.into, self.out, strict=True)
            ]
        )
        y_TcD = y_nD[back_n].reshape(*chosen_Tc.shape, x.shape[-1])
        routed_TD = (y_TcD * gate_Tc.unsqueeze(-1).to(y_TcD.dtype)).sum(1)
        shared_TD = _swiglu(x_TD, self.shared_in.weight, self.shared_out.weight)
        return (routed_TD + shared_TD).reshape(x.shape)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts `[T, c]` and their gates `[T, c]`, which add up to 1."""
        exact = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TX = F.linear(x_TD.to(exact), self.router.weight.to(exact)).sigmoid()
        chosen_Tc = (score_TX.detach() + self.bias).topk(self.top, dim=-1).indices
        score_Tc = score_TX.gather(-1, chosen_Tc)
        return chosen_Tc, score_Tc / score_Tc.sum(-1, keepdim=True)

    @torch.no_grad()
    def balance(self, rate: float = BALANCE_RATE) -> None:
        """Move the biases by the loads since the last call, and forget these; nothing moves where none was seen.

        Compared as integers, so the same loads give the same bits anywhere.
        """
        total = self.load.sum()
        self.bias += rate * torch.sign(total - self.load * len(self.load)).to(self.bias.dtype)
        self.load.zero_()


class ExpertLayer(Layer):
    """The sublayer that stands for SwiGLU in a block of experts."""

    def __init__(self, preset: Preset) -> None:
        super().__init__(preset)
        self.ffn_norm = nn.RMSNorm(preset.d_model)
        self.experts = Experts(preset)

    def feed(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        out: Tensor = self.experts(self.ffn_norm(x))
        return out


def _swiglu(x_nD: Tensor, into_GD: Tensor, out_DF: Tensor) -> Tensor:
    gate, up = F.linear(x_nD, into_GD).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, out_DF)
