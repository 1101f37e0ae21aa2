"""What the guard lets pass, and what it refuses and why."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from learner.catalogue import Catalogue
from learner.decoder import LazyDecoder
from learner.guard import FEWEST, PROBES, Guard, Verdict, read
from learner.policy import build, state_of
from learner.settings import LearnSettings
from learner.step import Trainer
from learner.update import train
from learner.valid_tree import Tree, keys_of, sids_of
from streams.blocks import not_finite
from streams.events import Sample
from tests.learner.makers import catalogue_of, law, learnable, random_catalogue, sample
from tests.learner.poison import POISONS, exploded, not_a_number, one_item

CODES, ROWS = 5, 64


@pytest.fixture
def catalogue() -> Catalogue:
    return random_catalogue(CODES, 60, seed=1)


@pytest.fixture
def tree(catalogue: Catalogue) -> Tree:
    return catalogue.valid.tree(catalogue.version)


@pytest.fixture
def model() -> LazyDecoder:
    torch.manual_seed(3)
    return build("tiny", CODES, ROWS)


def guard_of(model: LazyDecoder, samples: list[Sample], **limits: float) -> Guard:
    guard = Guard(build("tiny", CODES, ROWS), LearnSettings(**limits))  # type: ignore[arg-type]
    guard.good = state_of(model)
    guard.saw(samples)
    return guard


def spoilt(
    model: LazyDecoder, poison: Callable[[LazyDecoder, Tree], None], tree: Tree
) -> LazyDecoder:
    other = copy.deepcopy(model)
    poison(other, tree)
    return other


def judged(guard: Guard, model: LazyDecoder, tree: Tree) -> Verdict:
    return guard.judge(state_of(model), tree)


def test_an_update_passes_and_becomes_the_good_version(
    model: LazyDecoder, catalogue: Catalogue, tree: Tree
) -> None:
    samples = learnable(catalogue, 20, seed=1)
    guard = guard_of(model, samples)
    trainer = Trainer(copy.deepcopy(model), LearnSettings(), 1e-3)
    train(trainer, samples, catalogue)
    candidate = state_of(trainer.model)
    verdict = guard.judge(candidate, tree)
    assert verdict.reason == ""
    assert 0 < verdict.figures.divergence < 0.5
    assert guard.good is candidate
    assert guard.judge(candidate, tree).figures.divergence == 0.0


@pytest.mark.parametrize(
    ("poison", "says"),
    [
        (not_a_number, "weights that are not finite: places"),
        (exploded, "below learn.guard_entropy = 0.1"),
        (one_item, "below learn.guard_entropy = 0.1"),
    ],
)
def test_poison_is_refused_in_one_sentence_and_the_good_version_stays(
    model: LazyDecoder,
    catalogue: Catalogue,
    tree: Tree,
    poison: Callable[[LazyDecoder, Tree], None],
    says: str,
) -> None:
    guard = guard_of(model, learnable(catalogue, 20, seed=1))
    good = guard.good
    for _ in range(2):
        verdict = judged(guard, spoilt(model, poison, tree), tree)
        assert says in verdict.reason
        assert "\n" not in verdict.reason
        assert guard.good is good
    assert judged(guard, model, tree).reason == ""


@pytest.mark.parametrize("poison", POISONS[1:])
def test_each_limit_refuses_by_itself(
    model: LazyDecoder,
    catalogue: Catalogue,
    tree: Tree,
    poison: Callable[[LazyDecoder, Tree], None],
) -> None:
    samples, bad = learnable(catalogue, 20, seed=1), spoilt(model, poison, tree)
    lenient = {"guard_entropy": 0.0, "guard_divergence": 1e9, "guard_top_share": 1.0}
    assert judged(guard_of(model, samples, **lenient), bad, tree).reason == ""
    without = {key: value for key, value in lenient.items() if key != "guard_divergence"}
    refused = judged(guard_of(model, samples, **without), bad, tree)
    assert "a divergence of" in refused.reason
    if poison is one_item:
        without = {key: value for key, value in lenient.items() if key != "guard_top_share"}
        refused = judged(guard_of(model, samples, **without), bad, tree)
        assert "one item with" in refused.reason
        assert refused.figures.top_share > 0.9


def test_a_policy_that_has_forgotten_everything_is_refused(
    model: LazyDecoder, catalogue: Catalogue, tree: Tree
) -> None:
    samples = learnable(catalogue, 20, seed=1)
    for value in model.parameters():
        value.data.mul_(1.5)
    blank = copy.deepcopy(model)
    for value in blank.parameters():
        value.data.zero_()
    verdict = judged(guard_of(model, samples, guard_divergence=1e9), blank, tree)
    assert "it has forgotten what it knew" in verdict.reason
    assert judged(guard_of(blank, samples), blank, tree).reason == ""


def test_infinite_log_probabilities_are_refused_however_few_the_probes(
    model: LazyDecoder, catalogue: Catalogue, tree: Tree
) -> None:
    guard = guard_of(model, learnable(catalogue, 1, seed=1))
    huge = copy.deepcopy(model)
    for table in huge.embeddings:
        table.data.fill_(3e38)
    assert not_finite(state_of(huge)) == []
    assert "log-probabilities that are not finite" in judged(guard, huge, tree).reason


def test_few_probes_say_nothing_but_that_it_is_finite(
    model: LazyDecoder, catalogue: Catalogue, tree: Tree
) -> None:
    samples, bad = learnable(catalogue, FEWEST, seed=1), spoilt(model, one_item, tree)
    assert judged(guard_of(model, samples[1:]), bad, tree).reason == ""
    assert judged(guard_of(model, samples), bad, tree).reason
    assert judged(guard_of(model, []), bad, tree).reason == ""
    empty = Catalogue(CODES).valid.tree(-1)
    assert judged(guard_of(model, samples), bad, empty).reason == ""


def test_the_newest_requests_are_the_probes(model: LazyDecoder, catalogue: Catalogue) -> None:
    guard = guard_of(model, learnable(catalogue, PROBES, seed=1))
    guard.saw(learnable(catalogue, 30, seed=2))
    assert len(guard._probes) == PROBES
    assert guard._probes[-1].context == learnable(catalogue, 30, seed=2)[-1].context


def test_a_favourite_of_a_small_catalogue_is_not_refused(model: LazyDecoder) -> None:
    small = catalogue_of(CODES, [(0, 0, 0), (0, 1, 0)])
    tree = small.valid.tree(1)
    samples = [sample(f"r{number}", [], 1, user=f"u{number}") for number in range(20)]
    favoured = spoilt(model, one_item, tree)
    guard = guard_of(favoured, samples, guard_entropy=0.0)
    verdict = judged(guard, favoured, tree)
    assert verdict.figures.top_share > 0.5
    assert verdict.reason == ""


def test_the_figures_are_those_of_plain_sums(
    model: LazyDecoder, catalogue: Catalogue, tree: Tree
) -> None:
    """Against the whole law of each probe, by another path: entropy by level on the drawn nodes, share of a leaf."""
    for value in model.parameters():
        value.data.mul_(1.3)
    samples = learnable(catalogue, 20, seed=1)
    guard = guard_of(model, samples)
    found = judged(guard, model, tree).figures
    probes = [
        sample(f"r{number}", [], catalogue.version, user=each.user, context=each.context)
        for number, each in enumerate(samples)
    ]
    model.eval()
    laws = [law(model, each, catalogue) for each in probes]
    shares = {leaf: float(np.mean([np.exp(sum(each[leaf])) for each in laws])) for leaf in laws[0]}
    assert found.top_share in [pytest.approx(share, rel=1e-4) for share in shares.values()]
    reading = read(model, list(guard._probes), tree)
    spread = widest = 0.0
    for row, each in enumerate(laws):
        for draw in reading.sids_BkL[row].tolist():
            assert tuple(draw) in each, "drawn on the tree"
            for level in range(3):
                below = {
                    leaf[: level + 1]: logp[level]
                    for leaf, logp in each.items()
                    if list(leaf[:level]) == draw[:level]
                }
                logp_n = np.array(list(below.values()))
                spread -= float((np.exp(logp_n) * logp_n).sum())
                widest += float(np.log(len(logp_n)))
    assert found.entropy == pytest.approx(spread / widest, rel=1e-4)


def test_what_a_request_excluded_does_not_hide_a_collapse(
    model: LazyDecoder, catalogue: Catalogue, tree: Tree
) -> None:
    """All have seen the item; its share is measured all the same."""
    samples = learnable(catalogue, 20, seed=1)
    every = sids_of(tree.leaves(), CODES)
    for each in samples:
        each.excluded = every.astype("<u2").tobytes()
    assert len(keys_of(every, CODES)) == len(tree)
    refused = judged(guard_of(model, samples), spoilt(model, one_item, tree), tree)
    assert refused.figures.top_share > 0.9


def test_judging_leaves_the_random_state_alone(
    model: LazyDecoder, catalogue: Catalogue, tree: Tree
) -> None:
    guard = guard_of(model, learnable(catalogue, 20, seed=1))
    before = torch.get_rng_state()
    judged(guard, model, tree)
    assert torch.equal(before, torch.get_rng_state())
