"""What `dwell bench constraint` holds against each other: trees, and ways of decoding.

Notable choices
- *Unconstrained* is the same draw over the whole codebook, as lean as we can write it: float32, logits of all codes
  at every level, noise and top-k by torch's kernels, a few requests at a time so that its arrays stay in the cache.
- Trees: residual k-means of synthetic embeddings (a model of a real catalogue), and prefixes by Zipf's law, whose few
  hot nodes have thousands of children.
- Others' ways of constraining, by what they cost to ask: a Python trie walked node by node, and a mask of the whole
  level filled by binary search in the sorted leaves.

Shapes: B requests, M prefixes of a request, K codes of a level, W beam width.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from actor.recommend import step_of
from actor.sampling import Slates, draw
from learner.context_processor import KeyValues
from learner.decoder import LazyDecoder
from learner.semantic_ids import fit
from learner.valid_tree import Children, Exclusions, Keys, Tree, keys_of, sids_of
from ops.bench_contexts import packed_context
from ops.bench_tokeniser import mixture
from streams.events import LEVELS

FITTED: Final = 65_536
"""Items that codebooks are fitted on; the others are assigned."""
DENSE: Final = 1 << 25
"""Logits that the unconstrained decode holds at a time."""


def kmeans_keys(items: int, codes: int, seed: int, tell: Callable[[str], None]) -> Keys:
    """Leaf keys of a synthetic catalogue, in its items' order."""
    x_ND = mixture(items, seed)
    sample = x_ND[:FITTED] if items > FITTED else x_ND
    books = fit(sample, codes, seed, tell=lambda what, *_: tell(f"fit: {what}"))
    tell("assigning semantic IDs")
    return keys_of(books.assign(x_ND), codes)


def zipf_keys(leaves: int, codes: int, seed: int) -> Keys:
    """Distinct leaf keys whose codes follow Zipf's law on every level, in random order."""
    rng = np.random.default_rng([seed, 7])
    weight_K = 1.0 / np.arange(1, codes + 1)
    weight_K /= weight_K.sum()
    name_LK = np.stack([rng.permutation(codes) for _ in range(LEVELS)])
    found = np.empty(0, dtype=np.int64)
    while len(found) < leaves:
        rank_nL = rng.choice(codes, (2 * leaves, LEVELS), p=weight_K)
        sids_n3 = np.stack([name_LK[level][rank_nL[:, level]] for level in range(LEVELS)], axis=1)
        found = np.unique(np.concatenate([found, keys_of(sids_n3, codes)]))
    return rng.permutation(found)[:leaves]


def processed(model: LazyDecoder, requests: int, seed: int) -> KeyValues:
    """Keys and values of so many requests' contexts."""
    rng = np.random.default_rng([seed, requests])
    packed = [packed_context(model.preset.context, model.codes, rng) for _ in range(requests)]
    users = [f"user {number}" for number in range(requests)]
    with torch.inference_mode():
        return model.process(model.contexts(users, packed))


def part_of(kv: KeyValues, rows: slice) -> KeyValues:
    """Some requests of a batch."""
    return KeyValues(
        [keys[rows] for keys in kv.keys],
        [values[rows] for values in kv.values],
        kv.present_BN[rows],
    )


@dataclass(frozen=True)
class Load:
    """One decode: requests together, a beam, and what each request excludes."""

    kv: KeyValues
    width: int
    excluded: Sequence[Keys]


def constrained(model: LazyDecoder, tree: Tree, load: Load, rng: np.random.Generator) -> Slates:
    """A slate of `width` less one, whose beam is `width` wide, as the actor draws it."""
    return draw(step_of(model, load.kv), tree, load.excluded, load.width - 1, 1.0, rng)


@torch.inference_mode()
def unconstrained(model: LazyDecoder, load: Load, rng: torch.Generator) -> Tensor:
    """The same draw where every code is valid: codes `[B, W, 3]`."""
    requests = len(load.excluded)
    at_once = max(1, DENSE // (load.width * model.codes))
    return torch.cat(
        [
            _dense(model, part_of(load.kv, slice(low, low + at_once)), load.width, rng)
            for low in range(0, requests, at_once)
        ]
    )


def _dense(model: LazyDecoder, kv: KeyValues, width: int, rng: torch.Generator) -> Tensor:
    requests = len(kv.present_BN)
    codes_BMl = torch.zeros(requests, 1, 0, dtype=torch.int64)
    logp_BM = torch.zeros(requests, 1)
    score_BM = torch.zeros(requests, 1)
    for _ in range(LEVELS):
        logits_BMK = model.step(kv, codes_BMl)
        logp_BMK = torch.log_softmax(logits_BMK, -1).add_(logp_BM[:, :, None])
        free_BMK = torch.empty_like(logp_BMK).exponential_(generator=rng).log_().neg_()
        free_BMK += logp_BMK
        # Given that the largest child has its parent's score (appendix B.3 of the paper).
        below_BMK = free_BMK - free_BMK.amax(-1, keepdim=True)
        v_BMK = below_BMK.exp_().neg_().log1p_()
        v_BMK += score_BM[:, :, None] - free_BMK
        free_BMK = v_BMK.abs().neg_().exp_().log1p_().neg_().sub_(v_BMK.clamp_min_(0.0))
        free_BMK += score_BM[:, :, None]
        score_BM, at_BM = free_BMK.flatten(1).topk(width, dim=1)
        parent_BM = at_BM // model.codes
        logp_BM = logp_BMK.flatten(1).gather(1, at_BM)
        parents_BMl = codes_BMl.gather(1, parent_BM[:, :, None].expand(-1, -1, codes_BMl.shape[-1]))
        codes_BMl = torch.cat([parents_BMl, (at_BM % model.codes)[:, :, None]], -1)
    return codes_BMl


class Trie:
    """Nested dictionaries, asked node by node: what a constraint costs in Python."""

    def __init__(self, tree: Tree) -> None:
        self.codes = tree.codes
        self._root: dict[int, Any] = {}
        for c1, c2, c3 in sids_of(tree.leaves(), tree.codes).tolist():
            self._root.setdefault(c1, {}).setdefault(c2, {})[c3] = None

    def mask(self, prefix_BMl: Tensor, excluded: Sequence[Keys]) -> Tensor:
        """Valid children `[B, M, K]`; an excluded leaf closes its nodes when nothing else lives below."""
        B, M, _ = prefix_BMl.shape
        mask_BMK = torch.zeros(B, M, self.codes, dtype=torch.bool)
        for request, prefixes in enumerate(prefix_BMl.tolist()):
            gone = set(map(tuple, sids_of(excluded[request], self.codes).tolist()))
            for beam, prefix in enumerate(prefixes):
                node = self._root
                for code in prefix:
                    node = node.get(code, {})
                open_codes = [
                    code for code, below in node.items() if _lives((*prefix, code), below, gone)
                ]
                mask_BMK[request, beam, open_codes] = True
        return mask_BMK


def _lives(prefix: tuple[int, ...], below: Any, gone: set[tuple[int, ...]]) -> bool:
    if below is None:
        return prefix not in gone
    return any(_lives((*prefix, code), deeper, gone) for code, deeper in below.items())


class TimedTree(Tree):
    """The index, and how long it is busy."""

    busy_s = 0.0

    def locate(self, excluded: Sequence[Keys]) -> Exclusions:
        began = time.perf_counter()
        located = super().locate(excluded)
        self.busy_s += time.perf_counter() - began
        return located

    def children(self, row_BM: Keys, level: int, excluded: Exclusions | None = None) -> Children:
        began = time.perf_counter()
        children = super().children(row_BM, level, excluded)
        self.busy_s += time.perf_counter() - began
        return children


def searched_mask(tree: Tree, prefix_BMl: Tensor, excluded: Sequence[Keys]) -> Tensor:
    """The whole level's mask `[B, M, K]`, filled by binary search in the sorted nodes."""
    key_BM = np.zeros(prefix_BMl.shape[:2], dtype=np.int64)
    for level in range(prefix_BMl.shape[-1]):
        key_BM = key_BM * tree.codes + prefix_BMl[..., level].numpy()
    return torch.from_numpy(tree.child_mask(key_BM, prefix_BMl.shape[-1], excluded))
