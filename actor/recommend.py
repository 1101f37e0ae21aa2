"""From requests to exposures: the serving core, without I/O, clock or global state.

`prepare` reads what a request may see (context, valid tree, exclusions) at one moment, `decode` runs the policy on
a batch of prepared requests of one version, and `expose` turns a draw into the event that tells the truth about it.
`fall_back` is the slate of a request for which there was no time.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from actor.explore import Exploration, Pool, alike
from actor.policy import ServedPolicy
from actor.sampling import Slates, draw, last_hop
from actor.search import Step
from actor.users import Users
from learner.catalogue import Catalogue
from learner.context import pack_behaviours
from learner.context_processor import KeyValues
from learner.decoder import LazyDecoder
from learner.valid_tree import Children, Keys, Tree, keys_of, sid_of, sids_of
from streams.events import Draw, Exposure, LogpLevels, ShownItem, Source, pack_leaves

NO_EXPLORATION: Final = Exploration()
SEEDS: Final = 1 << 53
"""Seeds of draws are below this: JSON readers keep such integers."""


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
    new: Tree | None = None
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
        new=valid.newborn(version, explore.span) if explore.slots else None,
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
    of = model.contexts([one.user for one in batch], [one.context for one in batch])
    kv = model.looked_up(of)
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
    slate = _Slate(one, catalogue, rng)
    filled_J = slates.filled_BJ[row, : one.count]
    keys = keys_of(slates.sids_BJ3[row, : one.count][filled_J], policy.model.codes)
    for slot, key in enumerate(keys.tolist()):
        first, second, third = slates.logp_levels_BJ3[row, slot].tolist()
        logp_leaf, score = slates.logp_leaf_BJ[row, slot], slates.scores_BW[row, slot]
        slate.show("policy", key, float(logp_leaf), (first, second, third), float(score))
    if one.explore.slots:
        taken = np.concatenate([one.excluded, keys])
        assert one.new is not None
        pool = Pool(one.tree, one.new, taken, one.explore.new)
        for key, logp in pool.draw(one.explore.slots, rng):
            slate.show("explore", key, logp)
    drawn = None
    if slates.seed is not None:
        drawn = Draw(seed=slates.seed, row=row, rows=len(slates.sids_BJ3), slots=one.count)
    exposure = slate.exposure("gumbel_top_k", policy.version, temperature, now_ms)
    exposure.next_score, exposure.draw = slates.next_score(row, one.count), drawn
    return exposure


def fall_back(
    policy: ServedPolicy,
    one: Prepared,
    catalogue: Catalogue,
    temperature: float,
    rng: np.random.Generator,
    now_ms: int,
) -> Exposure:
    """A slate without the policy: every valid leaf alike, without replacement. It says that it is not the
    policy's."""
    slate = _Slate(one, catalogue, rng)
    for key, logp in alike(one.tree, one.excluded, one.count + one.explore.slots, rng):
        slate.show("other", key, logp)
    return slate.exposure("other", policy.version, temperature, now_ms)


class _Slate:
    """The slots of a request as they are filled."""

    def __init__(self, one: Prepared, catalogue: Catalogue, rng: np.random.Generator) -> None:
        self._one = one
        self._catalogue = catalogue
        self._rng = rng
        self._items: list[ShownItem] = []

    def show(
        self,
        source: Source,
        key: int,
        logp_leaf: float,
        logp_levels: LogpLevels | None = None,
        score: float | None = None,
    ) -> None:
        """Fill the next slot with an item of this leaf, unless it was deleted meanwhile."""
        one, valid = self._one, self._catalogue.valid
        members = valid.members(key, one.catalogue_version)
        item, logp_hop = last_hop(members, lambda member: member not in one.shown, self._rng)
        entry = self._catalogue.items.get(item)
        if entry is None:
            return
        self._items.append(
            ShownItem(
                item=item,
                sid=sid_of(key, valid.codes),
                position=len(self._items),
                duration_ms=entry.duration_ms,
                source=source,
                logp_levels=logp_levels,
                logp_decision=logp_leaf + logp_hop,
                score=score,
            )
        )

    def exposure(self, mode: str, version: int, temperature: float, now_ms: int) -> Exposure:
        """The event that tells of it."""
        one = self._one
        return Exposure(
            request=one.request,
            user=one.user,
            time_ms=now_ms,
            arm=one.arm,
            policy_version=version,
            catalogue_version=one.catalogue_version,
            decode_mode=mode,
            temperature=temperature,
            context=one.context,
            excluded=pack_leaves(sids_of(one.excluded, self._catalogue.valid.codes)),
            items=self._items,
        )
