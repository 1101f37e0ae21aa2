"""A state in blocks of 64 KiB: what does not change between versions is neither copied nor hashed again.

Blocks are immutable by convention: the next version of a state shares those that are the same (copy on write), so a
table of a million rows costs a version only the blocks whose rows moved. The digest of a state is a hash over names,
types, shapes and the digests of the blocks (contract of the policy, "Versions").
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES: Final = 1 << 16
"""A multiple of the size of any number."""

State = dict[str, NDArray[Any]]
"""Tensors by name."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Blocked:
    """One tensor."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: tuple[Bytes, ...]
    """Each of `BLOCK_BYTES`, the last of what remains."""
    digests: tuple[bytes, ...]
    whole: NDArray[Any] | None = None
    """All values in one piece, where the blocks are parts of such a one."""

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(block.nbytes for block in self.blocks)

    @cached_property
    def array(self) -> NDArray[Any]:
        """All values in one piece; without a copy where they lie so. Not to be written to."""
        if self.whole is not None:
            return self.whole
        whole = self.blocks[0] if len(self.blocks) == 1 else np.concatenate([_NONE, *self.blocks])
        return whole.view(self.dtype).reshape(self.shape)

    def with_blocks(self, changed: Mapping[int, Bytes]) -> "Blocked":
        """The tensor with some blocks replaced; the others are shared."""
        blocks, digests = list(self.blocks), list(self.digests)
        for place, block in changed.items():
            blocks[place], digests[place] = block, _digest(block)
        return Blocked(self.dtype, self.shape, tuple(blocks), tuple(digests))


_NONE: Final[Bytes] = np.zeros(0, np.uint8)

BlockState = dict[str, Blocked]
"""A state in blocks, by name."""


def blocked(array: NDArray[Any]) -> Blocked:
    """A copy of an array, in blocks."""
    blocks = tuple(block.copy() for block in pieces(array))
    digests = tuple(_digest(block) for block in blocks)
    return Blocked(array.dtype, array.shape, blocks, digests)


def in_one_piece(array: NDArray[Any]) -> Blocked:
    """A copy of an array, in blocks that lie in one piece: for what is read so and seldom moves in part, for any
    block keeps all the memory."""
    whole = array.copy(order="C")
    blocks = tuple(pieces(whole))
    return Blocked(whole.dtype, whole.shape, blocks, tuple(map(_digest, blocks)), whole)


def blocked_state(state: State) -> BlockState:
    """A copy of a state, in blocks."""
    return {name: blocked(array) for name, array in state.items()}


def whole_state(blocks: BlockState) -> State:
    """The tensors of a state, each in one piece; not to be written to."""
    return {name: tensor.array for name, tensor in blocks.items()}


def pieces(array: NDArray[Any]) -> Iterator[Bytes]:
    """The bytes of an array, block by block, as views where it lies in one piece."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for first in range(0, flat.nbytes, BLOCK_BYTES):
        yield flat[first : first + BLOCK_BYTES]


def root(blocks: BlockState) -> str:
    """The digest of a state, from those of its blocks."""
    digest = blake2b(digest_size=16)
    for name in sorted(blocks):
        _update(digest, name, blocks[name].dtype, blocks[name].shape)
        digest.update(b"".join(blocks[name].digests))
    return digest.hexdigest()


def digest_of(state: State) -> str:
    """The same of a state that is not in blocks."""
    digest = blake2b(digest_size=16)
    for name in sorted(state):
        _update(digest, name, state[name].dtype, state[name].shape)
        for piece in pieces(state[name]):
            digest.update(_digest(piece))
    return digest.hexdigest()


def _update(digest: blake2b, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    digest.update(f"{name}:{dtype}:{shape};".encode())


def _digest(block: Bytes) -> bytes:
    return blake2b(block.data, digest_size=16).digest()


def not_finite(state: State) -> list[str]:
    """Names of the tensors that hold a value which is not finite."""
    return [
        name
        for name, value in sorted(state.items())
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all()
    ]
