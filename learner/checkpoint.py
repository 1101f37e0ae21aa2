"""What a checkpoint holds, and how it becomes bytes: weights, optimisers, random state, offsets, codebooks.

One safetensors file: tensors by name, everything else as JSON in its header; or, where ranks hold shards, a folder of
such files (learner/sharded.py). Nothing is unpickled.
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor

from learner import sharded
from learner.policy import build
from learner.ranks import Ranks, like, whole
from learner.semantic_ids import Codebooks
from learner.settings import LearnSettings, PolicySettings
from learner.step import Trainer

FORMAT = "dwell-checkpoint-1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and why."""


@dataclass
class Progress:
    """Where learning stands, besides the tensors."""

    version: int
    lineage: str
    preset: str
    codes: int
    user_rows: int
    steps: int = 0
    catalogue_version: int = -1
    watermark_ms: int = 0
    offsets: dict[int, int] = field(default_factory=dict)
    """Next offset of `samples` by partition."""
    condemned: list[tuple[int, int]] = field(default_factory=list)
    """Versions (first, last) whose samples are dropped."""


def to_bytes(trainer: Trainer, progress: Progress, codebooks: Codebooks) -> bytes:
    """A whole checkpoint's content, the same on all ranks; all must ask."""
    return save(
        {name: whole(value).contiguous() for name, value in _tensors(trainer, codebooks).items()},
        metadata={FORMAT: _note(progress)},  # one key: safetensors writes several in any order
    )


def to_folder(
    folder: Path, trainer: Trainer, progress: Progress, codebooks: Codebooks, ranks: Ranks
) -> None:
    """A sharded checkpoint, each rank its shards; all must ask. Raises `OSError`."""
    sharded.write(folder, _tensors(trainer, codebooks), _note(progress), ranks)


def _tensors(trainer: Trainer, codebooks: Codebooks) -> dict[str, Tensor]:
    """Copies of all that a checkpoint holds, of shards where this rank has those."""
    tensors = {
        f"model.{name}": value.detach().clone()
        for name, value in trainer.model.state_dict().items()
    }
    for prefix, optimiser in _optimisers(trainer):
        for index, values in optimiser.state_dict()["state"].items():
            for name, value in values.items():
                tensors[f"{prefix}.{index}.{name}"] = torch.as_tensor(value).clone()
    for name, array in codebooks.to_tensors().items():
        tensors[f"codebooks.{name}"] = torch.from_numpy(array)
    tensors["random_state"] = torch.get_rng_state()
    return tensors


def _note(progress: Progress) -> str:
    return msgspec.json.encode(progress).decode()


def load(
    path: Path, settings: LearnSettings, lr: float, ranks: Ranks | None = None
) -> tuple[Trainer, Progress, Codebooks]:
    """The learner as it was, in one process; raises `CheckpointError` naming the file."""
    tensors, note = _read(path)
    try:
        return _restored(tensors, note, settings, lr, ranks or Ranks())
    except (ValueError, RuntimeError, TypeError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: {_in_one_line(error)}") from None


def shared(
    content: bytes, settings: LearnSettings, lr: float, ranks: Ranks
) -> tuple[Trainer, Progress, Codebooks]:
    """The same on each rank, from a checkpoint's content that one of them has read."""
    header = int.from_bytes(content[:8], "little")
    note = msgspec.json.decode(content[8 : 8 + header])["__metadata__"][FORMAT]
    return _restored(load_tensors(content), note, settings, lr, ranks)


def load_shards(
    folder: Path, settings: LearnSettings, lr: float, ranks: Ranks
) -> tuple[Trainer, Progress, Codebooks]:
    """The learner from a sharded checkpoint, each rank its own part; all must ask. Raises `CheckpointError`."""
    try:
        progress = msgspec.json.decode(sharded.note_of(folder), type=Progress)
        trainer = Trainer(
            build(progress.preset, progress.codes, progress.user_rows), settings, lr, ranks
        )
        tensors = sharded.empty(folder)
        for name, value in trainer.model.state_dict().items():
            tensors[f"model.{name}"] = value
        for prefix, optimiser in _optimisers(trainer):
            for index, parameter in enumerate(_parameters(optimiser)):
                for key in ("exp_avg", "exp_avg_sq"):
                    if (name := f"{prefix}.{index}.{key}") in tensors:
                        tensors[name] = torch.zeros_like(parameter)
        sharded.read(folder, tensors, ranks)
        _set(trainer, tensors)
        codebooks = _codebooks(tensors)
    except (ValueError, RuntimeError, TypeError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{folder}: {_in_one_line(error)}") from None
    return trainer, progress, codebooks


def _restored(
    tensors: dict[str, Tensor], note: str, settings: LearnSettings, lr: float, ranks: Ranks
) -> tuple[Trainer, Progress, Codebooks]:
    progress = msgspec.json.decode(note, type=Progress)
    model = build(progress.preset, progress.codes, progress.user_rows)
    model.load_state_dict(_under("model", tensors))
    trainer = Trainer(model, settings, lr, ranks)
    _set(trainer, tensors)
    return trainer, progress, _codebooks(tensors)


def _set(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    """Optimisers and random state."""
    for prefix, optimiser in _optimisers(trainer):
        _restore(optimiser, prefix, _under(prefix, tensors))
    if "random_state" not in tensors:
        raise ValueError("the random state is missing")
    torch.set_rng_state(tensors["random_state"])


def _codebooks(tensors: dict[str, Tensor]) -> Codebooks:
    books = {name: value.numpy() for name, value in _under("codebooks", tensors).items()}
    return Codebooks.from_tensors(books)


def codebooks_of(path: Path) -> Codebooks:
    """The codebooks alone; raises `CheckpointError`."""
    tensors, _ = _read(path, "codebooks.")
    try:
        return _codebooks(tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: {_in_one_line(error)}") from None


def differing(path: Path, content: bytes) -> list[str]:
    """Names of the tensors in which a checkpoint differs from `content`; raises `CheckpointError`."""
    ours, _ = _read(path)
    theirs = load_tensors(content)
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    )


def _read(path: Path, start: str = "") -> tuple[dict[str, Tensor], str]:
    """Tensors by name, whole, at least those whose names begin with `start`; and the note of progress."""
    if path.is_dir():
        try:
            tensors = sharded.empty(path)
            sharded.read(path, tensors, Ranks())
            return tensors, sharded.note_of(path)
        except sharded.ShardsError as error:
            raise CheckpointError(f"{path}: {_in_one_line(error)}") from None
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if FORMAT not in meta:
                raise CheckpointError(f"{path}: not a {FORMAT} file")
            wanted = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in wanted}, meta[FORMAT]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {_in_one_line(error)}") from None


def _restore(optimiser: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Set an optimiser's moments; torch itself would take any, and fail or go astray in the next step."""
    parameters = _parameters(optimiser)
    state: dict[int, dict[str, Tensor | int]] = {}
    for name, value in tensors.items():
        place, _, key = name.partition(".")
        # SparseAdam counts steps in a plain integer, AdamW in a tensor
        plain = prefix == "rows" and key == "step"
        state.setdefault(int(place), {})[key] = int(value) if plain else value
    for index, values in state.items():
        if index >= len(parameters) or set(values) != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(
                f"{prefix}.{index} holds {sorted(values)}, which is no optimiser's state"
            )
        for key in ("exp_avg", "exp_avg_sq"):
            found = tuple(torch.as_tensor(values[key]).shape)
            if found != tuple(parameters[index].shape):
                raise ValueError(
                    f"{prefix}.{index}.{key} has shape {found}, its parameter {tuple(parameters[index].shape)}"
                )
            values[key] = like(torch.as_tensor(values[key]), parameters[index])
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [value for group in optimiser.param_groups for value in group["params"]]


def fits(path: Path, progress: Progress, policy: PolicySettings) -> None:
    """Raise `CheckpointError` when a start does not fit the configured policy."""
    found = (progress.preset, progress.codes, progress.user_rows)
    asked = (policy.shape, policy.codes, policy.user_rows)
    if found != asked:
        raise CheckpointError(
            f"{path} holds a policy with (preset, codes, user_rows) = {found}, "
            f"the configuration asks for {asked}: set [policy] accordingly"
        )


def _optimisers(trainer: Trainer) -> tuple[tuple[str, torch.optim.Optimizer], ...]:
    return ("dense", trainer.dense_optimiser), ("rows", trainer.row_optimiser)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = prefix + "."
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def _in_one_line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= 300 else f"{line[:300]} ..."
