"""`dwell bench constraint`: what it costs to decode valid IDs only, beside decoding without any constraint.

Notable choices
- `overhead` of a cell is the time of a draw with the index and 128 exclusions a request over that of the same draw
  where every code is valid, minus one; the two take turns, the ratio is formed within a turn and its median told. The
  worst cell is the figure: over batches, beams, and trees of two kinds.
- Both decode with the same policy and contexts. What the index itself takes of a decode is told apart.
- Beside it, on the prefixes of a real draw: a Python trie and masks of whole levels filled by binary search, by the
  time of asking alone.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from actor.recommend import step_of
from actor.sampling import draw
from learner.context_processor import KeyValues
from learner.decoder import LazyDecoder
from learner.policy import PolicyError, build
from learner.valid_tree import Children, Keys, Tree
from ops.bench_constraint_changes import changes
from ops.bench_constraint_parts import (
    Load,
    TimedTree,
    Trie,
    constrained,
    kmeans_keys,
    processed,
    searched_mask,
    unconstrained,
    zipf_keys,
)
from ops.config import Config
from ops.errors import UserError
from ops.results import Check, exit_status, print_results, write_results

BATCHES: Final = (1, 16, 64)
BEAMS: Final = (6, 32, 512)
SIZES: Final = (10_000, 100_000, 1_000_000)
EXCLUDED: Final = 128
USER_ROWS: Final = 1_024
PATIENCE_S: Final = 10.0
"""Turns of a cell end when it has taken this long."""

Say = Callable[[str], None]


def trees_of(
    sizes: tuple[int, ...], codes: int, seed: int, say: Say
) -> dict[int, dict[str, TimedTree]]:
    """By number of items: a tree from residual k-means and one of Zipf's prefixes."""
    largest = max(sizes)
    of_kind = {
        "kmeans": kmeans_keys(largest, codes, seed, say),
        "zipf": zipf_keys(largest, codes, seed),
    }
    return {
        size: {kind: TimedTree(codes, np.unique(keys[:size])) for kind, keys in of_kind.items()}
        for size in sizes
    }


@dataclass
class Cell:
    """One combination and its turns: seconds constrained, unconstrained, and of the index alone."""

    items: int
    kind: str
    tree: TimedTree
    batch: int
    beam: int
    turns: list[tuple[float, float, float]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Medians over the turns."""
        return {
            "items": self.items,
            "tree": self.kind,
            "batch": self.batch,
            "beam": self.beam,
            "turns": len(self.turns),
            "constrained_s": statistics.median(one for one, _, _ in self.turns),
            "unconstrained_s": statistics.median(free for _, free, _ in self.turns),
            "overhead": statistics.median(one / free for one, free, _ in self.turns) - 1.0,
            "index_share": statistics.median(busy / one for one, _, busy in self.turns),
        }


def cells(
    model: LazyDecoder,
    trees: dict[int, dict[str, TimedTree]],
    repeats: int,
    seed: int,
    say: Say,
) -> list[dict[str, Any]]:
    """Every combination's times, decoded in turns."""
    found: list[Cell] = []
    noise = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    for batch in BATCHES:
        kv = processed(model, batch, seed)
        for beam in BEAMS:
            found += _in_turns(model, kv, trees, batch, beam, repeats, rng, noise, say)
    return [cell.figures() for cell in found]


def _in_turns(
    model: LazyDecoder,
    kv: KeyValues,
    trees: dict[int, dict[str, TimedTree]],
    batch: int,
    beam: int,
    repeats: int,
    rng: np.random.Generator,
    noise: torch.Generator,
    say: Say,
) -> list[Cell]:
    """The cells of one batch and beam."""
    free = Load(kv, beam, [np.empty(0, dtype=np.int64)] * batch)
    cells = [
        Cell(size, kind, tree, batch, beam)
        for size, of_kind in trees.items()
        for kind, tree in of_kind.items()
    ]
    began = time.perf_counter()
    for turn in range(repeats + 1):
        say(f"batch {batch}, beam {beam}, turn {turn} of {repeats}")
        free_s = _timed(unconstrained, model, free, noise)
        for cell in cells:
            load = Load(kv, beam, [_some(cell.tree, rng) for _ in range(batch)])
            cell.tree.busy_s = 0.0
            seconds = _timed(constrained, model, cell.tree, load, rng)
            if turn:  # the first is for the caches
                cell.turns.append((seconds, free_s, cell.tree.busy_s))
        if turn and time.perf_counter() - began > PATIENCE_S:
            break
    return cells


def asked_otherwise(
    model: LazyDecoder, tree: Tree, batch: int, beam: int, seed: int
) -> dict[str, float]:
    """Seconds of asking for a draw's valid children: this index, a Python trie, masks by binary search."""
    rng = np.random.default_rng(seed)
    kv = processed(model, batch, seed)
    excluded = [_some(tree, rng) for _ in range(batch)]
    asked: list[Tensor] = []
    step = step_of(model, kv)

    def listening(prefix_BMl: Tensor, children: Children) -> Tensor:
        asked.append(prefix_BMl)
        return step(prefix_BMl, children)

    timed = TimedTree(tree.codes, tree.leaves())
    times = []
    for _ in range(5):
        asked.clear()
        timed.busy_s = 0.0
        draw(listening, timed, excluded, beam - 1, 1.0, rng)
        times.append(timed.busy_s)
    built_s = time.perf_counter()
    trie = Trie(tree)
    built_s = time.perf_counter() - built_s
    return {
        "index_s": statistics.median(times),
        "trie_s": _timed(lambda: [trie.mask(prefix, excluded) for prefix in asked]),
        "trie_build_s": built_s,
        "searched_mask_s": _timed(
            lambda: [searched_mask(tree, prefix, excluded) for prefix in asked]
        ),
    }


def measure(
    config: Config,
    preset: str,
    codes: int,
    sizes: tuple[int, ...],
    repeats: int,
    seed: int,
    say: Say,
) -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(config.policy.threads)
    torch.manual_seed(seed)
    try:
        model = build(preset, codes, USER_ROWS).eval().requires_grad_(False)
    except PolicyError as error:
        raise UserError(f"--preset: {error}.") from None
    trees = trees_of(sizes, codes, seed, say)
    found = cells(model, trees, repeats, seed, say)
    say("a trie, and masks by binary search")
    worst = {
        f"items_{size}": max(cell["overhead"] for cell in found if cell["items"] == size)
        for size in sizes
    }
    return {
        "preset": preset,
        "codes": codes,
        "threads": config.policy.threads,
        "overhead": worst,
        "asking": {
            f"batch_{batch}": asked_otherwise(model, trees[max(sizes)]["kmeans"], batch, 6, seed)
            for batch in BATCHES[:2]
        },
        "changes": changes(model, trees[max(sizes)]["kmeans"].leaves(), seed, say),
        "largest_node": {
            f"items_{size}": {kind: _widest(tree) for kind, tree in of_kind.items()}
            for size, of_kind in trees.items()
        },
        "cells": found,
    }


def checks_of(results: dict[str, Any]) -> list[Check]:
    """The figures held against their goals."""
    changed, speed = results["changes"], partial(Check, correctness=False)
    checks = [
        speed(f"overhead.{name}", value, "<= 0", value <= 0)
        for name, value in results["overhead"].items()
    ]
    for name, goal in (("insert_10000_s", 0.1), ("insert_one_p99_s", 0.001)):
        checks.append(speed(name, changed[name], f"< {goal}", changed[name] < goal))
    for kind, ratio in changed["serving_over_quiet"].items():
        checks.append(speed(f"serving_over_quiet.{kind}", ratio, "<= 1.2", ratio <= 1.2))
    return checks


def run(
    config: Config,
    preset: str,
    codes: int,
    largest: int,
    repeats: int,
    seed: int,
    json: Path | None,
) -> int:
    """Bench, print, and return the exit status."""
    sizes = tuple(size for size in SIZES if size <= largest)
    if not sizes:
        raise UserError(f"--items {largest}: the smallest catalogue has {SIZES[0]}.")
    console = Console()
    with console.status("") as status:
        results = measure(config, preset, codes, sizes, repeats, seed, status.update)
    checks = checks_of(results)
    console.print(table_of(results["cells"]))
    print_results({name: results[name] for name in results if name != "cells"}, checks, console)
    if json is not None:
        write_results(json, "dwell bench constraint", config, [seed], results, checks)
    return exit_status(checks)


def table_of(found: Sequence[dict[str, Any]]) -> Table:
    """The cells, for people."""
    heads = ("items", "tree", "batch", "beam", "constrained ms", "free ms", "overhead", "index")
    table = Table(*heads, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for cell in found:
        table.add_row(
            *(str(cell[name]) for name in ("items", "tree", "batch", "beam")),
            f"{1e3 * cell['constrained_s']:.1f}",
            f"{1e3 * cell['unconstrained_s']:.1f}",
            f"{cell['overhead']:+.2f}",
            f"{cell['index_share']:.2f}",
        )
    return table


def _some(tree: Tree, rng: np.random.Generator) -> Keys:
    """Leaves that a request must not show."""
    leaves: Keys = rng.choice(tree.leaves(), EXCLUDED, replace=False)
    return leaves


def _widest(tree: Tree) -> int:
    """Most children of one node of the second level or below."""
    leaves = tree.leaves()
    return max(
        int(np.bincount(np.unique(leaves // tree.codes) // tree.codes).max()),
        int(np.unique(leaves // tree.codes, return_counts=True)[1].max()),
    )


def _timed(work: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began
