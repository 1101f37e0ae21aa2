"""An exposure's own probabilities, computed again: the core of `dwell audit propensity`.

Notable choices (contract of the policy, "Probabilities on an exposure")
- *As the learner does*: teacher-forced along the shown paths, over the valid tree of the request's catalogue version
  less its excluded leaves, at its temperature, in batches of any size. The difference is in nats per level.
- *As the actor did*: requests that were decoded together are decoded together again, by the actor's own code from the
  logged seed. Leaves, log-probabilities and scores must then be equal to the last bit.
- A deterministic beam has no law to hold: its log-probabilities are computed again, and so is the search. What it
  shows is of source `other`, and nothing of it may claim to be the policy's draw.
- Every leaf of the draw that was looked at must be told of, shown or skipped, in its place; what was skipped must
  have been beyond the cap on its author or have left the catalogue since, and what was shown must not.
- Which members of a leaf were shown lately only the actor knew. So the choice among members is held within bounds: a
  decision's probability must be that of its leaf over a whole number of members, not more than the leaf has.

Legend: B requests, k slots, L levels, K codes.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from actor.explore import Exploration, Pool
from actor.policy import ServedPolicy
from actor.recommend import BEAM, DRAWN, NO_EXPLORATION, Prepared, decode
from actor.sampling import Slates
from actor.slots import AUTHOR, DELETED, spare_of
from learner.batch import paths
from learner.catalogue import Catalogue
from learner.masking import masked_log_softmax
from learner.valid_tree import keys_of
from streams.events import Exposure, ShownItem, SkippedItem, Source, unpack_leaves

CHUNK: Final = 64
"""Requests computed together, as the learner does."""
HOP_TOLERANCE: Final = 1e-9
"""Nats between a logged decision and the leaf's law over a whole number of members; both are float64."""


@torch.inference_mode()
def differences(
    policy: ServedPolicy, exposures: Sequence[Exposure], catalogue: Catalogue
) -> NDArray[np.float64]:
    """How far the logged levels of all that the policy chose, shown or skipped, are from those computed now: the
    largest of the three, in nats `[n]`.

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
    judged = [in_order(exposure, chooser(exposure)) for exposure in exposures]
    sids_BkL, shown_Bk, mask_BkLK, valid_Bk = paths(
        [replace(exposure, items=of) for exposure, of in zip(exposures, judged, strict=True)],
        catalogue.valid,
    )
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
    for row, items in enumerate(judged):
        for slot, item in enumerate(items):
            if item.logp_levels is not None:
                logged_BkL[row, slot] = item.logp_levels
    with np.errstate(invalid="ignore"):  # -inf - -inf, of a leaf that is not valid
        off_Bk: NDArray[np.float64] = np.abs(logged_BkL - now_BkL).max(-1)
    off_Bk[~valid_Bk | np.isnan(off_Bk)] = np.inf
    off_n: NDArray[np.float64] = off_Bk[shown_Bk]
    return off_n


def chooser(exposure: Exposure) -> Source:
    """The source of what the policy itself chose: `policy` where it drew, `other` of a deterministic beam."""
    return "other" if exposure.draw is not None and exposure.draw.beam else "policy"


def in_order(exposure: Exposure, source: Source) -> list[ShownItem]:
    """All that a source chose, shown or skipped, in the order of its draw."""
    slots = [*(exposure.skipped or ()), *exposure.items]  # skipped for a slot, then shown in it
    return sorted((slot for slot in slots if slot.source == source), key=lambda slot: slot.position)


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
            author_cap=exposure.author_cap,
            spare=drawn.spare,
            beam=drawn.beam,
        )
        for exposure, drawn in zip(batch, draws, strict=True)
    ]
    slates = decode(policy, prepared, batch[0].temperature, draws[0].seed)
    return [
        _same(exposure, slates, row, one, catalogue)
        and _explored(exposure, one, slates.sids_BJ3[row], catalogue, explore)
        and _shown_or_skipped(exposure, catalogue)
        for row, (exposure, one) in enumerate(zip(batch, prepared, strict=True))
    ]


def _same(
    exposure: Exposure, slates: Slates, row: int, one: Prepared, catalogue: Catalogue
) -> bool:
    """Whether an exposure tells of its row of the draw, slot by slot as far as it was looked at."""
    told = in_order(exposure, chooser(exposure))
    drawn = int(slates.filled_BJ[row, : one.drawn].sum())
    sids = [tuple(sid) for sid in slates.sids_BJ3[row, :drawn].tolist()]
    if exposure.skipped is None:  # of an earlier release: what was deleted meanwhile is left out
        slot_of = {sid: slot for slot, sid in enumerate(sids)}
        at = [slot_of.get(item.sid, -1) for item in told]
        looked, whole = one.count, -1 not in at and at == sorted(set(at))
    else:
        looked = len(told)
        at, whole = list(range(looked)), looked <= drawn
        whole = whole and (looked == drawn or _ended(exposure, told, one, sids[looked], catalogue))
    in_place = [item.position for item in exposure.items] == list(range(len(exposure.items)))
    return (
        whole
        and in_place
        and exposure.decode_mode == (BEAM if one.beam else DRAWN)
        and exposure.next_score == slates.next_score(row, looked)
        and all(
            item.sid == sids[slot]
            and item.logp_levels == tuple(slates.logp_levels_BJ3[row, slot].tolist())
            and item.score == slates.score(row, slot)
            and _lawful_hop(item, slates.logp_leaf_BJ[row, slot], exposure, catalogue)
            for item, slot in zip(told, at, strict=True)
        )
    )


def _ended(
    exposure: Exposure,
    told: Sequence[ShownItem],
    one: Prepared,
    following: tuple[int, ...],
    catalogue: Catalogue,
) -> bool:
    """Whether the slots were full, and the leaf that follows might have been shown next; a beam stops at once."""
    shown = [item for item in told if not isinstance(item, SkippedItem)]
    if len(shown) != one.count or one.beam:
        return len(shown) == one.count and shown[-1] is told[-1]
    version, cap = exposure.catalogue_version, exposure.author_cap
    of = Counter(catalogue.author(item.item, version) for item in shown)
    (key,) = keys_of(np.array([following]), catalogue.valid.codes).tolist()
    authors = [catalogue.author(item, version) for item in catalogue.valid.members(key, version)]
    return any(not (cap and author and of[author] >= cap) for author in authors)


def _shown_or_skipped(exposure: Exposure, catalogue: Catalogue) -> bool:
    """Whether each slot was shown or skipped as the cap on authors has it."""
    version, cap = exposure.catalogue_version, exposure.author_cap
    of: Counter[str] = Counter()
    for item in [*in_order(exposure, chooser(exposure)), *in_order(exposure, "explore")]:
        author = catalogue.author(item.item, version)
        full = bool(cap and author) and of[author] >= cap
        if not isinstance(item, SkippedItem):
            of[author] += 1
            lawful = not full
        elif item.reason == DELETED:
            lawful = catalogue.valid.left_since(item.item, version)
        else:
            lawful = full and item.reason == AUTHOR
        if not lawful:
            return False
    return True


def _explored(
    exposure: Exposure,
    one: Prepared,
    drawn_J3: NDArray[np.int64],
    catalogue: Catalogue,
    explore: Exploration,
) -> bool:
    """Whether the reserved slots show what they could, with the probabilities of their law."""
    told = in_order(exposure, "explore")
    shown = sum(not isinstance(item, SkippedItem) for item in told)
    if shown > explore.slots:
        return False
    reserved = explore.slots if one.count > 1 else shown  # a slate has a slot of the policy
    looked = len(in_order(exposure, chooser(exposure)))
    if exposure.skipped is None:  # of an earlier release
        looked = one.count
        if shown < reserved:  # deleted before the answer: nobody knows which leaf it stood for
            return True
    codes = catalogue.valid.codes
    new = catalogue.valid.newborn(exposure.catalogue_version, explore.span)
    taken_J3 = drawn_J3[:looked]
    taken = np.concatenate([one.excluded, keys_of(taken_J3[taken_J3[:, 0] >= 0], codes)])
    pool = Pool(one.tree, new, taken, explore.new)
    for item in told:
        (key,) = keys_of(np.array([item.sid]), codes).tolist()
        if not _lawful_hop(item, pool.logp(key), exposure, catalogue):
            return False
        pool.take(key)
    spare = spare_of(reserved, one.count + reserved, exposure.author_cap)
    return shown == reserved or not pool.left or len(told) == reserved + spare


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
