"""`dwell bench weights`: how fast a version is served, what it weighs, and what serving feels of it.

Notable choices
- `applied` counts from the beginning of a publication to the swap of the actor's pointer, at five versions a second
  (`small`: one), on a real broker, the actor a process of its own.
- `delta_share.table` is of a policy with a table of 10^6 rows; `delta_share.dense` of the dense part alone, which
  float32 publishes in full, beside what bf16 and longer intervals would bring.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from learner.policy import build, state_of
from learner.settings import PolicySettings
from ops.bench_weights_dense import dense_shares, exact_after
from ops.bench_weights_parts import VERSIONS_PER_S, served, transport
from ops.bench_weights_swaps import swaps
from ops.config import Config
from ops.errors import UserError
from ops.results import Check, exit_status, print_results, write_results

HISTORY: Final = 50
ITEMS: Final = 2_000


@dataclass(frozen=True)
class Case:
    """A policy whose versions are published."""

    name: str
    policy: PolicySettings
    every_s: float
    share: float = 1.0
    """Of the versions asked for."""


STEADY_S: Final = 1 / VERSIONS_PER_S
TINY: Final = Case("tiny", PolicySettings("tiny"), STEADY_S)
CASES: Final = (
    TINY,
    Case("rows_1000000", PolicySettings("tiny", user_rows=1_000_000), STEADY_S, 0.5),
    Case("small", PolicySettings("small", codes=1024), 1.0, 0.2),
)
LARGE: Final = Case("0.1B", PolicySettings("0.1B", codes=1024), 5.0, 0.05)


def run(
    config: Config, versions: int, deltas: int, swapped: int, large: bool, json: Path | None
) -> int:
    """Bench, print, and return the exit status."""
    if config.kafka.bootstrap:
        raise UserError("the bench fills clusters of its own: leave --bootstrap out.")
    console = Console()
    seed = config.learn.seed
    folder = Path(config.storage.data_dir) / "bench-weights"
    with console.status("") as status:
        results = measured(config, folder, versions, deltas, swapped, large, seed, status.update)
    checks = checks_of(results)
    _print(console, results)
    print_results({}, checks, console)
    if json is not None:
        write_results(json, "dwell bench weights", config, [seed], results, checks)
    return exit_status(checks)


def measured(
    config: Config,
    folder: Path,
    versions: int,
    deltas: int,
    swapped: int,
    large: bool,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {"applied": {}}
    for case in [*CASES, *([LARGE] if large else [])]:
        say(f"{case.name}: publishing")
        here = _with(config, case)
        with served(here, folder / case.name, ITEMS, HISTORY, seed) as made:
            count = max(10, round(versions * case.share))
            found["applied"][case.name] = transport(made, count, case.every_s, seed)
    say("the dense part")
    found["delta_share"] = {
        "table": found["applied"]["rows_1000000"]["delta_share"],
        "dense": dense_shares(config, 20 * versions, int(time.time() * 1000)),
    }
    say(f"{deltas} deltas")
    state = state_of(build("tiny", TINY.policy.codes, 1024))
    found["deltas"] = deltas
    found["exact_after_deltas"] = exact_after(state, deltas, seed)
    say(f"{swapped} swaps")
    with served(_with(config, TINY), folder / "swaps", ITEMS, HISTORY, seed) as made:
        found["serving"] = swaps(made, swapped, HISTORY, seed)
    return found


def checks_of(results: dict[str, Any]) -> list[Check]:
    """The figures held against their goals."""
    tiny, serving = results["applied"]["tiny"], results["serving"]
    table, ratio = results["delta_share"]["table"], serving["p99_ratio"]["median"]
    exact = results["exact_after_deltas"]
    return [
        Check("applied.p99_s", tiny["p99_s"], "< 0.1", tiny["p99_s"] < 0.1, correctness=False),
        Check("delta_share.table", table, "<= 0.05", table <= 0.05, correctness=False),
        Check(f"exact after {results['deltas']} deltas", exact, "true", exact),
        Check("failed", serving["failed"], "0", serving["failed"] == 0),
        Check("mixed", serving["mixed"], "0", serving["mixed"] == 0),
        Check("p99_ratio", ratio, "<= 1.2", ratio <= 1.2, correctness=False),
    ]


def _with(config: Config, case: Case) -> Config:
    return replace(config, policy=replace(case.policy, threads=config.policy.threads))


def _print(console: Console, results: dict[str, Any]) -> None:
    table = Table(
        "policy",
        "MB in full",
        "MB a delta",
        "share",
        "publish p50 s",
        "applied p50 s",
        "p99 s",
        box=box.SIMPLE,
    )
    for name, one in results["applied"].items():
        table.add_row(
            name,
            f"{one['full_bytes'] / 1e6:.1f}",
            f"{one['delta_bytes'] / 1e6:.2f}",
            f"{one['delta_share']:.4f}",
            f"{one['publish_p50_s']:.3f}",
            f"{one['p50_s']:.3f}",
            f"{one['p99_s']:.3f}",
        )
    console.print(table)
    dense = Table(
        "dense part a version, over float32",
        *results["delta_share"]["dense"]["bf16"],
        box=box.SIMPLE,
    )
    for name, shares in results["delta_share"]["dense"].items():
        dense.add_row(name, *(f"{share:.3f}" for share in shares.values()))
    console.print(dense)
    serving = results["serving"]
    ratio = serving["p99_ratio"]
    console.print(
        f"{serving['requests']} requests at {serving['rate']:.0f} a second through {serving['swaps']} swaps: "
        f"{serving['failed']} failed, {serving['mixed']} mixed of {serving['drawn_again']} drawn again; "
        f"p99 {serving['swaps_p99_s']:.3f} s beside {serving['quiet_p99_s']:.3f} in quiet, of neighbours "
        f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    )
