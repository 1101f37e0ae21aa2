"""docs/events.md says what the code does: every record, every field, nothing that is not there."""

import re
from pathlib import Path

import msgspec
import pytest

from streams import events, topics, weights
from streams.settings import KafkaSettings

TEXT = (Path(__file__).parents[2] / "docs" / "events.md").read_text()


def structs() -> dict[str, type[msgspec.Struct]]:
    return {
        name: kind
        for module in (events, weights)
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and issubclass(kind, msgspec.Struct)
        and kind.__module__ == module.__name__
        and not name.startswith("_")
    }


def sections() -> dict[str, str]:
    """The text under each heading, by its first word."""
    parts = re.split(r"^#+ (\w+)[^\n]*\n", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(section: str) -> set[str]:
    """The names in the first column of a section's table."""
    rows = re.findall(r"^\| (`[^|]*) \|", section, flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_there_are_records_to_document() -> None:
    assert {"Exposure", "Sample", "Manifest"} <= set(structs())


@pytest.mark.parametrize("name", sorted(structs()))
def test_each_record_has_its_fields_documented_and_no_others(name: str) -> None:
    fields = {field.name for field in msgspec.structs.fields(structs()[name])}
    assert documented(sections()[name]) == fields


@pytest.mark.parametrize("name", sorted(structs()))
def test_each_record_is_headed_by_its_type(name: str) -> None:
    tag = structs()[name].__struct_config__.tag
    if tag is not None:
        assert re.search(rf"^#+ {name} \(`{tag}`\)$", TEXT, flags=re.MULTILINE)


def test_each_topic_is_listed() -> None:
    listed = documented(sections()["Topics"].replace(".", "_").replace("-", "_"))
    names = {
        topic.name.replace(".", "_").replace("-", "_") for topic in topics.topics(KafkaSettings())
    }
    assert names <= listed


def test_the_packed_context_is_as_long_as_documented() -> None:
    assert events.BEHAVIOUR.itemsize == 20
    assert "20 bytes each" in TEXT


def test_each_reason_of_a_dead_letter_is_documented() -> None:
    raised = {
        reason
        for path in Path(events.__file__).parent.glob("*.py")
        for reason in re.findall(r'UnreadableError\(\s*"(\w+)"', path.read_text())
    }
    assert len(raised) >= 5
    assert [reason for reason in sorted(raised) if f"`{reason}`" not in TEXT] == []
