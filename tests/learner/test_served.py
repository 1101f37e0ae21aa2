"""A served version: its answers are those of the policy built the long way, and it shares what did not change."""

import sys

import pytest
import torch

from learner.policy import USERS, PolicyError, build, load_state, served, state_of
from streams.blocks import State, blocked_state
from streams.delta import changes
from tests.learner.makers import random_model

CODES, ROWS = 5, 3000


def state_of_seed(seed: int) -> State:
    return state_of(random_model(build("tiny", 2, 1).preset, CODES, ROWS, seed=seed))


def answers(model: torch.nn.Module, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    users = [f"u{number}" for number in range(7)]
    of = model.contexts(users, [b""] * len(users))  # type: ignore[operator]
    with torch.inference_mode():
        logits: torch.Tensor = model(model.looked_up(of), torch.randint(CODES, (7, 2, 3)))  # type: ignore[operator]
    return logits


def long_way(state: State) -> torch.Tensor:
    model = build("tiny", CODES, ROWS)
    load_state(model, state)
    model.eval().requires_grad_(False)
    model.prepare()
    return answers(model)


def test_a_served_policy_answers_as_the_one_built_the_long_way() -> None:
    state = state_of_seed(1)
    blocks = blocked_state(state)
    assert len(blocks[USERS].blocks) > 1
    assert torch.equal(answers(served("tiny", CODES, ROWS, blocks)), long_way(state))


def test_the_next_version_is_put_into_modules_of_its_own() -> None:
    before, after = state_of_seed(1), state_of_seed(2)
    first = served("tiny", CODES, ROWS, blocked_state(before))
    second = served("tiny", CODES, ROWS, blocked_state(after), first)
    third = served("tiny", CODES, ROWS, blocked_state(before), second)
    assert torch.equal(answers(second), long_way(after))
    assert torch.equal(answers(first), long_way(before))
    assert torch.equal(answers(third), long_way(before))


def test_what_did_not_change_is_shared() -> None:
    state = state_of_seed(1)
    base = blocked_state(state)
    moved = {name: value.copy() for name, value in state.items()}
    moved["bos"] += 1
    moved[USERS][17] += 1
    _, blocks = changes(base, moved)
    first, second = (served("tiny", CODES, ROWS, each) for each in (base, blocks))
    assert second.places.data_ptr() == first.places.data_ptr()
    assert second.bos.data_ptr() != first.bos.data_ptr()
    assert torch.equal(answers(second), long_way(moved))


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
def test_a_table_of_another_size_is_refused_by_its_name(rows: int) -> None:
    with pytest.raises(PolicyError, match=USERS.replace(".", r"\.")):
        served("tiny", CODES, rows, blocked_state(state_of_seed(1)))


def test_a_state_that_lacks_a_tensor_is_refused_by_its_name() -> None:
    blocks = blocked_state(state_of_seed(1))
    del blocks["bos"]
    with pytest.raises(PolicyError, match="bos"):
        served("tiny", CODES, ROWS, blocks)


def test_serving_does_not_load_torchs_compiler() -> None:
    """It takes seconds of an actor's start."""
    import subprocess

    script = """
import sys
from learner.policy import build, served, state_of
from streams.blocks import blocked_state
state = blocked_state(state_of(build("tiny", 5, 64)))
served("tiny", 5, 64, state, served("tiny", 5, 64, state))
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
