"""Contexts for benches: random behaviours, packed as an exposure logs them."""

import numpy as np

from streams.events import BEHAVIOUR, LEVELS


def packed_context(positions: int, codes: int, rng: np.random.Generator) -> bytes:
    """A context of so many behaviours, plays and ages of 1 to 60 s."""
    behaviours_T = np.zeros(positions, BEHAVIOUR)
    behaviours_T["codes"] = rng.integers(codes, size=(positions, LEVELS))
    for name in ("play_ms", "duration_ms", "age_ms"):
        behaviours_T[name] = rng.integers(1_000, 60_000, size=positions)
    return behaviours_T.tobytes()
