"""From requests to exposures: the serving core, without I/O, clock or global state.

`prepare` reads what a request may see (context, valid tree, exclusions) at one moment, `decode` runs the policy on
a batch of prepared requests of one arm, and `expose` turns a draw into the event that tells the truth about it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actor.policy import ServedPolicy
from actor.sampling import Slates, draw, last_hop
from actor.users import Users
from learner.catalogue import Catalogue
from learner.context import contexts, pack_behaviours
from learner.valid_ids import Keys, Tree, sids_of
from streams.events import Exposure, ShownItem, pack_leaves


@dataclass(frozen=True)
class Prepared:
    """One request as the policy will see it."""

    request: str
    user: str
    arm: str
    count: int
    context: bytes
    tree: Tree
    catalogue_version: int
    excluded: Keys
    shown: frozenset[str]


def prepare(
    request: str,
    user: str,
    arm: str,
    count: int,
    users: Users,
    catalogue: Catalogue,
    context_length: int,
    now_ms: int,
) -> Prepared:
    """Context, tree and exclusions of a request, at this moment."""
    known = (
        (behaviour, catalogue.items[behaviour.item].sid)
        for behaviour in users.behaviours(user, context_length)
        if behaviour.item in catalogue.items
    )
    shown = users.shown(user)
    return Prepared(
        request=request,
        user=user,
        arm=arm,
        count=count,
        context=pack_behaviours(known, now_ms),
        tree=catalogue.valid.tree(catalogue.version),
        catalogue_version=catalogue.version,
        excluded=catalogue.valid.exhausted(shown, catalogue.version),
        shown=frozenset(shown),
    )


@torch.inference_mode()
def decode(
    policy: ServedPolicy, batch: list[Prepared], temperature: float, rng: np.random.Generator
) -> Slates:
    """Draw the slates of a batch; all of one arm and one tree."""
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

    def step(prefix_BMl: Tensor) -> Tensor:
        return model.step(kv, prefix_BMl)

    largest = max(one.count for one in batch)
    excluded = [one.excluded for one in batch]
    return draw(step, batch[0].tree, excluded, largest, temperature, rng)


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
    """The exposure of row `row` of a draw; items deleted since the request was prepared are left out."""
    items: list[ShownItem] = []
    codes = policy.model.codes
    for slot in range(one.count):
        if not slates.filled_BJ[row, slot]:
            break
        c1, c2, c3 = (int(code) for code in slates.sids_BJ3[row, slot])
        members = catalogue.valid.members((c1 * codes + c2) * codes + c3, one.catalogue_version)
        item, logp_hop = last_hop(members, lambda member: member not in one.shown, rng)
        entry = catalogue.items.get(item)
        if entry is None:
            continue
        levels = slates.logp_levels_BJ3[row, slot]
        items.append(
            ShownItem(
                item=item,
                sid=(c1, c2, c3),
                position=len(items),
                duration_ms=entry.duration_ms,
                source="policy",
                logp_levels=(float(levels[0]), float(levels[1]), float(levels[2])),
                logp_decision=float(slates.logp_leaf_BJ[row, slot]) + logp_hop,
                score=float(slates.scores_BW[row, slot]),
            )
        )
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
    )
