"""A preset with another context length: what it is called, and that its checkpoints and contexts fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.context import contexts
from learner.policy import PolicyError, build
from learner.presets import PRESETS, preset_of, shape_name, split_shape
from learner.settings import PolicySettings
from ops.bench_contexts import packed_context
from tests.learner.tiny import CODES


@pytest.mark.parametrize(("preset", "context"), [("tiny", 0), ("small", 3000), ("4B-MoE", 1)])
def test_a_shape_is_read_as_it_was_written(preset: str, context: int) -> None:
    shape = shape_name(preset, context)
    assert split_shape(shape) == (preset, context)
    assert preset_of(shape) == replace(PRESETS[preset], context=context or PRESETS[preset].context)


def test_a_preset_by_itself_is_a_shape() -> None:
    assert PolicySettings().shape == "tiny"
    assert PolicySettings(context=512).shape == "tiny:512"


@pytest.mark.parametrize("shape", ["vast", "tiny:", "tiny:0", "tiny:-3", "tiny:x", "tiny:3:4", ""])
def test_what_is_no_shape_is_told_by_name(shape: str) -> None:
    with pytest.raises(PolicyError, match=shape.partition(":")[0] or "''"):
        build(shape, CODES, 8)


def test_a_policy_takes_in_as_many_behaviours_as_its_shape_says() -> None:
    model = build("tiny:70", CODES, 8).eval().requires_grad_(False)
    packed = [packed_context(length, CODES, np.random.default_rng(1)) for length in (70, 90)]
    of = model.contexts(["a", "b"], packed)
    assert of.present_BT.shape == (2, 70)
    assert of.present_BT.all()
    assert model.process(of).keys[0].shape[2] == 71


def test_contexts_are_as_long_as_the_longest_and_come_to_the_same() -> None:
    model = build("tiny:70", CODES, 8).eval().requires_grad_(False)
    rng = np.random.default_rng(2)
    packed = [packed_context(length, CODES, rng) for length in (3, 0, 9)]
    users = ["a", "b", "c"]
    short = model.contexts(users, packed)
    assert short.present_BT.shape == (3, 9)
    assert model.contexts(["b"], [b""]).present_BT.shape == (1, 1)
    padded = contexts(users, packed, 70, model.user_rows, model.codes)
    start = torch.zeros(3, 1, 0, dtype=torch.int64)
    ours, theirs = (model.step(model.process(of), start) for of in (short, padded))
    assert (ours - theirs).abs().max() < 1e-5
