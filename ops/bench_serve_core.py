"""What `dwell bench serve` measures without HTTP: contexts looked up or recomputed, and searches.

Notable choices
- Contexts: from the tables per code that a served version has, and computed anew as the learner does, in turns; the
  time includes unpacking the exposures' bytes, which both need.
- Beams, deterministic and drawn: the searches alone, on one policy and tree, contexts of the preset's own length.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import torch

from actor.recommend import step_of
from actor.sampling import beam, draw
from learner.decoder import LazyDecoder
from learner.policy import build
from learner.presets import shape_name
from learner.valid_tree import Tree
from ops.bench_contexts import packed_context

BATCHES: Final = (1, 16, 64)
BEAMS: Final = (1, 32, 512)
MOST_BEHAVIOURS: Final = 50_000
"""Behaviours of a batch; cells with more are left out."""
PATIENCE_S: Final = 1.0
"""Turns of a cell end when it has taken this long."""
TURNS: Final = 30


def contexts(
    preset: str, codes: int, user_rows: int, lengths: tuple[int, ...], seed: int
) -> Iterator[dict[str, Any]]:
    """By history and batch: seconds of a batch's contexts looked up and recomputed."""
    for length in lengths:
        model = _model(shape_name(preset, length), codes, user_rows, seed)
        began = time.perf_counter()
        model.prepare()
        built_s = time.perf_counter() - began
        rng = np.random.default_rng([seed, length])
        for batch in BATCHES:
            if batch * length > MOST_BEHAVIOURS and batch > 1:
                continue
            users = [f"user {number}" for number in range(batch)]
            packed = [packed_context(length, codes, rng) for _ in users]

            def looked_up(
                model: LazyDecoder = model, users: list[str] = users, packed: list[bytes] = packed
            ) -> None:
                model.looked_up(model.contexts(users, packed))

            def recomputed(
                model: LazyDecoder = model, users: list[str] = users, packed: list[bytes] = packed
            ) -> None:
                model.process(model.contexts(users, packed))

            ours_s, theirs_s = _in_turns(looked_up, recomputed)
            yield {
                "history": length,
                "batch": batch,
                "tables_s": ours_s,
                "recomputed_s": theirs_s,
                "recomputed_over_tables": theirs_s / ours_s,
                "tables_built_s": built_s,
            }


def searches(
    preset: str, codes: int, user_rows: int, items: int, seed: int
) -> Iterator[dict[str, Any]]:
    """By batch and width: seconds of a deterministic beam, and of a draw of as many items."""
    model = _model(preset, codes, user_rows, seed)
    model.prepare()
    rng = np.random.default_rng(seed)
    tree = Tree(codes, np.sort(rng.choice(codes**3, min(items, codes**3), replace=False)))
    for batch in BATCHES[:2]:
        users = [f"user {number}" for number in range(batch)]
        packed = [packed_context(model.preset.context, codes, rng) for _ in users]
        with torch.inference_mode():
            step = step_of(model, model.looked_up(model.contexts(users, packed)))
        for width in BEAMS:

            def search(width: int = width, step: Any = step, batch: int = batch) -> None:
                beam(step, tree, None, width, requests=batch)

            def slates(width: int = width, step: Any = step, batch: int = batch) -> None:
                draw(step, tree, None, width, 1.0, rng, requests=batch)

            beam_s, draw_s = _in_turns(search, slates)
            yield {"batch": batch, "width": width, "beam_s": beam_s, "draw_s": draw_s}


def _model(shape: str, codes: int, user_rows: int, seed: int) -> LazyDecoder:
    torch.manual_seed(seed)
    return build(shape, codes, user_rows).eval().requires_grad_(False)


@torch.inference_mode()
def _in_turns(one: Callable[[], None], other: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of each, called alternately; the first call of each is for the caches."""
    took: list[tuple[float, float]] = []
    began = time.perf_counter()
    for _ in range(TURNS + 1):
        start = time.perf_counter()
        one()
        middle = time.perf_counter()
        other()
        took.append((middle - start, time.perf_counter() - middle))
        if len(took) > 2 and time.perf_counter() - began > PATIENCE_S:
            break
    counted = took[1:]
    return (
        statistics.median(first for first, _ in counted),
        statistics.median(second for _, second in counted),
    )
