"""The actor's process: uvicorn around the application."""

import socket

import uvicorn

from actor.api import application
from actor.service import Service
from actor.settings import ActorSettings
from learner.settings import PolicySettings
from streams.settings import KafkaSettings


class PortError(RuntimeError):
    """The port to listen on cannot be had; the message names it."""


def run(kafka: KafkaSettings, policy: PolicySettings, settings: ActorSettings) -> None:
    """Serve until SIGTERM or SIGINT; raises `PortError` when the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise PortError(
            f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}): "
            "set actor.port to a free port"
        ) from None
    service = Service(f"{settings.host}:{listener.getsockname()[1]}", kafka, policy, settings)
    config = uvicorn.Config(
        application(service.open),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listener])
