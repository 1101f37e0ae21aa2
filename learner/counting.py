"""Parameters, compute and stored activations of each architecture, in closed form from a preset and the sizes.

Two ways to count compute, each by part, in FLOPs of a trained item: 6 = 2 (multiply, add) x 3 (forward, backward).
A context that k targets share counts 1/k to each.
1. As built (`lazy`, `encoder_decoder`, `naive`): every matrix product that is done. Norms, softmax, SwiGLU's product
   and lookups are not counted; self-attention counts whole, not only below the diagonal, as its kernel is counted.
2. As the OneRec-V2 report counts (`report_*`; its Appendix B and tables). Its cells follow to the printed digit from
   - the linear maps of lazy decoder and naive decoder as the *nominal* size (0.1e9, 0.5e9, 1e9) times the positions;
     those of an encoder-decoder layer by layer, 16 d^2 in the encoder and 18 d^2 in the decoder, so with an FFN of
     4 d and no key/value projections, and heads;
   - one map 3 d_embed -> d_context of the context;
   - attention of context positions among N / k positions, not N; of a target's three over all N; where it is
     causal, among the pairs below the diagonal.

Activations are what the backward pass needs of linear maps and attention: what goes into them, queries, keys and
values, SwiGLU's gate, up and product. Sums of the residual, embeddings and logits are not counted.
"""

from dataclasses import dataclass
from typing import Final

from learner.context import FEATURES
from learner.presets import Preset
from streams.events import LEVELS

Parts = dict[str, float]
"""What by part."""

_TRAINED: Final = 6
"""FLOPs of a multiply-add in forward and backward."""
LOOKUPS: Final = ("users", "embeddings", "places")
"""Parts that are read by row or added, and so are left out of a model's size."""


@dataclass(frozen=True)
class Load:
    """What a training batch looks like, for each of its items."""

    positions: int
    """N: context positions of a request."""
    targets: int
    """k: targets that share a context."""

    @property
    def share(self) -> float:
        """Context positions an item."""
        return self.positions / self.targets


# Parameters


def parameters(preset: Preset, codes: int, user_rows: int) -> dict[str, int]:
    """Parameters of the lazy decoder by part; the experts' selection bias is none."""
    D, F, X = preset.d_model, preset.d_ffn, preset.d_expert
    sparse = sum(preset.has_experts(layer) for layer in range(preset.layers))
    dense = preset.layers - sparse
    maps = (2 if preset.short else 1) * (LEVELS * preset.d_embed + FEATURES)
    return {
        "users": user_rows * preset.d_user,
        "embeddings": LEVELS * codes * preset.d_embed,
        "places": preset.context * preset.d_context + (1 + LEVELS) * D,
        "context": (maps + preset.d_user + 1) * preset.d_context,
        "widen": 0 if preset.d_embed == D else preset.d_embed * D,
        "cross": preset.layers * 2 * D * D,
        "self": preset.layers * 4 * D * D,
        "ffn": dense * 3 * D * F,
        "router": sparse * D * preset.experts,
        "experts": sparse * (preset.experts + 1) * 3 * D * X,
        "norms": preset.d_context + (3 * preset.layers + LEVELS) * D,
        "heads": LEVELS * codes * (D + 1),
    }


def size(parts: dict[str, int]) -> int:
    """The size that a model is named after: without tables and places."""
    return sum(count for part, count in parts.items() if part not in LOOKUPS)


def active(preset: Preset, parts: dict[str, int]) -> int:
    """The part of `size` that works on one position: the chosen and the shared expert of each block."""
    if not preset.experts:
        return size(parts)
    working = parts["experts"] * (preset.top + 1) // (preset.experts + 1)
    return size(parts) - parts["experts"] + working


def kv_elements(preset: Preset, load: Load, batch: int) -> float:
    """Elements of the processed context of `batch` items."""
    return batch * load.share * preset.d_context


# Compute as built


def lazy(preset: Preset, codes: int, load: Load) -> Parts:
    """The lazy decoder, FLOPs of a trained item."""
    D, C, P = preset.d_model, preset.d_context, LEVELS
    behaviours = (load.positions - 1) / load.targets
    done = {
        "context": behaviours * LEVELS * preset.d_embed * C + preset.d_user * C / load.targets,
        "features": behaviours * FEATURES * C,
        "cross": preset.layers * P * 2 * D * D,
        "cross attention": preset.layers * P * 2 * load.positions * D,
        "self": preset.layers * P * 4 * D * D,
        "self attention": preset.layers * P * 2 * P * D,
        **_feeding(preset, P),
        **_ends(preset, codes),
    }
    return _times(_TRAINED, done)


def encoder_decoder(preset: Preset, encoder: int, decoder: int, codes: int, load: Load) -> Parts:
    """OneRec-V1's shape: so many encoder layers over the context, and decoder layers with keys and values projected
    from the encoder's output; FLOPs of a trained item."""
    D, P, N = preset.d_model, LEVELS, load.positions
    layer = (4 + 3 * preset.d_ffn / D) * D * D
    done = {
        "context": load.share * LEVELS * preset.d_embed * D,
        "encoder": encoder * load.share * layer,
        "encoder attention": encoder * load.share * 2 * N * D,
        "key and value maps": decoder * load.share * 2 * D * D,
        "decoder": decoder * P * (2 * D * D + layer),
        "decoder attention": decoder * P * 2 * (N + P) * D,
        **_ends(preset, codes),
    }
    return _times(_TRAINED, done)


def naive(preset: Preset, codes: int, load: Load) -> Parts:
    """Context and target as one causal sequence through all layers, without cross attention; the k targets share the
    context's part; FLOPs of a trained item. Attention counts below the diagonal only: the sequence is long."""
    D, P, N = preset.d_model, LEVELS, load.positions
    layer = (4 + 3 * preset.d_ffn / D) * D * D
    done = {
        "context": load.share * LEVELS * preset.d_embed * D,
        "layers": preset.layers * (load.share + P) * layer,
        "attention": preset.layers * 2 * D * (load.share * N / 2 + P * (N + P)),
        **_ends(preset, codes),
    }
    return _times(_TRAINED, done)


# Compute as the report counts it


def report_lazy(preset: Preset, nominal: float, load: Load) -> Parts:
    """`nominal` is the size in the model's name, 1e9 for 1B."""
    done = {
        "linear": LEVELS * nominal,
        "context": load.share * 3 * preset.d_embed * preset.d_context,
        "attention": preset.layers * LEVELS * 2 * load.positions * preset.d_model,
        "self attention": preset.layers * _causal(LEVELS) * preset.d_model,
    }
    return _times(_TRAINED, done)


def report_encoder_decoder(
    preset: Preset, encoder: int, decoder: int, codes: int, load: Load
) -> Parts:
    """Layers of the lazy decoder's width, split between encoder and decoder."""
    D = preset.d_model
    done = {
        "encoder": encoder * load.share * 16 * D * D,
        "encoder attention": encoder * 2 * load.share**2 * D,
        "decoder": decoder * LEVELS * 18 * D * D,
        "decoder attention": decoder * (LEVELS * 2 * load.positions + _causal(LEVELS)) * D,
        "context": load.share * 3 * preset.d_embed * D,
        "heads": LEVELS * D * codes,
    }
    return _times(_TRAINED, done)


def report_naive(preset: Preset, nominal: float, load: Load) -> Parts:
    """`nominal` as in `report_lazy`; one causal sequence of N / k + 3 positions."""
    length = load.share + LEVELS
    done = {
        "linear": length * nominal,
        "context": load.share * 3 * preset.d_embed * preset.d_model,
        "attention": preset.layers * _causal(length) * preset.d_model,
    }
    return _times(_TRAINED, done)


# Activations


def lazy_activations(preset: Preset, load: Load, batch: int) -> float:
    """Elements kept of `batch` items: the context before and after its norms, and 21 d_model a position and layer at
    an FFN of 4 d_model."""
    own = preset.layers * LEVELS * (_cross_kept(preset) + _self_kept(preset))
    return batch * (own + LEVELS * preset.d_model) + 2 * kv_elements(preset, load, batch)


def encoder_decoder_activations(
    preset: Preset, encoder: int, decoder: int, load: Load, batch: int
) -> float:
    """As `lazy_activations`; without projected keys and values, as the report's compute has none."""
    D = preset.d_model
    encoded = encoder * load.share * _self_kept(preset) + 2 * load.share * D
    decoded = decoder * LEVELS * (_cross_kept(preset) + _self_kept(preset)) + LEVELS * D
    return batch * (encoded + decoded)


def naive_activations(preset: Preset, load: Load, batch: int) -> float:
    """As `lazy_activations`."""
    own = preset.layers * (load.share + LEVELS) * _self_kept(preset)
    return batch * (own + LEVELS * preset.d_model)


def _causal(length: float) -> float:
    """Score and sum, over the pairs below the diagonal."""
    return length * (length - 1)


def _self_kept(preset: Preset) -> float:
    """Input, query, key, value and output of the attention; input, gate, up and product of the FFN."""
    return 6 * preset.d_model + 3 * preset.d_ffn


def _cross_kept(preset: Preset) -> float:
    """Input, query and output."""
    return 3 * preset.d_model


def _feeding(preset: Preset, positions: int) -> Parts:
    D = preset.d_model
    sparse = sum(preset.has_experts(layer) for layer in range(preset.layers))
    return {
        "ffn": (preset.layers - sparse) * positions * 3 * D * preset.d_ffn,
        "router": sparse * positions * D * preset.experts,
        "experts": sparse * positions * (preset.top + 1) * 3 * D * preset.d_expert,
    }


def _ends(preset: Preset, codes: int) -> Parts:
    """Embedded codes widened, and the heads, each at one position."""
    D, E = preset.d_model, preset.d_embed
    widen = 0 if E == D else E * D
    tied = LEVELS * (widen + E * codes) if preset.tied else 0
    return {"widen": (LEVELS - 1) * widen, "heads": LEVELS * D * codes + tied}


def _times(factor: float, parts: Parts) -> Parts:
    return {part: factor * count for part, count in parts.items()}
