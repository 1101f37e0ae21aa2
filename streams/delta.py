"""What changed from one version to the next: the delta codec.

Notable choices
- A delta overwrites: applied to its base it gives the next state bit for bit, and no arithmetic is done.
- Of each tensor it carries nothing (unchanged), the changed rows (an embedding table with a row-wise optimiser moves
  few), the changed values (a coarse precision leaves most alone), or all, whichever is the least bytes.
- Change is of bits: -0.0 and 0.0 differ, a NaN equals itself.
- Found by comparing with the base block by block: nothing needs to be told which rows an optimiser touched.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streams.blocks import BLOCK_BYTES, Blocked, BlockState, Bytes, State, in_one_piece, pieces

WHOLE: Final = "whole"
ROWS: Final = "rows"
VALUES: Final = "values"
"""How a tensor is carried; the first part of a name in a delta's content. Of rows and single values, the places stand
beside: `rows:NAME` and `rows@NAME`."""

_PLACE: Final = np.dtype(np.int64)


class DeltaError(ValueError):
    """A delta that does not fit its base; the message says which tensor and why."""


def changes(base: BlockState, state: State) -> tuple[dict[str, NDArray[Any]], BlockState]:
    """The content of the delta from `base` to `state`, and `state` in blocks, sharing what is the same.

    Raises `DeltaError` when names, types or shapes differ: such a state has no delta, it needs an anchor.
    """
    if base.keys() != state.keys():
        raise DeltaError(f"tensors differ: {sorted(base.keys() ^ state.keys())}")
    content: dict[str, NDArray[Any]] = {}
    following = {}
    for name, array in state.items():
        before = base[name]
        if (before.dtype, before.shape) != (array.dtype, array.shape):
            raise DeltaError(f"{name} was {before.dtype} {before.shape}")
        parts = list(pieces(array))
        differing = _differing(before, parts)
        following[name] = before.with_blocks({place: parts[place].copy() for place in differing})
        if differing:
            content |= _carried(name, array, differing)
    return content, following


def applied(base: BlockState, content: Mapping[str, NDArray[Any]]) -> BlockState:
    """The state that a delta makes of `base`, sharing what is the same; raises `DeltaError`."""
    following = dict(base)
    for label, values in content.items():
        how, _, name = label.partition(":")
        if not name:
            continue  # places, read with their values
        before = base.get(name)
        if before is None or how not in (WHOLE, ROWS, VALUES):
            raise DeltaError(f"{label} is no tensor of the base")
        if values.dtype != before.dtype:
            raise DeltaError(f"{label} is {values.dtype}, {name} is {before.dtype}")
        if how == WHOLE:
            if values.shape != before.shape:
                raise DeltaError(f"{label} has shape {values.shape}, {name} {before.shape}")
            following[name] = in_one_piece(values)  # it moved as a whole, and will again
            continue
        places = content.get(f"{how}@{name}")
        width = _width(before.shape) if how == ROWS else 1
        if places is None or not _fit(places, values, _size(before.shape) // width, width):
            raise DeltaError(f"the places of {label} do not fit")
        if how == ROWS:
            places = (places[:, None] * width + np.arange(width)).reshape(-1)
        following[name] = _overwritten(before, places, values.reshape(-1))
    return following


def _differing(before: Blocked, parts: list[Bytes]) -> dict[int, NDArray[np.bool_]]:
    """Of the blocks that differ, which values do; in ascending order."""
    bits = np.dtype(f"u{before.dtype.itemsize}")
    found = {}
    for place, (part, block) in enumerate(zip(parts, before.blocks, strict=True)):
        differs = part.view(bits) != block.view(bits)
        if differs.any():
            found[place] = differs
    return found


def _carried(
    name: str, array: NDArray[Any], differing: Mapping[int, NDArray[np.bool_]]
) -> dict[str, NDArray[Any]]:
    """The changed part of a tensor in the form that takes the least bytes."""
    width = _width(array.shape)
    size = array.dtype.itemsize
    row_bytes, value_bytes = width * size + _PLACE.itemsize, size + _PLACE.itemsize
    count = sum(int(np.count_nonzero(differs)) for differs in differing.values())
    # Where most moved it need not be known which: that would take longer than all the rest.
    if array.nbytes <= min(-(-count // width) * row_bytes, count * value_bytes):
        return {f"{WHOLE}:{name}": array}
    per_block = BLOCK_BYTES // size
    places = np.concatenate(
        [np.flatnonzero(differs) + place * per_block for place, differs in differing.items()]
    )
    rows = np.unique(places // width)
    costs = {
        WHOLE: array.nbytes,
        ROWS: len(rows) * row_bytes,
        VALUES: count * value_bytes,
    }
    how = min(costs, key=lambda one: costs[one])
    if how == WHOLE:
        return {f"{WHOLE}:{name}": array}
    if how == ROWS:
        return {f"{ROWS}@{name}": rows, f"{ROWS}:{name}": array.reshape(-1, width)[rows]}
    return {f"{VALUES}@{name}": places, f"{VALUES}:{name}": array.reshape(-1)[places]}


def _overwritten(before: Blocked, places: NDArray[np.int64], values: NDArray[Any]) -> Blocked:
    """The tensor with `values` at the flat indices `places`, which ascend."""
    per_block = BLOCK_BYTES // before.dtype.itemsize
    owner = places // per_block
    touched, firsts = np.unique(owner, return_index=True)
    moved = {}
    for place, first, upto in zip(touched, firsts, [*firsts[1:], len(places)], strict=True):
        block = before.blocks[place].copy()
        block.view(before.dtype)[places[first:upto] - place * per_block] = values[first:upto]
        moved[int(place)] = block
    return before.with_blocks(moved)


def _fit(places: NDArray[Any], values: NDArray[Any], many: int, width: int) -> bool:
    """Whether places ascend below `many`, and each has `width` values."""
    return bool(
        places.dtype == _PLACE
        and places.ndim == 1
        and values.size == len(places) * width
        and (np.diff(places) > 0).all()
        and (not len(places) or (places[0] >= 0 and places[-1] < many))
    )


def _width(shape: tuple[int, ...]) -> int:
    """Values of a row; a vector's rows are its values."""
    return max(1, _size(shape[1:]))


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
