"""The report of a run: what the loop did, judged from the log and from the simulator's truth.

Formulas are those of the evidence contract. Reward figures are over requests served in the last quarter of the run;
counts of requests, samples, lost and duplicated are over the whole log.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ops.account import Account
from ops.lift import last_quarter, lift, spread
from ops.monitor import Observed
from ops.results import Check
from ops.served import Served
from streams.control import CONTROL_ARM, LEARNING_ARM

FRESHNESS_GOAL_S = 2.4
FILL_GOAL = 0.99
LONG_RUN_S = 290.0


@dataclass(frozen=True)
class Quantiles:
    """Seconds."""

    p50_s: float | None
    p99_s: float | None
    count: int


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """Median and 99th percentile; None of none."""
    if not seconds:
        return Quantiles(None, None, 0)
    p50, p99 = np.quantile(np.asarray(seconds), [0.5, 0.99])
    return Quantiles(float(p50), float(p99), len(seconds))


def rewards(
    lines: Sequence[Served], catalogue: int, start_ms: int | None = None, end_ms: int | None = None
) -> dict[str, Any]:
    """What both arms were worth in the last quarter, from the simulator's lines."""
    late = last_quarter(lines, start_ms, end_ms)
    by_arm = {
        arm: [line for line in late if line.arm == arm] for arm in (CONTROL_ARM, LEARNING_ARM)
    }
    compared = lift(by_arm[CONTROL_ARM], by_arm[LEARNING_ARM])
    if compared is None:
        return {}
    spreads = {arm: spread(by_arm[arm], catalogue) for arm in by_arm}
    coverage = {arm: value[0] for arm, value in spreads.items()}
    return {
        "lift": {"satisfaction": compared.lift_satisfaction, "dwell": compared.lift_dwell},
        "gap_closed": compared.gap_closed,
        "permuted": {"satisfaction_lift": compared.permuted_satisfaction_lift},
        "fill": compared.fill[LEARNING_ARM],
        "coverage": coverage[LEARNING_ARM],
        "oracle": compared.oracle,
        "persons": compared.persons,
        "by_arm": {
            arm: {
                "satisfaction": compared.satisfaction[arm],
                "dwell_s": compared.dwell_s[arm],
                "dislikes": compared.dislikes[arm],
                "fill": compared.fill[arm],
                "coverage": coverage[arm],
                "gini": spreads[arm][1],
            }
            for arm in by_arm
        },
    }


def entropies(
    slots: Sequence[tuple[int, str, list[str], float | None]], start_ms: int, end_ms: int
) -> dict[str, float]:
    """Nats per level by arm over the last quarter: slot 1 is a draw from the policy, so -log p is unbiased."""
    since = start_ms + 0.75 * (end_ms - start_ms)
    found: dict[str, float] = {}
    for arm in (CONTROL_ARM, LEARNING_ARM):
        values = [
            surprise
            for time_ms, of, _, surprise in slots
            if of == arm and surprise is not None and since <= time_ms <= end_ms
        ]
        if values:
            found[arm] = float(np.mean(values))
    return found


def live_results(
    observed: Observed,
    account: Account,
    lines: Sequence[Served],
    catalogue: int,
    span_ms: tuple[int, int],
) -> dict[str, Any]:
    """All figures of a live run of the demonstration."""
    start_ms, end_ms = span_ms
    here = [line for line in lines if start_ms <= line.time_ms <= end_ms]
    results = rewards(here, catalogue, start_ms, end_ms)
    entropy = entropies(account.slots, start_ms, end_ms)
    for arm, value in entropy.items():
        results.get("by_arm", {}).get(arm, {})["entropy"] = value
    return {
        **results,
        "entropy": entropy.get(LEARNING_ARM),
        "freshness": quantiles(observed.freshness_s),
        "label_wait": quantiles(observed.label_wait_s),
        "requests": account.requests,
        "samples": account.samples,
        "open": account.open,
        "lost": account.lost,
        "duplicated": account.duplicated,
        "dead_letters": dict(account.dead_letters),
        "versions": observed.version,
        "versions_this_run": observed.versions,
        "versions_refused": observed.refused,
        "requests_this_run": len(here),
        "requests_per_second": len(here) / max(1e-9, (end_ms - start_ms) / 1000),
        "trained_this_run": observed.trained,
        "outcomes_this_run": dict(observed.outcomes),
        "seconds": (end_ms - start_ms) / 1000,
    }


def live_checks(results: Mapping[str, Any]) -> list[Check]:
    """The demonstration's goals; only lost and duplicated are a matter of correctness."""
    checks = [
        Check("lost", results["lost"], "0", results["lost"] == 0),
        Check("duplicated", results["duplicated"], "0", results["duplicated"] == 0),
    ]

    def goal(name: str, value: float | None, text: str, ok: bool) -> None:
        checks.append(Check(name, value, text, value is not None and ok, correctness=False))

    p99 = results["freshness"].p99_s
    goal(
        "freshness.p99_s", p99, f"< {FRESHNESS_GOAL_S}", p99 is not None and p99 < FRESHNESS_GOAL_S
    )
    if "lift" in results:
        gain = results["lift"]["satisfaction"]
        permuted = results["permuted"]["satisfaction_lift"]["mean"]
        goal("lift.satisfaction.low", gain["low"], "> 0", gain["low"] > 0)
        half = gain["mean"] / 2
        goal(
            "permuted.satisfaction_lift",
            permuted,
            f"<= {half:.3f} (half the lift)",
            permuted <= half,
        )
        goal("fill", results["fill"], f">= {FILL_GOAL}", results["fill"] >= FILL_GOAL)
        closed = results["gap_closed"]["mean"]
        if results["seconds"] >= LONG_RUN_S:
            goal("gap_closed", closed, ">= 0.2 at --for 300", closed >= 0.2)
    return checks
