"""Decides before each publication whether the learner must go back, and to what: by guard, roll-backs and rewards.

Notable choices (contract of the policy, "Versions")
- Only the first rank decides; the others are told the weights.
- A candidate that the guard refuses never becomes a version: the last good one is published again under the next
  number, and what the refused steps took is accounted for as condemned. It may be what was harmful.
- A roll-back is answered once: until the answer has been read back from `control`, its order among other commands
  is not known, so the same roll-back is not acted upon again.
- A drop of the rewards below control's is acted on here, without a command of its own: the answer on `control`, with
  the reason, comes with the version that the arm then serves. If the version older than the drop is not there, the
  learner goes back to what control serves. Rewards of condemned versions, and of a pinned arm, say nothing new.
- A learner that signs takes back only what it signed.
- A version that is not in the log any more cannot be gone back to. It is said once; learning goes on, and the arm
  stays where `control` has it.
"""

import logging
import time
from functools import partial
from typing import Literal, NamedTuple
from uuid import uuid4

import torch
from prometheus_client import Counter, Gauge

from learner.checkpoint import Progress
from learner.guard import Guard
from learner.policy import build
from learner.ranks import Ranks
from learner.recovery import Lost, RecoveryError, published_state
from learner.reward_test import Drop, RewardTest
from learner.settings import LearnSettings
from learner.source import Source
from streams.blocks import State
from streams.control import CONTROL_ARM, LEARNING_ARM, ControlState, Rollback, is_condemned
from streams.events import Command, Sample
from streams.signing import signer, trust_in

log = logging.getLogger("dwell.learner")

RETURNS = Counter("dwell_learner_returns_total", "Returns to an earlier version", ["by"])
FIGURES = Gauge("dwell_learner_guard", "What the guard saw of the last candidate", ["what"])
EVIDENCE = Gauge(
    "dwell_learner_reward_evidence",
    "That learning earns less than control; learn.reward_alarm is the limit",
)
GUARD_SECONDS = Gauge("dwell_learner_guard_seconds", "Time of the guard's last verdict")

WHO = "learner"


class Return(NamedTuple):
    """Going back instead of publishing what was learned."""

    restored: int
    state: State
    action: Literal["refuse", "follow"]
    why: str

    def command(self, version: int, now_ms: int) -> Command:
        """What is said of it on `control`, where it becomes `version`."""
        return Command(
            id=uuid4().hex,
            time_ms=now_ms,
            who=WHO,
            why=self.why,
            action=self.action,
            arm=LEARNING_ARM,
            version=version,
            restored=self.restored,
        )


class Keeper:
    """Of the first rank."""

    def __init__(
        self,
        bootstrap: str,
        learn: LearnSettings,
        progress: Progress,
        state: State,
        ranks: Ranks,
        lost: Lost | None = None,
    ) -> None:
        """`state` is the last published version, or a start; or an older one, where the last is `lost`."""
        self._bootstrap = bootstrap
        self._trust = trust_in(signer(learn.signing_key))
        self._lost = lost
        with torch.random.fork_rng(devices=[]):  # the random state is part of the checkpoint
            model = build(progress.preset, progress.codes, progress.user_rows)
        self.guard = Guard(model.to(ranks.device), learn)
        self.guard.good = state
        self._answered = 0
        self._unmet: Rollback | None = None
        self._rewards = RewardTest(learn.reward_alarm)
        self._drop: Drop | None = None

    def listen(self, source: Source) -> None:
        """Hear of all samples from now on."""
        if self._rewards.threshold > 0:
            source.heard = partial(self._hear, source.control)

    def _hear(self, control: ControlState, sample: Sample) -> None:
        if sample.arm == LEARNING_ARM:
            if sample.arm in control.pinned:
                self._rewards.start_again()
                return
            if is_condemned(sample.policy_version, control.condemned):
                return
        found = self._rewards.see(sample)
        self._drop = self._drop or found
        EVIDENCE.set(self._rewards.evidence)

    def called_back(self, source: Source) -> bool:
        """Whether there is a roll-back to be followed now."""
        due = self._lost is not None or self._drop is not None
        return due or self._pending(source) is not None

    def decide(self, source: Source, candidate: State, last: int) -> Return | None:
        """Whether to go back instead of publishing `candidate` after version `last`."""
        pending = self._pending(source)
        back = self._rolled_back(pending, last) if pending is not None else None
        if self._lost is not None:
            back, self._lost = back or self._found_lost(self._lost, last), None
        if self._drop is not None:
            back = back or self._dropped(source.control, self._drop, last)
            self._drop = None
        if back is not None:
            self._rewards.start_again()
        return back or self._judged(source, candidate, last)

    def _pending(self, source: Source) -> Rollback | None:
        pending = source.control.rollbacks.get(LEARNING_ARM)
        answered = source.answered >= self._answered
        return pending if answered and pending != self._unmet else None

    def _rolled_back(self, pending: Rollback, last: int) -> Return | None:
        try:
            state = published_state(self._bootstrap, pending.version, self._trust)
        except RecoveryError as error:
            log.error("control rolls %s back, but %s", LEARNING_ARM, error)
            self._unmet = pending
            return None
        self.guard.good, self._answered = state, last + 1
        RETURNS.labels("rollback").inc()
        why = f"the learner went back to version {pending.version}"
        log.warning("version %d: %s", last + 1, why)
        return Return(pending.version, state, "follow", why)

    def _found_lost(self, lost: Lost, last: int) -> Return:
        assert self.guard.good is not None
        RETURNS.labels("start").inc()
        why = f"{lost.why}: back to version {lost.restored}"
        log.error("version %d: %s", last + 1, why)
        return Return(lost.restored, self.guard.good, "follow", why)

    def _dropped(self, control: ControlState, drop: Drop, last: int) -> Return | None:
        told = (
            f"the learning arm has earned {drop.learning:.3g} a request, control {drop.control:.3g}, over "
            f"{drop.comparisons} of each"
        )
        self._rewards.start_again()
        older = drop.version
        while is_condemned(older, control.condemned):
            older -= 1
        for version in (older, control.pinned.get(CONTROL_ARM, 0)):
            if not 0 < version < last:
                continue
            try:
                state = published_state(self._bootstrap, version, self._trust)
            except RecoveryError as error:
                log.warning("%s", error)
                continue
            self.guard.good = state
            RETURNS.labels("rewards").inc()
            log.error("version %d is version %d again: %s", last + 1, version, told)
            return Return(version, state, "follow", f"{told}: back to version {version}")
        log.error("%s, and there is no older version to go back to", told)
        return None

    def _judged(self, source: Source, candidate: State, last: int) -> Return | None:
        began = time.perf_counter()
        catalogue = source.catalogue
        verdict = self.guard.judge(candidate, catalogue.valid.tree(catalogue.version))
        GUARD_SECONDS.set(time.perf_counter() - began)
        for what, value in vars(verdict.figures).items():
            FIGURES.labels(what).set(value)
        good = self.guard.good
        if not verdict.reason or good is None:
            return None
        RETURNS.labels("guard").inc()
        log.error("version %d is version %d again: refused %s", last + 1, last, verdict.reason)
        return Return(last, good, "refuse", f"refused {verdict.reason}")
