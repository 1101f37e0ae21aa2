"""Ways to spoil a policy, for `dwell bench harm`: from the state that is served to one that must not stay.

Notable choices
- All but one are seen without any label. That one, `learned_wrongly`, looks like a policy: besides what it has shown
  it comes to show what all viewers watch least, as if rewards had the wrong sign, as far as the learner's own guard
  lets a single version move. (Imitating the worst of each slate alone goes less deep: the slates are good ones.)
- What a spoilt policy will earn is estimated beforehand in the simulated world: the slates that it draws at the same
  requests, watched by the same viewers at the same visits as those of other versions.

Legend: B requests, k targets, L levels.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from msgspec import structs

from actor.policy import ServedPolicy
from actor.recommend import Prepared, decode
from learner.batch import assemble
from learner.catalogue import Catalogue
from learner.decoder import LazyDecoder
from learner.guard import PROBES, Figures, Guard
from learner.policy import build, load_state, served, state_of
from learner.pretrain import imitation
from learner.settings import LearnSettings
from learner.step import Trainer
from learner.valid_tree import keys_of, sid_of
from ops.viewer import watch
from ops.world import World
from streams.blocks import State, blocked_state
from streams.events import Sample, SemanticId, unpack_leaves
from streams.weights import Manifest

FACTOR: Final = 100.0
COLLAPSED: Final = 0.9
"""Mean probability of the one item at which a collapse is complete."""
MOST_STEPS: Final = 200
KEPT: Final = 2
TAUGHT: Final = 4
"""Of a request's targets, those that it had shown itself, and those that are watched least."""
FURTHEST: Final = 0.98
"""Of the divergence that the guard allows."""
EVERY: Final = 4
"""Steps between two questions to the guard."""
WRONG_STEPS: Final = 60
VISIT: Final = 1 << 40
"""A visit that no viewer of the run will make."""
PACE: Final = 20.0


def not_a_number(state: State) -> State:
    """One weight in thousands."""
    spoilt = {name: value.copy() for name, value in state.items()}
    spoilt["places"][0, 3] = np.nan
    return spoilt


def exploded(state: State) -> State:
    """All weights a hundred times as large."""
    return {name: value * np.float32(FACTOR) for name, value in state.items()}


class Collapse(NamedTuple):
    """A policy that shows one item to everybody."""

    state: State
    steps: int
    share: float
    """Mean probability of that item at the requests it was taught on."""


class Wrong(NamedTuple):
    """A policy that was taught what is watched least."""

    state: State
    steps: int
    figures: Figures
    """What the guard sees of it."""


class Workshop:
    """Where policies are spoilt: shape and settings of a lineage, and its catalogue."""

    def __init__(self, manifest: Manifest, learn: LearnSettings, catalogue: Catalogue) -> None:
        self._manifest = manifest
        self._learn = learn
        self.catalogue = catalogue

    def model(self, state: State) -> LazyDecoder:
        """A policy of its own, to be changed."""
        model = build(self._manifest.preset, self._manifest.codes, self._manifest.user_rows)
        load_state(model, state)
        return model

    def collapsed(self, state: State, samples: Sequence[Sample]) -> Collapse:
        """Taught to show one item to all, whatever they have seen; raises `ValueError` where it will not learn."""
        model = self.model(state)
        tree = self.catalogue.valid.tree(self.catalogue.version)
        sid = sid_of(tree.key_at(len(tree) // 2), tree.codes)
        taught = [_shown(sample, [sid], 0) for sample in samples]
        batch = imitation(assemble(taught, self.catalogue.valid, *self._sizes(model)))
        trainer = Trainer(model, LearnSettings(supervised=1.0, entropy=0.0), 0.01)
        for step in range(1, MOST_STEPS + 1):
            metrics = trainer.step(batch)
            assert metrics is not None
            share = float(np.exp(-3.0 * metrics.loss_supervised))  # before this step
            if share >= COLLAPSED:
                return Collapse(state_of(model), step, share)
        raise ValueError(
            f"after {MOST_STEPS} steps the one item has {share:.2g} of the probability"
        )

    def learned_wrongly(
        self, state: State, samples: Sequence[Sample], worst: Sequence[SemanticId], seed: int
    ) -> Wrong:
        """Taught to show the `worst` items besides its own, as far as the guard lets it.

        Raises `ValueError` where the guard lets nothing pass.
        """
        model = self.model(state)
        trainer = Trainer(model, LearnSettings(supervised=1.0, entropy=0.0), self._learn.lr)
        rng = np.random.default_rng([seed, 4])
        found: Wrong | None = None
        reason = ""
        for step in range(1, WRONG_STEPS + 1):
            rows = rng.choice(len(samples), min(len(samples), self._learn.batch), replace=False)
            taught = [_shown(samples[row], _some(worst, rng), KEPT) for row in rows.tolist()]
            trainer.step(imitation(assemble(taught, self.catalogue.valid, *self._sizes(model))))
            if step % EVERY:
                continue
            candidate = state_of(model)
            figures, reason = self.judged(state, candidate, samples[-PROBES:])
            if not reason and figures.divergence <= FURTHEST * self._learn.guard_divergence:
                found = Wrong(candidate, step, figures)
        if found is None:
            raise ValueError(f"the guard lets nothing pass that was taught so: {reason}")
        return found

    def judged(
        self, good: State, candidate: State, samples: Sequence[Sample]
    ) -> tuple[Figures, str]:
        """What the learner's guard says of a candidate after a good version, asked at the newest of these samples."""
        guard = Guard(self.model(good), self._learn)
        guard.good = good
        guard.saw(samples)
        verdict = guard.judge(candidate, self.catalogue.valid.tree(self.catalogue.version))
        return verdict.figures, verdict.reason

    def earnings(
        self,
        state: State,
        requests: Sequence[Sample],
        world: World,
        person_of: Callable[[str], int],
        seed: int,
    ) -> list[float]:
        """The reward of each request, had this version answered it; the same viewer chances for every version."""
        model = served(
            self._manifest.preset,
            self._manifest.codes,
            self._manifest.user_rows,
            blocked_state(state),
        )
        policy = ServedPolicy(0, self._manifest, model)
        found: list[float] = []
        for at in range(0, len(requests), 64):
            asked = [self._prepared(sample) for sample in requests[at : at + 64]]
            slates = decode(policy, asked, 1.0, seed + at)
            for row, (one, sample) in enumerate(zip(asked, requests[at : at + 64], strict=True)):
                keys = keys_of(slates.sids_BJ3[row][slates.filled_BJ[row]], model.codes)
                items = [
                    self.catalogue.valid.members(key, one.catalogue_version)[0]
                    for key in keys.tolist()
                ]
                found.append(_earned(world, person_of(sample.user), VISIT + at + row, items))
        return found

    def _prepared(self, sample: Sample) -> Prepared:
        valid = self.catalogue.valid
        return Prepared(
            request=sample.request,
            user=sample.user,
            arm=sample.arm,
            count=len(sample.items),
            context=sample.context,
            tree=valid.tree(sample.catalogue_version),
            catalogue_version=sample.catalogue_version,
            excluded=keys_of(unpack_leaves(sample.excluded), valid.codes),
            shown=frozenset(),
        )

    def _sizes(self, model: LazyDecoder) -> tuple[int, int]:
        return model.preset.context, model.user_rows


def _earned(world: World, person: int, visit: int, items: Sequence[str]) -> float:
    """As `learner.reward_test.reward` has it, of a viewing of these items."""
    viewing = watch(world, person, visit, items, PACE)
    disliked = {event.position for event in viewing.events if event.kind == "dislike"}
    shares = [
        0.0 if place in disliked else min(1.0, dwell / world.duration_ms[world.index[item]])
        for place, (item, dwell) in enumerate(zip(items, viewing.dwell_ms, strict=True))
    ]
    return float(np.mean(shares)) if shares else 0.0


def _shown(sample: Sample, sids: Sequence[SemanticId], kept: int) -> Sample:
    """The request as one where these leaves were shown besides so many of its own, and all were good."""
    first = sample.items[0]
    items = [structs.replace(item, advantage=1) for item in sample.items[:kept]]
    items += [structs.replace(first, sid=sid, advantage=1, source="other") for sid in sids]
    return structs.replace(sample, items=items, excluded=b"")


def _some(worst: Sequence[SemanticId], rng: np.random.Generator) -> list[SemanticId]:
    count = min(TAUGHT, len(worst))
    return [worst[at] for at in rng.choice(len(worst), count, replace=False).tolist()]
