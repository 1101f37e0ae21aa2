"""The context processor of the lazy decoder: behaviours and the user become keys and values.

Report, section "Context processor": one linear map per position, cut into S_kv * L_kv chunks of G_kv * d_head; each
key set and each value set has its own RMSNorm. Our choices where the report is silent:
- The parts are a static position (the user), the long-term behaviours and the `short` latest ones; where a preset
  tells these apart, each has its own input map. Position embeddings count from the newest behaviour.
- With tied logits a behaviour's context starts as the sum of its codes' embeddings (and features).
- The map of a behaviour is linear in its three codes' embeddings, so with weights that do not change any more (a
  served version's) the product is made once per *code*: a behaviour is then three rows gathered and added, features
  and position, whatever the width of the embeddings. Those tables are also what lets a batch be processed piece by
  piece in the cache, written straight to where attention reads it (docs/serving.md has figures).

Legend: B requests, N context positions (T behaviours and the static one), L levels, F features, E d_embed,
C d_context, G key/value heads, d d_head, K codes of a level, n behaviours of some requests.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learner.context import FEATURES, Contexts
from learner.presets import Preset
from streams.events import LEVELS

PIECE: Final = 1 << 18
"""Elements of a piece of a context that is processed at a time: it stays in a core's cache."""


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
            self.heads(norm(chunks[index * self.preset.s_kv]))
            for index, norm in enumerate(self.key_norms)
        ]
        values = [
            self.heads(norm(chunks[index * self.preset.s_kv + 1]))
            for index, norm in enumerate(self.value_norms)
        ] or keys
        always_B1 = torch.ones_like(contexts.present_BT[:, :1])
        return KeyValues(keys, values, torch.cat([always_B1, contexts.present_BT], dim=1))

    def mapped(self, contexts: Contexts, embeddings: nn.ParameterList) -> Tensor:
        """The context `[B, N, C]` before it is cut and normed: each position by itself, linearly."""
        users_B, codes_BTL, features_BTF, _ = contexts
        length = codes_BTL.shape[1]
        long, short = self.parts(length)
        parts = [(short, self.codes, self.features)]
        if long.stop:
            parts.insert(0, (long, self.long_codes, self.long_features))
        positions_TC = self.positions[self.preset.context - length :]
        mapped = [self.static(self.users(users_B)).unsqueeze(1)]
        for rows, code_map, feature_map in parts:
            part_BTC = code_map(_embedded(codes_BTL[:, rows], embeddings))
            part_BTC += feature_map(features_BTF[:, rows])  # in place: contexts are large
            mapped.append(part_BTC + positions_TC[rows])
        return torch.cat(mapped, dim=1)

    def parts(self, length: int) -> tuple[slice, slice]:
        """The long-term part, which may be empty, and the latest behaviours, of so many."""
        split = max(0, length - self.preset.short) if self.preset.short else 0
        return slice(0, split), slice(split, length)

    def heads(self, x_BNC: Tensor) -> Tensor:
        """`[B, G, N, d]`, laid out so."""
        B, N, _ = x_BNC.shape
        heads_BGNd = x_BNC.reshape(B, N, self.preset.kv_heads, self.preset.d_head).transpose(1, 2)
        return heads_BGNd.contiguous()  # all layers read it


def _embedded(codes_BTL: Tensor, embeddings: nn.ParameterList) -> Tensor:
    """The levels' embeddings side by side, `[B, T, L * E]`."""
    levels = [F.embedding(codes_BTL[..., level], table) for level, table in enumerate(embeddings)]
    return torch.cat(levels, dim=-1)


class CodeTables:
    """What a processor with fixed weights makes of each code, for both parts of the context."""

    def __init__(self, processor: ContextProcessor, embeddings: nn.ParameterList) -> None:
        self._processor = processor
        self._latest = _Part(processor.codes, processor.features, embeddings)
        self._long = self._latest
        if processor.preset.short:
            self._long = _Part(processor.long_codes, processor.long_features, embeddings)
        codes = len(embeddings[0])
        device = processor.positions.device
        self._first_L = torch.arange(0, LEVELS * codes, codes, device=device)

    def looked_up(self, contexts: Contexts) -> KeyValues:
        """As the processor's own, but for rounding."""
        processor, preset = self._processor, self._processor.preset
        users_B, codes_BTL, features_BTF, present_BT = (
            part.to(processor.positions.device) for part in contexts
        )
        B, T, _ = codes_BTL.shape
        norms = _by_chunk(processor)
        shape = (B, preset.kv_heads, 1 + T, preset.d_head)
        sets = [torch.empty(shape, device=codes_BTL.device) for _ in norms]
        static_BC = processor.static(processor.users(users_B))
        _write(static_BC.unsqueeze(1), norms, sets, slice(0, 1))
        row_BTL = codes_BTL + self._first_L
        positions_TC = processor.positions[preset.context - T :]
        at_once = max(1, PIECE // max(1, T * preset.d_context))
        for low in range(0, B, at_once):
            here = slice(low, low + at_once)
            ours = [each[here] for each in sets]
            for times, part in zip(processor.parts(T), (self._long, self._latest), strict=True):
                if times.start == times.stop:
                    continue
                x_BTC = part.mapped(row_BTL[here, times], features_BTF[here, times])
                x_BTC += positions_TC[times]
                _write(x_BTC, norms, ours, slice(1 + times.start, 1 + times.stop))
        always_B1 = torch.ones_like(present_BT[:, :1])
        present_BN = torch.cat([always_B1, present_BT], dim=1)
        keys = sets[:: preset.s_kv]
        return KeyValues(keys, sets[1::2] if preset.s_kv == 2 else keys, present_BN)


class _Part:
    """The map of one part of the context: a row `[C]` a code, all levels' one after the other, and of features."""

    def __init__(self, codes: nn.Linear, features: nn.Linear, embeddings: nn.ParameterList) -> None:
        maps = codes.weight.chunk(LEVELS, dim=1)
        levels = [table @ map_.T for table, map_ in zip(embeddings, maps, strict=True)]
        self._table = torch.cat(levels)
        self._features_FC = features.weight.T.contiguous()

    def mapped(self, row_BTL: Tensor, features_BTF: Tensor) -> Tensor:
        """`[B, T, C]`, without position."""
        B, T, _ = row_BTL.shape
        x_nC = F.embedding_bag(row_BTL.flatten(0, 1), self._table, mode="sum")
        x_nC.addmm_(features_BTF.flatten(0, 1), self._features_FC)
        return x_nC.reshape(B, T, -1)


def _by_chunk(processor: ContextProcessor) -> list[nn.Module]:
    """The norm of each chunk of a mapped context, in their order."""
    keys, values = list(processor.key_norms), list(processor.value_norms)
    return [norm for pair in zip(keys, values, strict=True) for norm in pair] if values else keys


def _write(x_BTC: Tensor, norms: list[nn.Module], sets: list[Tensor], at: slice) -> None:
    """Cut and norm mapped positions, into their place in each set `[B, G, N, d]`."""
    for chunk, norm, out_BGNd in zip(x_BTC.chunk(len(norms), dim=-1), norms, sets, strict=True):
        B, G, _, d = out_BGNd.shape
        out_BGNd[:, :, at] = norm(chunk).reshape(B, -1, G, d).transpose(1, 2)
