"""How well a policy imitates a log: what it would have shown, and whether that was what was watched.

Notable choices (contract of evidence, "Real logs")
- The policy ranks with the actor's own decoder: a beam over its valid tree, no exclusions. A beam yields leaves;
  items of one leaf share its probability evenly, as the actor's last hop has it, and stand in the order of
  their names. So a list has k *items*, whatever the tree.
- A difference between two lists' hits is bootstrapped over users: a user's rows resemble each other.

Shapes: B requests, W beam width, K ranks.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from actor.recommend import step_of
from actor.sampling import beam
from learner.catalogue import Catalogue
from learner.decoder import LazyDecoder
from learner.valid_tree import Keys, Tree, keys_of
from ops.results import Interval

BATCH = 64
"""Requests of one search: their beams fit into a core's cache (256 at once took a quarter longer)."""
RESAMPLES = 2000


class Ranker:
    """A catalogue version as arrays: its tree, and the items of each of its leaves."""

    def __init__(self, catalogue: Catalogue, number: dict[str, int]) -> None:
        """`number` is how items are called in ranked lists; -1 stands for one without a number."""
        self.tree: Tree = catalogue.valid.tree(catalogue.version)
        self._leaves: Keys = self.tree.leaves()
        members = [catalogue.valid.members(key, catalogue.version) for key in self._leaves.tolist()]
        self._first = np.cumsum([0, *map(len, members)])
        self._item = np.array(
            [number.get(item, -1) for leaf in members for item in leaf], dtype=np.int64
        )

    @torch.inference_mode()
    def rank(
        self, model: LazyDecoder, users: list[str], packed: list[bytes], k: int
    ) -> NDArray[np.int64]:
        """The k items `[B, K]` that the policy finds most probable, best first, then -1."""
        ranked = [np.empty((0, k), np.int64)]
        for low in range(0, len(users), BATCH):
            part = slice(low, low + BATCH)
            step = step_of(model, model.looked_up(model.contexts(users[part], packed[part])))
            codes_BW3, logp_BW = beam(step, self.tree, None, k, requests=len(users[part]))
            ranked.append(self._items(codes_BW3, logp_BW, model.codes, k))
        return np.concatenate(ranked)

    def _items(
        self, codes_BW3: NDArray[np.int64], logp_BW: NDArray[np.float64], codes: int, k: int
    ) -> NDArray[np.int64]:
        """The first k items of ranked leaves, by the leaf's probability over its size."""
        found_BW = logp_BW > -np.inf
        request_n, beam_n = np.nonzero(found_BW)
        leaf_n = np.searchsorted(self._leaves, keys_of(codes_BW3[request_n, beam_n], codes))
        size_n = self._first[leaf_n + 1] - self._first[leaf_n]
        score_n = logp_BW[request_n, beam_n] - np.log(size_n)
        # one row for each member of each leaf, members in order
        of_m = np.repeat(np.arange(len(leaf_n)), size_n)
        member_m = np.arange(len(of_m)) - np.repeat(np.cumsum(size_n) - size_n, size_n)
        item_m = self._item[self._first[leaf_n[of_m]] + member_m]
        request_m = request_n[of_m]
        order_m = np.lexsort((beam_n[of_m], -score_n[of_m], request_m))
        request_m, item_m = request_m[order_m], item_m[order_m]
        rank_m = np.arange(len(order_m)) - np.searchsorted(request_m, request_m)
        kept_m = rank_m < k
        ranked_BK = np.full((len(codes_BW3), k), -1, np.int64)
        ranked_BK[request_m[kept_m], rank_m[kept_m]] = item_m[kept_m]
        return ranked_BK


def difference(
    ours: NDArray[np.bool_], theirs: NDArray[np.bool_], user: NDArray[np.integer], seed: int = 0
) -> Interval:
    """Mean of ours minus theirs over the rows, with a 95 % bootstrap interval over users.

    Not a number without rows.
    """
    if not len(user):
        return Interval(mean=np.nan, low=np.nan, high=np.nan)
    _, of_user = np.unique(user, return_inverse=True)
    gain_U = np.bincount(of_user, weights=ours.astype(float) - theirs.astype(float))
    rows_U = np.bincount(of_user).astype(float)
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for sample in range(RESAMPLES):
        drawn_U = np.bincount(rng.integers(len(rows_U), size=len(rows_U)), minlength=len(rows_U))
        means[sample] = (drawn_U @ gain_U) / (drawn_U @ rows_U)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean=float(gain_U.sum() / rows_U.sum()), low=float(low), high=float(high))
