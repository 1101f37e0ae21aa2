"""`dwell bench serve`: latency and throughput of an actor over HTTP, and what batching and tables bring.

Notable choices
- Actor, broker and client (ops/bench_serve_load.py) are processes of their own on this machine; the actors of one
  comparison run side by side, and the load goes to one after the other, in turns.
- One policy, with contexts as long as the longest history; a batch's contexts are as long as its longest.
- `batched_over_unbatched` is throughput at an equal budget of p99: the highest rate of an open loop at which an actor
  that decodes up to 64 requests together answers all, by the policy and within the budget, over that of one that
  decodes each by itself. Rates are searched by halving, from what a closed loop saturates at.
- Deterministic beams have actors of their own (`actor.decoding = "beam"`), one a width, and answer with a usual slate
  or as many items as the beam is wide.
- A cell is within the budget when nothing failed, was refused or fell back, and p99 from the *scheduled* time is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ops.bench_serve_core import contexts, searches
from ops.bench_serve_load import Outcome, Plan, load
from ops.bench_serve_parts import actors, users_of
from ops.config import Config
from ops.errors import UserError
from ops.results import Check, exit_status, print_results, write_results

MAX_BATCHES: Final = (1, 4, 16, 64)
CLIENTS: Final = (1, 16, 64)
HISTORIES: Final = (50, 512, 3_000)
SLATES: Final = (1, 32, 512)
BEAMS: Final = (1, 32, 512)
SLATE: Final = 6
GOAL: Final = 3.0
SEED: Final = 1

Say = Callable[[str], None]


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    max_batches: tuple[int, ...] = MAX_BATCHES
    histories: tuple[int, ...] = HISTORIES
    slates: tuple[int, ...] = SLATES
    beams: tuple[int, ...] = BEAMS
    clients: tuple[int, ...] = CLIENTS
    halvings: int = 5
    """Rates tried for each actor."""
    seconds: float = 4.0
    """Of a cell."""
    budget_s: float = 0.1


@dataclass
class Search:
    """The highest rate that an actor holds, by halving."""

    low: float
    high: float
    held: float = 0.0
    """Answers a second of the best cell within the budget."""

    @property
    def rate(self) -> float:
        """To be tried next."""
        return (self.low + self.high) / 2

    def took(self, outcome: Outcome, budget_s: float) -> None:
        """What came of that rate."""
        if within(outcome, budget_s):
            self.held = max(self.held, outcome.per_second)
            self.low = self.rate
        else:
            self.high = self.rate


def within(outcome: Outcome, budget_s: float) -> bool:
    """Whether all were answered by the policy, and 99 of 100 in time."""
    return 0 < outcome.offered == outcome.answered and outcome.p99_s <= budget_s


@dataclass
class Bench:
    """One run; cells are noted as they are measured."""

    config: Config
    folder: Path
    extent: Extent
    items: int
    say: Say
    cells: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, url: str, what: dict[str, Any], plan: dict[str, Any]) -> Outcome:
        """One cell."""
        self.say(", ".join(f"{name} {value}" for name, value in (what | plan).items()))
        users = users_of(what["history"])
        made = Plan(url=url, users=users, count=what["slate"], seconds=self.extent.seconds, **plan)
        outcome = load(made)
        self.cells.append(what | plan | msgspec.structs.asdict(outcome))
        return outcome

    def batching(self, urls: dict[int, str], history: int) -> dict[int, float]:
        """By `max_batch`: closed loops, then the rate that each actor holds within the budget."""
        found: dict[int, Search] = {}
        for clients in self.extent.clients:
            for most, url in urls.items():
                cell = _cell(most, SLATE, history)
                outcome = self.ask(url, cell, {"clients": clients})
                found[most] = Search(0.0, 1.2 * max(1.0, outcome.per_second))
        for _ in range(self.extent.halvings):
            for most, url in urls.items():
                cell = _cell(most, SLATE, history)
                plan = {"rate": round(found[most].rate, 1)}
                found[most].took(self.ask(url, cell, plan), self.extent.budget_s)
        return {most: search.held for most, search in found.items()}

    def sizes(self, most: int, url: str, beams: dict[int, str]) -> None:
        """Slates drawn of several sizes, users with histories of several lengths, and deterministic beams.

        The shortest history with a slate of the usual size is among the cells of `batching`.
        """
        least, *longer = sorted(self.extent.histories)
        kinds = [(url, _cell(most, slate, least)) for slate in self.extent.slates]
        kinds += [(url, _cell(most, SLATE, history)) for history in longer]
        kinds += [
            (beams[width], _cell(most, min(SLATE, width), least, width))
            for width in self.extent.beams
        ]
        for where, cell in kinds:
            for clients in self.extent.clients[:2]:
                self.ask(where, cell, {"clients": clients})

    def run(self) -> dict[str, Any]:
        """All figures."""
        policy, extent = self.config.policy, self.extent
        torch.set_num_threads(policy.threads)
        longest = max(extent.histories)
        config = replace(
            self.config,
            policy=replace(policy, context=longest),
            streams=replace(self.config.streams, history_behaviours=longest),
        )
        widest = max(self.config.actor.max_slate, *extent.slates)
        largest = max(extent.max_batches)
        sets = {
            f"batch-{most}": (f"actor.max_batch={most}", f"actor.max_slate={widest}")
            for most in extent.max_batches
        } | {
            f"beam-{width}": (
                f"actor.max_batch={largest}",
                f"actor.beam={width}",
                "actor.decoding=beam",
            )
            for width in extent.beams
        }
        self.say("a broker, a lineage, actors")
        with actors(config, self.folder, self.items, extent.histories, sets, SEED) as named:
            urls = {most: named[f"batch-{most}"] for most in extent.max_batches}
            held = self.batching(urls, min(extent.histories))
            beams = {width: named[f"beam-{width}"] for width in extent.beams}
            self.sizes(largest, urls[largest], beams)
        self.say("tables and beams")
        sizes = (policy.preset, policy.codes, policy.user_rows)
        batched, single = held[max(held)], held[min(held)]
        return {
            "preset": policy.preset,
            "codes": policy.codes,
            "items": self.items,
            "threads": policy.threads,
            "budget_s": self.extent.budget_s,
            "held_per_second": {f"max_batch_{most}": rate for most, rate in held.items()},
            "batched_over_unbatched": batched / single if single else float("nan"),
            "contexts": list(contexts(*sizes, self.extent.histories, SEED)),
            "beams": list(searches(*sizes, self.items, SEED)),
            "cells": self.cells,
        }


def _cell(most: int, slate: int, history: int, beam: int = 0) -> dict[str, Any]:
    """What a cell asks, and of which actor; beam 0: drawn."""
    return {"max_batch": most, "beam": beam, "slate": slate, "history": history}


def checks_of(results: dict[str, Any]) -> list[Check]:
    """The figures held against their goals."""
    speed = partial(Check, correctness=False)
    ratio = results["batched_over_unbatched"]
    failed = sum(cell["failed"] + cell["short"] for cell in results["cells"])
    least = min(cell["recomputed_over_tables"] for cell in results["contexts"])
    return [
        Check("failed", failed, "0", failed == 0),
        speed("batched_over_unbatched", ratio, f">= {GOAL:g}", ratio >= GOAL),
        speed("recomputed_over_tables.least", least, ">= 1", least >= 1.0),
    ]


def run(
    config: Config,
    items: int,
    extent: Extent,
    json: Path | None,
) -> int:
    """Bench, print, and return the exit status."""
    if config.kafka.bootstrap:
        raise UserError("the bench fills clusters of its own: leave --bootstrap out.")
    folder = Path(config.storage.data_dir) / "bench-serve"
    console = Console()
    with console.status("") as status:
        results = Bench(config, folder, extent, items, status.update).run()
    checks = checks_of(results)
    console.print(table_of(results["cells"]))
    console.print(core_table(results))
    whole = ("cells", "contexts", "beams")
    print_results({name: results[name] for name in results if name not in whole}, checks, console)
    if json is not None:
        write_results(json, "dwell bench serve", config, [SEED], results, checks)
    return exit_status(checks)


def table_of(cells: Sequence[dict[str, Any]]) -> Table:
    """The cells over HTTP, for people."""
    heads = (
        "max_batch",
        "decode",
        "slate",
        "history",
        "load",
        "/s",
        "p50 ms",
        "p90",
        "p99",
        "not served",
    )
    table = Table(*heads, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for cell in cells:
        open_loop = "rate" in cell
        table.add_row(
            str(cell["max_batch"]),
            f"beam {cell['beam']}" if cell["beam"] else "drawn",
            *(str(cell[name]) for name in ("slate", "history")),
            f"{cell['rate']:.0f}/s" if open_loop else f"{cell['clients']} clients",
            f"{cell['per_second']:.0f}",
            *(f"{1e3 * cell[name]:.1f}" for name in ("p50_s", "p90_s", "p99_s")),
            str(cell["offered"] - cell["answered"]),
        )
    return table


def core_table(results: dict[str, Any]) -> Table:
    """What was measured without HTTP, for people."""
    table = Table("what", "batch", "ms", "ms", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for cell in results["contexts"]:
        table.add_row(
            f"contexts of {cell['history']}: by tables, recomputed",
            str(cell["batch"]),
            f"{1e3 * cell['tables_s']:.2f}",
            f"{1e3 * cell['recomputed_s']:.2f}",
        )
    for cell in results["beams"]:
        table.add_row(
            f"beam {cell['width']}: deterministic, drawn",
            str(cell["batch"]),
            f"{1e3 * cell['beam_s']:.2f}",
            f"{1e3 * cell['draw_s']:.2f}",
        )
    return table
