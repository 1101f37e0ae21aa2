"""The policy's definition that learner, actor and audit share: how it is built and what its state is.

State is compared by name; its float32 values are the version's definition.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from learner.decoder import LazyDecoder
from learner.presets import preset_of
from streams.weights import State


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
