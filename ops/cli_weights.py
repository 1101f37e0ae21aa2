"""The commands of `dwell weights`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ops.cli_base import Common, command

weights = typer.Typer(
    help="Which versions there are, and which one an arm serves.", no_args_is_help=True
)

Version = Annotated[int, typer.Argument(min=1, help="Number of the version.")]
Arm = Annotated[str, typer.Argument(help="Such as `learning` or `control`.")]
Why = Annotated[str, typer.Option(help="The reason; it stands on `control` for ever.")]


def add_to(app: typer.Typer) -> None:
    """Make these commands part of the program."""
    app.add_typer(weights, name="weights")


@partial(command, group=weights)
def list_(
    common: Common,
    last: Annotated[int, typer.Option(min=1, help="Show at most this many, the newest.")] = 20,
) -> None:
    """Show versions: when, how large, who took them, which arms serve them."""
    from ops.cluster import visited
    from ops.weights import show_all

    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(show_all(config, last))


@partial(command, group=weights)
def show(common: Common, version: Version) -> None:
    """Show what a version is, what it learned from, and what became of it."""
    from ops.cluster import visited
    from ops.weights import show_one

    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(show_one(config, version))


@partial(command, group=weights)
def verify(
    common: Common,
    version: Annotated[int | None, typer.Argument(min=1, help="This one alone; else all.")] = None,
) -> None:
    """Are the versions on the log what their manifests say, and finite?"""
    from ops.cluster import visited
    from ops.weights import verify

    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(verify(config, version))


@partial(command, group=weights)
def pin(common: Common, arm: Arm, version: Version, why: Why) -> None:
    """Let an arm serve one version until it is told otherwise."""
    from ops.cluster import visited
    from ops.weights import say

    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(say(config, "pin", arm, version, why))


@partial(command, group=weights)
def rollback(common: Common, arm: Arm, version: Version, why: Why) -> None:
    """Return an arm to an older version; the learner goes back to it, too, and on from there."""
    from ops.cluster import visited
    from ops.weights import say

    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(say(config, "rollback", arm, version, why))


@partial(command, group=weights)
def follow(common: Common, arm: Arm, why: Why) -> None:
    """Let an arm serve the newest version again."""
    from ops.cluster import visited
    from ops.weights import say

    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(say(config, "follow", arm, 0, why))


@weights.command()
def key(
    folder: Annotated[Path, typer.Argument(help="Where the two files go; they are not replaced.")],
) -> None:
    """Make a pair of keys: one to sign versions, one to know them by."""
    from ops.weights import make_keys

    raise typer.Exit(make_keys(folder))
