"""What a change of the catalogue costs, and what serving feels of it: a part of `dwell bench constraint`.

Notable choices
- A change is done when the tree of its version can be asked: an upsert, and the tree.
- Serving goes on in one thread, as at the actor, while another changes the catalogue: a slice at a time as the actor
  does, and with a tree after each, for there requests come in between. Blocks of requests in quiet and in change take
  turns, each of the same length, and the ratio is that of the 99th percentiles over all blocks.
"""

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from actor.subscription import PAUSE_S, SLICE
from learner.decoder import LazyDecoder
from learner.valid_ids import ValidIds
from learner.valid_tree import Keys, sid_of
from ops.bench_constraint_parts import Load, constrained, processed

SINGLE: Final = 2_000
"""Changes made one by one."""
BULK: Final = 10_000
"""Changes made together."""
BULKS: Final = 5
BLOCKS: Final = 20
"""Quiet ones, and as many with changes."""
EXCLUDED: Final = 128
REQUESTS: Final = 150
"""Requests of a block."""
PER_S: Final = 100.0
"""Single changes a second while serving, and one bulk a block."""


class Index:
    """An index of items, one a leaf, and what is left to be inserted."""

    def __init__(self, codes: int, keys: Keys, spare: Keys) -> None:
        self.codes = codes
        self.valid = ValidIds(codes)
        self._spare = spare.tolist()
        self._items = 0
        for key in keys.tolist():
            self._upsert(0, key)
        self.tree = self.valid.tree(0)
        """That of the last version, for other threads to take."""

    def _upsert(self, version: int, key: int) -> None:
        self._items += 1
        self.valid.upsert(version, f"i{self._items}", sid_of(key, self.codes))

    def insert(self, count: int) -> None:
        """New items, each a version."""
        for _ in range(count):
            self._upsert(self.valid.version + 1, self._spare.pop())
        self.tree = self.valid.tree(self.valid.version)

    def delete(self, item: int) -> None:
        """One item less."""
        self.valid.delete(self.valid.version + 1, f"i{item}")
        self.tree = self.valid.tree(self.valid.version)


def changes(
    model: LazyDecoder, keys: Keys, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Times of changes at the size of `keys` (distinct leaf keys), and of serving meanwhile."""
    rng = np.random.default_rng([seed, 11])
    codes = model.codes
    wanted = SINGLE + BULK * (BULKS + BLOCKS) + 100_000
    drawn = np.unique(_nearby(keys, wanted, codes, rng))
    spare = rng.permutation(drawn[~np.isin(drawn, keys)])
    say("loading the index")
    began = time.perf_counter()
    index = Index(codes, keys, spare)
    found: dict[str, Any] = {"items": len(keys), "load_s": time.perf_counter() - began}
    found["tree_bytes_per_item"] = index.tree.nbytes / len(keys)
    say("changes one by one")
    single = [_timed(index.insert, 1) for _ in range(SINGLE)]
    deleted = [_timed(index.delete, at) for at in rng.choice(len(keys), SINGLE, replace=False) + 1]
    say("changes in bulk")
    bulk = [_timed(index.insert, BULK) for _ in range(BULKS)]
    found |= {
        "insert_one_p50_s": float(np.quantile(single, 0.5)),
        "insert_one_p99_s": float(np.quantile(single, 0.99)),
        "delete_one_p99_s": float(np.quantile(deleted, 0.99)),
        "insert_10000_s": statistics.median(bulk),
    }
    say("serving meanwhile")
    return found | _serving(model, index, seed, rng)


def _nearby(keys: Keys, count: int, codes: int, rng: np.random.Generator) -> Keys:
    """New leaves where the catalogue is: another third code below a node that lives."""
    upper = rng.choice(keys, count) // codes
    return upper * codes + rng.integers(codes, size=count)


def _serving(
    model: LazyDecoder, index: Index, seed: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Time of a request in quiet, while single changes come, and with a bulk in every block."""
    load = Load(processed(model, 1, seed), 6, [rng.choice(index.tree.leaves(), EXCLUDED)])
    times: dict[str, list[float]] = {"quiet": [], "single": [], "bulk": []}
    for kind, taken in list(times.items()) * BLOCKS:
        over = threading.Event()
        writer = threading.Thread(target=_write, args=(index, kind, over))
        writer.start()
        taken += [_timed(constrained, model, index.tree, load, rng) for _ in range(REQUESTS)]
        over.set()
        writer.join()
    p99 = {kind: float(np.quantile(taken, 0.99)) for kind, taken in times.items()}
    return {
        "serving_p99_s": p99,
        "serving_over_quiet": {kind: p99[kind] / p99["quiet"] for kind in ("single", "bulk")},
    }


def _write(index: Index, kind: str, over: threading.Event) -> None:
    """The changes of one block."""
    if kind == "bulk":
        for _ in range(-(-BULK // SLICE)):
            index.insert(SLICE)
            time.sleep(PAUSE_S)
    while kind == "single" and not over.wait(1.0 / PER_S):
        index.insert(1)


def _timed(work: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began
