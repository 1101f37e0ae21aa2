"""`dwell bench harm`: harmful versions put before live actors, one after the other, and what becomes of each.

Notable choices
- One run of the whole loop: a broker of its own, streams, an actor over HTTP, simulated viewers, a learner that
  signs; the arms are control, pinned to version 1, and learning.
- Each harm comes past the learner's guard: the learner is killed, the version is published in its place, and once the
  actor has refused or returned it, the learner is started again and must go on. A replay comes beside a live learner.
- One harm has healthy figures, and the guard is asked to say so; only what viewers watch tells. After it the learner
  is started at once, since it is its test of the rewards that must find it, and adopts the harmful version. It learns
  at next to no rate then: at its own it repairs such a version about as fast as the test can tell, and the figure is
  of a drop that lasts.
- Times are read off the log afterwards (ops/bench_harm_log.py), which is then audited like any other run's.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from learner.recovery import catalogue_in_log
from ops.audit_samples import audit_samples, figures, journals
from ops.audit_samples import checks as audit_checks
from ops.bench_harm_intruder import LIE, Base, Intruder, replayed
from ops.bench_harm_log import Harm, Seen, by_rewards, outcome
from ops.bench_harm_loop import Loop
from ops.bench_harm_poison import Workshop, Wrong, exploded, not_a_number
from ops.broker import FOLDER
from ops.cluster import held, open_cluster
from ops.config import Config
from ops.errors import UserError
from ops.results import Check, report
from ops.warmup import world_of
from streams.blocks import State
from streams.events import Sample
from streams.signing import Signer, make_pair
from streams.weights_log import version_at

WARM_S: Final = 20.0
GOAL_S: Final = 10.0
REWARD_GOAL_S: Final = 60.0
"""Beside the label wait."""
PATIENCE_S: Final = 20.0
TAUGHT: Final = 512
"""Newest samples that a wrong policy is taught on."""
WORST: Final = 0.1
"""Part of the catalogue that it is taught."""
ASKED: Final = 1024
"""Requests at which earnings are estimated."""
LEAST_DROP: Final = 0.1
STILL: Final = ("--set", "learn.lr=1e-9")
"""A learner that does not repair what it has adopted."""


class Bench:
    """One run."""

    def __init__(self, loop: Loop, foreign: Path, tell: Callable[[str], None]) -> None:
        self._loop = loop
        self._config = loop.config
        self._foreign = Signer(foreign)
        self._tell = tell
        self._seed = loop.config.learn.seed
        self.harms: dict[str, Harm] = {}
        self.notes: dict[str, dict[str, Any]] = {}

    def spoil(self, name: str, make: Callable[[Base, Workshop, list[Sample]], State]) -> None:
        """A state that must not be served, until it is returned and the loop is well again."""
        intruder, base = self._in_its_place(name)
        state = make(base, self._workshop(base), self._newest(64))
        self.harms[name], refused = intruder.publish(base, state)
        if refused:
            self.notes.setdefault(name, {})["publisher_refused"] = refused
        self._go_on(name)

    def forge(self, name: str, **how: Any) -> None:
        """A version whose bytes do not hold."""
        intruder, base = self._in_its_place(name)
        self.harms[name] = intruder.forge(base, exploded(base.state), **how)
        self._go_on(name)

    def forge_digest(self) -> None:
        """Signed as it should be."""
        self.forge("wrong_digest", digest=LIE)

    def forge_signature(self) -> None:
        """Right but for who signed it."""
        self.forge("wrong_signature", signer=self._foreign)

    def replay(self) -> None:
        """A version from the beginning of the run once more, beside a live learner."""
        self._tell("replayed: an old version")
        harm = self.harms["replayed"] = replayed(self._config, 2)
        self._loop.waited(
            "a version behind the replay",
            lambda: self._loop.look(lambda seen: seen.taken_behind(harm)),
            PATIENCE_S,
        )
        self._loop.wait_until_well(harm.version)

    def earn_less(self) -> None:
        """A version that looks healthy, and earns less."""
        name = "earns_less"
        intruder, base = self._in_its_place(name)
        workshop = self._workshop(base)
        worst = self._loop.look(lambda seen: seen.watched_least(WORST))
        samples = self._newest(TAUGHT)
        wrong = workshop.learned_wrongly(base.state, samples, worst, self._seed)
        harm, _ = intruder.publish(base, wrong.state)
        self.harms[name] = harm
        self._loop.start_learner(*STILL)
        self.notes[name] = self._expected(base, workshop, wrong)
        wait_s = self._config.join.window_s + REWARD_GOAL_S
        self._loop.waited(
            "the rewards to tell",
            lambda: self._loop.look(lambda seen: seen.answered(harm)),
            1.5 * wait_s,
        )
        self._loop.wait_until_well(harm.version)
        self._loop.kill_learner()
        self._loop.start_learner()
        self._loop.wait_until_well(self._loop.newest())

    def _expected(self, base: Base, workshop: Workshop, wrong: Wrong) -> dict[str, Any]:
        """What guard and simulated world say of a wrong version beforehand."""
        world, twins = world_of(self._config)
        person = {user: at for at, users in enumerate(twins) for user in users.values()}
        control = self._loop.look(lambda seen: seen.control.pinned.get("control", 1))
        asked = self._newest(ASKED)
        earned = {
            who: float(
                np.mean(workshop.earnings(state, asked, world, person.__getitem__, self._seed))
            )
            for who, state in {
                "control": version_at(self._config.kafka.bootstrap, control).state,
                "before": base.state,
                "harmful": wrong.state,
            }.items()
        }
        return {
            "guard": vars(wrong.figures),
            "steps": wrong.steps,
            "expected": {**earned, "drop": 1.0 - earned["harmful"] / earned["control"]},
        }

    def _in_its_place(self, name: str) -> tuple[Intruder, Base]:
        """The learner is dead, and cannot publish if it were not."""
        self._tell(f"{name}: in the learner's place")
        self._loop.kill_learner()
        named = self._loop.look(lambda seen: set(seen.control.pinned.values()))
        intruder = Intruder(self._config, named)
        return intruder, intruder.base()

    def _go_on(self, name: str) -> None:
        """Once the harm has been refused or returned, a learner again, and the loop well."""
        harm = self.harms[name]
        self._loop.waited(
            f"{name} to be refused or returned",
            lambda: self._loop.look(
                lambda seen: outcome(seen, harm)["outcome"] in ("refused", "returned")
            ),
            PATIENCE_S,
        )
        began = time.monotonic()
        self._loop.start_learner()
        self._loop.wait_until_well(harm.version)
        self.notes.setdefault(name, {})["well_again_s"] = time.monotonic() - began

    def _workshop(self, base: Base) -> Workshop:
        config = self._config
        catalogue = catalogue_in_log(config.kafka.bootstrap, config.policy.codes)
        return Workshop(base.manifest, config.learn, catalogue)

    def _newest(self, count: int) -> list[Sample]:
        return self._loop.look(lambda seen: list(seen.newest)[-count:])


def run(config: Config, json: Path | None) -> int:
    """Bench, print, and return the exit status."""
    console = Console()
    if config.kafka.bootstrap:
        raise UserError("the bench publishes harm on a cluster of its own: leave --bootstrap out.")
    folder = Path(config.storage.data_dir) / "bench-harm"
    if (folder / FOLDER).exists():
        raise UserError(f"{folder} holds an earlier bench; remove it, or name another --data-dir.")
    private, public = make_pair(folder / "keys")
    foreign, _ = make_pair(folder / "foreign")
    config = replace(
        config,
        storage=replace(config.storage, data_dir=str(folder)),
        learn=replace(config.learn, signing_key=str(private)),
        actor=replace(config.actor, trusted_key=str(public)),
    )
    with held(folder), open_cluster(config, console.print) as cluster, console.status("") as status:
        loop = Loop(cluster, folder, status.update)
        bench = Bench(loop, foreign, status.update)
        try:
            loop.start(console)
            do_harm(bench, loop)
        finally:
            seen = loop.stop()
        status.update("auditing")
        client = loop.client()
        found, journal = audit_samples(cluster.config), journals(cluster.config.kafka)
    results = {
        **harms_of(bench, seen),
        "requests": client["requests"],
        "requests_failed": client["requests_failed"],
        "requests_per_second": config.simulate.requests_per_s,
        "learner_restarts": loop.restarts,
        "audit": {**figures(found), "journal": journal},
    }
    checks = checks_of(results, config.join.window_s) + audit_checks(found, journal)
    return report("dwell bench harm", config, [config.learn.seed], results, checks, json, console)


def do_harm(bench: Bench, loop: Loop) -> None:
    """All harms in their order."""
    time.sleep(WARM_S)
    loop.wait_until_well(1)
    bench.earn_less()  # first: the more the arm has learned, the further it is from earning less than control
    bench.spoil("not_a_number", lambda base, _, __: not_a_number(base.state))
    bench.spoil("exploded", lambda base, _, __: exploded(base.state))
    bench.spoil("one_item", lambda base, shop, samples: shop.collapsed(base.state, samples).state)
    bench.forge_digest()
    bench.forge_signature()
    bench.replay()


def harms_of(bench: Bench, seen: Seen) -> dict[str, Any]:
    """The figures of each harm, from the whole log."""
    found = {}
    for name, harm in bench.harms.items():
        of = by_rewards if name == "earns_less" else outcome
        found[name] = {**of(seen, harm), **bench.notes.get(name, {})}
    return {"harms": found}


def checks_of(results: dict[str, Any], window_s: float) -> list[Check]:
    """Each harm refused, passed over or returned in time, and viewers always answered."""
    checks = []
    for name, one in results["harms"].items():
        goal_s = window_s + REWARD_GOAL_S if name == "earns_less" else GOAL_S
        seconds = one["seconds"]
        in_time = seconds is not None and seconds < goal_s
        checks.append(Check(f"{name}.seconds", seconds, f"< {goal_s:g}", in_time))
        if one["outcome"] in ("refused", "passed over"):
            checks.append(Check(f"{name}.served", one["served"], "0", one["served"] == 0))
    drop = results["harms"].get("earns_less", {}).get("drop")
    if drop is not None:
        deep = drop["mean"] >= LEAST_DROP
        checks.append(Check("earns_less.drop", drop["mean"], f">= {LEAST_DROP}", deep, False))
    failed = results["requests_failed"]
    return [*checks, Check("requests_failed", failed, "0", failed == 0)]
