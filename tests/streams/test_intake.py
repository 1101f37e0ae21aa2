"""What may enter the join, and the reason for everything that may not."""

from typing import Any

import msgspec
import pytest
from aiokafka.partitioner import DefaultPartitioner as AioPartitioner
from hypothesis import given
from hypothesis import strategies as st
from kafka.partitioner.default import murmur2 as kafka_python_murmur2

from streams.events import (
    Exposure,
    Feedback,
    Tick,
    UnreadableError,
    decode,
    encode,
    exposure_decoder,
    feedback_decoder,
)
from streams.intake import MAX_EVENT_BYTES, MAX_ID, MAX_ITEMS, Intake, partition_of
from tests.streams.makers import T0, Feed, exposure

PARTITIONS = 4
HERE = partition_of("user", PARTITIONS)
SKEW_MS = 5000
INTAKE = Intake(HERE, PARTITIONS, SKEW_MS)


def refused(event: Any, record_ms: int = T0) -> tuple[str, str]:
    """Reason and detail of the dead letter that a record becomes."""
    if isinstance(event, Exposure):
        reader: Any = INTAKE.exposure
    else:
        reader = INTAKE.feedback
    value = encode(event) if isinstance(event, msgspec.Struct) else event
    with pytest.raises(UnreadableError) as found:
        reader(value, record_ms)
    return found.value.reason, found.value.detail


def feedback(**fields: Any) -> Feedback:
    return msgspec.structs.replace(Feed()("begin", 0, 0), **fields)


def with_item(**fields: Any) -> Exposure:
    made = exposure(slots=1)
    made.items = [msgspec.structs.replace(made.items[0], **fields)]
    return made


def test_good_records_come_through_as_they_were_written() -> None:
    for event in (exposure(), Tick(time_ms=T0, writer="w")):
        assert INTAKE.exposure(encode(event), T0) == event
    for other in (feedback(), Feed().left(3), Tick(time_ms=T0, writer="w")):
        assert INTAKE.feedback(encode(other), T0) == other


def test_a_record_without_a_value_is_empty() -> None:
    assert refused(None) == ("empty", "the record has no value")


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff",
        b"not messagepack",
        encode(Feed()("begin", 0, 0))[:-1],
        encode(Feed()("begin", 0, 0)) + b"\x00",
        msgspec.msgpack.encode({"type": "feedback", "v": "1.0"}),
        msgspec.msgpack.encode({"type": "elsewhere", "v": "1.0"}),
        msgspec.msgpack.encode([1, 2]),
        encode(Feed()("begin", 0, 0)).replace(b"\xa4user\xa4user", b"\xa4user\xa4\xff\xff\xff\xff"),
        b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0",  # nested without end
        b"\xdf\xff\xff\xff\xff",  # a map of four billion pairs
    ],
)
def test_what_is_not_an_event_is_malformed(value: bytes) -> None:
    assert refused(value)[0] == "malformed"


@given(st.binary(max_size=60), st.integers(0, 200), st.booleans())
def test_no_bytes_whatever_break_the_reader(noise: bytes, at: int, on_exposures: bool) -> None:
    good = encode(exposure(slots=1)) if on_exposures else encode(Feed()("like", 1, 0))
    value = good[:at] + noise + good[at + len(noise) :]
    reader: Any = INTAKE.exposure if on_exposures else INTAKE.feedback
    try:
        assert isinstance(reader(value, T0), Exposure | Feedback | Tick)
    except UnreadableError as error:
        assert error.reason
        assert encode(feedback(event=error.detail))  # can be written down


def test_an_unknown_major_is_named_also_where_the_record_no_longer_fits() -> None:
    assert refused(feedback(v="2.0")) == ("unknown_major", "version 2.0, this reader knows 1.x")
    assert refused(msgspec.msgpack.encode({"type": "feedback", "v": "3.1"}))[0] == "unknown_major"


def test_fields_and_minors_not_known_yet_are_ignored() -> None:
    wire = msgspec.msgpack.decode(encode(feedback(v="1.9")))
    wire["mood"] = {"deep": [1, 2]}
    assert INTAKE.feedback(msgspec.msgpack.encode(wire), T0) == feedback(v="1.9")


def test_a_float_may_be_written_as_an_integer_and_an_integer_not_as_a_float() -> None:
    wire = msgspec.msgpack.decode(encode(exposure()))
    assert INTAKE.exposure(msgspec.msgpack.encode(wire | {"temperature": 1}), T0) == exposure()
    assert refused(msgspec.msgpack.encode(wire | {"time_ms": float(T0)}))[0] == "malformed"


def test_an_event_further_ahead_of_its_record_than_the_skew_is_from_the_future() -> None:
    at_most = feedback(time_ms=T0 + SKEW_MS)
    assert INTAKE.feedback(encode(at_most), T0) == at_most
    for event in (
        feedback(time_ms=T0 + SKEW_MS + 1),
        exposure(time_ms=T0 + SKEW_MS + 1),
        Tick(time_ms=T0 + SKEW_MS + 1, writer="w"),
    ):
        assert refused(event) == ("future", f"event time is {SKEW_MS + 1} ms ahead of its record")


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (feedback(time_ms=-1), "time_ms"),
        (feedback(play_ms=-1), "play_ms"),
        (feedback(play_ms=1 << 32), "play_ms"),
        (feedback(position=-1), "position"),
        (feedback(request=""), "request"),
        (feedback(event=""), "event"),
        (feedback(event="e" * (MAX_ID + 1)), "event"),
        (exposure(request="r" * (MAX_ID + 1)), "request"),
        (exposure(items=[]), "0 items"),
        (exposure(slots=MAX_ITEMS + 1), f"{MAX_ITEMS + 1} items"),
        (exposure(items=exposure().items * 2), "share a position"),
        (exposure(arm=""), "arm"),
        (exposure(arm="a/b"), "arm"),
        (exposure(temperature=0.0), "temperature"),
        (exposure(temperature=float("nan")), "temperature"),
        (exposure(temperature=float("inf")), "temperature"),
        (exposure(context=b"x" * 19), "context"),
        (exposure(excluded=b"x" * 5), "excluded"),
        (with_item(item=""), "item"),
        (with_item(item="i" * (MAX_ID + 1)), "item"),
        (with_item(position=-1), "position"),
        (with_item(duration_ms=-1), "duration_ms"),
        (with_item(duration_ms=1 << 32), "duration_ms"),
        (with_item(sid=(0, -1, 0)), "sid"),
        (with_item(sid=(0, 0, 1 << 16)), "sid"),
        (with_item(logp_levels=None), "logp_levels"),
        (with_item(logp_levels=(0.0, float("nan"), 0.0)), "logp_levels"),
        (with_item(logp_levels=(0.0, 0.0, float("-inf"))), "logp_levels"),
        (with_item(logp_levels=(0.0, 0.5, 0.0)), "logp_levels"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(event: Any, words: str) -> None:
    reason, detail = refused(event)
    assert reason == "bad_value"
    assert words in detail


def test_values_at_their_limits_are_taken() -> None:
    for event in (
        exposure(slots=MAX_ITEMS, request="r" * MAX_ID, context=b"x" * 40, excluded=b"x" * 12),
        with_item(sid=(65_535, 0, 0), duration_ms=0, logp_levels=(0.0, 0.0, -80.0)),
        with_item(source="other", logp_levels=None),
    ):
        assert INTAKE.exposure(encode(event), T0) == event


def test_a_record_too_long_for_its_sample_is_refused() -> None:
    """Else the sample that holds it would not fit into a Kafka record, and nothing behind it could go on."""
    assert refused(exposure(context=b"x" * 20 * (MAX_EVENT_BYTES // 20)))[0] == "too_large"


def test_a_user_of_another_partition_is_refused_and_a_tick_has_no_user() -> None:
    other = next(f"u{n}" for n in range(99) if partition_of(f"u{n}", PARTITIONS) != HERE)
    for event in (feedback(user=other), exposure(user=other)):
        reason, detail = refused(event)
        assert reason == "wrong_partition"
        assert f"partition {partition_of(other, PARTITIONS)}" in detail


MURMUR2 = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}
"""Answers of Kafka's own org.apache.kafka.common.utils.Utils.murmur2."""


@pytest.mark.parametrize("partitions", [1, 4, 7, 1000])
def test_partitions_are_those_of_kafkas_murmur2(partitions: int) -> None:
    for text, answer in MURMUR2.items():
        assert partition_of(text, partitions) == (answer & 0x7FFFFFFF) % partitions


@given(st.text(min_size=1), st.integers(1, 64))
def test_both_clients_put_a_key_where_the_intake_expects_it(user: str, partitions: int) -> None:
    try:
        key = user.encode()
    except UnicodeEncodeError:
        return
    everywhere = list(range(partitions))
    expected = partition_of(user, partitions)
    assert (kafka_python_murmur2(key) & 0x7FFFFFFF) % partitions == expected
    assert AioPartitioner()(key, everywhere, everywhere) == expected


def test_the_record_after_a_malformed_one_is_unharmed() -> None:
    good = encode(feedback())
    for bad in (b"\xff", b"\x91" * 50_000, good[:-2]):
        with pytest.raises(UnreadableError):
            decode(feedback_decoder, bad)
        assert decode(feedback_decoder, good) == feedback()
    with pytest.raises(UnreadableError):
        decode(exposure_decoder, good)
    assert decode(exposure_decoder, encode(exposure())) == exposure()
