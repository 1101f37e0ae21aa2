"""The catalogue as a fold over its log."""

import pickle

import pytest

from learner.catalogue import Catalogue, CatalogueError
from learner.valid_tree import sids_of
from streams.events import SemanticId, Upsert, encode
from tests.learner.makers import CODEBOOK, upsert

Record = tuple[int, str, bytes | None]

LOG: list[Record] = [
    (0, "a", upsert("a", (0, 0, 0))),
    (2, "b", upsert("b", (0, 0, 1))),
    (3, "a", upsert("a", (1, 1, 1))),
    (7, "b", None),
    (8, "c", upsert("c", (2, 2, 2))),
]


def folded(log: list[Record], codes: int = 4) -> Catalogue:
    catalogue = Catalogue(codes)
    for offset, item, value in log:
        catalogue.take(offset, item.encode(), value)
    return catalogue


def leaves(catalogue: Catalogue, version: int) -> list[SemanticId]:
    keys = catalogue.valid.tree(version).leaves()
    return [(int(a), int(b), int(c)) for a, b, c in sids_of(keys, catalogue.valid.codes)]


def test_the_version_is_the_offset_of_the_last_record() -> None:
    catalogue = Catalogue(4)
    assert catalogue.version == -1
    for offset, item, value in LOG:
        catalogue.take(offset, item.encode(), value)
        assert catalogue.version == offset


def test_every_version_has_the_leaves_that_lived_then() -> None:
    catalogue = folded(LOG)
    assert leaves(catalogue, 0) == [(0, 0, 0)]
    assert leaves(catalogue, 2) == [(0, 0, 0), (0, 0, 1)]
    assert leaves(catalogue, 6) == [(0, 0, 1), (1, 1, 1)]
    assert leaves(catalogue, 7) == [(1, 1, 1)]
    assert leaves(catalogue, 8) == [(1, 1, 1), (2, 2, 2)]
    assert sorted(catalogue.items) == ["a", "c"]


def test_an_entry_that_changes_only_its_text_keeps_its_leaf() -> None:
    catalogue = folded(LOG)
    catalogue.take(
        9, b"c", encode(Upsert(item="c", sid=(2, 2, 2), codebook=CODEBOOK, duration_ms=5))
    )
    assert catalogue.version == 9
    assert catalogue.items["c"].duration_ms == 5
    assert leaves(catalogue, 9) == leaves(catalogue, 8)


def test_a_deleted_item_may_come_back() -> None:
    catalogue = folded([*LOG, (9, "b", upsert("b", (0, 0, 1)))])
    assert (0, 0, 1) not in leaves(catalogue, 8)
    assert (0, 0, 1) in leaves(catalogue, 9)


def test_a_log_read_before_and_after_its_compaction_comes_to_the_same() -> None:
    """Also where the log ends in the tombstone of an item whose upsert is gone by now."""
    log = [*LOG, (12, "d", upsert("d", (3, 0, 0))), (15, "d", None)]
    last = {item: offset for offset, item, _ in log}
    whole, late = folded(log), folded([record for record in log if last[record[1]] == record[0]])
    assert late.version == whole.version == 15
    for catalogue in (whole, late):
        assert leaves(catalogue, 15) == [(1, 1, 1), (2, 2, 2)]
        catalogue.take(16, b"c", None)
        assert leaves(catalogue, 16) == [(1, 1, 1)]
        assert leaves(catalogue, 15) == [(1, 1, 1), (2, 2, 2)]


def test_an_entry_of_another_codebook_is_refused_by_name() -> None:
    catalogue = folded(LOG)
    with pytest.raises(CatalogueError, match=r"offset 9, item 'd': codebook other, .* c0debook"):
        catalogue.take(9, b"d", upsert("d", (3, 3, 3), codebook="other"))
    assert "d" not in catalogue.items
    assert (3, 3, 3) not in leaves(catalogue, catalogue.version)


@pytest.mark.parametrize("sid", [(0, 0, 4), (-1, 0, 0), (0, 70_000, 0)])
def test_an_entry_with_a_code_outside_the_codebook_is_refused(sid: SemanticId) -> None:
    catalogue = folded(LOG)
    with pytest.raises(CatalogueError, match=r"item 'd': semantic ID .* allowed 0\.\.3"):
        catalogue.take(9, b"d", upsert("d", sid))
    assert catalogue.version == 8


@pytest.mark.parametrize("duration_ms", [-1, 1 << 32])
def test_an_entry_whose_duration_no_context_can_hold_is_refused(duration_ms: int) -> None:
    catalogue = folded(LOG)
    with pytest.raises(
        CatalogueError, match=rf"item 'd': duration_ms {duration_ms}, allowed 0\.\."
    ):
        catalogue.take(9, b"d", upsert("d", (3, 3, 3), duration_ms=duration_ms))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"d", b"rubbish"),
        (b"d", encode(Upsert(v="9.0", item="d", sid=(0, 0, 0), codebook="c", duration_ms=1))),
        (b"d", upsert("e", (0, 0, 0))),
        (None, upsert("e", (0, 0, 0))),
        (b"\xff\xfe", upsert("e", (0, 0, 0))),
        (b"", upsert("", (0, 0, 0))),
    ],
    ids=["malformed", "unknown major", "other item", "no key", "key not text", "no name"],
)
def test_an_unusable_record_is_refused_with_its_offset_and_changes_nothing(
    key: bytes | None, value: bytes
) -> None:
    catalogue = folded(LOG)
    with pytest.raises(CatalogueError, match="catalogue offset 9"):
        catalogue.take(9, key, value)
    assert sorted(catalogue.items) == ["a", "c"]
    assert leaves(catalogue, catalogue.version) == [(1, 1, 1), (2, 2, 2)]


def test_the_tokenisers_embedding_is_not_kept() -> None:
    catalogue = Catalogue(4)
    entry = Upsert(item="a", sid=(0, 0, 0), codebook=CODEBOOK, duration_ms=1, embedding=b"x" * 1000)
    catalogue.take(0, b"a", encode(entry))
    assert catalogue.items["a"].embedding == b""


def test_an_author_is_known_for_every_version_not_pruned() -> None:
    catalogue = folded(
        [
            (0, "a", upsert("a", (0, 0, 0), author="ann")),
            (1, "b", upsert("b", (0, 0, 1))),
            (2, "a", upsert("a", (0, 1, 0), author="ann")),
            (4, "a", upsert("a", (0, 1, 0), author="bob")),
            (5, "a", None),
            (7, "a", upsert("a", (0, 1, 0))),
            (9, "b", upsert("b", (0, 0, 1), author="cid")),
        ]
    )
    known = {0: "ann", 2: "ann", 3: "ann", 4: "bob", 7: "", 9: ""}
    assert {version: catalogue.author("a", version) for version in known} == known
    assert [catalogue.author("b", version) for version in (1, 8, 9)] == ["", "", "cid"]
    assert catalogue.author("nobody", 9) == ""
    for oldest in range(10):
        catalogue.prune(oldest)
        assert catalogue.valid.oldest == oldest
        assert all(catalogue.author("a", n) == known[n] for n in known if n >= oldest)
        assert all(catalogue.author("b", n) == "" for n in range(oldest, 9))


def test_pruned_authors_take_no_memory() -> None:
    catalogue = Catalogue(4)
    for offset in range(2_000):
        value = upsert("a", (0, 0, 0), author=f"{offset}") if offset % 3 else None
        catalogue.take(offset, b"a", value)
        catalogue.prune(offset - 10)
    assert len(pickle.dumps(vars(catalogue)["_authors"])) < 2_000


def test_an_item_that_left_its_leaf_since_is_known_to_have() -> None:
    valid = folded(LOG).valid
    assert valid.left_since("a", 0)  # it moved
    assert valid.left_since("b", 2)
    assert not valid.left_since("a", 3)
    assert not valid.left_since("b", 7)
    assert not valid.left_since("c", 8)
