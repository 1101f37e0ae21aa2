"""Sizes of the lazy decoder: a preset is a few numbers (OneRec-V2 report, Tables 1 to 5, adds the larger ones).

`tiny` learns online on one core. Its embedding is as wide as the model, so that the output heads can be tied to
the code embeddings; the report's sizes use about d_model / 20.
"""

from dataclasses import dataclass
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


PRESETS: Final[dict[str, Preset]] = {
    "tiny": Preset(d_model=64, layers=1, heads=4, d_embed=64, d_ffn=256, d_user=16, context=32),
}
