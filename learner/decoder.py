"""The lazy decoder of OneRec-V2: no encoder, no key/value projections in cross attention, three output levels.

Report sections "Context processor" and "Lazy decoder block":
- The context is one linear map per position, cut into S_kv * L_kv chunks of G_kv * d_head; each key set and each
  value set has its own RMSNorm. Layer l reads set floor(l * L_kv / layers).
- Input Embed([BOS, s1, s2]): position i predicts level i. Blocks are pre-norm: cross attention (only W_q and W_o),
  causal self-attention, SwiGLU or experts. Each level has its own RMSNorm and head.
- The k targets of a request share one context and do not see one another.
Our choices where the report is silent:
- The context's parts are a static position (the user), the long-term behaviours and the `short` latest ones; where a
  preset tells these apart, each has its own input map. Position embeddings count from the newest behaviour.
Of presets with tied logits. With few samples the start decides how soon the policy tells persons apart, so it starts
as a filter by content and learns from there:
- Code embeddings start from the k-means centroids, all levels through one random rotation and at one scale, so
  that an item's three embeddings add up to its place; context, input and output share them.
- logits = head(h), started at zero, + 2 h E^T / sqrt(d_model): h is RMS-normed and |E| about 4, so a code in the
  direction of h has up to 8 nats (at 1 / d_model satisfaction rose .6 times as much in 3,000 requests, one seed).
- A behaviour's context starts as the sum of its codes' embeddings (and features); W_o of the cross attention starts
  as the identity, so that what was attended to reaches the logits, and W_q small: all behaviours count alike.

Everything runs where the parameters are; inputs follow them.

Legend: B requests, N context positions (T behaviours and the static one), k targets, L levels, P prefix
positions, D d_model, E d_embed, H query heads, G key/value heads, C d_context, d d_head, K codes of a level.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learner.context import FEATURES, Contexts, contexts
from learner.experts import ExpertLayer
from learner.layers import CrossAttention, SelfAttention, SwiGLU, TargetSide
from learner.presets import Preset
from streams.events import LEVELS


class KeyValues(NamedTuple):
    """A processed context: per key/value set `[B, G, N, d]`, and which positions are real `[B, N]`."""

    keys: list[Tensor]
    values: list[Tensor]
    present_BN: Tensor


class FewFeatures(nn.Linear):
    """A linear map, without bias, of few features at many positions.

    The weight is laid out so that torch forms its gradient as x^T g, on a CPU ten times as fast as (g^T x)^T.
    """

    def forward(self, x_BTF: Tensor) -> Tensor:
        """`[B, T, F]` -> `[B, T, C]`."""
        return x_BTF @ self.weight.mT.contiguous()


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
        if preset.short:
            self.long_codes = nn.Linear(LEVELS * preset.d_embed, preset.d_context, bias=False)
            self.long_features = FewFeatures(FEATURES, preset.d_context, bias=False)
        if preset.tied:
            start_CE = torch.eye(width, preset.d_embed).repeat(preset.l_kv * preset.s_kv, LEVELS)
            with torch.no_grad():
                self.codes.weight.copy_(start_CE)
                if preset.short:
                    self.long_codes.weight.copy_(start_CE)

    def forward(self, contexts: Contexts, embeddings: nn.ParameterList) -> KeyValues:
        """Process a batch of contexts; `embeddings` are the code tables `[K, E]` of the levels."""
        contexts = Contexts(*(part.to(self.positions.device) for part in contexts))
        context_BNC = self.mapped(contexts, embeddings)
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

    def mapped(self, contexts: Contexts, embeddings: nn.ParameterList) -> Tensor:
        """The context `[B, N, C]` before it is cut and normed: each position by itself, linearly."""
        users_B, codes_BTL, features_BTF, _ = contexts
        length = codes_BTL.shape[1]
        split = max(0, length - self.preset.short) if self.preset.short else 0
        latest = (slice(split, None), self.codes, self.features)
        parts = [latest]
        if split:
            parts = [(slice(split), self.long_codes, self.long_features), latest]
        positions_TC = self.positions[self.preset.context - length :]
        mapped = [self.static(self.users(users_B)).unsqueeze(1)]
        for rows, code_map, feature_map in parts:
            part_BTC = code_map(_embedded(codes_BTL[:, rows], embeddings))
            part_BTC += feature_map(features_BTF[:, rows])  # in place: contexts are large
            mapped.append(part_BTC + positions_TC[rows])
        return torch.cat(mapped, dim=1)

    def _heads(self, x_BNC: Tensor) -> Tensor:
        B, N, _ = x_BNC.shape
        heads_BGNd = x_BNC.reshape(B, N, self.preset.kv_heads, self.preset.d_head).transpose(1, 2)
        return heads_BGNd.contiguous()  # all layers read it


def _embedded(codes_BTL: Tensor, embeddings: nn.ParameterList) -> Tensor:
    """The levels' embeddings side by side, `[B, T, L * E]`."""
    levels = [F.embedding(codes_BTL[..., level], table) for level, table in enumerate(embeddings)]
    return torch.cat(levels, dim=-1)


class LazyBlock(SelfAttention, CrossAttention):
    """Lazy cross attention, causal self-attention, FFN; each pre-normed, each with a residual."""

    def forward(self, x_BkPD: Tensor, keys: Tensor, values: Tensor, present_BN: Tensor) -> Tensor:
        """One block over `[B, k, P, D]`; the k targets are separate sequences over one context."""
        x_BkPD = x_BkPD + self.cross(x_BkPD, keys, values, present_BN)
        x_BkPD = x_BkPD + self.attend(x_BkPD)
        return x_BkPD + self.feed(x_BkPD)

    def feed(self, x_BkPD: Tensor) -> Tensor:
        """The FFN, which a subclass brings."""
        raise NotImplementedError


class Block(SwiGLU, LazyBlock):
    """The dense block."""


class ExpertBlock(ExpertLayer, LazyBlock):
    """The block with experts."""


class LazyDecoder(TargetSide):
    """The policy's network."""

    def __init__(self, preset: Preset, codes: int, user_rows: int) -> None:
        super().__init__(preset, codes)
        self.user_rows = user_rows
        self.context = ContextProcessor(preset, user_rows)
        self.blocks = nn.ModuleList(
            ExpertBlock(preset) if preset.has_experts(layer) else Block(preset)
            for layer in range(preset.layers)
        )
        self.add_heads()

    def process(self, contexts: Contexts) -> KeyValues:
        """Keys and values of a batch of contexts, computed once for all targets."""
        processed: KeyValues = self.context(contexts, self.embeddings)
        return processed

    def process_packed(self, users: list[str], packed: list[bytes]) -> KeyValues:
        """`process` of contexts as exposures log them; raises `ValueError` on a code outside the codebook."""
        return self.process(
            contexts(users, packed, self.preset.context, self.user_rows, self.codes)
        )

    def hidden(self, kv: KeyValues, prefix_Bkl: Tensor) -> Tensor:
        """States `[B, k, l + 1, D]` after [BOS, prefix] for prefixes of l codes `[B, k, l]`, l < 3."""
        x_BkPD = self.embedded(prefix_Bkl)
        for index, block in enumerate(self.blocks):
            chunk = index * self.preset.l_kv // self.preset.layers
            x_BkPD = block(x_BkPD, kv.keys[chunk], kv.values[chunk], kv.present_BN)
        return x_BkPD

    def step(self, kv: KeyValues, prefix_Bkl: Tensor) -> Tensor:
        """Logits `[B, k, K]` of the level that follows each prefix."""
        depth = prefix_Bkl.shape[-1]
        return self.logits(depth, self.hidden(kv, prefix_Bkl)[:, :, depth])

    def step_to(self, kv: KeyValues, prefix_Bkl: Tensor, place_n: Tensor, code_n: Tensor) -> Tensor:
        """As `step`, but only the logits `[n]` of these codes, each after the prefix in its place among B k."""
        depth = prefix_Bkl.shape[-1]
        h_BkD = self.hidden(kv, prefix_Bkl)[:, :, depth]
        return self.child_logits(depth, h_BkD, place_n.to(h_BkD.device), code_n.to(h_BkD.device))

    def forward(self, kv: KeyValues, sids_BkL: Tensor) -> Tensor:
        """Teacher-forced logits `[B, k, L, K]` of targets `[B, k, L]`."""
        return self.all_logits(self.hidden(kv, sids_BkL[..., : LEVELS - 1]))

    def balance(self, total: Callable[[Tensor], Tensor] = lambda load: load) -> None:
        """Even out the experts' loads, `total` over all that share in a step; called once after each."""
        for block in self.blocks:
            if isinstance(block, ExpertBlock):
                total(block.experts.load)
                block.experts.balance()
