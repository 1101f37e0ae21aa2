"""The architectures that the lazy decoder is measured against, of the same presets.

Both read the context that the lazy decoder reads (its `ContextProcessor`, one normed key set of width d_model), have
its code embeddings, attention, FFN and heads (learner/layers.py) and its interface, so the same training step and the
same decoding run on them. What differs is what they do to a context position:
- `EncoderDecoder`, OneRec-V1's shape (its report, "Encoder" and "Decoder"): encoder blocks of self-attention and
  SwiGLU over the N positions, both ways; decoder blocks of causal self-attention, cross attention with keys and
  values projected from the encoder's output, SwiGLU. The preset's layers are shared out 1:1 or 1:2.
- `NaiveDecoder` (OneRec-V2 report, "Design principles", the naive decoder-only model): context and target as one
  causal sequence through all layers.

Nothing is done twice, and nothing that nobody reads:
- Keys and values of the context are computed once a request, whatever its targets, beams and levels.
- The naive decoder's k targets each continue the same context and do not see one another: a sequence of N + 3k under
  a mask. As no context position sees a target, the context goes first, through a causal kernel without a mask, and
  its keys and values per layer are the cache that both training and serving read. For this its padding is moved
  behind the last behaviour. In the last layer only keys and values of the context are read, so nothing else is
  computed there (the report's count, and that of learner/counting.py, includes it).

Legend: B requests, N context positions, k targets, P prefix positions, D d_model, H heads, d d_head, X sequences.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learner.context import Contexts
from learner.context_processor import ContextProcessor, KeyValues
from learner.layers import CrossAttention, SelfAttention, SwiGLU, TargetSide
from learner.presets import Preset
from streams.events import LEVELS


def split(layers: int, ratio: int) -> tuple[int, int]:
    """Encoder and decoder layers at 1 : `ratio`, as near as whole layers come (the report: 14 layers at 1:2 are 5
    and 9)."""
    encoder = round(layers / (1 + ratio))
    if not 0 < encoder < layers:
        raise ValueError(f"{layers} layers cannot be split 1:{ratio}; take more layers")
    return encoder, layers - encoder


class Baseline(TargetSide):
    """What training and serving ask of an architecture, less the architecture."""

    def __init__(self, preset: Preset, codes: int, user_rows: int) -> None:
        if preset.experts or preset.d_context != preset.d_model:
            raise ValueError(
                "a baseline is dense and reads one context of d_model: take a preset without experts, with "
                "l_kv = s_kv = 1 and as many key/value heads as query heads"
            )
        super().__init__(preset, codes)
        self.user_rows = user_rows
        self.context = ContextProcessor(preset, user_rows)

    def process(self, contexts: Contexts) -> KeyValues:
        """Keys and values of each layer that reads the context, computed once for all targets."""
        raise NotImplementedError

    def hidden(self, kv: KeyValues, prefix_Bkl: Tensor) -> Tensor:
        """States `[B, k, l + 1, D]` after [BOS, prefix] for prefixes of l codes `[B, k, l]`, l < 3."""
        raise NotImplementedError

    def step(self, kv: KeyValues, prefix_Bkl: Tensor) -> Tensor:
        """Logits `[B, k, K]` of the level that follows each prefix."""
        depth = prefix_Bkl.shape[-1]
        return self.logits(depth, self.hidden(kv, prefix_Bkl)[:, :, depth])

    def forward(self, kv: KeyValues, sids_BkL: Tensor) -> Tensor:
        """Teacher-forced logits `[B, k, L, K]` of targets `[B, k, L]`."""
        return self.all_logits(self.hidden(kv, sids_BkL[..., : LEVELS - 1]))

    def balance(self, total: Callable[[Tensor], Tensor] | None = None) -> None:
        """There are no experts whose loads could be evened out."""

    def read(self, contexts: Contexts) -> tuple[Tensor, Tensor]:
        """The context `[B, N, D]`, as the lazy decoder's keys before they are cut into heads, and which positions
        are real `[B, N]`."""
        kv: KeyValues = self.context(contexts, self.embeddings)
        return kv.keys[0].transpose(1, 2).flatten(2), kv.present_BN


class EncoderBlock(SwiGLU, SelfAttention):
    """Self-attention both ways, SwiGLU; each pre-normed, each with a residual."""

    def forward(self, x_BND: Tensor, present_BN: Tensor) -> Tensor:
        """One block over `[B, N, D]`; positions that are not real are not seen."""
        x_BND = x_BND + self.attend(x_BND, present_BN[:, None, None, :])
        return x_BND + self.feed(x_BND)


class DecoderBlock(SwiGLU, SelfAttention, CrossAttention):
    """Causal self-attention, cross attention with projected keys and values, SwiGLU."""

    def __init__(self, preset: Preset) -> None:
        super().__init__(preset)
        self.cross_key_value = nn.Linear(preset.d_model, 2 * preset.d_model, bias=False)

    def keys_and_values(self, encoded_BND: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's W_k and W_v of the encoded context, each `[B, H, N, d]`."""
        B, N, _ = encoded_BND.shape
        both = self.cross_key_value(encoded_BND).reshape(B, N, 2, self.preset.heads, -1)
        keys, values = both.permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(self, x_BkPD: Tensor, keys: Tensor, values: Tensor, present_BN: Tensor) -> Tensor:
        """One block over `[B, k, P, D]`; the k targets are separate sequences over one context."""
        x_BkPD = x_BkPD + self.attend(x_BkPD)
        x_BkPD = x_BkPD + self.cross(x_BkPD, keys, values, present_BN)
        return x_BkPD + self.feed(x_BkPD)


class EncoderDecoder(Baseline):
    """OneRec-V1's shape."""

    def __init__(self, preset: Preset, codes: int, user_rows: int, ratio: int = 1) -> None:
        """`ratio` decoder layers for one of the encoder."""
        super().__init__(preset, codes, user_rows)
        encoder, decoder = split(preset.layers, ratio)
        self.encoder = nn.ModuleList(EncoderBlock(preset) for _ in range(encoder))
        self.encoded_norm = nn.RMSNorm(preset.d_model)
        self.blocks = nn.ModuleList(DecoderBlock(preset) for _ in range(decoder))
        self.add_heads()

    def process(self, contexts: Contexts) -> KeyValues:
        """As `Baseline.process`."""
        x_BND, present_BN = self.read(contexts)
        for block in self.encoder:
            x_BND = block(x_BND, present_BN)
        encoded_BND = self.encoded_norm(x_BND)
        kv = []
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            kv.append(block.keys_and_values(encoded_BND))
        return KeyValues([keys for keys, _ in kv], [values for _, values in kv], present_BN)

    def hidden(self, kv: KeyValues, prefix_Bkl: Tensor) -> Tensor:
        """As `Baseline.hidden`."""
        x_BkPD = self.embedded(prefix_Bkl)
        for block, keys, values in zip(self.blocks, kv.keys, kv.values, strict=True):
            x_BkPD = block(x_BkPD, keys, values, kv.present_BN)
        return x_BkPD


class NaiveBlock(SwiGLU, SelfAttention):
    """Causal self-attention, SwiGLU: over the context, then over the targets that continue it."""

    def read(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The context after this block, `[B, N, D]`, and its keys and values in it, each `[B, H, N, d]`."""
        q, keys, values = self._cut(self.self_qkv(self.self_norm(x_BND)), 3)
        y_BHNd = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        x_BND = x_BND + self.self_out(y_BHNd.transpose(1, 2).flatten(2))
        return x_BND + self.feed(x_BND), keys, values

    def keys_and_values(self, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        """As `read`, where nothing comes after this block."""
        weight = self.self_qkv.weight[self.preset.d_model :]
        keys, values = self._cut(F.linear(self.self_norm(x_BND), weight), 2)
        return keys, values

    def forward(self, x_BkPD: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """One block over targets `[B, k, P, D]` that see the context's keys and values and, by `mask`
        `[B, 1, kP, N + kP]`, their own."""
        x_BXD = x_BkPD.flatten(1, 2)
        q, own_keys, own_values = self._cut(self.self_qkv(self.self_norm(x_BXD)), 3)
        y_BHXd = F.scaled_dot_product_attention(
            q,
            torch.cat([keys, own_keys], dim=2),
            torch.cat([values, own_values], dim=2),
            attn_mask=mask,
        )
        x_BkPD = x_BkPD + self.self_out(y_BHXd.transpose(1, 2).reshape(x_BkPD.shape))
        return x_BkPD + self.feed(x_BkPD)

    def _cut(self, x_BXC: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`[B, X, parts D]` -> `parts` of `[B, H, X, d]`."""
        B, X, _ = x_BXC.shape
        return x_BXC.reshape(B, X, parts, self.preset.heads, -1).permute(2, 0, 3, 1, 4).unbind()


class NaiveDecoder(Baseline):
    """Decoder-only: context and target through all layers."""

    def __init__(self, preset: Preset, codes: int, user_rows: int) -> None:
        super().__init__(preset, codes, user_rows)
        self.blocks = nn.ModuleList(NaiveBlock(preset) for _ in range(preset.layers))
        self.add_heads()

    def process(self, contexts: Contexts) -> KeyValues:
        """As `Baseline.process`; padding stands last."""
        x_BND, present_BN = self.read(contexts)
        order_BN = present_BN.int().argsort(dim=1, descending=True, stable=True)
        x_BND = x_BND.gather(1, order_BN.unsqueeze(-1).expand_as(x_BND))
        kv = []
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, NaiveBlock)
            if layer < self.preset.layers - 1:
                x_BND, keys, values = block.read(x_BND)
            else:
                keys, values = block.keys_and_values(x_BND)
            kv.append((keys, values))
        present_BN = present_BN.gather(1, order_BN)
        return KeyValues([keys for keys, _ in kv], [values for _, values in kv], present_BN)

    def hidden(self, kv: KeyValues, prefix_Bkl: Tensor) -> Tensor:
        """As `Baseline.hidden`."""
        x_BkPD = self.embedded(prefix_Bkl)
        B, k, P, _ = x_BkPD.shape
        one_PP = torch.ones(P, P, device=x_BkPD.device).tril()
        own_XX = torch.kron(torch.eye(k, device=x_BkPD.device), one_PP).bool()
        mask = torch.cat(
            [
                kv.present_BN[:, None, None, :].expand(B, 1, k * P, -1),
                own_XX.expand(B, 1, k * P, k * P),
            ],
            dim=-1,
        )
        for block, keys, values in zip(self.blocks, kv.keys, kv.values, strict=True):
            x_BkPD = block(x_BkPD, keys, values, mask)
        return x_BkPD
