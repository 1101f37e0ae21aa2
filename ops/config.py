"""The configuration: the settings of all packages in one typed whole, read from every source.

Notable choices:
- Later sources override earlier ones: defaults, the command's profile, the TOML file, the
  environment (`DWELL_JOIN_WINDOW_S=20`), `--set join.window_s=20`, named flags.
- What a key means is the line of documentation under its field, what it allows is the field's
  annotation (ops/kinds.py); both live in the settings classes, so nothing is said twice.
- The unknown is an error, never ignored, except in the environment, which belongs to others too:
  there only names with one of our sections count. Kubernetes gives every pod variables such as
  `DWELL_ACTOR_SERVICE_HOST` for a service called `dwell-actor`; these are left alone.
"""

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from actor.settings import ActorSettings
from learner.settings import LearnSettings, PolicySettings, PretrainSettings
from ops.errors import UserError
from ops.kinds import Kind, kinds
from ops.settings import SimulateSettings
from storage.settings import StorageSettings
from streams.settings import JoinSettings, KafkaSettings, ShapeSettings, StreamsSettings

DEFAULT_FILE = Path("dwell.toml")
PREFIX = "DWELL_"
DEMO = {
    "join.window_s": 10.0,
    "join.cap_s": 30.0,
    "join.abandon_s": 3.0,
    "join.lateness_s": 2.0,
}
"""The demonstration's profile, in wall seconds: its viewers wait less between their events."""

LOG = {
    "policy.codes": 128,
    "pretrain.steps": 2000,
    "learn.lr": 1e-3,
    "learn.supervised": 1.0,
    "learn.entropy": 0.02,
    "learn.batch_wait_s": 0.2,
}
"""The profile of a real log (`pretrain`, `replay`); how it was chosen is in docs/replay.md."""

_AT_MOST = (
    ("join.window_s", "join.cap_s"),
    ("join.cap_s", "join.dedupe_horizon_s"),
    ("actor.slate", "actor.max_slate"),
    ("actor.explore_slots", "actor.slate"),
    ("simulate.slate", "actor.max_slate"),
    ("policy.context", "streams.history_behaviours"),
)
_KUBERNETES = re.compile(
    r"(.+_)?(service_(host|port)(_.+)?|port_\d+_(tcp|udp|sctp)(_(proto|port|addr))?)"
)


@dataclass(frozen=True)
class Config:
    """Everything an operator may set, a section for each part."""

    storage: StorageSettings = field(default_factory=StorageSettings)
    kafka: KafkaSettings = field(default_factory=KafkaSettings)
    streams: StreamsSettings = field(default_factory=StreamsSettings)
    join: JoinSettings = field(default_factory=JoinSettings)
    shape: ShapeSettings = field(default_factory=ShapeSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    learn: LearnSettings = field(default_factory=LearnSettings)
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    actor: ActorSettings = field(default_factory=ActorSettings)
    simulate: SimulateSettings = field(default_factory=SimulateSettings)


@dataclass(frozen=True)
class Given:
    """One value as a source gave it; `source` names the file, variable or flag."""

    source: str
    section: str
    key: str
    value: object


@dataclass(frozen=True)
class Loaded:
    """A configuration and, for each `section.key` that a source gave, which source it was."""

    config: Config
    origins: Mapping[str, str]


def demo(config: Config) -> Config:
    """The demonstration's profile over a configuration."""
    return _apply(config, _from_profile("demo", DEMO)).config


def parse(text: str, source: str = str(DEFAULT_FILE)) -> Config:
    """The configuration that a TOML text describes; `source` is its name in errors.

    Raises `UserError` for what is not TOML, unknown, of the wrong type or forbidden.
    """
    return _apply(Config(), _from_toml(text, source)).config


def load(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    sets: Sequence[str] = (),
    flags: Sequence[Given] = (),
    demo: bool = False,
    log: bool = False,
) -> Loaded:
    """The configuration from all sources; each overrides the ones before.

    `file` None means `dwell.toml` of the working directory where there is one; `sets` are texts
    `section.key=value`. Raises `UserError` naming source, key, value and what is allowed.
    """
    given = list(_from_profile("demo", DEMO)) if demo else []
    given += _from_profile("log", LOG) if log else []
    if file is not None or DEFAULT_FILE.is_file():
        path = file or DEFAULT_FILE
        given += _from_toml(_read(path), str(path))
    given += _from_environment(environment or {})
    given += _from_sets(sets)
    given += flags
    return _apply(Config(), given)


def value_of(config: Config, name: str) -> Any:
    """The value of `section.key`."""
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _apply(config: Config, given: Iterable[Given]) -> Loaded:
    origins: dict[str, str] = {}
    for one in given:
        if one.section not in _sections():
            raise _unknown_section(one.source, one.section)
        kind = _sections()[one.section].get(one.key)
        if kind is None:
            raise _unknown_key(one)
        fault = kind.fault(one.value)
        if fault is not None:
            raise UserError(
                f"{one.source}: {one.section}.{one.key} = {_shown(one.value)} {fault}; "
                f"allowed is {kind.allowed()}."
            )
        settings = replace(getattr(config, one.section), **{one.key: kind.base(one.value)})
        config = replace(config, **{one.section: settings})
        origins[f"{one.section}.{one.key}"] = one.source
    for small, large in _AT_MOST:
        if value_of(config, small) > value_of(config, large):
            low, high = (
                f"{name} = {value_of(config, name)} ({origins.get(name, 'default')})"
                for name in (small, large)
            )
            raise UserError(f"{low} must not be above {high}.")
    return Loaded(config, origins)


def _from_profile(profile: str, values: Mapping[str, object]) -> Iterator[Given]:
    for name, value in values.items():
        section, key = name.split(".")
        yield Given(f"{profile} profile", section, key, value)


def _from_toml(text: str, source: str) -> Iterator[Given]:
    try:
        document = tomllib.loads(text)
    except ValueError as error:  # also for a number of more digits than Python reads
        raise UserError(f"{source}: this is not valid TOML: {error}.") from None
    for section, keys in document.items():
        if isinstance(keys, dict):
            if section not in _sections():
                raise _unknown_section(source, section)
            for key, value in keys.items():
                yield Given(source, section, key, value)
        elif section in _sections():
            raise UserError(
                f"{source}: {section} = {_shown(keys)} must be a section, [{section}], with keys "
                f"of its own: {', '.join(_sections()[section])}."
            )
        else:
            raise UserError(
                f"{source}: {section} = {_shown(keys)} stands outside a section; the sections "
                f"are {', '.join(_sections())}."
            )


def _from_environment(environment: Mapping[str, str]) -> Iterator[Given]:
    for name, text in sorted(environment.items()):
        section, _, key = name.removeprefix(PREFIX).lower().partition("_")
        if not name.startswith(PREFIX) or not key:
            continue
        if _KUBERNETES.fullmatch(key) or (key.endswith("port") and "://" in text):
            continue
        if section in _sections():
            yield Given(f"environment variable {name}", section, key, _plain(section, key, text))
            continue
        for near in get_close_matches(section, _sections(), n=1):
            if key in _sections()[near]:
                raise UserError(
                    f"environment variable {name}: there is no section {section}; did you mean "
                    f"{PREFIX}{near.upper()}_{key.upper()}?"
                )


def _from_sets(sets: Iterable[str]) -> Iterator[Given]:
    for text in sets:
        name, equals, value = text.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            raise UserError(
                f"--set {text}: this must have the form SECTION.KEY=VALUE, such as "
                f"join.window_s=20."
            )
        yield Given("--set", section, key, _plain(section, key, value.strip()))


def _plain(section: str, key: str, text: str) -> bool | int | float | str:
    """A text from the environment or a flag as the plainest value that it spells."""
    kind = _sections().get(section, {}).get(key)
    if kind is None or kind.base is str:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file; `dwell init {path}` writes one with every key."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8, which TOML has to be; save it as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: this cannot be read as a configuration file ({error.strerror})."
        ) from None


def _unknown_section(source: str, section: str) -> UserError:
    near = get_close_matches(section, _sections(), n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return UserError(
        f"{source}: there is no section {section}{hint} Allowed are {', '.join(_sections())}."
    )


def _unknown_key(one: Given) -> UserError:
    keys = list(_sections()[one.section])
    near = [f"{one.section}.{key}" for key in get_close_matches(one.key, keys, n=1)]
    near += [f"{section}.{one.key}" for section, known in _sections().items() if one.key in known]
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return UserError(
        f"{one.source}: there is no key {one.section}.{one.key} (given {_shown(one.value)}){hint} "
        f"Allowed in {one.section} are {', '.join(keys)}."
    )


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def _sections() -> dict[str, dict[str, Kind]]:
    default = Config()
    return {part.name: kinds(type(getattr(default, part.name))) for part in fields(Config)}
