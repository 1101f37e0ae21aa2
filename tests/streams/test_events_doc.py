"""docs/events.md says what the records are: every struct, field by field, and its examples run."""

import inspect
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import pytest
from kafka import TopicPartition

import streams.events
import streams.topics
import streams.weights
from streams.clients import consumer, producer, read
from streams.events import (
    ACTION_BITS,
    BEHAVIOUR,
    Exposure,
    Feedback,
    Sample,
    Tick,
    encode,
    pack_leaves,
    unpack_context,
    unpack_leaves,
)
from streams.intake import Intake, partition_of
from streams.settings import KafkaSettings
from streams.topics import EXPOSURES, FEEDBACK, SAMPLES, topics
from tests.streams.makers import T0, exposure
from tests.streams.shell import Shell

DOC = (Path(__file__).parents[2] / "docs" / "events.md").read_text()

STRUCTS = [
    struct
    for module in (streams.events, streams.weights)
    for name, struct in inspect.getmembers(module, inspect.isclass)
    if issubclass(struct, msgspec.Struct)
    and struct.__module__ == module.__name__
    and not name.startswith("_")
]


def section(heading: str) -> str:
    """What stands below a heading, up to the next of its level or above."""
    level = heading.partition(" ")[0]
    found = re.search(
        rf"^{re.escape(heading)}\b.*?$(.*?)(?=^#{{1,{len(level)}}} |\Z)",
        DOC,
        re.MULTILINE | re.DOTALL,
    )
    assert found, f"docs/events.md has no {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The body of the first table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def written(hint: Any) -> str:
    """How the document writes a type."""
    simple: dict[Any, str] = {
        int: "integer",
        float: "float",
        str: "text",
        bytes: "binary",
        bool: "boolean",
    }
    if hint in simple:
        return simple[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "text"
    if origin in (Union, types.UnionType):
        return " or ".join("nil" if each is type(None) else written(each) for each in arguments)
    if origin is list:
        return f"array of {written(arguments[0])}"
    if origin is tuple:
        return "[" + ", ".join(written(each) for each in arguments) + "]"
    if origin is dict:
        return f"map of {written(arguments[0])} to {written(arguments[1])}"
    assert issubclass(hint, msgspec.Struct), hint
    return str(hint.__name__)


def default(field: msgspec.structs.FieldInfo) -> str:
    """How the document writes a field's default."""
    if field.default_factory is not msgspec.NODEFAULT:
        return msgspec.json.encode(field.default_factory()).decode()
    if field.default is msgspec.NODEFAULT:
        return "required"
    value = msgspec.json.encode(field.default).decode()
    return "nil" if value == "null" else value


def test_every_record_is_looked_at() -> None:
    names = {struct.__name__ for struct in STRUCTS}
    assert {"Exposure", "Feedback", "Sample", "LateStart", "Manifest", "Ack"} <= names


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_field_stands_in_the_document_with_type_and_default(struct: Any) -> None:
    hints = get_type_hints(struct)
    expected = [
        [f"`{field.name}`", written(hints[field.name]), default(field)]
        for field in msgspec.structs.fields(struct)
    ]
    found = rows(section(f"### {struct.__name__}"))
    assert [row[:3] for row in found] == expected
    assert all(len(row) == 4 and row[3] for row in found), "each field has a meaning"


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_record_is_named_by_its_type(struct: Any) -> None:
    heading = re.search(rf"^### {struct.__name__}\b.*$", DOC, re.MULTILINE)
    assert heading
    tag = struct.__struct_config__.tag
    assert (f'`type` = "{tag}"' in heading[0]) == (tag is not None)


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_word_that_a_field_may_hold_is_named(struct: Any) -> None:
    for hint in get_type_hints(struct).values():
        if get_origin(hint) is Literal:
            missing = [
                word
                for word in get_args(hint)
                if f"`{word}`" not in section(f"### {struct.__name__}")
            ]
            assert missing == []


def test_no_struct_is_described_that_is_not_there() -> None:
    headings = re.findall(r"^### (\w+) \(", section("## Records"), re.MULTILINE)
    assert sorted(headings) == sorted(struct.__name__ for struct in STRUCTS)


def test_every_topic_stands_in_the_document() -> None:
    expected = {
        f"`{topic.name}`": ("P" if topic.partitions == 7 else "1", topic.config["cleanup.policy"])
        for topic in topics(KafkaSettings(partitions=7))
    }
    found = {row[0]: (row[1], row[2].partition(",")[0]) for row in rows(section("## Topics"))}
    assert found == expected


def test_every_reason_of_a_dead_letter_stands_in_the_document() -> None:
    code = "".join(
        (Path(__file__).parents[2] / "streams" / f"{module}.py").read_text()
        for module in ("events", "intake", "processor")
    )
    reasons = set(re.findall(r'UnreadableError\(\s*"(\w+)"', code)) | {"malformed", "unknown_major"}
    assert {row[0].strip("`") for row in rows(section("## Dead letters"))} == reasons


def test_the_bits_of_actions_stand_in_the_document() -> None:
    found = {row[0].strip("`"): int(row[1]) for row in rows(section("### Actions"))}
    assert found == ACTION_BITS


def test_the_layout_of_a_behaviour_stands_in_the_document() -> None:
    found = [(row[0].strip("`"), int(row[1]), row[2]) for row in rows(section("### A context"))]
    names = {"<u2": "u16", "<u4": "u32"}
    expected = []
    for name in BEHAVIOUR.names or ():
        kind, offset = dict(BEHAVIOUR.fields or {})[name][:2]
        count = f"{kind.shape[0]} x " if kind.shape else ""
        expected.append((name, offset, count + names[kind.base.str]))
    assert found == expected
    assert f"{BEHAVIOUR.itemsize} bytes" in section("### A context")


def test_packed_arrays_are_what_the_document_says() -> None:
    """Written and read here with `struct` alone, as another language would."""
    import struct

    two = struct.pack("<3HHIII", 1, 2, 3, 17, 4000, 30_000, 60_000) * 2
    found = unpack_context(two)
    assert len(found) == 2
    assert found[1].tolist()[0].tolist() == [1, 2, 3]
    assert found[1].tolist()[1:] == (17, 4000, 30_000, 60_000)
    leaves = struct.pack("<6H", 1, 2, 3, 40_000, 5, 6)
    assert unpack_leaves(leaves).tolist() == [[1, 2, 3], [40_000, 5, 6]]
    assert pack_leaves(np.array([[1, 2, 3], [40_000, 5, 6]])) == leaves


def examples() -> dict[str, str]:
    """The document's programs by the sentence before them."""
    found = re.findall(r"^(\w[^\n]*):\n+```python\n(.*?)```", DOC, re.MULTILINE | re.DOTALL)
    return dict(found)


def test_the_documents_programs_write_and_read_as_it_says(
    kafka: KafkaSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = [text.replace("localhost:9092", kafka.bootstrap) for text in examples().values()]
    write, follow = programs
    reader = consumer(kafka.bootstrap)
    reader.topics()
    places = [
        TopicPartition(topic, partition)
        for topic in (EXPOSURES, FEEDBACK)
        for partition in range(kafka.partitions)
    ]
    before = reader.end_offsets(places)
    exec(compile(write, "docs/events.md", "exec"), {})
    events: list[Exposure | Feedback | Tick] = []
    for place in places:
        intake = Intake(place.partition, kafka.partitions, max_skew_ms=5000)
        take: Any = intake.exposure if place.topic == EXPOSURES else intake.feedback
        found = read(reader, place.topic, place.partition, before[place])
        events += [take(record.value, record.timestamp) for record in found]
    reader.close()
    kinds = [
        event.kind if isinstance(event, Feedback) else type(event).__name__ for event in events
    ]
    assert sorted(kinds) == ["Exposure", "begin", "end", "heartbeat", "left", "like"]
    assert len({event.request for event in events if not isinstance(event, Tick)}) == 1

    (sample,) = Shell([exposure("told", T0, 1, user="ann"), T0 + 1000]).run(()).samples
    assert isinstance(sample, Sample)
    client = producer(kafka.bootstrap)
    try:
        place = partition_of("ann", kafka.partitions)
        client.send(SAMPLES, encode(sample), partition=place).get(timeout=30)
    finally:
        client.close()
    capsys.readouterr()
    exec(compile(follow, "docs/events.md", "exec"), {})
    assert "told" in capsys.readouterr().out
