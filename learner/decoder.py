"""The lazy decoder of OneRec-V2: no encoder, no key/value projections in cross attention, three output levels.

Report sections "Context processor" and "Lazy decoder block":
- The context is one linear map per position, cut into S_kv * L_kv chunks of G_kv * d_head; each key set and each
  value set has its own RMSNorm. Layer l reads set floor(l * L_kv / layers).
- Input Embed([BOS, s1, s2]): position i predicts level i. Blocks are pre-norm: cross attention (only W_q and W_o),
  causal self-attention, SwiGLU. Each level has its own RMSNorm and head.
- The k targets of a request share one context and do not see one another.
Our choices where the report is silent. With few samples the start decides how soon the policy tells persons apart,
so it starts as a filter by content and learns from there:
- Code embeddings start from the k-means centroids, all levels through one random rotation and at one scale, so
  that an item's three embeddings add up to its place; context, input and output share them.
- logits = head(h), started at zero, + 2 h E^T / sqrt(d_model): h is RMS-normed and |E| about 4, so a code in the
  direction of h has up to 8 nats (at 1 / d_model satisfaction rose .6 times as much in 3,000 requests, one seed).
- A behaviour's context starts as the sum of its codes' embeddings (and features); W_o of the cross attention starts
  as the identity, so that what was attended to reaches the logits, and W_q small: all behaviours count alike.
- Position embeddings count from the newest behaviour.

Legend: B requests, N context positions (T behaviours and the static one), k targets, L levels, P prefix
positions, D d_model, E d_embed, H query heads, G key/value heads, d d_head, K codes of a level.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from learner.context import FEATURES, Contexts
from learner.presets import Preset
from streams.events import LEVELS

_QUERY_START: Final = 0.2
"""Of the usual size: nearly uniform attention at the start."""
_CODE_NORM: Final = 4.0
"""Mean norm of the first level's embeddings at the start; the other levels keep their proportion."""
_TIED_SCALE: Final = 2.0


class KeyValues(NamedTuple):
    """A processed context: per key/value set `[B, G, N, d]`, and which positions are real `[B, N]`."""

    keys: list[Tensor]
    values: list[Tensor]
    present_BN: Tensor


class ContextProcessor(nn.Module):
    """From behaviours and the user to normalised keys and values."""

    def __init__(self, preset: Preset, user_rows: int) -> None:
        super().__init__()
        self.preset = preset
        self.users = nn.Embedding(user_rows, preset.d_user, sparse=True)
        self.codes = nn.Linear(LEVELS * preset.d_embed, preset.d_context, bias=False)
        self.features = nn.Linear(FEATURES, preset.d_context, bias=False)
        self.static = nn.Linear(preset.d_user, preset.d_context)
        self.positions = nn.Parameter(torch.zeros(preset.context, preset.d_context))
        width = preset.kv_heads * preset.d_head
        self.key_norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(preset.l_kv))
        self.value_norms = nn.ModuleList(
            nn.RMSNorm(width) for _ in range(preset.l_kv if preset.s_kv == 2 else 0)
        )
        nn.init.zeros_(self.users.weight)
        sets = preset.l_kv * preset.s_kv
        with torch.no_grad():
            self.codes.weight.copy_(torch.eye(width, preset.d_embed).repeat(sets, LEVELS))

    def forward(self, contexts: Contexts, embeddings: nn.ParameterList) -> KeyValues:
        """Process a batch of contexts; `embeddings` are the code tables `[K, E]` of the levels."""
        codes_BTE = torch.cat(
            [
                F.embedding(contexts.codes_BTL[..., level], table)
                for level, table in enumerate(embeddings)
            ],
            dim=-1,
        )
        length = contexts.codes_BTL.shape[1]
        behaviours_BTC = (
            self.codes(codes_BTE)
            + self.features(contexts.features_BTF)
            + self.positions[self.preset.context - length :]
        )
        static_B1C = self.static(self.users(contexts.users_B)).unsqueeze(1)
        context_BNC = torch.cat([static_B1C, behaviours_BTC], dim=1)
        chunks = context_BNC.chunk(self.preset.l_kv * self.preset.s_kv, dim=-1)
        keys = [
            self._heads(norm(chunks[index * self.preset.s_kv]))
            for index, norm in enumerate(self.key_norms)
        ]
        values = [
            self._heads(norm(chunks[index * self.preset.s_kv + 1]))
            for index, norm in enumerate(self.value_norms)
        ] or keys
        always_B1 = torch.ones_like(contexts.present_BT[:, :1])
        return KeyValues(keys, values, torch.cat([always_B1, contexts.present_BT], dim=1))

    def _heads(self, x_BNC: Tensor) -> Tensor:
        B, N, _ = x_BNC.shape
        return x_BNC.reshape(B, N, self.preset.kv_heads, self.preset.d_head).transpose(1, 2)


class Block(nn.Module):
    """Lazy cross attention, causal self-attention, SwiGLU; each pre-normed, each with a residual."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        width = preset.d_model
        self.heads = preset.heads
        self.cross_norm = nn.RMSNorm(width)
        self.cross_query = nn.Linear(width, width, bias=False)
        self.cross_out = nn.Linear(width, width, bias=False)
        self.self_norm = nn.RMSNorm(width)
        self.self_qkv = nn.Linear(width, 3 * width, bias=False)
        self.self_out = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width)
        self.ffn_in = nn.Linear(width, 2 * preset.d_ffn, bias=False)
        self.ffn_out = nn.Linear(preset.d_ffn, width, bias=False)
        nn.init.eye_(self.cross_out.weight)
        with torch.no_grad():
            self.cross_query.weight.mul_(_QUERY_START)

    def forward(self, x_BkPD: Tensor, keys: Tensor, values: Tensor, present_BN: Tensor) -> Tensor:
        """One block over `[B, k, P, D]`; the k targets are separate sequences over one context."""
        x_BkPD = x_BkPD + self._cross(self.cross_norm(x_BkPD), keys, values, present_BN)
        x_BkPD = x_BkPD + self._self(self.self_norm(x_BkPD))
        gate, up = self.ffn_in(self.ffn_norm(x_BkPD)).chunk(2, dim=-1)
        out: Tensor = x_BkPD + self.ffn_out(F.silu(gate) * up)
        return out

    def _cross(self, x_BkPD: Tensor, keys: Tensor, values: Tensor, present_BN: Tensor) -> Tensor:
        B, k, P, D = x_BkPD.shape
        q_BHqd = self.cross_query(x_BkPD).reshape(B, k * P, self.heads, -1).transpose(1, 2)
        y_BHqd = F.scaled_dot_product_attention(
            q_BHqd,
            keys,
            values,
            attn_mask=present_BN[:, None, None, :],
            enable_gqa=keys.shape[1] != self.heads,
        )
        y_BkPD: Tensor = self.cross_out(y_BHqd.transpose(1, 2).reshape(B, k, P, D))
        return y_BkPD

    def _self(self, x_BkPD: Tensor) -> Tensor:
        B, k, P, D = x_BkPD.shape
        qkv = self.self_qkv(x_BkPD).reshape(B * k, P, 3, self.heads, D // self.heads)
        q, key, value = qkv.permute(2, 0, 3, 1, 4)
        y_XHPd = F.scaled_dot_product_attention(q, key, value, is_causal=True)
        y_BkPD: Tensor = self.self_out(y_XHPd.transpose(1, 2).reshape(B, k, P, D))
        return y_BkPD


class LazyDecoder(nn.Module):
    """The policy's network."""

    def __init__(self, preset: Preset, codes: int, user_rows: int) -> None:
        super().__init__()
        self.preset = preset
        self.codes = codes
        self.user_rows = user_rows
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
        self.context = ContextProcessor(preset, user_rows)
        self.blocks = nn.ModuleList(Block(preset) for _ in range(preset.layers))
        self.norms = nn.ModuleList(nn.RMSNorm(preset.d_model) for _ in range(LEVELS))
        self.heads = nn.ModuleList(nn.Linear(preset.d_model, codes) for _ in range(LEVELS))
        for head in self.heads:
            assert isinstance(head, nn.Linear)
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

    def process(self, contexts: Contexts) -> KeyValues:
        """Keys and values of a batch of contexts, computed once for all targets."""
        processed: KeyValues = self.context(contexts, self.embeddings)
        return processed

    def hidden(self, kv: KeyValues, prefix_Bkl: Tensor) -> Tensor:
        """States `[B, k, l + 1, D]` after [BOS, prefix] for prefixes of l codes `[B, k, l]`, l < 3."""
        B, k, depth = prefix_Bkl.shape
        parts = [self.bos.expand(B, k, 1, -1)]
        for level in range(depth):
            embedded = F.embedding(prefix_Bkl[..., level], self.embeddings[level])
            parts.append(self.widen(embedded).unsqueeze(2))
        x_BkPD = torch.cat(parts, dim=2) + self.places[: depth + 1]
        for index, block in enumerate(self.blocks):
            chunk = index * self.preset.l_kv // self.preset.layers
            x_BkPD = block(x_BkPD, kv.keys[chunk], kv.values[chunk], kv.present_BN)
        return x_BkPD

    def logits(self, level: int, h_BkD: Tensor) -> Tensor:
        """Logits `[B, k, K]` of one level from its position's state."""
        h_BkD = self.norms[level](h_BkD)
        scale = _TIED_SCALE / self.preset.d_model**0.5
        tied_BkK = h_BkD @ self.widen(self.embeddings[level]).T * scale
        logits_BkK: Tensor = self.heads[level](h_BkD) + tied_BkK
        return logits_BkK

    def step(self, kv: KeyValues, prefix_Bkl: Tensor) -> Tensor:
        """Logits `[B, k, K]` of the level that follows each prefix."""
        depth = prefix_Bkl.shape[-1]
        return self.logits(depth, self.hidden(kv, prefix_Bkl)[:, :, depth])

    def forward(self, kv: KeyValues, sids_BkL: Tensor) -> Tensor:
        """Teacher-forced logits `[B, k, L, K]` of targets `[B, k, L]`."""
        h_BkLD = self.hidden(kv, sids_BkL[..., : LEVELS - 1])
        return torch.stack([self.logits(level, h_BkLD[:, :, level]) for level in range(LEVELS)], 2)
