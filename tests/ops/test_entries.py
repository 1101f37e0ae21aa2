"""Lines become entries, and what is wrong with one is said by line and field."""

import json
from typing import Any

import numpy as np
import pytest

from learner.semantic_ids import Codebooks, fit
from ops.entries import FAULTS_KEPT, Entries, Lineage
from streams.events import Upsert, decode, upsert_decoder

BOOKS = fit(np.random.default_rng(1).normal(size=(50, 3)), 4, 1)
KNOWN = Upsert(
    item="known", sid=(3, 2, 1), codebook="c", duration_ms=1, author="then", embedding=b"12345678"
)


def entries(books: Codebooks | None = BOOKS) -> Entries:
    lineage = Lineage("c0de", 4, books)
    return Entries(lineage, lambda item: KNOWN if item == "known" else None)


def lines(*objects: Any) -> list[tuple[int, bytes]]:
    return [
        (number, one if isinstance(one, bytes) else json.dumps(one).encode())
        for number, one in enumerate(objects, start=1)
    ]


def taken(made: Entries, *objects: Any) -> list[Upsert]:
    return [decode(upsert_decoder, value) for _, value in made.take(lines(*objects))]


def test_an_embedding_becomes_the_id_that_its_float32_has_and_is_kept() -> None:
    made = entries()
    vectors = np.random.default_rng(2).normal(size=(5, 3))
    found = taken(
        made,
        *(
            {
                "item": f"i{n}",
                "duration_ms": n,
                "author": "ann",
                "tags": ["x"],
                "embedding": list(v),
            }
            for n, v in enumerate(vectors)
        ),
    )
    assert made.faults == []
    assert made.lines == 5
    for number, (entry, vector) in enumerate(zip(found, vectors, strict=True)):
        kept = np.frombuffer(entry.embedding, "<f4")
        assert np.array_equal(kept, vector.astype("f4"))
        assert entry.sid == tuple(BOOKS.assign(kept[None]).tolist()[0])
        assert (entry.item, entry.duration_ms, entry.codebook) == (f"i{number}", number, "c0de")
        assert (entry.author, entry.tags) == ("ann", ["x"])


def test_an_explicit_id_is_taken_as_it_is_and_needs_no_codebooks() -> None:
    made = entries(books=None)
    (entry,) = taken(made, {"item": "a", "duration_ms": 5, "sid": [1, 0, 3]})
    assert (entry.sid, entry.embedding, made.faults) == ((1, 0, 3), b"", [])


def test_what_is_said_of_a_known_item_changes_without_its_id() -> None:
    made = entries()
    (entry,) = taken(made, {"item": "known", "duration_ms": 9, "author": "now"})
    assert (entry.sid, entry.embedding) == (KNOWN.sid, KNOWN.embedding)
    assert (entry.duration_ms, entry.author) == (9, "now")


GOOD = {"item": "g", "duration_ms": 1, "sid": [0, 0, 0]}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "line 2: not JSON: "),
        (b"\xff\xfe", "line 2: not JSON: "),
        ({"duration_ms": 1}, "line 2, item: it is missing; a line is an object such as {"),
        ({**GOOD, "item": ""}, "line 2, item: Expected `str` of length >= 1"),
        ({**GOOD, "item": "x", "duration_ms": "1"}, "line 2, duration_ms: Expected `int`"),
        ({**GOOD, "item": "x", "duration_ms": -1}, "line 2, duration_ms: Expected `int` >= 0"),
        ({**GOOD, "item": "x", "tags": [1]}, "line 2, tags[0]: Expected `str`"),
        ({**GOOD, "item": "x", "dur": 1}, "line 2, dur: there is no such field; there are: item, "),
        ({**GOOD, "item": "x", "sid": [0, 0, 4]}, "line 2, sid: [0, 0, 4], codes allowed are 0..3"),
        ({**GOOD, "item": "x", "sid": [0, 0]}, "line 2, sid: Expected `array` of length 3"),
        ({**GOOD, "item": "x", "embedding": [1, 2, 3]}, "line 2, sid: give `embedding` or `sid`"),
        ({**GOOD}, "line 2, item: 'g' stands in line 1 already"),
        ({"item": "x", "duration_ms": 1}, "line 2, embedding: 'x' is not in the catalogue yet"),
        (
            {"item": "x", "duration_ms": 1, "embedding": [1.0, 2.0]},
            "line 2, embedding: it has 2 numbers, the codebooks read 3",
        ),
        (
            {"item": "x", "duration_ms": 1, "embedding": [1.0, 2.0, 1e39]},
            "line 2, embedding: it holds a number that is not finite",
        ),
        (
            {**GOOD, "item": "x", "tags": ["y" * 1_000_000]},
            "line 2: the entry has 1,000,",
        ),
    ],
)
def test_a_wrong_line_is_told_by_number_and_field(line: Any, says: str) -> None:
    made = entries()
    good = taken(made, GOOD, line, {**GOOD, "item": "h"})
    assert len(made.faults) == 1
    assert made.faults[0].startswith(says)
    assert [entry.item for entry in good] == ["g", "h"]
    assert made.lines == 3


def test_an_embedding_without_codebooks_says_where_to_name_them() -> None:
    made = entries(books=None)
    assert taken(made, {"item": "x", "duration_ms": 1, "embedding": [1.0]}) == []
    assert "--codebooks" in made.faults[0]


def test_blank_lines_count_for_nothing_but_the_numbers() -> None:
    made = entries()
    assert [entry.item for entry in taken(made, GOOD, b"  \n", b"")] == ["g"]
    taken(made, b"", b"rubbish")
    assert made.faults[0].startswith("line 2: ")
    assert made.lines == 2


def test_a_file_of_rubbish_is_told_of_briefly() -> None:
    made = entries()
    taken(made, *([b"rubbish"] * 500))
    assert (len(made.faults), made.faulty) == (FAULTS_KEPT, 500)
