"""What serving feels of swaps: a part of `dwell bench weights`.

Notable choices
- Half of what one actor can do, as an open loop over HTTP; blocks in which versions come five a second and quiet
  blocks take turns, so that a noisy machine disturbs both alike. The ratio is of the blocks' 99th percentiles.
- A *failed* request is one without a full slate of the policy. *Mixed* is an answer that its version does not give:
  every slate is drawn again from the version that it names (`dwell audit propensity`).
"""

import threading
from typing import Any, Final

import numpy as np

from ops.audit_propensity import audit_propensity
from ops.bench_serve_load import Outcome, Plan, load
from ops.bench_serve_parts import users_of
from ops.bench_weights_parts import VERSIONS_PER_S, Mover, Served

CLIENTS: Final = 32
COUNT: Final = 6
BLOCK_S: Final = 8.0
WARM_S: Final = 0.5


def swaps(lineage: Served, count: int, history: int, seed: int) -> dict[str, Any]:
    """Serve through `count` swaps."""
    mover = Mover.on(lineage, seed)
    per_block = int(BLOCK_S * VERSIONS_PER_S)
    quiet: list[Outcome] = []
    moved: list[Outcome] = []
    try:
        plan = Plan(url=lineage.url, users=users_of(history), count=COUNT, seconds=BLOCK_S)
        most = load(_of(plan, clients=CLIENTS)).per_second
        for block in range(-(-count // per_block)):
            open_loop = _of(plan, rate=most / 2, seed=seed + block)
            if block % 2:
                quiet.append(load(open_loop))
            moved.append(_under_swaps(mover, open_loop, per_block))
            if not block % 2:
                quiet.append(load(open_loop))
    finally:
        mover.publisher.close()
    audited = audit_propensity(lineage.config)
    unequal = audited.drawn_again - round(audited.bit_equal * audited.drawn_again)
    mixed = unequal + sum(audited.not_at_hand.values()) + len(audited.wrong)
    p99_s = {
        "quiet": np.array([block.p99_s for block in quiet]),
        "swaps": np.array([block.p99_s for block in moved]),
    }
    ratios = p99_s["swaps"] / p99_s["quiet"]
    low, high = _interval(ratios, seed)
    return {
        "swaps": len(mover.manifests),
        "rate": most / 2,
        "requests": sum(block.offered for block in [*quiet, *moved]),
        "failed": sum(block.offered - block.answered for block in [*quiet, *moved]),
        "checked": audited.exposures,
        "drawn_again": audited.drawn_again,
        "mixed": mixed,
        "max_difference_nats": audited.max_difference_nats,
        "quiet_p99_s": float(np.median(p99_s["quiet"])),
        "swaps_p99_s": float(np.median(p99_s["swaps"])),
        "p99_ratio": {
            "median": float(np.median(ratios)),
            "low": low,
            "high": high,
        },
    }


def _under_swaps(mover: Mover, plan: Plan, count: int) -> Outcome:
    publishing = threading.Thread(
        target=mover.publish_steadily, args=(count, 1.0 / VERSIONS_PER_S), name="publishing"
    )
    publishing.start()
    try:
        return load(plan)
    finally:
        publishing.join()


def _of(plan: Plan, rate: float = 0.0, clients: int = 0, seed: int = 1) -> Plan:
    return Plan(
        url=plan.url,
        users=plan.users,
        count=plan.count,
        seconds=plan.seconds,
        warm_s=WARM_S,
        rate=rate,
        clients=clients,
        seed=seed,
    )


def _interval(values: np.ndarray[Any, Any], seed: int) -> tuple[float, float]:
    """95 % of the median, over values drawn again."""
    drawn = np.random.default_rng(seed).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)
