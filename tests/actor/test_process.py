"""The actor's process: how it starts, and how it ends."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actor.run import ActorError, listening_socket, run
from actor.settings import ActorSettings
from tests.actor.world import CODES, POLICY, ROWS, World, until, user_of

PROCESS = """
import asyncio, gc, sys
from pathlib import Path
from actor.run import ActorError, run
from actor.settings import ActorSettings
from actor.subscription import Subscription
from learner.settings import PolicySettings
from streams.settings import KafkaSettings

async def broken(self):
    await asyncio.sleep(0.3)
    raise RuntimeError("a defect")

bootstrap, port, partitions, codes, rows, breaks, data_dir = sys.argv[1:]
if breaks == "breaks":
    Subscription.run = broken
kafka = KafkaSettings(bootstrap=bootstrap, partitions=int(partitions))
policy = PolicySettings(codes=int(codes), user_rows=int(rows))
try:
    run(kafka, policy, ActorSettings(port=int(port)), Path(data_dir))
    print("frozen:", gc.get_freeze_count(), file=sys.stderr)
except ActorError as error:
    sys.exit(f"said: {error}")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(
    world: World, port: int, breaks: bool = False, data_dir: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    arguments = [world.kafka.bootstrap, port, world.kafka.partitions, CODES, ROWS]
    arguments.append("breaks" if breaks else "")
    with tempfile.TemporaryDirectory() as own:
        running = subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, arguments), str(data_dir or own)],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield running
        finally:
            running.kill()
            running.communicate()


def asked(port: int, path: str, body: object = None) -> int:
    """Status of one request; 0 where nothing answers."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code)
    except OSError:
        return 0


async def test_a_process_serves_until_it_is_told_to_end(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    port = free_port()
    with process(world, port) as actor:
        await until(lambda: actor.poll() is not None or asked(port, "/ready") == 200, 60)
        assert asked(port, "/recommend", {"user": user_of("learning")}) == 200
        assert asked(port, "/recommend", {}) == 422
        actor.send_signal(signal.SIGTERM)
        _, said = await asyncio.to_thread(actor.communicate, timeout=20)
    assert actor.returncode == 0, said
    assert "Traceback" not in said
    assert "Unclosed" not in said
    assert len(world.exposures()) == 1
    frozen = int(said.partition("frozen: ")[2].split()[0])
    assert (
        frozen > 10_000
    )  # what was there when it was ready is not looked at for garbage while it serves


async def test_a_process_whose_reader_has_ended_ends_with_a_sentence(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    with process(world, free_port(), breaks=True) as actor:
        _, said = await asyncio.to_thread(actor.communicate, timeout=60)
    assert actor.returncode == 1
    assert said.splitlines()[-1] == "said: reading Kafka ended: a defect"


def test_a_port_in_use_is_one_sentence(world: World, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ActorError, match=rf"127\.0\.0\.1:{port} .* set actor\.port"):
            run(world.kafka, POLICY, ActorSettings(port=port), tmp_path)


async def test_answers_do_not_wait_for_a_clients_acknowledgement() -> None:
    """Nagle's algorithm is off on the connections that are accepted."""
    at_once: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        at_once.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with listening_socket() as listener:
        listener.bind(("127.0.0.1", 0))
        async with await asyncio.start_server(accepted, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            assert await at_once
            writer.close()
            await writer.wait_closed()
