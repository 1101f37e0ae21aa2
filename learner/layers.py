"""What every architecture here is made of: attention, SwiGLU, and the side of the targets.

A block is a class that inherits the sublayers it is made of, so an encoder's block, a decoder's with projected keys
and ours share them and are compared on equal terms. Sublayers are pre-normed and return what is to be added:
`x = x + self.attend(x)`. Attention runs through torch's own kernels.

Legend: B requests, k targets, L levels, P positions of a sequence, X sequences, D d_model, E d_embed, H query heads,
G key/value heads, N context positions, d d_head, K codes of a level.
"""

import warnings
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from learner.presets import Preset
from streams.events import LEVELS

_QUERY_START: Final = 0.2
"""Of the usual size: nearly uniform attention at the start."""
_CODE_NORM: Final = 4.0
"""Mean norm of the first level's embeddings at the start; the other levels keep their proportion."""
_TIED_SCALE: Final = 2.0
SMALL_LEVEL: Final = 1 << 15
"""Logits that are computed faster than chosen."""
SINGLE_COST: Final = 8
"""What a single logit costs beside one of a whole level, in a product at full speed."""

with warnings.catch_warnings():
    # torch says once that this kind of tensor is young; what is used of it here is tested.
    warnings.simplefilter("ignore")
    torch.zeros(1, 1).to_sparse_csr()


class Layer(nn.Module):
    """The root of sublayers; each makes its parameters after those of the class it is mixed with."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset


class CrossAttention(Layer):
    """Lazy cross attention: only W_q and W_o, keys and values come as they are (report, "Lazy decoder block")."""

    def __init__(self, preset: Preset) -> None:
        super().__init__(preset)
        width = preset.d_model
        self.cross_norm = nn.RMSNorm(width)
        self.cross_query = nn.Linear(width, width, bias=False)
        self.cross_out = nn.Linear(width, width, bias=False)
        if preset.tied:
            nn.init.eye_(self.cross_out.weight)
            with torch.no_grad():
                self.cross_query.weight.mul_(_QUERY_START)

    def cross(self, x_BkPD: Tensor, keys: Tensor, values: Tensor, present_BN: Tensor) -> Tensor:
        """What the k targets of a request read from its one context `[B, G, N, d]`."""
        B, k, P, D = x_BkPD.shape
        heads, groups = self.preset.heads, keys.shape[1]
        q = (
            self.cross_query(self.cross_norm(x_BkPD))
            .reshape(B, k * P, heads, D // heads)
            .transpose(1, 2)
        )
        # Query heads that share a key head are further queries to it: no copies, any kernel.
        q = q.reshape(B, groups, heads // groups * k * P, D // heads)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=present_BN[:, None, None, :])
        y = y.reshape(B, heads, k * P, D // heads).transpose(1, 2).reshape(B, k, P, D)
        out: Tensor = self.cross_out(y)
        return out


class SelfAttention(Layer):
    """Multi-head self-attention."""

    def __init__(self, preset: Preset) -> None:
        super().__init__(preset)
        width = preset.d_model
        self.self_norm = nn.RMSNorm(width)
        self.self_qkv = nn.Linear(width, 3 * width, bias=False)
        self.self_out = nn.Linear(width, width, bias=False)

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention within each sequence of `x` `[..., P, D]`; causal, or by `mask` (true: is seen), broadcast to
        `[X, H, P, P]` with X sequences."""
        *_, P, D = x.shape
        qkv = self.self_qkv(self.self_norm(x)).reshape(
            -1, P, 3, self.preset.heads, D // self.preset.heads
        )
        q_XHPd, keys, values = qkv.permute(2, 0, 3, 1, 4)
        y_XHPd = F.scaled_dot_product_attention(
            q_XHPd, keys, values, attn_mask=mask, is_causal=mask is None
        )
        out: Tensor = self.self_out(y_XHPd.transpose(1, 2).reshape(x.shape))
        return out


class SwiGLU(Layer):
    """The dense FFN."""

    def __init__(self, preset: Preset) -> None:
        super().__init__(preset)
        width = preset.d_model
        self.ffn_norm = nn.RMSNorm(width)
        self.ffn_in = nn.Linear(width, 2 * preset.d_ffn, bias=False)
        self.ffn_out = nn.Linear(preset.d_ffn, width, bias=False)

    def feed(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        gate, up = self.ffn_in(self.ffn_norm(x)).chunk(2, dim=-1)
        out: Tensor = self.ffn_out(F.silu(gate) * up)
        return out


class TargetSide(nn.Module):
    """Targets in, logits out: code embeddings, their places, and a norm and a head per level.

    A subclass makes its own layers after `__init__` and then calls `add_heads`.
    """

    norms: nn.ModuleList
    heads: nn.ModuleList

    def __init__(self, preset: Preset, codes: int) -> None:
        super().__init__()
        self.preset = preset
        self.codes = codes
        self.embeddings = nn.ParameterList(
            nn.Parameter(torch.randn(codes, preset.d_embed) * 0.05) for _ in range(LEVELS)
        )
        self.bos = nn.Parameter(torch.randn(preset.d_model) * 0.05)
        self.places = nn.Parameter(torch.randn(LEVELS, preset.d_model) * 0.05)
        self.widen = (
            nn.Identity()
            if preset.d_embed == preset.d_model
            else nn.Linear(preset.d_embed, preset.d_model, bias=False)
        )

    def add_heads(self) -> None:
        """The norms and heads of the levels; where logits are tied, heads start at zero."""
        self.norms = nn.ModuleList(nn.RMSNorm(self.preset.d_model) for _ in range(LEVELS))
        self.heads = nn.ModuleList(
            nn.Linear(self.preset.d_model, self.codes) for _ in range(LEVELS)
        )
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            if self.preset.tied:
                nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def start_from_centroids(self, centroids: Sequence[NDArray[np.floating]]) -> None:
        """Code embeddings from the codebooks `[K, X]`: one random rotation and one scale for all levels,
        first level's mean norm 4, plus .05 noise."""
        with torch.no_grad():
            width = centroids[0].shape[1]
            projection_XE = nn.init.orthogonal_(torch.empty(width, self.preset.d_embed))
            projected = [torch.from_numpy(table_KX) @ projection_XE for table_KX in centroids]
            scale = _CODE_NORM / projected[0].norm(dim=1).mean().clamp_min(1e-6)
            for table, projected_KE in zip(self.embeddings, projected, strict=True):
                table.copy_(projected_KE * scale + 0.05 * torch.randn_like(projected_KE))

    def embedded(self, prefix_Bkl: Tensor) -> Tensor:
        """Inputs `[B, k, l + 1, D]` of [BOS, prefix] for prefixes of l codes `[B, k, l]`, l < 3."""
        prefix_Bkl = prefix_Bkl.to(self.places.device)
        B, k, depth = prefix_Bkl.shape
        parts = [self.bos.expand(B, k, 1, -1)]
        for level in range(depth):
            embedded = F.embedding(prefix_Bkl[..., level], self.embeddings[level])
            parts.append(self.widen(embedded).unsqueeze(2))
        return torch.cat(parts, dim=2) + self.places[: depth + 1]

    def logits(self, level: int, h_BkD: Tensor) -> Tensor:
        """Logits `[B, k, K]` of one level from its position's state."""
        h_BkD = self.norms[level](h_BkD)
        logits_BkK: Tensor = self.heads[level](h_BkD)
        if self.preset.tied:
            logits_BkK = logits_BkK + self._narrowed(h_BkD) @ self.embeddings[level].T
        return logits_BkK

    def child_logits(self, level: int, h_BkD: Tensor, place_n: Tensor, code_n: Tensor) -> Tensor:
        """Logits `[n]` of some codes of one level, each from its own of the N = B k states.

        `place_n` ascends. The whole level is computed where that is cheaper.
        """
        whole = h_BkD[..., 0].numel() * self.codes
        if whole <= max(SMALL_LEVEL, len(place_n) * SINGLE_COST):
            whole_NK = self.logits(level, h_BkD).reshape(-1, self.codes)
            return whole_NK[place_n, code_n]
        head = self.heads[level]
        assert isinstance(head, nn.Linear)
        h_ND: Tensor = self.norms[level](h_BkD).flatten(0, 1)
        first_N = torch.searchsorted(place_n, torch.arange(len(h_ND) + 1, device=place_n.device))
        wanted = torch.sparse_csr_tensor(
            first_N,
            code_n,
            h_ND.new_zeros(len(code_n)),
            (len(h_ND), self.codes),
            check_invariants=False,
        )

        def products(h_NX: Tensor, table_KX: Tensor) -> Tensor:
            """Only the wanted products of states and codes."""
            values_n: Tensor = torch.sparse.sampled_addmm(
                wanted, h_NX, table_KX.T, beta=0.0
            ).values()
            return values_n

        logits_n: Tensor = products(h_ND, head.weight) + head.bias[code_n]
        if self.preset.tied:
            narrow_NE = self._narrowed(h_ND)
            logits_n = logits_n + products(narrow_NE, self.embeddings[level])
        return logits_n

    def _narrowed(self, h_XD: Tensor) -> Tensor:
        """States as tied logits take them: narrowing a state is cheaper than widening the table."""
        scale: float = _TIED_SCALE / self.preset.d_model**0.5
        narrow_XE = h_XD @ self.widen.weight if isinstance(self.widen, nn.Linear) else h_XD
        return narrow_XE * scale

    def all_logits(self, h_BkLD: Tensor) -> Tensor:
        """Logits `[B, k, L, K]` of all levels, each from its own position."""
        return torch.stack([self.logits(level, h_BkLD[:, :, level]) for level in range(LEVELS)], 2)
