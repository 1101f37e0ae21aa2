"""The shapes of instability in docs/objectives.md, small enough to run: its figures are those printed here (-s).

Dislikes alone: three softmaxes of 32 codes; a code is shown with the probability it had in the version before, and
disliked with a probability of its own, .05 to .25. Both expectations are summed, not drawn, so nothing is random.
"""

import math
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.batch import assemble
from learner.masking import masked_log_softmax
from learner.objectives import OBJECTIVES, entropy
from learner.settings import LearnSettings
from learner.step import StepMetrics
from learner.watch import Watch
from tests.learner.makers import learnable, random_catalogue
from tests.learner.tiny import CODES, fresh_tiny

STEPS = 400


class Run(NamedTuple):
    """What came of learning from dislikes."""

    entropy: float
    """Nats, mean over the levels."""
    disliked: float
    """Share of what is shown that is disliked."""


def dislikes() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.05 + 0.2 * torch.rand(32, 3, generator=generator, dtype=torch.float64)


def from_dislikes_alone(name: str, plain: bool = False) -> list[Run]:
    """Before each step and after the last; `plain`: gradient descent instead of the learner's AdamW."""
    generator = torch.Generator().manual_seed(2)
    start = 0.5 * torch.randn(32, 3, generator=generator, dtype=torch.float64)
    logits_KL = start.requires_grad_()
    optimiser = (
        torch.optim.SGD([logits_KL], lr=10.0)
        if plain
        else torch.optim.AdamW([logits_KL], lr=0.05, betas=(0.9, 0.98), weight_decay=0.0)
    )
    advantage = -torch.ones(1, 96, dtype=torch.float64)

    def now() -> Tensor:
        return torch.log_softmax(logits_KL, 0)

    def seen() -> Run:
        logp_KL = now().detach()
        spread = entropy(logp_KL.T).mean()
        return Run(float(spread), float((logp_KL.exp() * dislikes()).sum(0).mean()))

    found, old_KL = [seen()], now().detach()
    for _ in range(STEPS):
        logp_KL = now()
        # every (code, level) as an item of one level, weighted by how often it is disliked
        losses = OBJECTIVES[name](
            logp_KL.reshape(1, 96, 1), old_KL.reshape(1, 96, 1), advantage
        ).reshape(32, 3)
        loss = (old_KL.exp() * dislikes() * losses).sum()
        old_KL = logp_KL.detach()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        found.append(seen())
    return found


@pytest.mark.parametrize("plain", [False, True], ids=["AdamW", "gradient descent"])
@pytest.mark.parametrize("name", ["ppo_clip", "ecpo", "dual_clip"])
def test_clipped_objectives_collapse_on_dislikes_alone(name: str, plain: bool) -> None:
    """They minimise the expected share of dislikes: the optimum shows nothing but the least disliked code."""
    first, *_, last = from_dislikes_alone(name, plain)
    assert first.entropy > 3.3
    least = float(dislikes().amin(0).mean())
    print(f"{name}: {first} -> {last}, least possible {least}")
    assert last.entropy < 0.1
    assert last.disliked < least + 0.02


@pytest.mark.parametrize("plain", [False, True], ids=["AdamW", "gradient descent"])
@pytest.mark.parametrize("name", ["gbpo_level", "unlikelihood"])
def test_a_push_that_fades_with_the_probability_keeps_the_entropy(name: str, plain: bool) -> None:
    """They minimise sum d (-log(1 - p) - p), about sum d p^2 / 2: an optimum inside, p near 1/d."""
    first, *_, last = from_dislikes_alone(name, plain)
    print(f"{name}: {first} -> {last}")
    assert last.entropy > first.entropy
    assert last.entropy > 0.95 * math.log(32)
    assert last.disliked < first.disliked


def test_gbpo_comes_to_rest_where_a_codes_probability_is_the_inverse_of_its_dislikes() -> None:
    inverse_KL = 1.0 / dislikes()
    law_KL = inverse_KL / inverse_KL.sum(0)
    expected = float((law_KL * dislikes()).sum(0).mean())
    last = from_dislikes_alone("gbpo_level")[-1]
    assert last.disliked == pytest.approx(expected, rel=0.02)


def test_the_watch_tells_of_the_collapse_while_there_is_something_left() -> None:
    silent = {one.name: 0.0 for one in fields(StepMetrics)}

    def told(name: str) -> list[tuple[int, float]]:
        watch = Watch(LearnSettings())
        return [
            (step, run.entropy)
            for step, run in enumerate(from_dislikes_alone(name))
            if watch.see(StepMetrics(**{**silent, "entropy": run.entropy}))
        ]

    ((step, left),) = told("ppo_clip")
    print(f"ppo_clip: told at step {step} of {STEPS}, entropy {left:.2f}")
    assert left > 0.1
    assert told("gbpo_level") == []


# --- what a dislike weighs, per item and per level --------------------------------------------------


def norm_at_logits(pi: float, codes: int) -> float:
    """Norm of one-hot - p, where the other codes share what is left."""
    return (1.0 - pi) * math.sqrt(1.0 + (1.0 / (codes - 1) if codes > 1 else 0.0))


def analytic_ratio(levels: list[tuple[float, int]]) -> float:
    """Norm of a dislike's gradient at the logits on policy, per item over per level; (pi, valid codes) by level."""
    item = math.prod(pi for pi, _ in levels)
    whole = item / max(item, 1.0 - item)
    per_item = [whole * norm_at_logits(pi, codes) for pi, codes in levels]
    per_level = [pi / max(pi, 1.0 - pi) / 3 * norm_at_logits(pi, codes) for pi, codes in levels]
    return math.hypot(*per_item) / math.hypot(*per_level)


TABLE = {
    "tiny at the start: 32 x 31 x 3 valid codes, all alike": (
        [(1 / 32, 32), (1 / 31, 31), (1 / 3, 3)],
        4.0e-3,
    ),
    "tiny when sharp: .3, .3, .6": ([(0.3, 32), (0.3, 31), (0.6, 3)], 0.29),
    "10^6 items at 3 x 8192, all alike: 8192 x 61 x 2": (
        [(1 / 8192, 8192), (1 / 61, 61), (1 / 2, 2)],
        6.7e-6,
    ),
    "10^6 items when sharp: .1, .2, .5": ([(0.1, 8192), (0.2, 61), (0.5, 2)], 0.057),
}


@pytest.mark.parametrize("row", TABLE)
def test_per_item_a_dislike_weighs_almost_nothing(row: str) -> None:
    """The table of docs/objectives.md; autograd agrees with its formula."""
    levels, expected = TABLE[row]
    found = analytic_ratio(levels)
    print(f"{row}: {found:.2g}")
    assert found == pytest.approx(expected, rel=0.05)
    norms = []
    for name in ("gbpo_item", "gbpo_level"):
        logits = [
            torch.tensor([math.log(pi), *[math.log((1.0 - pi) / (codes - 1))] * (codes - 1)])
            .double()
            .requires_grad_()
            for pi, codes in levels
        ]
        logp = torch.stack([torch.log_softmax(x, 0)[0] for x in logits]).reshape(1, 1, 3)
        loss = OBJECTIVES[name](logp, logp.detach(), -torch.ones(1, 1).double()).sum()
        gradients = torch.autograd.grad(loss, logits)
        norms.append(math.hypot(*[float(g.norm()) for g in gradients]))
    assert norms[0] / norms[1] == pytest.approx(found, rel=1e-6)


def measured_ratios(seed: int) -> NDArray[np.float64]:
    """Over `tiny`'s parameters, for one dislike at a time: items at random leaves of a tree of 3,000."""
    catalogue = random_catalogue(CODES, 3000, seed=1)
    model = fresh_tiny(seed, user_rows=64)
    parameters = [p for p in model.parameters() if p is not model.context.users.weight]
    found = []
    for sample in learnable(catalogue, 8, seed):
        batch = assemble([sample], catalogue.valid, model.preset.context, 64)
        logits = model(model.process(batch.contexts), batch.sids_BkL) / batch.temperature_B
        logp_BkL = masked_log_softmax(logits, batch.mask_BkLK).gather(
            -1, batch.sids_BkL.unsqueeze(-1)
        )[..., 0]
        for slot in range(3):
            advantage_Bk = torch.zeros(1, 3)
            advantage_Bk[0, slot] = -1.0
            norms = []
            for name in ("gbpo_item", "gbpo_level"):
                loss = OBJECTIVES[name](logp_BkL, logp_BkL.detach(), advantage_Bk).sum()
                gradients = torch.autograd.grad(
                    loss, parameters, retain_graph=True, allow_unused=True
                )
                norms.append(math.hypot(*[float(g.norm()) for g in gradients if g is not None]))
            found.append(norms[0] / norms[1])
    return np.array(found)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_ratio_measured_on_tiny_is_that_of_the_table(seed: int) -> None:
    """Of the whole gradient: under a fiftieth at the median."""
    low, median, high = np.quantile(measured_ratios(seed), [0.1, 0.5, 0.9])
    print(f"seed {seed}: median {median:.2g}, 80 % between {low:.2g} and {high:.2g}")
    assert 1e-3 < median < 2e-2


def test_adam_hides_the_lost_dislikes() -> None:
    """Ten steps on one dislike move the logits as far per item as per level; plain gradients tell the truth."""
    moved = {}
    for optimiser, lr in ((torch.optim.Adam, 0.01), (torch.optim.SGD, 0.01)):
        for name in ("gbpo_item", "gbpo_level"):
            logits = torch.zeros(1, 1, 3, 32, dtype=torch.float64, requires_grad=True)
            opt = optimiser([logits], lr=lr)
            for _ in range(10):
                logp = torch.log_softmax(logits, -1)[..., 0]
                opt.zero_grad()
                loss = OBJECTIVES[name](logp, logp.detach(), -torch.ones(1, 1).double())
                loss.sum().backward()  # type: ignore[no-untyped-call]
                opt.step()
            moved[optimiser.__name__, name] = float(logits.detach()[..., 0].norm())
    adam, plain = (moved[kind, "gbpo_item"] / moved[kind, "gbpo_level"] for kind in ("Adam", "SGD"))
    print(
        f"distance per item over per level: {adam:.2g} under Adam, {plain:.2g} by plain gradients"
    )
    assert 0.9 < adam < 1.1
    assert plain < 0.01
