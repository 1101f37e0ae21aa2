"""Sharded checkpoints: torch's distributed checkpoint, its shards as safetensors.

Each rank writes what it holds, and any number of ranks reads it, each its own part: torch re-shards. A folder is one
checkpoint; beside the shards stands the note of progress, as in the header of a whole one. Nothing is unpickled.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from learner.ranks import Ranks

NOTE: Final = "progress.json"


class ShardsError(ValueError):
    """Shards that cannot be read; the message says why."""


def write(folder: Path, tensors: dict[str, Tensor], note: str, ranks: Ranks) -> None:
    """Write a checkpoint into an empty folder that all ranks see; all must ask. Raises `OSError`."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _told():
        save(tensors, storage_writer=writer, no_dist=ranks.world == 1)
    if ranks.rank == 0:
        (folder / NOTE).write_text(note)


def note_of(folder: Path) -> str:
    """The note of progress; raises `ShardsError`."""
    try:
        return (folder / NOTE).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ShardsError(f"{NOTE} cannot be read: {error}") from None


def empty(folder: Path) -> dict[str, Tensor]:
    """A tensor of the right shape and type for each of a checkpoint's, to be read into; raises `ShardsError`."""
    with _told():
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {}
    for name, stored in found.items():
        if isinstance(stored, TensorStorageMetadata):
            tensors[name] = torch.zeros(stored.size, dtype=stored.properties.dtype)
    if not tensors:
        raise ShardsError("there are no shards")
    return tensors


def read(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Read a checkpoint's tensors in place, each rank its own parts; all must ask. Raises `ShardsError`."""
    reader = HuggingFaceStorageReader(str(folder))
    with _told():
        load(tensors, storage_reader=reader, no_dist=ranks.world == 1)


@contextmanager
def _told() -> Iterator[None]:
    """What torch finds wrong in one sentence, and not that a process is alone."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        causes = [failure for failure, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, OSError):
                raise cause from None
        raise ShardsError("; ".join(" ".join(str(cause).split()) for cause in causes)) from None
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ShardsError(" ".join(str(error).split()) or type(error).__name__) from None
