"""What the commands of `dwell` share: the program, its common flags, and how a command is added to it.

Notable choices:
- Every command takes the same five flags after its name (`Common`); they are declared once and
  added to each command's own by `command`. A command's named flag maps to the key it is named
  after (`--port` of the actor to `actor.port`), so the usual precedence and checks hold for it.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ops.config import DEFAULT_FILE, Config, Given, load
from ops.config_text import resolved
from ops.errors import UserError
from ops.logs import log_as_role

app = typer.Typer(
    name="dwell",
    help="An open, continuously learning generative recommender over Kafka.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO_S = 120.0
"""How long a demonstration runs unless told otherwise."""

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the results here as JSON.")
]
ForSeconds = Annotated[
    float | None,
    typer.Option("--for", metavar="SECONDS", min=0, help="Stop after this long, or at Ctrl-C."),
]
StartFrom = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Start from this folder, written by `dwell pretrain`."),
]
MetricsPort = Annotated[
    int, typer.Option(min=0, max=65_535, help="Port of Prometheus metrics; 0 takes a free one.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the policy and of the world.")]
LogDir = Annotated[Path, typer.Argument(metavar="DIR", help="A feed log in KuaiRand's format.")]


@dataclass(frozen=True)
class Common:
    """The flags that every command takes."""

    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Configuration; {DEFAULT_FILE} here if there is one."),
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="SECTION.KEY=VALUE", help="Set any key; may be repeated."),
    ] = None
    data_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where everything is kept.")
    ] = None
    bootstrap: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="An existing Kafka cluster to use.")
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")
    ] = False

    def load(
        self, named: Mapping[str, object] | None = None, demo: bool = False, log: bool = False
    ) -> Config:
        """The configuration from all sources; ends the program if it was only to be printed.

        `named` gives the values of a command's own flags by `section.key`; None is not given.
        """
        values = {
            "storage.data_dir": self.data_dir,
            "kafka.bootstrap": self.bootstrap,
            **(named or {}),
        }
        flags = []
        for name, value in values.items():
            section, key = name.split(".")
            if value is not None:
                flags.append(Given(f"--{key.replace('_', '-')}", section, key, value))
        loaded = load(self.config, os.environ, self.set or (), flags, demo, log)
        if self.dry_run:
            typer.echo(resolved(loaded), nl=False)
            raise typer.Exit
        return loaded.config

    def load_of_run(self) -> Config:
        """The configuration that a run on the data directory wrote down, where it is now; else as `load`."""
        config = self.load()
        path = Path(config.storage.data_dir) / "run" / "config.toml"
        if self.config is not None or not path.exists():
            return config
        past = replace(self, config=path).load()
        kafka = replace(past.kafka, bootstrap=config.kafka.bootstrap)
        return replace(past, kafka=kafka, storage=config.storage)

    def load_with_kafka(self, named: Mapping[str, object] | None = None) -> Config:
        """As `load`, for a role that cannot do without a cluster; it logs from here on."""
        config = self.load(named)
        log_as_role()
        if not config.kafka.bootstrap:
            raise UserError(
                "kafka.bootstrap is empty, and this role needs a cluster: give --bootstrap "
                "HOST:PORT (`dwell broker` starts one and prints its address), or use `dwell up`."
            )
        return config


def command(function: Callable[..., None], group: typer.Typer = app) -> Callable[..., None]:
    """Registers a command whose first parameter is `common: Common`."""

    @wraps(function)
    def run(**given: Any) -> None:
        common = Common(**{part.name: given.pop(part.name) for part in fields(Common)})
        try:
            function(common, **given)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    own = list(inspect.signature(function).parameters.values())[1:]
    shared = [
        inspect.Parameter(
            part.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=part.default,
            annotation=part.type,
        )
        for part in fields(Common)
    ]
    run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    return group.command(function.__name__.strip("_").replace("_", "-"))(run)


def require_writable(path: Path | None) -> None:
    """Raises `UserError` if results could not be written here; asked before the work begins."""
    if path is not None:
        from ops import results

        results.require_writable(path)
