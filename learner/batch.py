"""From samples to the tensors of one step: contexts, targets, and the valid tree of each request.

The tree is the request's own: its catalogue version, its excluded leaves. A learner without the mask has every
third-level ratio wrong from the start, and the reward curve does not show it (reference measurements, section 2).

Legend: B requests, k targets, L levels, K codes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.context import Contexts, contexts
from learner.objectives import Targets
from learner.valid_ids import ValidIds
from learner.valid_tree import keys_of
from streams.events import LEVELS, Exposure, Sample, unpack_leaves


class Batch(NamedTuple):
    """One step's input."""

    contexts: Contexts
    sids_BkL: Tensor
    mask_BkLK: Tensor
    temperature_B: Tensor
    targets: Targets

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(
            Contexts(*(part.to(device) for part in self.contexts)),
            self.sids_BkL.to(device),
            self.mask_BkLK.to(device),
            self.temperature_B.to(device),
            Targets(*(part.to(device) for part in self.targets)),
        )


class Paths(NamedTuple):
    """What was shown, on the valid trees of its requests; places without an item are open to all codes."""

    sids_BkL: NDArray[np.int64]
    shown_Bk: NDArray[np.bool_]
    mask_BkLK: NDArray[np.bool_]
    valid_Bk: NDArray[np.bool_]
    """Whether what was shown is a leaf of its request's tree; true where nothing was."""


def paths(requests: Sequence[Exposure | Sample], valid: ValidIds) -> Paths:
    """Each shown leaf's path down the tree of its request: catalogue version less excluded leaves.

    Raises `ValueError` on a code outside the codebook, `UnknownVersionError` on a catalogue version not at hand.
    """
    count, slots = len(requests), max((len(request.items) for request in requests), default=1)
    sids_BkL = np.zeros((count, slots, LEVELS), np.int64)
    shown_Bk = np.zeros((count, slots), bool)
    mask_BkLK = np.ones((count, slots, LEVELS, valid.codes), bool)
    by_version: dict[int, list[int]] = {}
    for row, request in enumerate(requests):
        by_version.setdefault(request.catalogue_version, []).append(row)
        for slot in range(len(request.items)):
            sids_BkL[row, slot] = request.items[slot].sid
            shown_Bk[row, slot] = True
    for version, rows in by_version.items():
        excluded = [keys_of(unpack_leaves(requests[row].excluded), valid.codes) for row in rows]
        mask_BkLK[rows] = valid.tree(version).path_masks(sids_BkL[rows], excluded)
    mask_BkLK[~shown_Bk] = True
    on_path_BkL = np.take_along_axis(mask_BkLK, sids_BkL[..., None], axis=-1)[..., 0]
    return Paths(sids_BkL, shown_Bk, mask_BkLK, np.logical_and.reduce(on_path_BkL, axis=-1))


def assemble(samples: list[Sample], valid: ValidIds, context_length: int, user_rows: int) -> Batch:
    """Tensors of `samples`, of which there may be none; `ValueError` when a target is not in its request's tree."""
    sids_BkL, shown_Bk, mask_BkLK, valid_Bk = paths(samples, valid)
    advantage_Bk = np.zeros(shown_Bk.shape, np.float32)
    supervised_Bk = np.zeros(shown_Bk.shape, bool)
    logp_old_BkL = np.full(sids_BkL.shape, np.nan, np.float32)
    for row, sample in enumerate(samples):
        for slot, item in enumerate(sample.items):
            advantage_Bk[row, slot] = item.advantage or 0
            supervised_Bk[row, slot] = item.supervised
            if item.source == "policy" and item.logp_levels is not None:
                logp_old_BkL[row, slot] = item.logp_levels
    if not valid_Bk.all():
        row, slot = np.argwhere(~valid_Bk)[0]
        raise ValueError(
            f"item {samples[row].items[slot].item!r} of request {samples[row].request} is not in the "
            f"valid tree of catalogue version {samples[row].catalogue_version}"
        )
    return Batch(
        contexts(
            [sample.user for sample in samples],
            [sample.context for sample in samples],
            context_length,
            user_rows,
            valid.codes,
        ),
        torch.from_numpy(sids_BkL),
        torch.from_numpy(mask_BkLK),
        torch.tensor([sample.temperature for sample in samples]),
        Targets(
            torch.from_numpy(advantage_Bk),
            torch.from_numpy(supervised_Bk),
            torch.from_numpy(shown_Bk),
            torch.from_numpy(logp_old_BkL),
        ),
    )


def fault(sample: Sample, valid: ValidIds) -> str:
    """Why `assemble` refuses this sample; empty where it does not."""
    try:
        assemble([sample], valid, 1, 1)
    except (ValueError, LookupError) as error:
        return str(error)
    return ""
