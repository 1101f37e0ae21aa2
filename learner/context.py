"""From packed behaviours to the tensors of the context processor; the same code serves and learns.

A context is a static position (the user) and the latest behaviours, oldest first, as the exposure logged them: so
the learner sees what the policy saw. Features of a behaviour enter linearly, which keeps "gather per code, sum,
add features" possible. They are centred and of like size: what tells taste is how far a play outlasts others of its
duration, a small difference of two large logarithms unless it is a feature itself.

Legend: B requests, T behaviours, F features, L levels of a semantic ID.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streams.control import stable_hash
from streams.events import ACTION_BITS, BEHAVIOUR, LEVELS, Behaviour, SemanticId

FEATURES: Final = 8
_POSITIVE_ACTIONS: Final = sum(bit for name, bit in ACTION_BITS.items() if name != "dislike")


class Contexts(NamedTuple):
    """A batch of contexts; padding stands before the oldest behaviour."""

    users_B: Tensor
    codes_BTL: Tensor
    features_BTF: Tensor
    present_BT: Tensor


def user_row(user: str, rows: int) -> int:
    """The row of the user table that a user id is hashed onto."""
    return stable_hash(user, b"dwell-user-row") % rows


def pack_behaviours(behaviours: Iterable[tuple[Behaviour, SemanticId]], now_ms: int) -> bytes:
    """The context bytes of an exposure at `now_ms`, oldest behaviour first."""
    known = list(behaviours)
    if not known:
        return b""
    packed_T = np.empty(len(known), dtype=BEHAVIOUR)
    # Column by column, each of its own type: rows as tuples take five times as long.
    columns = {
        "codes": [sid for _, sid in known],
        "actions": [behaviour.actions for behaviour, _ in known],
        "play_ms": [behaviour.play_ms for behaviour, _ in known],
        "duration_ms": [behaviour.duration_ms for behaviour, _ in known],
        "age_ms": [min(max(0, now_ms - behaviour.end_ms), 0xFFFFFFFF) for behaviour, _ in known],
    }
    for name, values in columns.items():
        packed_T[name] = np.array(values, dtype=BEHAVIOUR[name].base)
    return packed_T.tobytes()


def features(behaviours_N: NDArray[np.void]) -> NDArray[np.float32]:
    """Features `[N, F]` of behaviours, each centred or 0/1, and about 1 in size."""
    play_s = behaviours_N["play_ms"] / 1000.0
    duration_s = behaviours_N["duration_ms"] / 1000.0
    ratio = np.minimum(play_s / np.maximum(duration_s, 0.1), 2.0)
    actions = behaviours_N["actions"]
    features_NF = np.empty((len(behaviours_N), FEATURES), np.float32)
    features_NF[:, 0] = 1.0
    # Play times grow about as the root of the duration; features 1 and 2 span any other power, too.
    log_duration = np.log(np.maximum(duration_s, 0.5))
    features_NF[:, 1] = np.log(play_s + 0.5) - 0.5 * log_duration - 0.2
    features_NF[:, 2] = log_duration - 3.5
    features_NF[:, 3] = 2.0 * (ratio - 0.3)
    features_NF[:, 4] = ratio > 0.9
    features_NF[:, 5] = (actions & _POSITIVE_ACTIONS) != 0
    features_NF[:, 6] = (actions & ACTION_BITS["dislike"]) != 0
    features_NF[:, 7] = np.log1p(behaviours_N["age_ms"] / 60_000.0) / 8.0
    return features_NF


def contexts(
    users: list[str], packed: list[bytes], length: int, user_rows: int, codes: int
) -> Contexts:
    """Contexts of `length` behaviours from the packed form; codes beyond the codebook raise `ValueError`."""
    codes_BTL = np.zeros((len(users), length, LEVELS), np.int64)
    features_BTF = np.zeros((len(users), length, FEATURES), np.float32)
    present_BT = np.zeros((len(users), length), bool)
    latest = [value[-length * BEHAVIOUR.itemsize :] for value in packed]
    for row, value in enumerate(latest):
        if len(value) % BEHAVIOUR.itemsize:
            raise ValueError(
                f"a context has {len(value)} bytes, no multiple of {BEHAVIOUR.itemsize}"
            )
        present_BT[row, length - len(value) // BEHAVIOUR.itemsize :] = True
    behaviours_n = np.frombuffer(b"".join(latest), dtype=BEHAVIOUR)
    codes_BTL[present_BT] = behaviours_n["codes"]
    features_BTF[present_BT] = features(behaviours_n)
    if codes_BTL.size and int(codes_BTL.max()) >= codes:
        raise ValueError(f"a context holds code {codes_BTL.max()}, the codebooks have {codes}")
    return Contexts(
        torch.tensor([user_row(user, user_rows) for user in users], dtype=torch.int64),
        torch.from_numpy(codes_BTL),
        torch.from_numpy(features_BTF),
        torch.from_numpy(present_BT),
    )
