"""The configuration: every source, their order, and what a user is told about a mistake."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.config import Config, Given, Loaded, demo, load, parse, value_of
from ops.config_text import commented_toml, docs, resolved
from ops.errors import UserError
from ops.kinds import kinds

SECTIONS = [part.name for part in fields(Config)]
EVERY_KEY = [
    f"{section}.{key}" for section in SECTIONS for key in kinds(type(getattr(Config(), section)))
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(text)
    return str(caught.value)


def changed(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case float() if value == 0:
            return 0.5
        case float() if value < 1:
            return value / 2
        case int() | float():
            return value + 1
        case "":
            return "somewhere:9092"
        case "count":
            return "side"
        case "closing":
            return "exposure"
        case "tiny":
            return "small"
        case "gbpo_level":
            return "ecpo"
        case "sample":
            return "beam"
        case "auto":
            return "cpu"
        case "streams" | "actor":
            return "another-1"
        case _:
            return f'{value} "x" \\ é'


def with_value(name: str, value: Any) -> Config:
    section, key = name.split(".")
    return replace(Config(), **{section: replace(getattr(Config(), section), **{key: value})})


def test_defaults_of_every_section_are_allowed_values() -> None:
    for section in SECTIONS:
        part = getattr(Config(), section)
        for key, kind in kinds(type(part)).items():
            assert kind.fault(getattr(part, key)) is None, f"{section}.{key}"


def test_every_field_of_every_section_has_a_line_of_documentation() -> None:
    for section in SECTIONS:
        kept = type(getattr(Config(), section))
        assert kept.__doc__ and not kept.__doc__.startswith(kept.__name__)
        assert list(docs(kept)) == [part.name for part in fields(kept)], section


def test_the_commented_file_read_back_is_the_configuration() -> None:
    assert parse(commented_toml(Config())) == Config()


def test_the_commented_file_with_its_keys_uncommented_is_the_configuration() -> None:
    text = re.sub(r"^#(?=\w+ = )", "", commented_toml(Config()), flags=re.MULTILINE)
    assert parse(text) == Config()
    assert len(re.findall(r"^\w+ = ", text, flags=re.MULTILINE)) == len(EVERY_KEY)


@pytest.mark.parametrize("name", EVERY_KEY)
def test_a_changed_key_stands_in_the_commented_file_and_is_read_back(name: str) -> None:
    value = changed(value_of(Config(), name))
    text = commented_toml(with_value(name, value))
    assert len(re.findall(r"^\w+ = ", text, flags=re.MULTILINE)) == 1
    assert value_of(parse(text), name) == value


@given(value=st.floats(min_value=0, exclude_min=True, max_value=1e18))
def test_every_allowed_number_survives_being_written(value: float) -> None:
    text = resolved(Loaded(with_value("learn.lr", value), {}))
    assert parse(text).learn.lr == value


@given(value=st.text(min_size=1).filter(str.isprintable))
def test_every_allowed_text_survives_being_written(value: str) -> None:
    text = resolved(Loaded(with_value("storage.data_dir", value), {}))
    assert parse(text).storage.data_dir == value


def test_each_source_overrides_the_ones_before_it(folder: Path) -> None:
    def window(**sources: Any) -> tuple[float, str | None]:
        loaded = load(**sources)
        return loaded.config.join.window_s, loaded.origins.get("join.window_s")

    sources: dict[str, Any] = {}
    assert window(**sources) == (300.0, None)
    sources["demo"] = True
    assert window(**sources) == (10.0, "demo profile")
    (folder / "dwell.toml").write_text("[join]\nwindow_s = 11.0\n")
    assert window(**sources) == (11.0, "dwell.toml")
    sources["environment"] = {"DWELL_JOIN_WINDOW_S": "12"}
    assert window(**sources) == (12.0, "environment variable DWELL_JOIN_WINDOW_S")
    sources["sets"] = ["join.window_s=13"]
    assert window(**sources) == (13.0, "--set")
    sources["flags"] = [Given("--window-s", "join", "window_s", 14.0)]
    assert window(**sources) == (14.0, "--window-s")


def test_a_named_file_is_read_in_place_of_the_one_in_the_working_directory(folder: Path) -> None:
    (folder / "dwell.toml").write_text("[join]\nwindow_s = 11.0\n")
    (folder / "other.toml").write_text("[learn]\nbatch = 8\n")
    config = load(Path("other.toml")).config
    assert (config.join.window_s, config.learn.batch) == (300.0, 8)


def test_the_demonstration_changes_the_join_and_nothing_else() -> None:
    config = demo(Config())
    assert config.join == replace(
        Config().join, window_s=10.0, cap_s=30.0, abandon_s=3.0, lateness_s=2.0
    )
    assert replace(config, join=Config().join) == Config()


def test_an_untouched_file_of_init_leaves_the_demonstration_as_it_is(folder: Path) -> None:
    (folder / "dwell.toml").write_text(commented_toml(Config()))
    assert load(demo=True).config == demo(Config())


def test_an_unknown_key_is_told_with_the_close_one_and_the_allowed_ones() -> None:
    message = error_of("[join]\nwindow = 3")
    assert message.startswith("dwell.toml: there is no key join.window (given 3)")
    assert "did you mean join.window_s?" in message
    assert all(part.name in message for part in fields(Config().join))


def test_a_key_of_another_section_is_told_with_that_section() -> None:
    assert "did you mean streams.batch_ms?" in error_of("[join]\nbatch_ms = 3")


def test_an_unknown_section_is_told_with_the_allowed_ones() -> None:
    message = error_of("[jion]\nwindow_s = 3")
    assert "no section jion; did you mean join? Allowed are storage, kafka, " in message
    assert "; did" not in error_of("[zzz]")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            '[join]\nwindow_s = "long"',
            'join.window_s = "long" is text; allowed is a number above 0',
        ),
        ("[join]\nwindow_s = true", "join.window_s = true is true or false; allowed is a number"),
        ("[join]\nwindow_s = [1]", "join.window_s = [1] is a list"),
        ("[join]\nwindow_s = 2024-01-01", "is a date or time"),
        ("[join.window_s]\nx = 1", 'join.window_s = {"x": 1} is a table'),
        ("[learn]\nbatch = 64.0", "batch = 64.0 is a number; allowed is a whole number at least 1"),
        ("[streams]\ntick = 1", "tick = 1 is a whole number; allowed is true or false"),
        ("[join]\nwindow_s = 0", "window_s = 0 is out of range; allowed is a number above 0"),
        ("[join]\nlateness_s = -0.1", "is out of range; allowed is a number at least 0"),
        ("[join]\nwindow_s = nan", "is not a number"),
        ("[join]\nwindow_s = inf", "is too large"),
        (f"[learn]\nbatch = {10**400}", "is too large"),
        ("[shape]\nthreshold_quantile = 1.0", "allowed is a number above 0 and below 1"),
        ("[actor]\nport = 65536", "allowed is a whole number at least 0 and at most 65535"),
        ('[policy]\npreset = "vast"', 'none of the choices; allowed is "tiny"'),
        ('[storage]\ndata_dir = ""', "is empty; allowed is text that is not empty"),
        ('[storage]\ndata_dir = "a\\nb"', "holds a character that cannot be printed"),
        ('[kafka]\nbootstrap = "localhost"', "has another form; allowed is empty, or host:port"),
    ],
)
def test_a_wrong_value_is_told_with_its_fault_and_what_is_allowed(text: str, told: str) -> None:
    message = error_of(text)
    assert message.startswith("dwell.toml: ")
    assert told in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text", ["[kafka]\nbootstrap = 'a:1,b:2'", "[kafka]\nbootstrap = '[::1]:9092'"]
)
def test_an_address_may_be_a_list_or_of_version_6(text: str) -> None:
    assert parse(text).kafka.bootstrap


def test_a_whole_number_where_a_number_is_wanted_becomes_one() -> None:
    value = parse("[join]\nwindow_s = 20").join.window_s
    assert (value, type(value)) == (20.0, float)


def test_keys_outside_a_section_and_sections_that_are_values_are_told() -> None:
    assert "window_s = 3 stands outside a section" in error_of("window_s = 3")
    assert "join = 3 must be a section, [join]" in error_of("join = 3")


def test_what_is_not_toml_is_told_with_the_line() -> None:
    message = error_of("[join]\nwindow_s = long\n")
    assert message.startswith("dwell.toml: this is not valid TOML: ") and "line 2" in message
    assert "this is not valid TOML" in error_of(f"[join]\nwindow_s = {'9' * 5000}")


def test_a_file_that_cannot_be_read_is_told_by_its_name(folder: Path) -> None:
    (folder / "bytes.toml").write_bytes(b"# \xff")
    for name, told in [
        ("gone.toml", "there is no such file"),
        ("bytes.toml", "byte 2 is not UTF-8"),
        (".", "cannot be read as a configuration file"),
    ]:
        with pytest.raises(UserError, match=re.escape(f"{name}: ") + f".*{told}"):
            load(Path(name))


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"DWELL_JOIN_WINDOW": "3"}, "environment variable DWELL_JOIN_WINDOW: there is no key"),
        ({"DWELL_JOIN_WINDOW_S": "soon"}, 'DWELL_JOIN_WINDOW_S: join.window_s = "soon" is text'),
        ({"DWELL_LEARN_BATCH": "6.5"}, "learn.batch = 6.5 is a number; allowed is a whole number"),
        ({"DWELL_JION_WINDOW_S": "3"}, "did you mean DWELL_JOIN_WINDOW_S?"),
    ],
)
def test_a_mistake_in_the_environment_is_told(environment: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        load(environment=environment)


def test_variables_that_are_not_ours_are_left_alone() -> None:
    environment = {
        "DWELL_LOG_DIR": "somewhere",
        "DWELL_HOME": "somewhere",
        "DWELL_ACTOR": "yes",
        "JOIN_WINDOW_S": "soon",
        "DWELL_ACTOR_SERVICE_HOST": "10.0.0.1",
        "DWELL_ACTOR_SERVICE_PORT": "8080",
        "DWELL_ACTOR_SERVICE_PORT_HTTP": "8080",
        "DWELL_ACTOR_PORT": "tcp://10.0.0.1:8080",
        "DWELL_ACTOR_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "DWELL_ACTOR_PORT_8080_TCP_ADDR": "10.0.0.1",
    }
    assert load(environment=environment).config == Config()


def test_texts_of_variables_become_values_of_the_type_of_their_key() -> None:
    environment = {
        "DWELL_STREAMS_TICK": "False",
        "DWELL_ACTOR_PORT": "0",
        "DWELL_LEARN_LR": "1e-4",
        "DWELL_STORAGE_DATA_DIR": "123",
    }
    config = load(environment=environment).config
    assert config.streams.tick is False
    assert (config.actor.port, config.learn.lr) == (0, 1e-4)
    assert config.storage.data_dir == "123"


@pytest.mark.parametrize("text", ["join.window_s", "window_s=3", "=3", "join.=3", ".x=3"])
def test_a_set_flag_of_another_form_is_told_the_form(text: str) -> None:
    with pytest.raises(UserError, match=r"must have the form SECTION\.KEY=VALUE"):
        load(sets=[text])


def test_a_set_value_may_itself_hold_an_equals_sign() -> None:
    assert load(sets=["storage.data_dir=a=b"]).config.storage.data_dir == "a=b"


def test_values_that_contradict_each_other_are_told_with_their_sources() -> None:
    with pytest.raises(UserError) as caught:
        load(sets=["join.window_s=60"], demo=True)
    assert str(caught.value) == (
        "join.window_s = 60.0 (--set) must not be above join.cap_s = 30.0 (demo profile)."
    )


def test_the_resolved_configuration_is_toml_that_says_where_values_come_from() -> None:
    loaded = load(environment={"DWELL_LEARN_BATCH": "8"}, sets=["actor.port=0"], demo=True)
    text = resolved(loaded)
    assert parse(text) == loaded.config
    commented = [line for line in text.splitlines() if "#" in line]
    assert commented == [
        "window_s = 10.0  # demo profile",
        "cap_s = 30.0  # demo profile",
        "abandon_s = 3.0  # demo profile",
        "lateness_s = 2.0  # demo profile",
        "batch = 8  # environment variable DWELL_LEARN_BATCH",
        "port = 0  # --set",
    ]
