"""The commands that come in groups: `dwell audit`, `dwell bench`, `dwell eval` and `dwell dead-letters`."""

import signal
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from ops.cli_base import Common, JsonFile, LogDir, command, require_writable
from ops.errors import UserError

audit = typer.Typer(
    help="Does a live or past run hold what must always hold?", no_args_is_help=True
)
bench = typer.Typer(help="How fast, and does it hold under force?", no_args_is_help=True)
eval_ = typer.Typer(
    help="Does it learn, and what do its parts do to real data?", no_args_is_help=True
)
dead_letters = typer.Typer(help="What could not be used, why, and once more.", no_args_is_help=True)
Moment = typer.Option(formats=["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d"], help="Local time.")


def add_to(app: typer.Typer) -> None:
    """Make these commands part of the program."""
    app.add_typer(audit, name="audit")
    app.add_typer(bench, name="bench")
    app.add_typer(eval_, name="eval")
    app.add_typer(dead_letters, name="dead-letters")


@partial(command, group=audit)
def samples(
    common: Common,
    since: Annotated[datetime | None, Moment] = None,
    until: Annotated[datetime | None, Moment] = None,
    json: JsonFile = None,
) -> None:
    """Does every exposure have exactly one sample, with the right label?"""
    from ops.audit_samples import run

    config = common.load_of_run()
    require_writable(json)
    if since is not None and until is not None and since >= until:
        raise UserError(f"--since {since} is not before --until {until}; exchange them.")
    raise typer.Exit(run(config, (since, until), json))


@partial(command, group=audit)
def replay_(common: Common, json: JsonFile = None) -> None:
    """Do the journals, followed again from a checkpoint, give every published version?"""
    config = common.load_of_run()
    require_writable(json)
    from ops.audit_replay import run

    raise typer.Exit(run(config, json))


@partial(command, group=audit)
def propensity(common: Common, json: JsonFile = None) -> None:
    """Do exposures tell the truth about their probability? Computed again from the stored versions."""
    config = common.load_of_run()
    require_writable(json)
    from ops.audit_propensity import run

    raise typer.Exit(run(config, json))


@partial(command, group=bench)
def kills(
    common: Common,
    kills: Annotated[int, typer.Option(min=1, help="Disturbances in all.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the truth and of the disturbances.")] = 1,
    json: JsonFile = None,
) -> None:
    """Kill, freeze and rebalance the join on a real broker; then audit what came of it."""
    config = common.load()
    require_writable(json)
    from ops.bench_kills import run

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise typer.Exit(run(config, kills, seed, json))


@partial(command, group=bench)
def outage(
    common: Common,
    for_s: Annotated[
        float, typer.Option("--for-s", min=1, help="Seconds that the broker is away.")
    ] = 60.0,
    json: JsonFile = None,
) -> None:
    """Kill the broker under the demonstration's load, bring it back later; then audit what came of it."""
    config = common.load()
    require_writable(json)
    from ops.bench_outage import run

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise typer.Exit(run(config, for_s, json))


@partial(command, group=bench)
def harm(common: Common, json: JsonFile = None) -> None:
    """Put harmful versions before live actors past the learner's guard; how is each refused or returned?"""
    config = common.load(demo=True)
    require_writable(json)
    from ops.bench_harm import run

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise typer.Exit(run(config, json))


@partial(command, group=bench)
def join(
    common: Common,
    requests: Annotated[int, typer.Option(min=100, help="Requests of the throughput.")] = 20_000,
    waiting: Annotated[int, typer.Option(min=100, help="Requests that wait.")] = 100_000,
    json: JsonFile = None,
) -> None:
    """How fast join and shape are, beside Faust with a table update an event."""
    config = common.load()
    require_writable(json)
    from ops.bench_join import run

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise typer.Exit(run(config, requests, waiting, json))


@partial(command, group=bench)
def tokeniser(
    common: Common,
    items: Annotated[
        int, typer.Option(min=1, help="Items of the synthetic catalogue.")
    ] = 1_000_000,
    codes: Annotated[int, typer.Option(min=1, help="Codes of a level.")] = 8192,
    seed: Annotated[int, typer.Option(help="Seed of the embeddings and of the fitting.")] = 1,
    balanced: Annotated[
        bool, typer.Option(help="Balanced codebooks, too; they take several times as long.")
    ] = True,
    json: JsonFile = None,
) -> None:
    """How long a million items take to get semantic IDs, and how good these are."""
    config = common.load()
    require_writable(json)
    from ops.bench_tokeniser import run

    raise typer.Exit(run(config, items, codes, seed, balanced, json))


@partial(command, group=bench)
def decoder(
    common: Common,
    preset: Annotated[str, typer.Option(help="Size of all architectures.")] = "small",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch; else policy.threads.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each architecture.")] = 3,
    json: JsonFile = None,
) -> None:
    """Time, compute and memory of the lazy decoder beside an encoder-decoder and a naive decoder."""
    config = common.load()
    require_writable(json)
    from ops.bench_decoder import run

    raise typer.Exit(run(config, preset, device, threads, repeats, json))


@partial(command, group=bench)
def constraint(
    common: Common,
    preset: Annotated[str, typer.Option(help="Size of the policy.")] = "tiny",
    codes: Annotated[int, typer.Option(min=2, help="Codes of a level.")] = 8192,
    items: Annotated[int, typer.Option(min=1, help="Items of the largest catalogue.")] = 1_000_000,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each cell.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of catalogues, policy and draws.")] = 1,
    json: JsonFile = None,
) -> None:
    """What it costs to decode valid IDs only, beside decoding without any constraint."""
    config = common.load()
    require_writable(json)
    from ops.bench_constraint import run

    raise typer.Exit(run(config, preset, codes, items, repeats, seed, json))


@partial(command, group=bench)
def weights(
    common: Common,
    versions: Annotated[int, typer.Option(min=50, help="Published of the smallest policy.")] = 300,
    deltas: Annotated[int, typer.Option(min=1, help="Applied one upon the other.")] = 10_000,
    swaps: Annotated[int, typer.Option(min=1, help="Versions that come while serving.")] = 1_000,
    large: Annotated[bool, typer.Option(help="Publish a policy of 0.1B parameters, too.")] = False,
    json: JsonFile = None,
) -> None:
    """How fast a version is served, what it weighs, and what serving feels of it."""
    config = common.load()
    require_writable(json)
    from ops.bench_weights import run

    raise typer.Exit(run(config, versions, deltas, swaps, large, json))


@partial(command, group=bench)
def freshness(
    common: Common,
    rates: Annotated[str, typer.Option(help="Requests a second, one run each.")] = "100,150,200",
    for_s: Annotated[float, typer.Option("--for", min=30, help="Seconds of each run.")] = 90.0,
    json: JsonFile = None,
) -> None:
    """How long it takes from a decided play to answers that have learned from it, stage by stage."""
    config = common.load(demo=True)
    require_writable(json)
    from ops.bench_freshness import run

    raise typer.Exit(run(config, rates, for_s, json))


@partial(command, group=bench)
def serve(
    common: Common,
    preset: Annotated[str | None, typer.Option(help="Size of the policy.")] = None,
    items: Annotated[int, typer.Option(min=1000, help="Items of the catalogue.")] = 10_000,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each cell.")] = 4.0,
    budget: Annotated[float, typer.Option(min=0.001, help="Of p99, in seconds.")] = 0.1,
    json: JsonFile = None,
) -> None:
    """Latency and throughput of an actor over HTTP; what batching, tables, beams and histories do to it."""
    config = common.load({"policy.preset": preset})
    require_writable(json)
    from ops.bench_serve import Extent, run

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise typer.Exit(run(config, items, Extent(seconds=seconds, budget_s=budget), json))


@partial(command, group=eval_)
def shaping(
    common: Common,
    directory: LogDir,
    json: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the results here as SVG.")
    ] = None,
) -> None:
    """Shape a real feed log: what dwell, play ratio and percentile owe to duration, and to likes."""
    config = common.load()
    require_writable(json)
    from ops.eval_shaping import run

    raise typer.Exit(run(config, directory, json, plot))


@partial(command, group=eval_)
def faithfulness(
    common: Common,
    json: JsonFile = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables here as Markdown.")
    ] = None,
) -> None:
    """Parameters, compute and activations of every preset, beside the OneRec-V2 report's tables."""
    config = common.load()
    require_writable(json)
    from ops.eval_faithfulness import run

    raise typer.Exit(run(config, json, markdown))


@partial(command, group=eval_)
def order(
    common: Common,
    directory: LogDir,
    limit: Annotated[
        int | None, typer.Option(metavar="REQUESTS", min=1, help="Only the log's first requests.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the shuffling.")] = 1,
    json: JsonFile = None,
) -> None:
    """Join a real feed log twice, the second time shuffled and doubled: are the samples the same?"""
    config = common.load()
    require_writable(json)
    from ops.eval_order import run

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise typer.Exit(run(config, directory, limit, seed, json))


Reason = Annotated[str | None, typer.Option(help="Only those with this reason.")]
Topic = Annotated[str | None, typer.Option(help="Only those that came from this topic.")]
Offsets = Annotated[
    list[int] | None, typer.Option("--offset", help="Only this one of `dead-letters`; repeatable.")
]


@partial(command, group=dead_letters)
def list_(
    common: Common,
    reason: Reason = None,
    topic: Topic = None,
    offset: Offsets = None,
    last: Annotated[int, typer.Option(min=1, help="Show at most this many, the newest.")] = 50,
) -> None:
    """Show dead letters: when, why, and where they came from."""
    from ops.cluster import visited
    from ops.dead_letters import Wanted, show

    wanted = Wanted(reason, topic, frozenset(offset or ()))
    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(show(config, wanted, last))


@partial(command, group=dead_letters)
def replay(
    common: Common, reason: Reason = None, topic: Topic = None, offset: Offsets = None
) -> None:
    """Write dead letters of the inputs to their topics again, those that would now be taken."""
    from ops.cluster import visited
    from ops.dead_letters import Wanted, replay

    wanted = Wanted(reason, topic, frozenset(offset or ()))
    with visited(common.load_of_run(), typer.echo) as config:
        raise typer.Exit(replay(config, wanted))
