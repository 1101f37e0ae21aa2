"""The configuration as text: the commented file of `dwell init`, and what `--dry-run` prints.

In a commented file each key that has its default is commented out. A file that repeated defaults
would override the demonstration's profile, and would freeze what a later release improves.
Comments are the lines of documentation under the fields of the settings classes, read from source.
"""

import ast
import inspect
import json
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from textwrap import dedent
from typing import Any

from ops.config import Config, Loaded

_HEAD = """\
# The configuration of Dwell: every key with its meaning and its default.
# To change a value, remove the # before its key. The environment (DWELL_JOIN_WINDOW_S=20)
# overrides this file; flags (--set join.window_s=20) override both. Add --dry-run to a
# command to see the values it would run with, and where each comes from.
"""


def commented_toml(config: Config) -> str:
    """The configuration as a commented TOML file; `ops.config.parse` reads it back."""
    default = Config()
    lines = [_HEAD]
    for section, settings in _parts(config):
        lines += [_comment(inspect.getdoc(settings) or ""), f"[{section}]"]
        meanings = docs(type(settings))
        for key, value in _parts(settings):
            mark = "#" if value == getattr(getattr(default, section), key) else ""
            lines += [_comment(meanings[key]), f"{mark}{key} = {_toml(value)}"]
        lines.append("")
    return "\n".join(lines)


def resolved(loaded: Loaded) -> str:
    """Every value as TOML; one that a source gave is followed by that source as a comment."""
    lines = []
    for section, settings in _parts(loaded.config):
        lines.append(f"[{section}]")
        for key, value in _parts(settings):
            origin = loaded.origins.get(f"{section}.{key}")
            lines.append(f"{key} = {_toml(value)}" + (f"  # {origin}" if origin else ""))
        lines.append("")
    return "\n".join(lines)


def docs(settings: type[Any]) -> dict[str, str]:
    """The documentation under each field of a settings class, read from its source."""
    (definition,) = ast.parse(dedent(inspect.getsource(settings))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, following in pairwise(definition.body):
        match statement, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(doc))),
            ):
                found[name] = inspect.cleandoc(doc)
    return found


def _parts(settings: Any) -> Iterator[tuple[str, Any]]:
    for part in fields(settings):
        yield part.name, getattr(settings, part.name)


def _comment(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def _toml(value: bool | int | float | str) -> str:
    # Texts are printable (ops/kinds.py sees to it), so JSON's escapes are those of TOML.
    return repr(value) if type(value) in (int, float) else json.dumps(value, ensure_ascii=False)
