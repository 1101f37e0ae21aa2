"""From requests to exposures: the serving core, without I/O, clock or global state.

`prepare` reads what a request may see (context, valid tree, exclusions) at one moment, and `renewed` the catalogue's
part of it again once the request has waited; `decode` runs the policy on a batch of prepared requests of one
version, and `expose` turns a draw into the event that tells the truth about it. `fall_back` is the slate of a request
for which there was no time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from actor.explore import Exploration, Pool, alike
from actor.policy import ServedPolicy
from actor.sampling import Slates, draw, most_probable
from actor.search import Step
from actor.slots import Leaf, Slots, spare_of
from actor.users import Users
from learner.catalogue import Catalogue
from learner.context import pack_behaviours
from learner.context_processor import KeyValues
from learner.decoder import LazyDecoder
from learner.valid_tree import Children, Keys, Tree, keys_of, sids_of
from streams.events import Draw, Exposure, Source, pack_leaves

NO_EXPLORATION: Final = Exploration()
DRAWN: Final = "gumbel_top_k"
"""Decode mode of slates drawn by the policy."""
BEAM: Final = "beam"
"""Decode mode of what a deterministic beam found."""
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
    author_cap: int = 0
    """Most items of one author; 0: any number."""

    spare: int = 0
    """Leaves drawn beyond `count`, because the cap may skip some."""
    beam: int = 0
    """Width of the deterministic beam, the same for all that are decoded together; 0: drawn."""

    @property
    def asked(self) -> int:
        """Slots of the slate."""
        return self.count + self.explore.slots

    @property
    def drawn(self) -> int:
        """Leaves drawn."""
        return self.count + self.spare


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
    author_cap: int = 0,
    beam: int = 0,
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
    own = count - explore.slots
    spare = spare_of(own, count, author_cap)
    return Prepared(
        request=request,
        user=user,
        arm=arm,
        count=own,
        context=pack_behaviours(known, now_ms),
        tree=valid.tree(version),
        catalogue_version=version,
        excluded=valid.exhausted(shown, version),
        shown=frozenset(shown),
        explore=explore,
        new=valid.newborn(version, explore.span) if explore.slots else None,
        author_cap=author_cap,
        spare=max(0, beam - own) if beam and spare else spare,  # a beam is there already
        beam=beam,
    )


def renewed(one: Prepared, catalogue: Catalogue) -> Prepared:
    """The request over the catalogue as it is now: tree, exclusions and new leaves. Its context stays."""
    version, valid = catalogue.version, catalogue.valid
    if version == one.catalogue_version:
        return one
    return replace(
        one,
        tree=valid.tree(version),
        catalogue_version=version,
        excluded=valid.exhausted(one.shown, version),
        new=None if one.new is None else valid.newborn(version, one.explore.span),
    )


@torch.inference_mode()
def decode(
    policy: ServedPolicy,
    batch: list[Prepared],
    temperature: float,
    noise: np.random.Generator | int,
) -> Slates:
    """The slates of a batch, all of one version and tree. The same seed in `noise` gives the same slates; a beam has
    no noise, and its seed only names the batch."""
    model = policy.model
    of = model.contexts([one.user for one in batch], [one.context for one in batch])
    kv = model.looked_up(of)
    step, tree, width = step_of(model, kv), batch[0].tree, batch[0].beam
    excluded = [one.excluded for one in batch]
    if width:
        slates = most_probable(step, tree, excluded, width, temperature)
    else:
        largest = max(one.drawn for one in batch)
        rng = np.random.default_rng(noise)
        slates = draw(step, tree, excluded, largest, temperature, rng)
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
    """The exposure of row `row` of a draw, reserved slots after the policy's."""
    slots = _slots(one, catalogue, rng)
    codes = policy.model.codes
    source: Source = "other" if one.beam else "policy"
    looked = slots.fill(source, one.count, _leaves(slates, row, one.drawn, codes))
    if one.explore.slots:
        taken = np.concatenate([one.excluded, keys_of(slates.sids_BJ3[row, :looked], codes)])
        assert one.new is not None
        pool = Pool(one.tree, one.new, taken, one.explore.new)
        drawn = one.explore.slots + spare_of(one.explore.slots, one.asked, one.author_cap)
        leaves = (Leaf(key, logp) for key, logp in pool.draw(drawn, rng))
        slots.fill("explore", one.explore.slots, leaves)
    mode = BEAM if one.beam else DRAWN
    exposure = _exposure(one, slots, catalogue, mode, policy.version, temperature, now_ms)
    exposure.next_score = slates.next_score(row, looked)
    if slates.seed is not None:
        rows = len(slates.sids_BJ3)
        exposure.draw = Draw(
            seed=slates.seed, row=row, rows=rows, slots=one.count, spare=one.spare, beam=one.beam
        )
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
    slots = _slots(one, catalogue, rng)
    drawn = one.asked + spare_of(one.asked, one.asked, one.author_cap)
    leaves = (Leaf(key, logp) for key, logp in alike(one.tree, one.excluded, drawn, rng))
    slots.fill("other", one.asked, leaves)
    return _exposure(one, slots, catalogue, "other", policy.version, temperature, now_ms)


def _slots(one: Prepared, catalogue: Catalogue, rng: np.random.Generator) -> Slots:
    return Slots(catalogue, one.catalogue_version, one.shown, one.author_cap, rng)


def _leaves(slates: Slates, row: int, upto: int, codes: int) -> Iterator[Leaf]:
    """A row's drawn leaves in their order."""
    filled_J = slates.filled_BJ[row, :upto]
    for slot, key in enumerate(keys_of(slates.sids_BJ3[row, :upto][filled_J], codes).tolist()):
        first, second, third = slates.logp_levels_BJ3[row, slot].tolist()
        logp = float(slates.logp_leaf_BJ[row, slot])
        yield Leaf(key, logp, (first, second, third), slates.score(row, slot))


def _exposure(
    one: Prepared,
    slots: Slots,
    catalogue: Catalogue,
    mode: str,
    version: int,
    temperature: float,
    now_ms: int,
) -> Exposure:
    """The event that tells of a slate."""
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
        excluded=pack_leaves(sids_of(one.excluded, catalogue.valid.codes)),
        items=slots.items,
        author_cap=one.author_cap,
        skipped=slots.skipped,
    )
