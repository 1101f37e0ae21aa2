"""The commands of `dwell catalogue`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ops.cli_base import Common, command

catalogue = typer.Typer(
    help="What can be recommended, and its changes while actors serve.", no_args_is_help=True
)

Wait = Annotated[
    bool, typer.Option("--wait", help="Return when all live actors have acknowledged it.")
]
Limit = Annotated[
    float, typer.Option("--limit", metavar="SECONDS", min=0, help="Wait at most this long.")
]


def add_to(app: typer.Typer) -> None:
    """Make these commands part of the program."""
    app.add_typer(catalogue, name="catalogue")


@partial(command, group=catalogue)
def list_(
    common: Common,
    last: Annotated[int, typer.Option(min=1, help="Show at most this many, the newest.")] = 20,
) -> None:
    """Show the items, and how far the actors have come."""
    from ops.catalogue import show_all
    from ops.cluster import visited

    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(show_all(config, last))


@partial(command, group=catalogue)
def show(common: Common, item: Annotated[str, typer.Argument(metavar="ITEM")]) -> None:
    """Show what is known of an item."""
    from ops.catalogue import show_one
    from ops.cluster import visited

    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(show_one(config, item))


@partial(command, group=catalogue)
def upsert(
    common: Common,
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON lines; - is standard input.")],
    codebooks: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A checkpoint or start of the catalogue's lineage."),
    ] = None,
    wait: Wait = False,
    limit: Limit = 30.0,
) -> None:
    """Add items, or change them: all lines, or none where one is wrong."""
    from ops.catalogue_changes import Patience, upsert
    from ops.cluster import visited

    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(upsert(config, file, codebooks, Patience(wait, limit)))


@partial(command, group=catalogue)
def delete(
    common: Common,
    items: Annotated[list[str], typer.Argument(metavar="ITEM...")],
    wait: Wait = False,
    limit: Limit = 30.0,
) -> None:
    """Delete items; with --wait they are served nowhere when it returns."""
    from ops.catalogue_changes import Patience, delete
    from ops.cluster import visited

    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(delete(config, items, Patience(wait, limit)))
