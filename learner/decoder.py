"""The lazy decoder of OneRec-V2: no encoder, no key/value projections in cross attention, three output levels.

Report sections "Context processor" and "Lazy decoder block":
- The context (learner/context_processor.py) comes as key and value sets; layer l reads set floor(l * L_kv / layers).
- Input Embed([BOS, s1, s2]): position i predicts level i. Blocks are pre-norm: cross attention (only W_q and W_o),
  causal self-attention, SwiGLU or experts. Each level has its own RMSNorm and head.
- The k targets of a request share one context and do not see one another.
Our choices for presets with tied logits. With few samples the start decides how soon the policy tells persons
apart, so it starts as a filter by content and learns from there:
- Code embeddings start from the k-means centroids, all levels through one random rotation and at one scale, so
  that an item's three embeddings add up to its place; context, input and output share them.
- logits = head(h), started at zero, + 2 h E^T / sqrt(d_model): h is RMS-normed and |E| about 4, so a code in the
  direction of h has up to 8 nats (at 1 / d_model satisfaction rose .6 times as much in 3,000 requests, one seed).
- W_o of the cross attention starts as the identity, so that what was attended to reaches the logits, and W_q small:
  all behaviours count alike.

Everything runs where the parameters are; inputs follow them.

Legend: B requests, N context positions, k targets, L levels, P prefix positions, l codes of a prefix, D d_model,
E d_embed, K codes of a level, n single codes.
"""

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor, nn

from learner.context import Contexts, contexts
from learner.context_processor import CodeTables, ContextProcessor, KeyValues
from learner.experts import ExpertLayer
from learner.layers import CrossAttention, SelfAttention, SwiGLU, TargetSide
from learner.presets import Preset
from streams.events import BEHAVIOUR, LEVELS


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
        self._tables: CodeTables | None = None
        self.register_load_state_dict_post_hook(_without_tables)  # type: ignore[no-untyped-call]
        self.blocks = nn.ModuleList(
            ExpertBlock(preset) if preset.has_experts(layer) else Block(preset)
            for layer in range(preset.layers)
        )
        self.add_heads()

    def process(self, contexts: Contexts) -> KeyValues:
        """Keys and values of a batch of contexts, computed once for all targets."""
        processed: KeyValues = self.context(contexts, self.embeddings)
        return processed

    def contexts(self, users: list[str], packed: list[bytes]) -> Contexts:
        """Contexts as exposures log them, as long as the longest; raises `ValueError` on a code outside the codebook.

        So a long context costs those who have it, and those who are decoded with them.
        """
        longest = max(map(len, packed), default=0) // BEHAVIOUR.itemsize
        length = max(1, min(longest, self.preset.context))
        return contexts(users, packed, length, self.user_rows, self.codes)

    def twin(self, values: dict[str, Tensor]) -> "LazyDecoder":
        """A decoder of its own modules around other parameters and buffers, by name, and without tables; what is not
        named is shared.

        Half a millisecond of the interpreter's time, where `deepcopy` and `load_state_dict` take six.
        """
        twin = _around(self, values)
        assert isinstance(twin, LazyDecoder)
        twin._tables = None
        return twin

    def prepare(self) -> None:
        """Make the tables that `looked_up` reads; weights must not change afterwards. Raises `ValueError` where
        they may."""
        if any(value.requires_grad for value in self.parameters()):
            raise ValueError("tables are made of fixed weights: requires_grad_(False) comes first")
        torch.get_num_threads()  # a thread that has never asked multiplies with every core, to other bits
        self._tables = CodeTables(self.context, self.embeddings)

    def looked_up(self, contexts: Contexts) -> KeyValues:
        """`process` for serving, from the tables where `prepare` made them: the same but for rounding."""
        if self._tables is None:
            return self.process(contexts)
        return self._tables.looked_up(contexts)

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


def _around(module: nn.Module, values: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """A module like this, and all below it, with the `values` of those names in place of its own."""
    made = copy(module)
    made._parameters = {
        name: value
        if value is None or (new := values.get(prefix + name)) is None
        else nn.Parameter(new, requires_grad=value.requires_grad)
        for name, value in module._parameters.items()
    }
    made._buffers = {
        name: values.get(prefix + name, value) for name, value in module._buffers.items()
    }
    made._modules = {
        name: None if below is None else _around(below, values, f"{prefix}{name}.")
        for name, below in module._modules.items()
    }
    return made


def _without_tables(model: nn.Module, _: object) -> None:
    """Other weights: tables of those before must not be read any more."""
    assert isinstance(model, LazyDecoder)
    model._tables = None
