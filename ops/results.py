"""What a command found out: a table for people, and with `--json FILE` one object for programs.

Notable choices:
- The object's keys are those of the evidence contract: `command`, `dwell_version`, `machine`,
  `config`, `seeds`, `results`, `checks`; an interval is `{mean, low, high}` (95 %).
- The file appears whole or not at all, and a value that is not finite is written as null, because
  JSON has no word for it.
- A missed goal of speed or learning is shown; only a failed check of correctness is an error.
"""

import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ops.config import Config
from ops.errors import UserError


class Interval(TypedDict):
    """A mean with the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Check:
    """A figure held against its goal, such as `lost` against `"0"`."""

    name: str
    value: object
    goal: str
    ok: bool
    correctness: bool = True
    """Whether failing is an error of the program, and not only a missed goal."""


_CHECK_KEYS = ("name", "value", "goal", "ok")
_INTERVAL_KEYS = set(Interval.__annotations__)


def exit_status(checks: Sequence[Check]) -> int:
    """1 when a check of correctness failed, else 0."""
    return int(any(check.correctness and not check.ok for check in checks))


def require_writable(path: Path) -> None:
    """Raises `UserError` if results could not be written here; asked before the work begins."""
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {path.parent}; make it first.")
    if path.is_dir():
        raise UserError(f"--json {path}: this is a folder; name a file in it.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--json {path}: {path.parent} is not writable; name a file elsewhere.")


def write_results(
    path: Path,
    command: str,
    config: Config,
    seeds: Sequence[int],
    results: Mapping[str, object],
    checks: Sequence[Check],
) -> None:
    """Writes one JSON object; raises `UserError` if that is not possible."""
    document = {
        "command": command,
        "dwell_version": dwell_version(),
        "machine": machine(),
        "config": config,
        "seeds": list(seeds),
        "results": results,
        "checks": [{name: getattr(c, name) for name in _CHECK_KEYS} for c in checks],
    }
    text = json.dumps(_plain(document), indent=2, allow_nan=False, ensure_ascii=False)
    require_writable(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"--json {path}: this cannot be written ({error.strerror}).") from None


def print_results(
    results: Mapping[str, object], checks: Sequence[Check], console: Console | None = None
) -> None:
    """Prints the results, one line a figure, then the checks with their goals."""
    console = console or Console()
    table = Table("figure", "value")
    for name, value in _figures("", _plain(results)):
        table.add_row(name, Text(value))  # as it is: brackets are no markup here
    console.print(table)
    if checks:
        table = Table("check", "value", "goal", "")
        for check in checks:
            missed = "failed" if check.correctness else "missed"
            verdict = "ok" if check.ok else missed
            table.add_row(check.name, Text(_words(_plain(check.value))), Text(check.goal), verdict)
        console.print(table)


def report(
    command: str,
    config: Config,
    seeds: Sequence[int],
    results: Mapping[str, object],
    checks: Sequence[Check],
    json: Path | None,
    console: Console | None = None,
) -> int:
    """How a command of evidence ends: print, write where a file was asked for, and return the exit status."""
    print_results(results, checks, console)
    if json is not None:
        write_results(json, command, config, seeds, results, checks)
    return exit_status(checks)


def dwell_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("dwell")
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, object]:
    """The hardware and software under this process, as far as a reader of figures needs it.

    `cores` are those that this process may use; `gpu` is known only where torch was loaded.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return {
        "cpu": _cpu(),
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": _version_or_none("torch"),
    }


def _version_or_none(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """The value in JSON's own types; raises `TypeError` for what has no such form."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _figures(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value.keys() != _INTERVAL_KEYS:
        for key, item in value.items():
            yield from _figures(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, _words(value)


def _words(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        case {"mean": mean, "low": low, "high": high}:
            return f"{_words(mean)} [{_words(low)}, {_words(high)}]"
        case list():
            return ", ".join(_words(item) for item in value)
        case _:
            return str(value)
