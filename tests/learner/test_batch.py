"""From samples to tensors: targets, pi_old, and the tree of each request."""

import numpy as np
import pytest
import torch

from learner.batch import assemble
from learner.settings import LearnSettings
from learner.step import Trainer
from streams.events import SemanticId
from tests.learner.makers import (
    SMALL,
    Shown,
    catalogue_of,
    context_of,
    law,
    learnable,
    random_catalogue,
    random_model,
    sample,
    upsert,
)

ROWS = 64
LEAVES: list[SemanticId] = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 2, 3), (1, 2, 0), (3, 3, 3)]


def test_a_mask_holds_the_living_leaves_that_the_request_did_not_exclude() -> None:
    catalogue = catalogue_of(4, LEAVES)
    batch = assemble(
        [sample("r", [Shown((0, 0, 0)), Shown((1, 2, 3))], 5, excluded=[(0, 1, 0), (3, 3, 3)])],
        catalogue.valid,
        2,
        ROWS,
    )
    assert batch.mask_BkLK.tolist() == [
        [
            [[True, True, False, False], [True, False, False, False], [True, True, False, False]],
            [[True, True, False, False], [False, False, True, False], [True, False, False, True]],
        ]
    ]


def test_each_request_has_the_tree_of_its_own_catalogue_version() -> None:
    catalogue = catalogue_of(4, LEAVES)
    catalogue.take(6, b"i1", None)  # (0, 0, 1) dies
    catalogue.take(7, b"i6", upsert("i6", (0, 0, 3)))
    batch = assemble(
        [sample(f"r{version}", [Shown((0, 0, 0))], version) for version in (0, 5, 7, 5)],
        catalogue.valid,
        2,
        ROWS,
    )
    assert batch.mask_BkLK[:, 0, 2].tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, False, True],
        [True, True, False, False],
    ]


@pytest.mark.parametrize(
    ("version", "excluded"),
    [(2, []), (5, [(1, 2, 3)])],
    ids=["not yet born", "excluded"],
)
def test_a_target_outside_its_tree_is_refused_by_name(
    version: int, excluded: list[SemanticId]
) -> None:
    catalogue = catalogue_of(4, LEAVES)
    good = sample("good", [Shown((0, 0, 0))], 5)
    bad = sample(
        "bad", [Shown((0, 0, 0)), Shown((1, 2, 3), item="film")], version, excluded=excluded
    )
    with pytest.raises(
        ValueError, match=f"item 'film' of request bad .*catalogue version {version}"
    ):
        assemble([good, bad], catalogue.valid, 2, ROWS)


@pytest.mark.parametrize("sid", [(0, 0, 4), (0, 0, -1), (-1, -1, -1)])
def test_a_target_outside_the_codebook_is_refused(sid: SemanticId) -> None:
    catalogue = catalogue_of(4, LEAVES)
    with pytest.raises(ValueError, match=r"outside|not in the valid tree"):
        assemble([sample("r", [Shown(sid)], 5)], catalogue.valid, 2, ROWS)


def test_only_the_policys_own_exposures_carry_an_old_probability() -> None:
    logged = (-0.5, -1.0, -1.5)
    shown = [
        Shown((0, 0, 0), 1, logp_levels=logged),
        Shown((0, 0, 1), 1, logp_levels=logged, source="other"),
        Shown((0, 1, 0), 1, logp_levels=logged, source="explore"),
        Shown((1, 2, 3), 1),
    ]
    batch = assemble([sample("r", shown, 5)], catalogue_of(4, LEAVES).valid, 2, ROWS)
    assert batch.targets.logp_old_BkL[0, 0].tolist() == list(logged)
    assert batch.targets.logp_old_BkL[0, 1:].isnan().all()


def test_targets_say_what_the_sample_says() -> None:
    shown = [Shown((0, 0, 0), 1, supervised=True), Shown((0, 0, 1), None), Shown((0, 1, 0), -1)]
    batch = assemble([sample("r", shown, 5)], catalogue_of(4, LEAVES).valid, 2, ROWS)
    assert batch.targets.advantage_Bk.tolist() == [[1.0, 0.0, -1.0]]
    assert batch.targets.supervised_Bk.tolist() == [[True, False, False]]
    assert batch.targets.shown_Bk.tolist() == [[True, True, True]]


def test_ragged_slates_are_padded_without_effect_on_the_step() -> None:
    """A long slate in the batch changes neither the loss nor the update of the short one's targets."""
    catalogue = random_catalogue(5, 60, seed=1)
    short, long = learnable(catalogue, 1, seed=2, slots=2), learnable(catalogue, 1, seed=3, slots=7)
    for item in long[0].items:
        item.advantage, item.supervised = None, False

    def stepped(padded: bool) -> tuple[float, float, dict[str, torch.Tensor]]:
        model = random_model(SMALL, 5, ROWS, seed=4)
        # without the entropy term, which looks at all that was shown
        trainer = Trainer(model, LearnSettings(entropy=0.0), 1e-2)
        batch = assemble(short + long if padded else short, catalogue.valid, SMALL.context, ROWS)
        assert batch.sids_BkL.shape[1] == (7 if padded else 2)
        metrics = trainer.step(batch)
        assert metrics is not None
        return metrics.loss_rl, metrics.loss_supervised, model.state_dict()

    with_padding, without = stepped(True), stepped(False)
    assert with_padding[:2] == pytest.approx(without[:2], abs=1e-6)
    for name, value in with_padding[2].items():
        assert torch.allclose(value, without[2][name], atol=2e-4), name


def test_padding_does_not_count_in_the_entropy() -> None:
    catalogue = random_catalogue(5, 60, seed=1)
    one, other = learnable(catalogue, 2, seed=2, slots=6)
    other.items = other.items[:1]
    model = random_model(SMALL, 5, ROWS, seed=4)
    metrics = Trainer(model, LearnSettings(), 1e-9).step(
        assemble([one, other], catalogue.valid, SMALL.context, ROWS)
    )
    assert metrics is not None
    laws = [law(model, each, catalogue) for each in (one, other)]
    found: list[float] = []
    for of, each in ((one, laws[0]), (other, laws[1])):
        for item in of.items:
            levels = []
            for level in range(3):
                children = {
                    leaf[level]: logp[level]
                    for leaf, logp in each.items()
                    if leaf[:level] == item.sid[:level]
                }
                # the law of `makers.law` is at the sample's temperature; the entropy is at 1
                scaled = np.array(list(children.values())) * of.temperature
                p = np.exp(scaled - np.logaddexp.reduce(scaled))
                levels.append(-(p * np.log(p)).sum())
            found.append(float(np.mean(levels)))
    assert metrics.entropy == pytest.approx(np.mean(found), abs=1e-5)


def test_a_context_with_a_code_outside_the_codebook_is_refused() -> None:
    broken = sample("r", [Shown((0, 0, 0))], 5, context=context_of([(0, 9, 0)]))
    with pytest.raises(ValueError, match="code 9, the codebooks have 4"):
        assemble([broken], catalogue_of(4, LEAVES).valid, 2, ROWS)


def test_a_context_longer_than_the_policys_keeps_the_newest() -> None:
    sids: list[SemanticId] = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 2, 3)]
    long = sample("r", [Shown((0, 0, 0))], 5, context=context_of(sids))
    batch = assemble([long], catalogue_of(4, LEAVES).valid, 2, ROWS)
    assert batch.contexts.codes_BTL.tolist() == [[[0, 1, 0], [1, 2, 3]]]
    assert batch.contexts.present_BT.tolist() == [[True, True]]
