"""An exposure's own probabilities, computed again: the core of `dwell audit propensity`.

Notable choices (contract of the policy, "Probabilities on an exposure")
- *As the learner does*: teacher-forced along the shown paths, over the valid tree of the request's catalogue version
  less its excluded leaves, at its temperature, in batches of any size. The difference is in nats per level.
- *As the actor did*: requests that were decoded together are decoded together again, by the actor's own code from the
  logged seed. Leaves, log-probabilities and scores must then be equal to the last bit.
- Which members of a leaf were shown lately only the actor knew. So the choice among members is held within bounds: a
  decision's probability must be that of its leaf over a whole number of members, not more than the leaf has.

Legend: B requests, k slots, L levels, K codes.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from actor.explore import Exploration, Pool
from actor.policy import ServedPolicy
from actor.recommend import NO_EXPLORATION, Prepared, decode
from actor.sampling import Slates
from learner.batch import paths
from learner.catalogue import Catalogue
from learner.masking import masked_log_softmax
from learner.valid_tree import keys_of
from streams.events import Exposure, ShownItem, unpack_leaves

CHUNK: Final = 64
"""Requests computed together, as the learner does."""
HOP_TOLERANCE: Final = 1e-9
"""Nats between a logged decision and the leaf's law over a whole number of members; both are float64."""


@torch.inference_mode()
def differences(
    policy: ServedPolicy, exposures: Sequence[Exposure], catalogue: Catalogue
) -> NDArray[np.float64]:
    """How far each policy slot's logged levels are from those computed now: the largest of the three, in nats `[n]`.

    Infinite where a leaf is not in its request's tree or nothing was logged. Raises as `learner.batch.paths`.
    """
    found = [
        _differences(policy, exposures[at : at + CHUNK], catalogue)
        for at in range(0, len(exposures), CHUNK)
    ]
    return np.concatenate(found) if found else np.empty(0)


def _differences(
    policy: ServedPolicy, exposures: Sequence[Exposure], catalogue: Catalogue
) -> NDArray[np.float64]:
    model = policy.model
    sids_BkL, shown_Bk, mask_BkLK, valid_Bk = paths(exposures, catalogue.valid)
    kv = model.process(
        model.contexts(
            [exposure.user for exposure in exposures], [exposure.context for exposure in exposures]
        )
    )
    index_BkL = torch.from_numpy(sids_BkL)
    temperature_B = torch.tensor([exposure.temperature for exposure in exposures])
    scaled_BkLK = model(kv, index_BkL) / temperature_B[:, None, None, None]
    logp_BkLK = masked_log_softmax(scaled_BkLK, torch.from_numpy(mask_BkLK))
    now_BkL = logp_BkLK.gather(-1, index_BkL.unsqueeze(-1)).squeeze(-1).double().numpy()
    logged_BkL = np.full(now_BkL.shape, -np.inf)
    judged_Bk = np.zeros_like(shown_Bk)
    for row, exposure in enumerate(exposures):
        for slot, item in enumerate(exposure.items):
            judged_Bk[row, slot] = item.source == "policy"
            if item.logp_levels is not None:
                logged_BkL[row, slot] = item.logp_levels
    with np.errstate(invalid="ignore"):  # -inf - -inf, of a leaf that is not valid
        off_Bk: NDArray[np.float64] = np.abs(logged_BkL - now_BkL).max(-1)
    off_Bk[~valid_Bk | np.isnan(off_Bk)] = np.inf
    off_n: NDArray[np.float64] = off_Bk[shown_Bk & judged_Bk]
    return off_n


def together(exposures: Sequence[Exposure]) -> list[list[Exposure]]:
    """Exposures of one version that say how they were drawn, by batch and in the order of its rows.

    Two arms that serve the same version are decoded together. Only whole batches: of others the shapes could not be
    had again.
    """
    batches: dict[int, dict[int, Exposure]] = {}
    for exposure in exposures:
        if exposure.draw is not None:
            batches.setdefault(exposure.draw.seed, {})[exposure.draw.row] = exposure
    return [
        [rows[row] for row in range(len(rows))]
        for rows in batches.values()
        if set(rows) == set(range(next(iter(rows.values())).draw.rows))  # type: ignore[union-attr]
    ]


def drawn_again(
    policy: ServedPolicy,
    batch: Sequence[Exposure],
    catalogue: Catalogue,
    explore: Exploration = NO_EXPLORATION,
) -> list[bool]:
    """Whether each slate of a whole batch comes out again, to the last bit, and its reserved slots had their law.

    Raises `UnknownVersionError` on a catalogue version not at hand.
    """
    draws = [exposure.draw for exposure in batch if exposure.draw is not None]
    codes = policy.model.codes
    tree = catalogue.valid.tree(batch[0].catalogue_version)
    prepared = [
        Prepared(
            request=exposure.request,
            user=exposure.user,
            arm=exposure.arm,
            count=drawn.slots,
            context=exposure.context,
            tree=tree,
            catalogue_version=exposure.catalogue_version,
            excluded=keys_of(unpack_leaves(exposure.excluded), codes),
            shown=frozenset(),
        )
        for exposure, drawn in zip(batch, draws, strict=True)
    ]
    slates = decode(policy, prepared, batch[0].temperature, draws[0].seed)
    return [
        _same(exposure, slates, row, one.count, catalogue)
        and _explored(exposure, one, slates.sids_BJ3[row], catalogue, explore)
        for row, (exposure, one) in enumerate(zip(batch, prepared, strict=True))
    ]


def _explored(
    exposure: Exposure,
    one: Prepared,
    drawn_J3: NDArray[np.int64],
    catalogue: Catalogue,
    explore: Exploration,
) -> bool:
    """Whether the reserved slots show what they could, with the probabilities of their law.

    Where an item was deleted before the answer nobody knows which leaf it stood for: not judged.
    """
    items = [item for item in exposure.items if item.source == "explore"]
    if len(items) != explore.slots or not items:
        return len(items) <= explore.slots
    codes = catalogue.valid.codes
    new = catalogue.valid.newborn(exposure.catalogue_version, explore.span)
    shown = drawn_J3[: one.count]
    taken = np.concatenate([one.excluded, keys_of(shown[shown[:, 0] >= 0], codes)])
    pool = Pool(one.tree, new, taken, explore.new)
    for item in items:
        (key,) = keys_of(np.array([item.sid]), codes).tolist()
        if not _lawful_hop(item, pool.logp(key), exposure, catalogue):
            return False
        pool.take(key)
    return True


def _same(exposure: Exposure, slates: Slates, row: int, slots: int, catalogue: Catalogue) -> bool:
    """Whether an exposure shows its row of the draw. An item deleted before the answer is left out."""
    slot_of = {
        tuple(slates.sids_BJ3[row, slot].tolist()): slot
        for slot in range(slots)
        if slates.filled_BJ[row, slot]
    }
    items = [item for item in exposure.items if item.source == "policy"]
    at = [slot_of.get(item.sid, -1) for item in items]
    return (
        -1 not in at
        and at == sorted(set(at))
        and exposure.next_score == slates.next_score(row, slots)
        and all(
            item.logp_levels == tuple(slates.logp_levels_BJ3[row, slot].tolist())
            and item.score == slates.scores_BW[row, slot]
            and _lawful_hop(item, slates.logp_leaf_BJ[row, slot], exposure, catalogue)
            for item, slot in zip(items, at, strict=True)
        )
    )


def _lawful_hop(
    item: ShownItem, logp_leaf: float, exposure: Exposure, catalogue: Catalogue
) -> bool:
    """Whether the item was one of a whole number of its leaf's members, each as likely."""
    (key,) = keys_of(np.array([item.sid]), catalogue.valid.codes).tolist()
    members = catalogue.valid.members(key, exposure.catalogue_version)
    if item.item not in members or item.logp_decision is None:
        return False
    hop = logp_leaf - item.logp_decision
    return any(
        abs(hop - np.log(eligible)) <= HOP_TOLERANCE for eligible in range(1, len(members) + 1)
    )
