"""The demonstration as part of a bench: `dwell up --demo` in a process of its own, as a user would start it."""

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from ops.config import Config
from ops.errors import UserError
from ops.roles import Role, last_line, write_config


class Demonstration:
    """Runs while open; its log and results lie in `folder`, its data where `config` says."""

    def __init__(self, config: Config, folder: Path, for_s: float) -> None:
        self._out = folder / "demo.json"
        path = write_config(config, folder)
        options = ["--config", str(path), "--demo", f"--for={for_s}", f"--json={self._out}"]
        self._up = Role("up", options, folder)

    def __enter__(self) -> "Demonstration":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._up.stop()

    def wait(self, what: str, true: Callable[[], object], patience_s: float) -> None:
        """Until something is true of it; raises `UserError` when it is not in time, or the demonstration ends."""
        give_up = time.monotonic() + patience_s
        while not true():
            self._up.check()
            if time.monotonic() > give_up:
                raise UserError(f"{what}: not within {patience_s:.0f} s; see {self._up.log_file}.")
            time.sleep(0.1)

    def results(self) -> dict[str, Any]:
        """What it says of itself at its end, which is waited for; raises `UserError` where it broke off.

        A check of its own may have failed: the figures say which.
        """
        while self._up.alive:
            time.sleep(0.1)
        if not self._out.exists():
            said, where = last_line(self._up.log_file), self._up.log_file
            raise UserError(f"the demonstration did not finish: {said}; see {where}.")
        found: dict[str, Any] = msgspec.json.decode(self._out.read_bytes())["results"]
        return found
