"""The index of valid IDs against a brute-force reading of the same log."""

import time
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from learner.valid_ids import UnknownVersionError, ValidIds
from learner.valid_tree import Tree, keys_of, sids_of
from streams.events import SemanticId

CODES = 3
Op = tuple[str, SemanticId | None]

code = st.integers(0, CODES - 1)
# Few items and few leaves, so that leaves die, are born again, and are shared.
sid = st.sampled_from([(0, 0, 0), (0, 0, 1), (0, 2, 1), (1, 1, 1), (2, 0, 0), (2, 0, 2), (2, 2, 2)])
leaf = st.tuples(code, code, code)
operation = st.tuples(st.sampled_from("abcdefgh"), sid | st.none())
operations = st.lists(operation, max_size=40)


def built(ops: Iterable[Op]) -> ValidIds:
    index = ValidIds(CODES)
    for version, (item, leaf) in enumerate(ops):
        if leaf is None:
            index.delete(version, item)
        else:
            index.upsert(version, item, leaf)
    return index


def catalogue_at(ops: list[Op], version: int) -> dict[str, SemanticId]:
    state: dict[str, SemanticId] = {}
    for item, leaf in ops[: version + 1]:
        if leaf is None:
            state.pop(item, None)
        else:
            state[item] = leaf
    return state


def key(leaf: SemanticId, codes: int = CODES) -> int:
    return (leaf[0] * codes + leaf[1]) * codes + leaf[2]


def expected_mask(
    live: set[SemanticId], prefix: tuple[int, ...], codes: int = CODES
) -> NDArray[np.bool_]:
    mask = np.zeros(codes, dtype=bool)
    for leaf in live:
        if leaf[: len(prefix)] == prefix:
            mask[leaf[len(prefix)]] = True
    return mask


def assert_tree_is(tree: Tree, live: set[SemanticId], gone: list[set[SemanticId]]) -> None:
    """Every mask of every node, also of nodes that do not live, for several requests at once."""
    excluded = [np.array([key(leaf) for leaf in leaves], dtype=np.int64) for leaves in gone]
    for level in range(3):
        prefixes = list(np.ndindex(*(CODES,) * level))
        node_M = [int(np.ravel_multi_index(p, (CODES,) * level)) if p else 0 for p in prefixes]
        prefix_BM = np.tile(np.array([-1, *node_M], dtype=np.int64), (len(gone), 1))
        mask_BMK = tree.child_mask(prefix_BM, level, excluded)
        located = tree.child_mask(prefix_BM, level, tree.locate(excluded))
        assert np.array_equal(mask_BMK, located)
        for request, leaves in enumerate(gone):
            assert not mask_BMK[request, 0].any()
            for beam, prefix in enumerate(prefixes, start=1):
                expected = expected_mask(live - leaves, tuple(map(int, prefix)))
                assert np.array_equal(mask_BMK[request, beam], expected)
        plain = tree.child_mask(prefix_BM, level)
        for beam, prefix in enumerate(prefixes, start=1):
            assert np.array_equal(plain[0, beam], expected_mask(live, tuple(map(int, prefix))))


@given(operations, st.lists(st.sets(st.tuples(code, code, code)), min_size=1, max_size=3))
def test_every_version_has_the_masks_of_what_lived_then(
    ops: list[Op], excluded: list[set[SemanticId]]
) -> None:
    index = built(ops)
    for version in {-1, len(ops) // 2, len(ops) - 1} & set(range(-1, len(ops))):
        live = set(catalogue_at(ops, version).values())
        tree = index.tree(version)
        assert tree.leaves().tolist() == sorted(key(leaf) for leaf in live)
        assert len(tree) == len(live)
        # Random leaves, all leaves, and all but one: the cases in which nodes go.
        but_one = set(sorted(live)[1:])
        assert_tree_is(tree, live, [*excluded, live, but_one])


@given(operations, st.sets(st.sampled_from("abcdefgh")))
def test_members_and_ids_are_those_of_the_version(ops: list[Op], shown: set[str]) -> None:
    index = built(ops)
    for version in range(-1, len(ops)):
        state = catalogue_at(ops, version)
        of_leaf: dict[int, set[str]] = {}
        for item, leaf in state.items():
            of_leaf.setdefault(key(leaf), set()).add(item)
        for leaf_key in range(CODES**3):
            assert index.members(leaf_key, version) == sorted(of_leaf.get(leaf_key, set()))
        for item in "abcdefgh":
            assert index.sid_of(item, version) == state.get(item)
        exhausted = [leaf for leaf, members in of_leaf.items() if members <= shown]
        assert index.exhausted(shown, version).tolist() == sorted(exhausted)
    assert all(index.sid_of(item) == leaf for item, leaf in catalogue_at(ops, len(ops)).items())


@given(operations, st.integers(1, 45))
def test_newborn_leaves_are_those_with_a_member_that_came_lately(ops: list[Op], span: int) -> None:
    index = built(ops)
    came: dict[str, tuple[SemanticId, int]] = {}
    for version, (item, leaf) in enumerate(ops):
        if leaf is None:
            came.pop(item, None)
        elif item not in came or came[item][0] != leaf:
            came[item] = (leaf, version)
        young = {key(leaf) for leaf, born in came.values() if born > version - span}
        assert index.newborn(version, span).leaves().tolist() == sorted(young)
    with pytest.raises(UnknownVersionError):
        index.newborn(len(ops), span)


@given(operations, st.integers(-1, 45))
def test_pruning_keeps_every_later_version_and_refuses_the_earlier(
    ops: list[Op], before: int
) -> None:
    index = built(ops)
    index.tree(-1)
    index.prune(before)
    oldest = min(before, len(ops) - 1)
    assert index.oldest == oldest
    for version in range(-1, len(ops)):
        if version < oldest:
            with pytest.raises(UnknownVersionError, match="is pruned"):
                index.tree(version)
            continue
        live = {key(leaf) for leaf in catalogue_at(ops, version).values()}
        assert index.tree(version).leaves().tolist() == sorted(live)
    # And it goes on where it was.
    index.upsert(len(ops), "a", (1, 2, 2))
    assert index.sid_of("a") == (1, 2, 2)


@given(operations, st.lists(st.integers(-1, 12), min_size=40, max_size=40), st.integers(1, 9))
def test_an_index_that_is_pruned_as_it_goes_answers_as_one_that_never_was(
    ops: list[Op], behind: list[int], span: int
) -> None:
    """Rows of the forgotten are taken again, and nothing of them is seen."""
    whole, pruned = ValidIds(CODES), ValidIds(CODES)
    for version, (item, leaf) in enumerate(ops):
        for index in (whole, pruned):
            if leaf is None:
                index.delete(version, item)
            else:
                index.upsert(version, item, leaf)
        if behind[version] >= 0:
            pruned.prune(version - behind[version])
    again = ValidIds.from_tensors(pruned.to_tensors())
    for one in (pruned, again):
        for at in range(max(0, one.oldest), len(ops)):
            assert one.tree(at).leaves().tolist() == whole.tree(at).leaves().tolist()
            newborn = whole.newborn(at, span).leaves().tolist()
            assert one.newborn(at, span).leaves().tolist() == newborn
            for name in "abcdefgh":
                assert one.key_of(name, at) == whole.key_of(name, at)
            for leaf_key in range(CODES**3):
                assert one.members(leaf_key, at) == whole.members(leaf_key, at)
    again.prune(len(ops))
    assert again.rows == len(catalogue_at(ops, len(ops) - 1))


def test_a_long_churn_leaves_an_index_of_the_items_that_live_and_the_ends_that_are_kept() -> None:
    items, behind, codes = 200, 50, 32
    rng = np.random.default_rng(4)
    index = ValidIds(codes)
    state: set[int] = set()
    most = 0
    for version in range(30_000):
        item = int(rng.integers(items))
        if item in state:
            index.delete(version, f"i{item}")
            state.remove(item)
        else:
            c1, c2, c3 = rng.integers(0, codes, 3).tolist()
            index.upsert(version, f"i{item}", (c1, c2, c3))
            state.add(item)
        if version % 7 == 0:
            index.prune(version - behind)
        most = max(most, index.rows)
    assert most <= items + behind + 7
    stays = index.to_tensors()["valid_ids.stays"]
    assert stays.shape[1] == index.rows
    before = index.rows
    index.prune(index.version)
    assert len(state) == index.rows < before
    assert {name for name in map(str, range(items)) if index.key_of(f"i{name}") is not None} == {
        str(item) for item in state
    }


def test_pruning_costs_what_it_forgets_and_not_what_there_is() -> None:
    index = ValidIds(64)
    rng = np.random.default_rng(1)
    for version, leaf in enumerate(rng.integers(0, 64, (100_000, 3)).tolist()):
        index.upsert(version, f"item-{version}", (leaf[0], leaf[1], leaf[2]))
    spent = []
    for version in range(100_000, 100_200):
        index.delete(version, f"item-{version - 100_000}")
        begin = time.process_time()
        index.prune(version)
        spent.append(time.process_time() - begin)
    assert min(spent) < 2e-4
    assert index.rows == 100_000 - 200


@given(operations)
def test_tensors_carry_the_whole_index(ops: list[Op]) -> None:
    index = built(ops)
    index.prune(len(ops) // 3)
    again = ValidIds.from_tensors(index.to_tensors())
    assert (again.codes, again.version, again.oldest) == (CODES, index.version, index.oldest)
    for version in range(index.oldest, len(ops)):
        assert np.array_equal(again.tree(version).leaves(), index.tree(version).leaves())
        for leaf_key in range(CODES**3):
            assert again.members(leaf_key, version) == index.members(leaf_key, version)
    again.delete(len(ops), "a")
    assert again.sid_of("a") is None


def test_names_of_any_script_survive_a_checkpoint() -> None:
    index = ValidIds(4)
    for version, item in enumerate(["", "é", "视频", "plain"]):
        index.upsert(version, item, (1, 1, version))
    again = ValidIds.from_tensors(index.to_tensors())
    assert [again.sid_of(item) for item in ("", "é", "视频", "plain")] == [
        (1, 1, version) for version in range(4)
    ]


def test_a_key_that_died_and_was_born_again_is_taken_alive_at_the_version() -> None:
    index = ValidIds(4)
    index.upsert(10, "a", (1, 2, 3))
    index.delete(20, "a")
    index.upsert(30, "b", (1, 2, 3))
    assert [len(index.tree(version)) for version in (9, 10, 19, 20, 29, 30)] == [0, 1, 1, 0, 0, 1]
    leaf = int(index.tree(30).leaves()[0])
    assert index.members(leaf, 15) == ["a"]
    assert index.members(leaf, 25) == []
    assert index.members(leaf, 30) == ["b"]


def test_a_shared_leaf_lives_until_its_last_member_leaves() -> None:
    index = ValidIds(4)
    index.upsert(0, "a", (0, 0, 0))
    index.upsert(1, "b", (0, 0, 0))
    index.delete(2, "a")
    index.upsert(3, "b", (0, 0, 1))
    assert [index.tree(version).leaves().tolist() for version in range(4)] == [[0], [0], [0], [1]]


def test_a_tree_that_was_handed_out_does_not_change() -> None:
    index = built([("a", (0, 0, 0)), ("b", (1, 1, 1))])
    tree = index.tree(1)
    index.upsert(1, "c", (2, 2, 2))
    assert len(tree) == 2
    assert len(index.tree(1)) == 3
    with pytest.raises(ValueError, match="read-only"):
        tree.leaves()[0] = 5


def test_an_unchanged_upsert_keeps_the_tree() -> None:
    index = built([("a", (0, 0, 0))])
    tree = index.tree(0)
    index.upsert(0, "a", (0, 0, 0))
    assert index.tree(0) is tree


def test_versions_go_forward_and_are_known_before_they_are_asked_for() -> None:
    index = built([("a", (0, 0, 0)), ("nobody", None)])
    assert index.version == 1
    index.advance(7)
    assert len(index.tree(7)) == 1
    with pytest.raises(UnknownVersionError, match="8 is not applied yet, the last is 7"):
        index.tree(8)
    with pytest.raises(ValueError, match="6 comes after 7"):
        index.delete(6, "a")


def test_codes_outside_the_codebook_are_refused_instead_of_naming_another_leaf() -> None:
    with pytest.raises(ValueError, match=r"'a' has semantic ID \(0, 3, 0\)"):
        ValidIds(3).upsert(0, "a", (0, 3, 0))
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        keys_of(np.array([[0, 3, 0]]), 3)
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        built([("a", (0, 0, 0))]).tree(0).path_masks(np.array([[[0, 3, 0]]]))


def test_lists_of_exclusions_must_match_the_requests() -> None:
    tree = built([("a", (0, 0, 0))]).tree(0)
    with pytest.raises(ValueError, match="2 lists of excluded leaves for 1 requests"):
        tree.child_mask(np.zeros((1, 1), np.int64), 0, [np.zeros(1, np.int64)] * 2)


leaf_sets = st.sets(st.integers(0, CODES**3 - 1))


@pytest.mark.parametrize("part", [1 << 30, 2, 0], ids=["merged", "either", "bucket by bucket"])
@given(leaf_sets, st.lists(st.tuples(leaf_sets, leaf_sets), max_size=8), st.sets(leaf))
def test_a_changed_tree_is_the_tree_of_its_leaves_and_those_before_it_stay(
    part: int,
    first: set[int],
    changes: list[tuple[set[int], set[int]]],
    gone: set[SemanticId],
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("learner.valid_tree.PART", part)
        live = set(first)
        trees = [(Tree(CODES, np.array(sorted(live), dtype=np.int64)), set(live))]
        for added, removed in changes:
            added = added - removed
            live = (live - removed) | added
            tree = trees[-1][0].changed(
                np.array(list(added), dtype=np.int64), np.array(list(removed), dtype=np.int64)
            )
            trees.append((tree, set(live)))
    for tree, keys in trees:
        assert tree.leaves().tolist() == sorted(keys)
        assert len(tree) == len(keys)
        assert [tree.key_at(rank) for rank in range(len(tree))] == sorted(keys)
        ranks = tree.ranks_of(np.arange(CODES**3)).tolist()
        assert [at for at, rank in enumerate(ranks) if rank >= 0] == sorted(keys)
        assert [rank for rank in ranks if rank >= 0] == list(range(len(keys)))
        of = [tuple(sid) for sid in sids_of(tree.leaves(), CODES).tolist()]
        assert_tree_is(tree, {(a, b, c) for a, b, c in of}, [gone, set()])


def test_an_arena_that_is_mostly_waste_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.valid_tree.SLACK", 1 << 10)
    tree = Tree(16, np.arange(0, 4000, 2))
    first = most = tree.nbytes
    for turn in range(2_000):
        odd, arena = np.array([2 * turn + 1]), tree._arena
        tree = tree.changed(odd, odd - 1)
        most = max(most, tree.nbytes)
        assert tree._arena is arena or tree.nbytes < 2 * first
    assert tree.leaves().tolist() == list(range(1, 4000, 2))
    assert most < 3 * first


def test_an_arena_does_not_grow_before_it_is_left() -> None:
    tree = Tree(16, np.arange(0, 4000, 2))
    left = 0
    for odd in range(1, 4000, 2):
        arena, leaf_key = tree._arena, tree._arena.leaf_key
        tree = tree.changed(np.array([odd]), np.array([odd - 1]))
        left += tree._arena is not arena
        assert arena.leaf_key is leaf_key
    assert left > 1


@given(operations, st.sets(st.integers(0, 40)))
def test_a_version_asked_for_as_it_comes_is_the_one_asked_for_later(
    ops: list[Op], asked: set[int]
) -> None:
    index = ValidIds(CODES)
    for version, (item, to) in enumerate(ops):
        # Two records share a version now and then, as in a bulk load.
        at = version - version % 2
        index.upsert(at, item, to) if to is not None else index.delete(at, item)
        if version in asked:
            state = catalogue_at(ops, version)
            assert index.tree(at).leaves().tolist() == sorted({key(one) for one in state.values()})
    for version in range(0, len(ops), 2):
        state = catalogue_at(ops, min(version + 1, len(ops) - 1))
        found = index.tree(version).leaves().tolist()
        assert found == sorted({key(one) for one in state.values()})


@given(operations, st.sets(st.tuples(code, code, code)), st.data())
def test_children_are_the_mask_as_a_list_also_of_prefixes_asked_for_twice(
    ops: list[Op], gone: set[SemanticId], data: st.DataObject
) -> None:
    tree = built(ops).tree(len(ops) - 1)
    excluded = [np.array([key(leaf) for leaf in gone], dtype=np.int64), tree.leaves()[:0]]
    located = tree.locate(excluded)
    for level in range(3):
        prefix = st.integers(-1, CODES**level - 1)
        rows = st.lists(st.lists(prefix, min_size=3, max_size=3), min_size=2, max_size=2)
        prefix_BM = np.array(data.draw(rows), dtype=np.int64)
        children = tree.children(tree.rows_of(prefix_BM, level), level, located)
        mask = tree.child_mask(prefix_BM, level, excluded).reshape(6, CODES)
        place, code = np.nonzero(mask)
        assert children.place_n.tolist() == place.tolist()
        assert children.code_n.tolist() == code.tolist()
        child = prefix_BM.reshape(-1)[children.place_n] * CODES + children.code_n
        assert tree.rows_of(child, level + 1).tolist() == children.row_n.tolist()


def test_keys_and_ids_are_each_others_inverse_and_order_like_the_ids() -> None:
    sids = np.array(list(np.ndindex(5, 5, 5)))
    keys = keys_of(sids, 5)
    assert keys.tolist() == list(range(125))
    assert np.array_equal(sids_of(keys, 5), sids)
    assert keys_of(np.array([[8191, 8191, 8191]]), 8192).tolist() == [8192**3 - 1]


def test_masks_along_a_path_are_those_of_its_nodes_less_what_is_excluded() -> None:
    rng = np.random.default_rng(0)
    codes = 6
    live_n = np.unique(rng.integers(0, codes**3, 60))
    tree = Tree(codes, live_n)
    live = {tuple(map(int, leaf)) for leaf in sids_of(live_n, codes)}
    sids_Bk3 = sids_of(rng.choice(live_n, (5, 4)), codes)
    sids_Bk3[2, 3] = -1
    excluded = [rng.choice(live_n, size) for size in (0, 5, 30, 50, 60)]
    masks = tree.path_masks(sids_Bk3, excluded)
    for request, slot in np.ndindex(5, 4):
        target = tuple(map(int, sids_Bk3[request, slot]))
        left = live - {tuple(map(int, leaf)) for leaf in sids_of(excluded[request], codes)}
        for level in range(3):
            expected = (
                np.zeros(codes, dtype=bool)
                if target == (-1, -1, -1)
                else expected_mask({(a, b, c) for a, b, c in left}, target[:level], codes)
            )
            assert np.array_equal(masks[request, slot, level], expected)


def test_a_catalogue_loads_and_a_slate_is_masked_fast() -> None:
    rng = np.random.default_rng(1)
    leaves = [(int(a), int(b), int(c)) for a, b, c in rng.integers(0, 32, (7600, 3))]
    loading = []
    for _ in range(5):  # the quickest of some: other work on the machine only adds
        index = ValidIds(32)
        begin = time.process_time()
        for version, leaf in enumerate(leaves):
            index.upsert(version, f"item-{version}", leaf)
        tree = index.tree(len(leaves) - 1)
        loading.append(time.process_time() - begin)
    assert min(loading) < 0.2

    excluded = [rng.choice(tree.leaves(), 128, replace=False)]
    path_1M = rng.choice(tree.leaves(), (1, 8))
    spent = []
    for _ in range(50):
        begin = time.process_time()
        located = tree.locate(excluded)
        tree.child_mask(np.zeros((1, 1), np.int64), 0, located)
        tree.child_mask(path_1M // 32**2, 1, located)
        tree.child_mask(path_1M // 32, 2, located)
        spent.append(time.process_time() - begin)
    assert min(spent) < 1.5e-3
