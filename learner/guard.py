"""Judges a candidate version against the last good one before it is published. Pure.

Notable choices (DESIGN, invariant 10; docs/guard.md has the figures behind the limits)
- It judges the arrays that would be published, in a model of its own: nothing of the learner's is touched, and the
  verdict is about what actors would serve. The price is one more copy of the policy where the guard is.
- Probes are the contexts of requests just learned from. All are asked over the newest catalogue's whole tree, without
  the leaves that a request excluded: who has seen an item is spared it, and a collapse towards it would hide there.
- `DRAWS` leaves a probe are drawn from the policy by fixed noise, so the figures are those of what it would serve:
  entropy and divergence are exact at each node on the way and estimated over the ways. Noise is numpy's and seeded:
  the learner's random state is part of its checkpoint.
- Entropy is a share of the uniform law's over the same nodes, so that one floor fits trees of any size. A ceiling
  stands only against the last good version: a lineage may begin with a policy that knows nothing.
- One item's share is refused only if it is large and has grown: a small catalogue may have a favourite.

Legend: B probes, k draws, L levels, K codes.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from learner.context import Contexts, contexts
from learner.decoder import LazyDecoder
from learner.masking import masked_log_softmax
from learner.policy import load_state
from learner.settings import LearnSettings
from learner.valid_tree import Tree
from streams.blocks import State, not_finite
from streams.events import LEVELS, Sample

PROBES: Final = 64
DRAWS: Final = 4
FEWEST: Final = 16
"""Of fewer probes only finiteness is judged: the other figures would be noise."""
FORGOT: Final = 0.25
"""A candidate may come nearer to the uniform law by this share of what the last good version was away from it."""
GREW: Final = 3.0
"""One item's share is refused only above so many times that of the last good version."""
_SEED: Final = 20_240_607


class Probe(NamedTuple):
    """A request to ask both versions."""

    user: str
    context: bytes


@dataclass(frozen=True)
class Figures:
    """What the probes show of a version; NaN where they were not asked."""

    divergence: float = float("nan")
    """KL(good || candidate), nats a level."""
    entropy: float = float("nan")
    """Share of the uniform law's."""
    top_share: float = float("nan")
    """Mean probability of the leaf that was drawn most."""


@dataclass(frozen=True)
class Verdict:
    """Whether a version may be published; `reason` is empty where it may, else a sentence."""

    figures: Figures
    reason: str = ""


@dataclass(frozen=True)
class Reading:
    """One version's answers to the probes."""

    contexts: Contexts
    sids_BkL: Tensor
    mask_BkLK: Tensor
    logp_BkLK: Tensor
    finite: bool
    entropy: float
    top_share: float


class Guard:
    """The last good version, and the probes; `saw` what was learned from, `judge` before each publication."""

    def __init__(self, model: LazyDecoder, settings: LearnSettings) -> None:
        """`model` becomes the guard's own; `good` must be set before anything can be compared."""
        self._model = model.eval().requires_grad_(False)
        self._settings = settings
        self._probes: deque[Probe] = deque(maxlen=PROBES)
        self._reading: Reading | None = None
        self._good: State | None = None

    @property
    def good(self) -> State | None:
        """The last version that was let pass, as it was published."""
        return self._good

    @good.setter
    def good(self, state: State) -> None:
        self._good, self._reading = state, None

    def saw(self, samples: Iterable[Sample]) -> None:
        """Keep the newest requests as probes."""
        self._probes.extend(Probe(sample.user, sample.context) for sample in samples)

    def judge(self, candidate: State, tree: Tree) -> Verdict:
        """Whether `candidate` may be published; if so it is the good one from now on."""
        broken = not_finite(candidate)
        if broken:
            return Verdict(Figures(), f"weights that are not finite: {', '.join(broken[:3])}")
        if self._reading is None and self._good is not None:
            self._reading = self._read(self._good, tree)
        own = self._read(candidate, tree)
        verdict = Verdict(Figures())
        if own is not None:
            verdict = compare(self._model, own, self._reading, self._settings)
        if not verdict.reason:
            self._good, self._reading = candidate, own
        return verdict

    def _read(self, state: State, tree: Tree) -> Reading | None:
        """The answers of a version, which the model then holds; None where there is nothing to ask."""
        load_state(self._model, state)
        return read(self._model, list(self._probes), tree) if self._probes and len(tree) else None


@torch.inference_mode()
def read(model: LazyDecoder, probes: list[Probe], tree: Tree) -> Reading:
    """Draw from a version at each of the probes, and keep what it gave to all children on the way."""
    of = contexts(
        [probe.user for probe in probes],
        [probe.context for probe in probes],
        model.preset.context,
        model.user_rows,
        tree.codes,
    )
    kv = model.process(of)
    rng = np.random.default_rng(_SEED)
    sids_BkL = torch.zeros((len(probes), DRAWS, LEVELS), dtype=torch.int64)
    mask_BkLK = torch.zeros((*sids_BkL.shape, tree.codes), dtype=torch.bool)
    logp_BkLK = torch.full(mask_BkLK.shape, -torch.inf)
    prefix_Bk = np.zeros((len(probes), DRAWS), np.int64)
    for level in range(LEVELS):
        mask_BkLK[:, :, level] = torch.from_numpy(tree.child_mask(prefix_Bk, level))
        logits_BkK = model.step(kv, sids_BkL[..., :level].to(model.places.device)).cpu().float()
        logp_BkK = masked_log_softmax(logits_BkK, mask_BkLK[:, :, level])
        logp_BkLK[:, :, level] = logp_BkK
        noise_BkK = torch.from_numpy(rng.gumbel(size=tuple(logp_BkK.shape)))
        sids_BkL[..., level] = (logp_BkK.nan_to_num(neginf=-torch.inf) + noise_BkK).argmax(-1)
        prefix_Bk = prefix_Bk * tree.codes + sids_BkL[..., level].numpy()
    finite = bool(logp_BkLK[mask_BkLK].isfinite().all())
    entropy = share_of_uniform(logp_BkLK, mask_BkLK) if finite else float("nan")
    top = _top_share(model, of, sids_BkL, tree) if finite else float("nan")
    return Reading(of, sids_BkL, mask_BkLK, logp_BkLK, finite, entropy, top)


def compare(
    model: LazyDecoder, own: Reading, good: Reading | None, limits: LearnSettings
) -> Verdict:
    """The verdict on the version in `model`, whose answers are `own`."""
    if not own.finite:
        return Verdict(Figures(), "log-probabilities that are not finite")
    apart = divergence(model, good) if good is not None else float("nan")
    found = Figures(apart, own.entropy, own.top_share)
    enough = len(own.sids_BkL) >= FEWEST
    return Verdict(found, _fault(found, good, limits) if enough else "")


def _fault(found: Figures, good: Reading | None, limits: LearnSettings) -> str:
    before = good.top_share if good is not None else 0.0
    if found.entropy < limits.guard_entropy:
        return (
            f"an entropy of {found.entropy:.2g} of the uniform law's, below learn.guard_entropy = "
            f"{limits.guard_entropy:g}"
        )
    if found.top_share > max(limits.guard_top_share, GREW * before):
        return (
            f"one item with {found.top_share:.2g} of all probability, {before:.2g} before; "
            f"learn.guard_top_share = {limits.guard_top_share:g}"
        )
    if good is None:
        return ""
    if not found.divergence <= limits.guard_divergence:
        return (
            f"a divergence of {found.divergence:.2g} nats a level from the last good version, above "
            f"learn.guard_divergence = {limits.guard_divergence:g}"
        )
    if 1.0 - found.entropy < (1.0 - FORGOT) * (1.0 - good.entropy) and found.entropy > 0.9:
        return (
            f"an entropy of {found.entropy:.3g} of the uniform law's, {good.entropy:.3g} before: it has forgotten "
            "what it knew"
        )
    return ""


@torch.inference_mode()
def divergence(model: LazyDecoder, good: Reading) -> float:
    """KL(good || model) in nats a level, over the nodes that `good` passed; inf where one of them is not finite."""
    device = model.places.device
    logits_BkLK = model(model.process(good.contexts), good.sids_BkL.to(device)).cpu().float()
    logp_BkLK = masked_log_softmax(logits_BkLK, good.mask_BkLK)
    gap_BkLK = (good.logp_BkLK - logp_BkLK).masked_fill(~good.mask_BkLK, 0.0)
    value = float((good.logp_BkLK.exp() * gap_BkLK).sum(-1).mean())
    return value if np.isfinite(value) else float("inf")


def share_of_uniform(logp_BkLK: Tensor, mask_BkLK: Tensor) -> float:
    """Entropy over that of the uniform law, both summed over the nodes; 1 where there is nothing to choose."""
    chances_BkLK = logp_BkLK.exp()
    spread = -float((chances_BkLK * logp_BkLK.masked_fill(~mask_BkLK, 0.0)).double().sum())
    widest = float(mask_BkLK.sum(-1).clamp_min(1).double().log().sum())
    return spread / widest if widest else 1.0


def _top_share(model: LazyDecoder, of: Contexts, sids_BkL: Tensor, tree: Tree) -> float:
    """Mean probability, over the probes, of the leaf that was drawn most."""
    drawn, counts = torch.unique(sids_BkL.flatten(0, 1), dim=0, return_counts=True)
    top_BkL = drawn[counts.argmax()].expand(len(sids_BkL), 1, LEVELS)
    mask_BkLK = torch.from_numpy(tree.path_masks(top_BkL.numpy()))
    logits_BkLK = model(model.process(of), top_BkL.to(model.places.device)).cpu().float()
    logp_BkLK = masked_log_softmax(logits_BkLK, mask_BkLK)
    return float(logp_BkLK.gather(-1, top_BkL.unsqueeze(-1)).sum((-1, -2)).exp().mean())
