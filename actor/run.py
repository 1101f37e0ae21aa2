"""The actor's process: uvicorn around the application, inside an open service."""

import asyncio
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import uvicorn

from actor.api import application
from actor.service import Service, ServiceError
from actor.settings import ActorSettings
from learner.settings import PolicySettings
from storage.heap import settle_heap
from streams.settings import KafkaSettings

SWITCH_S: Final = 5e-4
"""Event loop and decode share the interpreter: Python's 5 ms between their turns were most of p99 at high rates."""


class ActorError(RuntimeError):
    """The actor cannot start or go on; the message says why, and what would help."""


PortError = ActorError


def run(
    kafka: KafkaSettings, policy: PolicySettings, settings: ActorSettings, data_dir: Path
) -> None:
    """Serve until SIGTERM or SIGINT; the actor's own state lies below `data_dir`.

    Raises `ActorError` when the port is taken, Kafka does not answer at the start, or serving cannot go on.
    """
    with listening_socket() as listener:
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise ActorError(
                f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}): "
                "set actor.port to a free port"
            ) from None
        name = f"{settings.host}:{listener.getsockname()[1]}"
        try:
            asyncio.run(_serve(listener, Service(name, kafka, policy, settings, data_dir)))
        except ServiceError as error:
            raise ActorError(str(error)) from None


def listening_socket() -> socket.socket:
    """A TCP socket to listen on, not bound yet.

    The protocol is named because asyncio turns Nagle's algorithm off only where it is: with it a client's delayed
    acknowledgement holds each answer back by 40 ms, since headers and body are written one after the other.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return listener


async def _serve(listener: socket.socket, service: Service) -> None:
    async with service.open():
        settle_heap()
        sys.setswitchinterval(SWITCH_S)
        config = uvicorn.Config(
            application(service),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)

        async def end_with_service() -> None:
            await service.failed.wait()
            server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            # uvicorn takes the signals, and raises them again when it has ended: the service closes after that
            signal.signal(number, lambda *_: None)
        watch = asyncio.create_task(end_with_service())
        await server.serve(sockets=[listener])
        watch.cancel()
    if service.fault:
        raise ServiceError(service.fault)
