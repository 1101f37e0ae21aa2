"""What `dwell bench decoder` measures on one architecture: a training step, its optimiser, a served request.

Legend: B requests, k targets of a request, L levels, K codes, T behaviours, M prefixes, l codes of a prefix.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from actor.sampling import draw
from actor.search import of_whole_level
from learner.baselines import Baseline, EncoderDecoder, NaiveDecoder, split
from learner.context import Contexts, contexts
from learner.counting import Load, encoder_decoder, lazy, naive
from learner.decoder import LazyDecoder
from learner.presets import Preset
from learner.settings import LearnSettings
from learner.step import Trainer
from learner.valid_tree import Tree
from ops.bench_contexts import packed_context
from ops.errors import UserError
from streams.events import LEVELS

LEAVES: Final = 100_000
"""Leaves of the catalogue that slates are drawn from."""
Network = LazyDecoder | Baseline


@dataclass(frozen=True)
class Architecture:
    """One of those compared."""

    name: str
    ratio: int
    """Decoder layers to one of the encoder; 0 without encoder."""
    positions: int
    """Context positions of a training batch; more do not make it faster (docs/decoder-bench.md)."""

    def build(self, preset: Preset, codes: int, user_rows: int) -> Network:
        """The model, untrained."""
        if self.ratio:
            return EncoderDecoder(preset, codes, user_rows, self.ratio)
        return (LazyDecoder if self is LAZY else NaiveDecoder)(preset, codes, user_rows)

    def flops(self, preset: Preset, codes: int, load: Load) -> float:
        """Matrix products done for a trained item, counted as in learner/counting.py.

        That module counts a baseline's context as 3 d_embed -> d_model, and the naive decoder's in all layers; here
        the context is mapped as the lazy decoder's, and what nobody reads is not done (learner/baselines.py).
        """
        done = lazy(preset, codes, load)
        context = done["context"] + done["features"]
        if self is LAZY:
            return sum(done.values())
        if self.ratio:
            done = encoder_decoder(preset, *split(preset.layers, self.ratio), codes, load)
            return sum(done.values()) - done["context"] + context
        done = naive(preset, codes, load)
        width = preset.d_model
        unread = (2 * width + 3 * preset.d_ffn + load.positions) * width * load.share
        return sum(done.values()) - done["context"] + context - 6 * unread

    def requests(self, preset: Preset) -> int:
        """Of a training batch."""
        return max(1, self.positions // preset.positions)


LAZY: Final = Architecture("lazy", 0, 12_288)
ENCODER_DECODER: Final = Architecture("encoder_decoder_1_1", 1, 4096)
ARCHITECTURES: Final = (
    LAZY,
    ENCODER_DECODER,
    Architecture("encoder_decoder_1_2", 2, 4096),
    Architecture("naive", 0, 4096),
)


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run share."""

    preset: Preset
    codes: int
    user_rows: int
    device: str
    threads: int

    def at(self, positions: int) -> Preset:
        """The preset at so many context positions, one of them static."""
        return replace(self.preset, context=positions - 1)

    def model(self, architecture: Architecture, positions: int) -> Network:
        """Built from the same seed, on the device."""
        torch.manual_seed(0)
        made = architecture.build(self.at(positions), self.codes, self.user_rows)
        return made.to(self.device)


def device_named(name: str) -> str:
    """`auto` is CUDA where there is one; raises `UserError` for one that there is not."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; take cpu, or auto.")
    return name


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds, until the device has done it."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


class Peak:
    """What this machine can do at most, in one product of large square matrices."""

    def __init__(self, device: str, width: int) -> None:
        self._width = width
        self._device = device
        self._square = torch.randn(self._width, self._width, device=device)

    def __call__(self) -> float:
        """FLOP/s in float32."""
        took = timed(lambda: torch.mm(self._square, self._square), self._device)
        return 2 * self._width**3 / took


class Step:
    """Forward and backward of the supervised loss over all codes, on full contexts and without a tree."""

    def __init__(self, setting: Setting, model: Network, requests: int, targets: int) -> None:
        generator = np.random.default_rng(1)
        self.model = model
        self.items = requests * targets
        self._contexts = _contexts(setting, model.preset, requests, generator)
        sids = generator.integers(setting.codes, size=(requests, targets, LEVELS))
        self._sids_BkL = torch.from_numpy(sids).to(setting.device)
        self._type = setting.device

    def loss(self) -> Tensor:
        """Mean over targets and levels."""
        logits_BkLK = self.model(self.model.process(self._contexts), self._sids_BkL)
        return F.cross_entropy(logits_BkLK.flatten(0, 2), self._sids_BkL.flatten())

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.add_gradients()

    def add_gradients(self) -> None:
        """As a call, but onto the gradients that are there."""
        self.loss().backward()  # type: ignore[no-untyped-call]

    def in_bfloat16(self) -> None:
        """As a call, under autocast."""
        with torch.autocast(self._type, torch.bfloat16):
            self()


class Serving:
    """One request after the other: its context, then a slate drawn from the policy, as the actor does it."""

    def __init__(self, setting: Setting, model: Network, tree: Tree, slate: int) -> None:
        generator = np.random.default_rng(2)
        self.model = model
        self.model_s = 0.0
        """Time in the model, of all requests."""
        self._setting, self._tree, self._slate, self._rng = setting, tree, slate, generator
        self._packed = packed_context(model.preset.context, setting.codes, generator)

    @torch.inference_mode()
    def __call__(self) -> None:
        preset, setting = self.model.preset, self._setting
        rows, codes = setting.user_rows, setting.codes
        of = contexts(["user"], [self._packed], preset.context, rows, codes)
        began = time.perf_counter()
        kv = self.model.process(of)
        _wait(setting.device)
        self.model_s += time.perf_counter() - began

        def step(prefix_BMl: Tensor) -> Tensor:
            began = time.perf_counter()
            logits_BMK = self.model.step(kv, prefix_BMl)
            _wait(setting.device)
            self.model_s += time.perf_counter() - began
            return logits_BMK

        draw(of_whole_level(step), self._tree, None, self._slate, 1.0, self._rng)


def catalogue(codes: int) -> Tree:
    """Random leaves, as many as asked for where there are so many."""
    generator = np.random.default_rng(3)
    return Tree(codes, np.unique(generator.integers(codes**LEVELS, size=LEAVES)))


def optimiser_s(setting: Setting, positions: int, architecture: Architecture) -> float:
    """Seconds of clipping and both optimisers' steps after a training step; the learner's own."""
    model = setting.model(architecture, positions)
    trainer = Trainer(cast(LazyDecoder, model), LearnSettings(), lr=1e-6)
    step = Step(setting, model, 1, 1)
    taken = []
    for _ in range(4):
        step()
        taken.append(timed(lambda: _move(trainer), setting.device))
    return float(np.median(taken[1:]))


def _move(trainer: Trainer) -> None:
    torch.nn.utils.clip_grad_norm_(trainer.dense, trainer.settings.clip)
    trainer.dense_optimiser.step()
    trainer.row_optimiser.step()  # type: ignore[no-untyped-call]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _contexts(
    setting: Setting, preset: Preset, requests: int, generator: np.random.Generator
) -> Contexts:
    packed = [packed_context(preset.context, setting.codes, generator) for _ in range(requests)]
    users = [f"user-{row}" for row in range(requests)]
    made = contexts(users, packed, preset.context, setting.user_rows, setting.codes)
    return Contexts(*(part.to(setting.device) for part in made))
