"""The `tiny` policy as it stands before any training."""

import numpy as np
import torch

from learner.decoder import LazyDecoder
from learner.policy import build

CODES = 32


def fresh_tiny(seed: int, user_rows: int) -> LazyDecoder:
    """Built and started from random centroids, whose norm falls with the level as those of residuals do."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = build("tiny", CODES, user_rows)
    model.start_from_centroids(
        [scale * rng.standard_normal((CODES, 16)).astype(np.float32) for scale in (1.0, 0.6, 0.4)]
    )
    return model
