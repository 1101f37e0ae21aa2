"""From requests to exposures: the serving core, without I/O, clock or global state.

`prepare` reads what a request may see (context, valid tree, exclusions) at one moment, `decode` runs the policy on
a batch of prepared requests of one version, and `expose` turns a draw into the event that tells the truth about it.
"""

from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from actor.explore import Exploration, Pool
from actor.policy import ServedPolicy
from actor.sampling import Slates, Step, draw, last_hop
from actor.users import Users
from learner.catalogue import Catalogue
from learner.context import contexts, pack_behaviours
from learner.decoder import KeyValues, LazyDecoder
from learner.valid_tree import Children, Keys, Tree, keys_of, sid_of, sids_of
from streams.events import Draw, Exposure, LogpLevels, ShownItem, Source, pack_leaves

NO_EXPLORATION: Final = Exploration()
SEEDS: Final = 1 << 53
"""Seeds of draws are below this: JSON readers keep such integers."""


def _nothing() -> Keys:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Prepared:
    """One request as the policy will see it."""

    request: str
    user: str
    arm: str
    count: int
    """Slots of the policy."""
    context: bytes
    tree: Tree
    catalogue_version: int
    excluded: Keys
    shown: frozenset[str]
    explore: Exploration = NO_EXPLORATION
    """Its slots are those of this request."""
    new: Keys = field(default_factory=_nothing)
    """New leaves, where slots are reserved."""


def prepare(
    request: str,
    user: str,
    arm: str,
    count: int,
    users: Users,
    catalogue: Catalogue,
    context_length: int,
    now_ms: int,
    explore: Exploration = NO_EXPLORATION,
) -> Prepared:
    """Context, tree and exclusions of a request, at this moment."""
    known = (
        (behaviour, catalogue.items[behaviour.item].sid)
        for behaviour in users.behaviours(user, context_length)
        if behaviour.item in catalogue.items
    )
    shown = users.shown(user)
    version, valid = catalogue.version, catalogue.valid
    explore = replace(explore, slots=min(explore.slots, count - 1))  # the first is the policy's
    return Prepared(
        request=request,
        user=user,
        arm=arm,
        count=count - explore.slots,
        context=pack_behaviours(known, now_ms),
        tree=valid.tree(version),
        catalogue_version=version,
        excluded=valid.exhausted(shown, version),
        shown=frozenset(shown),
        explore=explore,
        new=valid.newborn(version, explore.span) if explore.slots else _nothing(),
    )


@torch.inference_mode()
def decode(
    policy: ServedPolicy,
    batch: list[Prepared],
    temperature: float,
    noise: np.random.Generator | int,
) -> Slates:
    """Draw the slates of a batch, all of one version and tree. The same seed in `noise` gives the same slates."""
    model = policy.model
    kv = model.process(
        contexts(
            [one.user for one in batch],
            [one.context for one in batch],
            model.preset.context,
            model.user_rows,
            model.codes,
        )
    )
    largest = max(one.count for one in batch)
    excluded = [one.excluded for one in batch]
    rng = np.random.default_rng(noise)
    slates = draw(step_of(model, kv), batch[0].tree, excluded, largest, temperature, rng)
    return replace(slates, seed=noise) if isinstance(noise, int) else slates


def step_of(model: LazyDecoder, kv: KeyValues) -> Step:
    """The policy on a batch of processed contexts, as the search asks it."""

    def step(prefix_BMl: Tensor, children: Children) -> Tensor:
        place_n, code_n = torch.from_numpy(children.place_n), torch.from_numpy(children.code_n)
        return model.step_to(kv, prefix_BMl, place_n, code_n)

    return step


def expose(
    policy: ServedPolicy,
    one: Prepared,
    row: int,
    slates: Slates,
    catalogue: Catalogue,
    temperature: float,
    rng: np.random.Generator,
    now_ms: int,
) -> Exposure:
    """The exposure of row `row` of a draw, reserved slots after the policy's.

    Items deleted since the request was prepared are left out.
    """
    items: list[ShownItem] = []
    codes = policy.model.codes

    def show(
        source: Source,
        key: int,
        logp_leaf: float,
        logp_levels: LogpLevels | None = None,
        score: float | None = None,
    ) -> None:
        """Fill the next slot with an item of this leaf."""
        members = catalogue.valid.members(key, one.catalogue_version)
        item, logp_hop = last_hop(members, lambda member: member not in one.shown, rng)
        entry = catalogue.items.get(item)
        if entry is None:
            return
        items.append(
            ShownItem(
                item=item,
                sid=sid_of(key, codes),
                position=len(items),
                duration_ms=entry.duration_ms,
                source=source,
                logp_levels=logp_levels,
                logp_decision=logp_leaf + logp_hop,
                score=score,
            )
        )

    filled_J = slates.filled_BJ[row, : one.count]
    keys = keys_of(slates.sids_BJ3[row, : one.count][filled_J], codes)
    for slot, key in enumerate(keys.tolist()):
        first, second, third = slates.logp_levels_BJ3[row, slot].tolist()
        logp_leaf, score = slates.logp_leaf_BJ[row, slot], slates.scores_BW[row, slot]
        show("policy", key, float(logp_leaf), (first, second, third), float(score))
    if one.explore.slots:
        taken = np.concatenate([one.excluded, keys])
        pool = Pool(one.tree.leaves(), one.new, taken, one.explore.new)
        for key, logp in pool.draw(one.explore.slots, rng):
            show("explore", key, logp)
    return Exposure(
        request=one.request,
        user=one.user,
        time_ms=now_ms,
        arm=one.arm,
        policy_version=policy.version,
        catalogue_version=one.catalogue_version,
        decode_mode="gumbel_top_k",
        temperature=temperature,
        context=one.context,
        excluded=pack_leaves(sids_of(one.excluded, codes)),
        items=items,
        next_score=slates.next_score(row, one.count),
        draw=None if slates.seed is None else _drawn(slates, slates.seed, row, one.count),
    )


def _drawn(slates: Slates, seed: int, row: int, slots: int) -> Draw:
    return Draw(seed=seed, row=row, rows=len(slates.sids_BJ3), slots=slots)
