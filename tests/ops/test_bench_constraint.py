"""The bench of constrained decoding: what it compares is the same draw, and what it tells is what it measured."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from learner.presets import Preset
from learner.valid_tree import Tree, keys_of
from ops.bench_constraint import Cell, asked_otherwise, cells, checks_of, trees_of
from ops.bench_constraint_changes import Index, changes
from ops.bench_constraint_parts import (
    Load,
    TimedTree,
    Trie,
    constrained,
    kmeans_keys,
    processed,
    searched_mask,
    unconstrained,
    zipf_keys,
)
from tests.learner.makers import random_model

CODES = 6
SMALL = Preset(d_model=16, layers=2, heads=4, d_embed=8, d_ffn=32, d_user=4, context=6)


def everything() -> TimedTree:
    return TimedTree(CODES, np.arange(CODES**3))


def test_both_ways_draw_the_same_law_where_every_code_is_valid() -> None:
    model = random_model(SMALL, CODES, 64, seed=1).eval().requires_grad_(False)
    requests = 4_000
    alike = processed(model, 1, seed=2)
    kv = type(alike)(
        [keys.expand(requests, -1, -1, -1) for keys in alike.keys],
        [values.expand(requests, -1, -1, -1) for values in alike.values],
        alike.present_BN.expand(requests, -1),
    )
    load = Load(kv, 4, [np.empty(0, dtype=np.int64)] * requests)
    slates = constrained(model, everything(), load, np.random.default_rng(3))
    free = unconstrained(model, load, torch.Generator().manual_seed(4)).numpy()
    assert free.shape == (requests, 4, 3)
    for slot in range(3):
        ours = keys_of(slates.sids_BJ3[:, slot], CODES)
        theirs = keys_of(free[:, slot], CODES)
        counts = np.stack([np.bincount(keys, minlength=CODES**3) for keys in (ours, theirs)])
        common = counts.sum(0) >= 40
        assert common.sum() > 5
        table = np.concatenate(
            [counts[:, common], counts[:, ~common].sum(1, keepdims=True)], axis=1
        )
        table = table[:, table.sum(0) > 0]
        expected = table.sum(0) / 2
        assert chisquare(table.ravel(), np.tile(expected, 2), ddof=table.shape[1]).pvalue > 1e-4
    assert len(np.unique(keys_of(free[0], CODES))) == 4


def test_others_ways_of_asking_give_the_same_children() -> None:
    rng = np.random.default_rng(5)
    tree = Tree(CODES, np.unique(rng.choice(CODES**3, 60, replace=False)))
    excluded = [rng.choice(tree.leaves(), 25, replace=False) for _ in range(3)]
    trie = Trie(tree)
    for level in range(3):
        prefixes = torch.from_numpy(rng.integers(CODES, size=(3, 4, level)))
        assert torch.equal(trie.mask(prefixes, excluded), searched_mask(tree, prefixes, excluded))


def test_catalogues_have_their_size_and_shape() -> None:
    zipf = zipf_keys(500, 16, seed=6)
    assert len(np.unique(zipf)) == 500
    tops = np.bincount(zipf // 256, minlength=16)
    assert tops.max() > 3 * np.median(tops)
    assert zipf_keys(500, 16, seed=6).tolist() == zipf.tolist()
    assert kmeans_keys(300, 8, 6, lambda _: None).shape == (300,)


def test_every_cell_is_measured_in_turns_and_the_worst_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ops.bench_constraint.BATCHES", (1, 2))
    monkeypatch.setattr("ops.bench_constraint.BEAMS", (3, 5))
    model = random_model(SMALL, 16, 64, seed=7).eval().requires_grad_(False)
    trees = trees_of((200, 400), 16, 8, lambda _: None)
    found = cells(model, trees, 2, 9, lambda _: None)
    assert len(found) == 2 * 2 * 2 * 2
    assert {cell["turns"] for cell in found} == {2}
    assert all(0 < cell["index_share"] < 1 for cell in found)
    asked = asked_otherwise(model, trees[400]["kmeans"], 2, 3, 10)
    assert all(seconds > 0 for seconds in asked.values())
    cell = Cell(1, "zipf", everything(), 1, 6, [(3.0, 2.0, 0.3), (1.0, 2.0, 0.2), (2.0, 2.0, 0.2)])
    assert cell.figures()["overhead"] == 0.0
    assert cell.figures()["index_share"] == 0.1


def test_changes_are_made_and_served_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SINGLE": 20, "BULK": 30, "BULKS": 2, "BLOCKS": 2, "REQUESTS": 3}.items():
        monkeypatch.setattr(f"ops.bench_constraint_changes.{name}", value)
    model = random_model(SMALL, 32, 64, seed=11).eval().requires_grad_(False)
    keys = np.unique(np.random.default_rng(12).integers(32**3, size=400))
    found = changes(model, keys, 13, lambda _: None)
    assert found["items"] == len(keys)
    assert 0 < found["insert_one_p50_s"] <= found["insert_one_p99_s"]
    assert found["insert_10000_s"] > 0
    assert set(found["serving_over_quiet"]) == {"single", "bulk"}


def test_an_index_of_items_inserts_and_deletes_leaves() -> None:
    index = Index(8, np.array([1, 5, 9]), np.array([20, 30, 40]))
    before = index.tree
    index.insert(2)
    index.delete(1)
    assert index.tree.leaves().tolist() == [5, 9, 30, 40]
    assert before.leaves().tolist() == [1, 5, 9]


def test_goals_are_missed_and_met_by_what_was_measured() -> None:
    changed = {
        "insert_10000_s": 0.2,
        "insert_one_p99_s": 0.0005,
        "serving_over_quiet": {"single": 1.1, "bulk": 1.3},
    }
    checks = checks_of({"overhead": {"items_200": 0.01, "items_400": -0.2}, "changes": changed})
    assert [check.ok for check in checks] == [False, True, False, True, True, False]
    assert not any(check.correctness for check in checks)
