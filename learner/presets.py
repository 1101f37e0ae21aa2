"""Sizes of the lazy decoder: a preset is a few numbers.

`tiny` learns online on one core. `small` is for measuring: its matrices of 256 x 1024 are large enough that
multiplying takes most of a step on a CPU, a step at 512 positions still takes well below a second, and its six layers
also split 1:1 and 1:2. Both start as a filter by content with logits tied to the code embeddings.

From `0.1B` on, the OneRec-V2 report's sizes: d_model, layers, heads and embedding width from its table, keys and
values shared by all layers. The FFN is 4 d_model wide, which the report does not state, but its compute of the
encoder-decoders gives exactly (learner/counting.py), as does the size of its MoE. The report does not give the split
of its 512 context positions either: one is static and 20 are short-term, as in OneRec-V1, the others long-term.

A shape is a preset's name, or one with another length of the context, `tiny:3000`: that is what a checkpoint and a
manifest say.
"""

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True)
class Preset:
    """The numbers that make a decoder."""

    d_model: int
    layers: int
    heads: int
    d_embed: int
    """Width of a code's embedding."""
    d_ffn: int
    """Hidden width of SwiGLU."""
    d_user: int
    """Width of a row of the user table."""
    context: int
    """Behaviours in the context, besides the static position."""
    l_kv: int = 1
    """Key/value sets over the layers."""
    s_kv: int = 1
    """1: values are keys; 2: separate."""
    g_kv: int = 0
    """Key/value heads; 0 means as many as query heads."""
    short: int = 0
    """The latest behaviours, the short-term part; older ones are the long-term part, with an input projection of
    their own. 0: all behaviours are one part."""
    experts: int = 0
    """Routed experts of a block; 0: every block is dense."""
    top: int = 3
    """Routed experts that a position is sent to; one shared expert sees all positions."""
    d_expert: int = 0
    """Hidden width of an expert."""
    dense_layers: int = 2
    """The first blocks stay dense."""
    tied: bool = True
    """Logits have a part tied to the code embeddings, and the start is a filter by content. The report's sizes have
    neither."""

    @property
    def d_head(self) -> int:
        """Width of an attention head."""
        return self.d_model // self.heads

    @property
    def kv_heads(self) -> int:
        """G_kv of the report."""
        return self.g_kv or self.heads

    @property
    def d_context(self) -> int:
        """S_kv * L_kv * G_kv * d_head."""
        return self.s_kv * self.l_kv * self.kv_heads * self.d_head

    @property
    def positions(self) -> int:
        """N of the report: the static position and the behaviours."""
        return 1 + self.context

    def has_experts(self, layer: int) -> bool:
        """Whether this block (from 0) is a mixture of experts."""
        return self.experts > 0 and layer >= self.dense_layers


def _of_report(
    d_model: int, layers: int, heads: int, d_embed: int, experts: int = 0, d_expert: int = 0
) -> Preset:
    return Preset(
        d_model=d_model,
        layers=layers,
        heads=heads,
        d_embed=d_embed,
        d_ffn=4 * d_model,
        d_user=64,
        context=511,
        short=20,
        experts=experts,
        d_expert=d_expert,
        tied=False,
    )


REPORT_CODES: Final = 8192
"""Codes of a level in the report."""

PRESETS: Final[dict[str, Preset]] = {
    "tiny": Preset(d_model=64, layers=1, heads=4, d_embed=64, d_ffn=256, d_user=16, context=32),
    "small": Preset(
        d_model=256, layers=6, heads=4, d_embed=64, d_ffn=1024, d_user=32, context=511, short=20
    ),
    "0.1B": _of_report(640, 12, 10, 32),
    "0.2B": _of_report(896, 12, 14, 45),
    "0.5B": _of_report(1408, 14, 11, 70),
    "1B": _of_report(1792, 18, 14, 90),
    "2B": _of_report(2304, 22, 18, 115),
    "4B": _of_report(2944, 26, 23, 147),
    "8B": _of_report(3584, 34, 28, 179),
    "4B-MoE": _of_report(1408, 14, 11, 70, experts=53, d_expert=1408),
}


def shape_name(preset: str, context: int) -> str:
    """What a shape is called; a context of 0 is the preset's own."""
    return f"{preset}:{context}" if context else preset


def split_shape(shape: str) -> tuple[str, int]:
    """Preset and context (0: its own) of a shape; `ValueError` for what is none."""
    name, colon, length = shape.partition(":")
    if colon and not (length.isascii() and length.isdigit() and int(length)):
        raise ValueError(f"shape {shape!r} is no preset, nor one with a context, such as tiny:512")
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; there are: {', '.join(PRESETS)}")
    return name, int(length or 0)


def preset_of(shape: str) -> Preset:
    """The numbers of a shape; raises as `split_shape`."""
    name, context = split_shape(shape)
    return replace(PRESETS[name], context=context) if context else PRESETS[name]
