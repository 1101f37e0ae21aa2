"""What the dense part of a delta weighs, and that many deltas lose no bit: a part of `dwell bench weights`.

Notable choices
- The states are those of a real run (the serial loop's versions): how many values of a coarse precision change at
  all depends on the sizes of real updates.
- bf16 is what a published precision of 16 bits would carry: states rounded to it, and the same delta codec.
"""

from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from learner.policy import USERS
from ops.bench_weights_parts import Moving
from ops.config import Config
from ops.serial import Serial
from ops.warmup import warm_start
from streams.blocks import BlockState, State, blocked_state, digest_of, root, whole_state
from streams.chain import Chain
from streams.delta import changes
from streams.weights import Assembler, Manifest, pack, schema_of

INTERVALS: Final = (1, 2, 5, 10)
"""Versions between two publications."""


def dense_shares(config: Config, requests: int, now_ms: int) -> dict[str, dict[str, float]]:
    """Bytes of a delta over those of the float32 dense part, by precision and versions between publications."""
    states: list[State] = []
    serial = Serial(config, warm_start(config, now_ms, lambda *_: None), config.learn.seed, now_ms)
    serial.on_version = lambda state: states.append(
        {name: value for name, value in state.items() if name != USERS}
    )
    serial.run(requests, lambda *_: None)
    full = sum(value.nbytes for value in states[0].values())
    shares: dict[str, dict[str, float]] = {"float32": {}, "bf16": {}}
    for interval in INTERVALS:
        for name, kept in (
            ("float32", states[::interval]),
            ("bf16", [rounded(state) for state in states[::interval]]),
        ):
            sizes = [_size(one, other) for one, other in pairwise(kept)] or [full]
            shares[name][f"every_{interval}"] = float(np.mean(sizes)) / full / interval
    return shares


def exact_after(state: State, count: int, seed: int) -> bool:
    """Whether `count` deltas through the wire format leave a reader with the writer's bits."""
    moving = Moving({name: value.copy() for name, value in state.items()}, seed)
    chain, assembler = Chain(), Assembler()
    blocks = blocked_state(moving.state)
    for version in range(1, count + 2):
        content: dict[str, NDArray[Any]] = moving.state
        if version > 1:
            content, blocks = changes(blocks, moving.step())
        for _, value in pack(_manifest(version, moving.state, blocks), content):
            whole = assembler.take(value)
            if whole is not None and not chain.take(*whole):
                return False
    assert chain.head is not None
    theirs = whole_state(chain.head.blocks)
    same = all(value.tobytes() == theirs[name].tobytes() for name, value in moving.state.items())
    return same and root(chain.head.blocks) == digest_of(moving.state)


def _manifest(version: int, state: State, blocks: BlockState) -> Manifest:
    return Manifest(
        version=version,
        lineage="bench",
        codebook="",
        preset="tiny",
        codes=0,
        user_rows=0,
        schema=schema_of(state),
        digest=root(blocks),
        base=version - 1,
        size_bytes=0,
        chunks=0,
        journal=[],
        watermark_ms=0,
        created_ms=0,
    )


def _size(one: State, other: State) -> int:
    content, _ = changes(blocked_state(one), other)
    return sum(value.nbytes for value in content.values())


def rounded(state: State) -> State:
    """To the nearest bf16, as 16 bits."""
    rounded = {}
    for name, value in state.items():
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        rounded[name] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded
