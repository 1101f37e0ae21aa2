"""The program `dwell`: one command per role, and one for everything together.

Notable choices:
- What a command needs is imported inside it: `dwell --help` loads neither torch nor Kafka clients.
- Exit status: 0 done, 1 a check of correctness failed, 2 something the user can mend (one line on
  stderr, never a trace), 130 interrupted.
"""

import signal
import sys
import threading
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ops import cli_catalogue, cli_groups, cli_weights
from ops.cli_base import (
    DEMO_S,
    Common,
    ForSeconds,
    JsonFile,
    LogDir,
    MetricsPort,
    Seed,
    StartFrom,
    app,
    command,
    require_writable,
)
from ops.config import DEFAULT_FILE, Config
from ops.config_text import commented_toml
from ops.errors import UserError
from ops.roles import end_with_parent

cli_groups.add_to(app)
cli_weights.add_to(app)
cli_catalogue.add_to(app)


@command
def up(
    common: Common,
    demo: Annotated[
        bool, typer.Option("--demo", help="Add simulated viewers, a short window and a live view.")
    ] = False,
    for_s: ForSeconds = None,
    serial: Annotated[
        bool, typer.Option("--serial", help="One process, without Kafka; deterministic by seed.")
    ] = False,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a --serial run.")] = 3000,
    seed: Seed = None,
    json: JsonFile = None,
    start_from: StartFrom = None,
) -> None:
    """Run the whole loop: broker, actor, streams, insights and learner."""
    config = common.load({"learn.seed": seed, "simulate.seed": seed}, demo=demo or serial)
    for_s = DEMO_S if demo and for_s is None else for_s
    require_writable(json)
    if serial:
        from ops.serial_shell import run as run_serial

        raise typer.Exit(run_serial(config, requests, json))
    from ops.up import up as run

    raise typer.Exit(run(config, demo, for_s, json, start_from))


@command
def broker(common: Common) -> None:
    """Run the embedded Apache Kafka alone, and print its address; Ctrl-C stops it."""
    config = common.load()
    if config.kafka.bootstrap:
        raise UserError(
            f"kafka.bootstrap = {config.kafka.bootstrap} names an existing cluster, so there is "
            f"no broker to start; leave it empty."
        )
    from ops.broker import EmbeddedBroker

    kafka = EmbeddedBroker(Path(config.storage.data_dir))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        typer.echo(kafka.start(lambda line: typer.echo(line, err=True)))
        while kafka.alive:
            time.sleep(0.2)
        raise UserError(f"the broker ended by itself; {kafka.log_file} says why.")
    except KeyboardInterrupt:
        typer.echo("stopping the broker", err=True)
    finally:
        kafka.stop()


@command
def actor(
    common: Common,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    member: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name among the actors that share the data directory."),
    ] = None,
) -> None:
    """Serve slates over HTTP, and publish exposures and feedback."""
    config = common.load_with_kafka(
        {"actor.host": host, "actor.port": port, "actor.member": member}
    )
    from actor.run import PortError, run

    try:
        run(config.kafka, config.policy, config.actor, Path(config.storage.data_dir))
    except PortError as error:
        raise UserError(f"{error}.") from None


@command
def streams(
    common: Common,
    metrics_port: MetricsPort = 0,
    member: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name among the processes that share the work."),
    ] = None,
) -> None:
    """Join exposures with feedback, and shape them into samples."""
    config = common.load_with_kafka({"streams.member": member})
    import asyncio

    from ops.admin import ensure_topics
    from storage.kv import StoreError
    from streams.ownership import own
    from streams.readback import StreamsError

    ensure_topics(config.kafka.bootstrap, config.kafka)
    _serve_metrics(metrics_port)
    state_dir = Path(config.storage.data_dir) / "streams" / config.streams.member
    work = own(config.kafka, config.join, config.shape, config.streams, state_dir)
    try:
        asyncio.run(_until_stopped(work))
    except (StreamsError, StoreError) as error:
        raise UserError(f"{error}.") from None


@command
def insights(common: Common, metrics_port: MetricsPort = 0) -> None:
    """Sum samples up into windowed rewards per arm, item statistics and coverage."""
    config = common.load_with_kafka()
    from streams.insights import run

    try:
        run(config.kafka, Path(config.storage.data_dir), metrics_port)
    except OSError as error:
        raise UserError(f"{error}.") from None


@command
def learner(common: Common, start_from: StartFrom = None, metrics_port: MetricsPort = 0) -> None:
    """Learn from samples, and publish weights; under torchrun as one of several ranks."""
    config = common.load_with_kafka()
    from learner.checkpoint import CheckpointError
    from learner.publication import PublicationError
    from learner.ranks import Ranks, RanksError
    from learner.run import Learner, LearnerError
    from ops.start import Start

    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    _serve_metrics(metrics_port)
    try:
        ranks = Ranks.join(config.learn.device)
        data_dir = Path(config.storage.data_dir)
        role = Learner(config.kafka, config.policy, config.learn, data_dir, ranks)
        role.start(None if start_from is None else Start.at(start_from).policy)
        role.run(stopped)
        role.close()
        ranks.leave()
    except (LearnerError, RanksError, CheckpointError, PublicationError) as error:
        raise UserError(f"{error}.") from None


@command
def simulate(common: Common, for_s: ForSeconds = None) -> None:
    """Let simulated viewers call a running actor as an app's backend would."""
    config = common.load()
    from ops.simulate import run

    counts = run(config, for_s)
    failed = f"{counts.requests_failed} failed, " if counts.requests_failed else ""
    typer.echo(f"{counts.requests} requests, {failed}{counts.viewings} viewings")


@command
def replay(
    common: Common,
    directory: LogDir,
    speed: Annotated[
        float | None,
        typer.Option(min=0, help="Log seconds per wall second; as fast as it goes if not given."),
    ] = None,
    barrier: Annotated[
        int,
        typer.Option(min=0, help="Requests between waits for the learner to catch up; 0: none."),
    ] = 1024,
    limit: Annotated[
        int | None, typer.Option(metavar="ROWS", min=1, help="Read only the log's first rows.")
    ] = None,
    json: JsonFile = None,
    start_from: StartFrom = None,
) -> None:
    """Stream a real feed log through the live loop, testing before training."""
    config = common.load(log=True)
    if common.data_dir is None:  # a log lives in its own time: never among live events
        folder = str(Path(config.storage.data_dir) / "replay")
        config = replace(config, storage=replace(config.storage, data_dir=folder))
    require_writable(json)
    from ops.replay import run

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise typer.Exit(run(config, directory, speed, barrier, limit, json, start_from))


@command
def pretrain(
    common: Common,
    directory: LogDir,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where the start goes; `pretrained` in the data directory."
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Warm a policy up on the watch history that precedes a feed log."""
    config = common.load(log=True)
    require_writable(json)
    from ops.pretrain import run

    raise typer.Exit(run(config, directory, out, json))


@command
def doctor(common: Common) -> None:
    """Check Python, torch, Java, disk, ports, broker and topics; say what to do about each."""
    config = common.load()
    from ops.doctor import checks, render

    found = checks(config)
    typer.echo(render(found))
    raise typer.Exit(0 if all(check.ok for check in found) else 1)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")] = DEFAULT_FILE,
) -> None:
    """Write a configuration file that explains every key."""
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(commented_toml(Config()))
    except FileExistsError:
        raise UserError(
            f"{file} exists already and was left as it is; name another: dwell init FILE."
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); name another.") from None
    typer.echo(f"wrote {file}")


@app.command()
def version() -> None:
    """Print the version."""
    from ops.results import dwell_version

    typer.echo(f"dwell {dwell_version()}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program and ends it with its exit status; `arguments` None means `sys.argv`."""
    end_with_parent()
    try:
        app(arguments, prog_name="dwell")
    except (UserError, OSError) as error:  # a full disk or a taken port is not ours to explain
        line = " ".join(str(error).splitlines())
        print(f"dwell: {line}", file=sys.stderr)
        sys.exit(2)


def _serve_metrics(port: int) -> None:
    from prometheus_client import start_http_server

    try:
        server, _ = start_http_server(port, addr="127.0.0.1")
    except OSError as error:
        raise UserError(
            f"--metrics-port {port} cannot be used ({error.strerror}); name another, or 0."
        ) from None
    typer.echo(f"metrics at http://127.0.0.1:{server.server_port}/metrics", err=True)


async def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Awaits the work; Ctrl-C and SIGTERM cancel it, so that it can clean up."""
    import asyncio

    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    main()
