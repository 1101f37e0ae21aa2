"""The policy's definition that learner, actor and audit share: how it is built and what its state is.

State is compared by name; its float32 values are the version's definition.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from learner.decoder import LazyDecoder
from learner.presets import preset_of
from streams.blocks import BLOCK_BYTES, Blocked, BlockState, State


class PolicyError(ValueError):
    """A policy that cannot be built as asked; the message says what would be right."""


def build(shape: str, codes: int, user_rows: int) -> LazyDecoder:
    """A decoder of a shape (learner/presets.py); raises `PolicyError` for an unknown one."""
    try:
        preset = preset_of(shape)
    except ValueError as error:
        raise PolicyError(str(error)) from None
    return LazyDecoder(preset, codes, user_rows)


def compile_blocks(model: LazyDecoder) -> LazyDecoder:
    """The same policy with its blocks compiled, in place: faster by fusing, same state, rounding apart.

    Each block by itself, so that the first of a kind is all that torch must compile, and the user table's sparse
    gradient stays outside. Compilation happens at the first call, and again for shapes of another kind; it needs a
    C++ compiler on CPU.
    """
    for block in model.blocks:
        block.compile(dynamic=True)
    return model


def state_of(model: LazyDecoder) -> State:
    """The policy's state by name, float32 on the CPU; copies, so that training may go on."""
    return arrays_of(model.state_dict())


def arrays_of(tensors: Mapping[str, Tensor]) -> State:
    """Copies of whole tensors on the CPU, by name."""
    return {name: value.detach().cpu().numpy().copy() for name, value in tensors.items()}


def load_state(model: LazyDecoder, state: State) -> None:
    """Set all parameters; raises `PolicyError` when names or shapes differ."""
    tensors: dict[str, Tensor] = {name: torch.from_numpy(value) for name, value in state.items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise PolicyError(f"state does not fit the policy: {error}") from None


USERS = "context.users.weight"
"""The table that has a row for each user, of which a version moves few."""


def served(
    shape: str, codes: int, user_rows: int, blocks: BlockState, like: LazyDecoder | None = None
) -> LazyDecoder:
    """The policy of a state, sharing its memory: to be asked, not trained, and the state not to be written to.

    The user table stays in blocks, so that a version costs no copy of it. `like` is another version of this shape,
    which spares making the modules anew. Raises `PolicyError`.
    """
    like = like or build(shape, codes, user_rows).eval().requires_grad_(False)
    tensors = {
        name: torch.from_numpy(tensor.array) for name, tensor in blocks.items() if name != USERS
    }
    asked = {name: tuple(value.shape) for name, value in like.state_dict().items()}
    asked[USERS] = user_rows, like.preset.d_user
    differ = asked.items() ^ {name: tensor.shape for name, tensor in blocks.items()}.items()
    if differ:
        raise PolicyError(f"state does not fit the policy: {sorted(differ)}")
    model = like.twin(tensors)
    model.context.users = _Rows(blocks[USERS])  # type: ignore[assignment]
    model.prepare()
    return model


class _Rows(nn.Module):
    """An embedding table in blocks."""

    def __init__(self, table: Blocked) -> None:
        super().__init__()
        self._table = table
        self._row_bytes = table.shape[1] * table.dtype.itemsize
        self._in_blocks = len(table.blocks) > 1 and BLOCK_BYTES % self._row_bytes == 0

    def forward(self, rows_B: Tensor) -> Tensor:
        """`[B]` -> `[B, E]`."""
        if not self._in_blocks:
            return torch.from_numpy(self._table.array)[rows_B]
        rows = []
        for row in rows_B.tolist():
            block, first = divmod(row * self._row_bytes, BLOCK_BYTES)
            rows.append(self._table.blocks[block][first : first + self._row_bytes])
        return torch.from_numpy(np.stack(rows).view(self._table.dtype))
