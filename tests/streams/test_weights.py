"""The weight wire format: what is put together is what was published, or nothing."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.blocks import State, digest_of
from streams.chain import anchored
from streams.clients import producer, records
from streams.events import encode
from streams.settings import KafkaSettings
from streams.topics import MAX_MESSAGE_BYTES, WEIGHTS_ANCHORS
from streams.weights import (
    CHUNK_BYTES,
    Assembler,
    Chunk,
    Commit,
    Manifest,
    StepEntry,
    WeightError,
    pack,
    record_keys,
    schema_of,
)

Whole = tuple[Manifest, bytes]


def verified_state(manifest: Manifest, content: bytes) -> State:
    return anchored(manifest, content).state


def state_of(seed: int, rows: int = 3) -> State:
    rng = np.random.default_rng(seed)
    return {
        "heads": rng.standard_normal((rows, 4)).astype(np.float32),
        "bias": rng.standard_normal(5),
        "steps": np.array(seed, dtype=np.int64),
        "empty": np.zeros((0, 2), dtype=np.float16),
    }


def manifest_of(version: int, state: State) -> Manifest:
    return Manifest(
        version=version,
        lineage="line",
        codebook="c0de",
        preset="tiny",
        codes=32,
        user_rows=8,
        schema=schema_of(state),
        digest=digest_of(state),
        size_bytes=0,
        chunks=0,
        journal=[
            StepEntry(ranges=[(0, 3, 9)], trained=4, control=1, without_target=1, condemned=0)
        ],
        watermark_ms=5,
        created_ms=7,
    )


def published(version: int, state: State) -> list[bytes]:
    """A version's values in the order of the topic."""
    return [value for _, value in pack(manifest_of(version, state), state)]


def assembled(values: list[bytes | None]) -> list[Whole]:
    assembler = Assembler()
    wholes = (assembler.take(value) for value in values)
    return [whole for whole in wholes if whole is not None]


LARGE = state_of(1, rows=CHUNK_BYTES // 8)
"""Three chunks."""


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and np.array_equal(value, other[name])
        for name, value in one.items()
    )


# --- whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [state_of(3), LARGE], ids=["one chunk", "three chunks"])
def test_a_version_comes_back_as_it_was_published(state: State) -> None:
    values = published(4, state)
    ((manifest, content),) = assembled([*values])
    assert manifest == manifest_of_wire(values[0])
    assert manifest.chunks == len(values) - 2
    assert manifest.journal[0].ranges == [(0, 3, 9)]
    assert same(verified_state(manifest, content), state)


def manifest_of_wire(value: bytes) -> Manifest:
    assembler = Assembler()
    assert assembler.take(value) is None
    return msgspec.msgpack.decode(value, type=Manifest)


def test_every_record_fits_into_a_kafka_record() -> None:
    assert len(published(4, LARGE)) == 5
    assert max(len(value) for value in published(4, LARGE)) < MAX_MESSAGE_BYTES


def test_a_versions_keys_are_those_of_its_records() -> None:
    manifest = manifest_of(4, LARGE)
    assert [key for key, _ in pack(manifest, LARGE)] == record_keys(manifest)
    assert record_keys(manifest) == ["4/manifest", "4/0", "4/1", "4/2", "4/commit"]


def test_versions_come_one_after_the_other_and_tombstones_between_are_nothing() -> None:
    one, two = published(1, state_of(1)), published(2, state_of(2))
    found = assembled([*one, None, *two[:1], None, *two[1:]])
    assert [manifest.version for manifest, _ in found] == [1, 2]


def test_the_rest_of_a_version_whose_beginning_was_deleted_is_passed_over() -> None:
    rest, whole = published(1, LARGE)[2:], published(2, state_of(2))
    assert [manifest.version for manifest, _ in assembled([*rest, *whole])] == [2]


@given(st.integers(1, 4), st.integers(0, 1 << 20))
def test_a_version_cut_short_never_appears(length: int, seed: int) -> None:
    cut = published(1, LARGE)[:length]
    after = published(2, state_of(seed))
    assert [manifest.version for manifest, _ in assembled([*cut, *after])] == [2]


# --- or absent --------------------------------------------------------------------------------------


def refusal(values: list[bytes]) -> str:
    """What an assembler says, and that the next version is unharmed by it."""
    assembler, said = Assembler(), []
    for value in values:
        try:
            assert assembler.take(value) is None
        except WeightError as error:
            said.append(str(error))
    wholes = [assembler.take(value) for value in published(9, state_of(9))]
    assert wholes[-1] is not None
    assert len(said) == 1, said
    return said[0]


def test_a_missing_chunk_is_named() -> None:
    manifest, first, second, third, commit = published(4, LARGE)
    assert "version 4" in refusal([manifest, first, third, commit])
    assert "chunk 2" in refusal([manifest, first, third, commit])
    assert "2 of 3 chunks" in refusal([manifest, first, second, commit])


def test_a_chunk_out_of_order_is_named() -> None:
    manifest, first, second, third, commit = published(4, LARGE)
    for order in ([second, first, third], [first, first, second, third]):
        assert "version 4: chunk" in refusal([manifest, *order, commit])


def test_a_chunk_or_commit_of_another_version_is_named() -> None:
    manifest, *chunks, commit = published(4, LARGE)
    foreign = encode(Chunk(version=3, index=1, data=b"x"))
    assert "version 4: a record of version 3" in refusal([manifest, chunks[0], foreign, commit])
    other = encode(Commit(version=5))
    assert "version 4: a record of version 5" in refusal([manifest, *chunks, other])


def test_a_wrong_size_is_named() -> None:
    manifest, _, commit = published(4, state_of(1))
    short = encode(Chunk(version=4, index=0, data=b"x"))
    assert "version 4: 1 bytes" in refusal([manifest, short, commit])


def test_a_record_that_cannot_be_read_is_named() -> None:
    manifest, chunk, commit = published(4, state_of(1))
    assert "malformed" in refusal([manifest, chunk[:-1], commit])
    newer = manifest.replace(b"\xa31.0", b"\xa32.0")
    assert "unknown_major" in refusal([newer, chunk, commit])


def refused(manifest: Manifest, content: bytes) -> str:
    with pytest.raises(WeightError) as found:
        verified_state(manifest, content)
    return str(found.value)


def whole(state: State) -> Whole:
    ((manifest, content),) = assembled([*published(4, state)])
    return manifest, content


def test_a_changed_value_is_seen_by_the_digest() -> None:
    manifest, content = whole(state_of(1))
    flipped = bytearray(content)
    flipped[-1] ^= 1
    assert "version 4: digest" in refused(manifest, bytes(flipped))


@settings(max_examples=300)
@given(st.integers(0, 343), st.integers(1, 255))
def test_damage_anywhere_is_a_weight_error(at: int, flip: int) -> None:
    manifest, content = whole(state_of(1))
    damaged = bytearray(content)
    damaged[at % len(content)] ^= flip
    try:
        state = verified_state(manifest, bytes(damaged))
    except WeightError as error:
        assert "version 4" in str(error)
    else:  # JSON has spellings that mean the same
        assert same(state, state_of(1))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("bias"), "bias"),
        (lambda s: s.update(more=s["bias"]), "more"),
        (lambda s: s.update(heads=s["heads"].T.copy()), "heads"),
        (lambda s: s.update(bias=s["bias"].astype(np.float32)), "bias"),
    ],
)
def test_a_schema_that_differs_is_refused_by_the_tensors_name(change: Any, named: str) -> None:
    manifest, _ = whole(state_of(1))
    other = state_of(1)
    change(other)
    _, content = whole(other)
    assert f"version 4: schema differs at ['{named}']" in refused(manifest, content)


def test_schemas_are_compared_by_name_not_by_order() -> None:
    manifest, content = whole(state_of(1))
    manifest.schema.reverse()
    assert same(verified_state(manifest, content), state_of(1))


def test_the_digest_covers_names_types_shapes_and_values() -> None:
    base = {"a": np.zeros((2, 2), np.float32)}
    others: list[State] = [
        {"b": base["a"]},
        {"a": base["a"].astype(np.float64)},
        {"a": base["a"].reshape(4)},
        {"a": base["a"] + 1},
        {**base, "b": np.zeros(0, np.float32)},
    ]
    assert len({digest_of(state) for state in [base, *others]}) == 6
    assert digest_of({"b": others[0]["b"], "a": base["a"]}) == digest_of(
        {"a": base["a"], "b": others[0]["b"]}
    )
    assert digest_of({"a": np.asfortranarray(np.arange(6.0).reshape(2, 3))}) == digest_of(
        {"a": np.arange(6.0).reshape(2, 3)}
    )


# --- through Kafka ----------------------------------------------------------------------------------


def test_an_aborted_version_is_invisible_and_the_next_one_whole(kafka: KafkaSettings) -> None:
    client = producer(kafka.bootstrap, transactional_id="test-weights", max_request_size=1 << 20)
    client.init_transactions()
    try:
        for version, commits in ((1, True), (2, False), (3, True)):
            state = LARGE if version == 2 else state_of(version)
            client.begin_transaction()
            for key, value in pack(manifest_of(version, state), state):
                client.send(WEIGHTS_ANCHORS, value, key.encode(), partition=0)
            client.flush()
            if commits:
                client.commit_transaction()
            else:
                client.abort_transaction()
    finally:
        client.close()
    found = assembled([record.value for record in records(kafka.bootstrap, WEIGHTS_ANCHORS)])
    assert [manifest.version for manifest, _ in found] == [1, 3]
    for manifest, content in found:
        assert same(verified_state(manifest, content), state_of(manifest.version))
