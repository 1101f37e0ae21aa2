"""The HTTP routes: thin shells over the serving core.

Notable choices
- Bodies are read by msgspec: a wrong one is 422 with the path of the field. The OpenAPI document carries the
  schemas of the same structs.
- An exposure or a feedback is durable (acknowledged by Kafka, or in the spool) before its answer. Where it cannot be
  the answer is 503: nothing was acknowledged, and the same feedback may be sent again (its event ids make it one).
- Feedback is stamped with the time of receipt; the client's clock is kept beside it.
"""

import logging
import re
import time
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Annotated, Any, TypeVar

import msgspec
from aiokafka.errors import KafkaError
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest
from starlette.requests import ClientDisconnect

from actor.outgoing import SpoolFullError
from actor.producing import RefusedError
from actor.service import BusyError, NotReadyError, Service
from storage.kv import StoreError
from streams.events import FeedbackKind

log = logging.getLogger("dwell.actor")

REQUESTS = Counter("dwell_actor_requests_total", "HTTP requests answered", ["route", "status"])
SECONDS = Histogram(
    "dwell_actor_request_seconds",
    "Time to answer",
    ["route"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Recommend(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /recommend."""

    user: Name
    count: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Recommended(msgspec.Struct):
    """One item of an answer."""

    item: str
    position: int
    logp: float | None


class Slate(msgspec.Struct):
    """Answer of POST /recommend."""

    request: str
    user: str
    arm: str
    policy_version: int
    catalogue_version: int
    items: list[Recommended]
    fallback: bool
    """Not the policy's: there was no time."""


class FeedbackEvent(msgspec.Struct, forbid_unknown_fields=True):
    """One event of POST /feedback; `play_ms` is the play so far of this position."""

    event: Name
    user: Name
    request: Name
    kind: FeedbackKind
    position: Annotated[int, msgspec.Meta(ge=-1, le=1000)] = -1
    item: Annotated[str, msgspec.Meta(max_length=256)] = ""
    play_ms: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    withdrawn: bool = False
    client_time_ms: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)] | None = None

    def __post_init__(self) -> None:
        if self.position < 0 and self.kind != "left":
            raise ValueError(f"kind {self.kind!r} needs field `position` >= 0")


class FeedbackBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /feedback."""

    events: Annotated[list[FeedbackEvent], msgspec.Meta(min_length=1, max_length=256)]


class Accepted(msgspec.Struct):
    """Answer of POST /feedback."""

    accepted: int


T = TypeVar("T")
_encode = msgspec.json.encode
_recommend = msgspec.json.Decoder(Recommend)
_feedback = msgspec.json.Decoder(FeedbackBody)


class _BadBodyError(ValueError):
    """A body that is not what the route takes; `field` is its path."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def application(service: Service) -> FastAPI:
    """The actor's HTTP application over an open service."""
    app = FastAPI(title="Dwell actor", version=metadata.version("dwell"))

    @app.post("/recommend", **_documented(Recommend, Slate))
    async def recommend(request: Request) -> Response:
        """A slate for a user."""

        async def answer() -> bytes:
            body = await _body(request, _recommend)
            most = service.settings.most
            count = min(service.settings.slate, most) if body.count is None else body.count
            if count > most:
                allowed = f"allowed 1..{most}"
                raise _BadBodyError(f"count is {count}, {allowed}", "$.count")
            exposure = await service.recommend(body.user, count)
            return _encode(
                Slate(
                    request=exposure.request,
                    user=exposure.user,
                    arm=exposure.arm,
                    policy_version=exposure.policy_version,
                    catalogue_version=exposure.catalogue_version,
                    items=[
                        Recommended(item.item, item.position, item.logp_decision)
                        for item in exposure.items
                    ],
                    fallback=exposure.decode_mode == "other",
                )
            )

        return await _answered("recommend", answer)

    @app.post("/feedback", **_documented(FeedbackBody, Accepted))
    async def feedback(request: Request) -> Response:
        """What viewers did: 1 to 256 events, of any users."""

        async def answer() -> bytes:
            received_ms = int(time.time() * 1000)
            body = await _body(request, _feedback)
            return _encode(Accepted(await service.feedback(body.events, received_ms)))

        return await _answered("feedback", answer)

    @app.get("/health")
    async def health() -> Response:
        """Alive."""
        return _json(200, {"status": "alive"})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether every arm serves the version it should, and there is a catalogue."""
        missing = service.missing()
        return _json(503 if missing else 200, {"ready": not missing, "missing": missing})

    @app.get("/version")
    async def version() -> Response:
        """Program, policy version by arm, catalogue version."""
        return _json(200, service.versions())

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return app


_FIELD = re.compile(r"(?:missing required|contains unknown|needs) field `([^`]+)`")


async def _body(request: Request, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(await request.body())
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        path = path.rstrip("`") or "$"
        named = _FIELD.search(message)
        raise _BadBodyError(message, f"{path}.{named[1]}" if named else path) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _BadBodyError(f"not JSON: {error}", "$") from None


async def _answered(route: str, answer: Callable[[], Awaitable[bytes]]) -> Response:
    """Run a route; every expected failure has its status and one sentence."""
    started = time.perf_counter()
    try:
        response = Response(await answer(), media_type="application/json")
    except _BadBodyError as error:
        detail = [{"loc": ["body", error.field], "msg": str(error), "type": "value_error"}]
        response = _json(422, {"detail": detail})
    except NotReadyError as error:
        response = _json(503, {"detail": str(error)})
        response.headers["Retry-After"] = "1"
    except BusyError as error:
        response = _json(429, {"detail": str(error)})
        response.headers["Retry-After"] = "1"
    except (SpoolFullError, StoreError, RefusedError) as error:
        response = _json(503, {"detail": str(error)})
        response.headers["Retry-After"] = "5"
    except (TimeoutError, KafkaError):
        response = _json(503, {"detail": "Kafka does not answer: not acknowledged, try again"})
        response.headers["Retry-After"] = "1"
    except ClientDisconnect:
        response = _json(400, {"detail": "the connection ended before the body did"})
    except Exception:
        log.exception("%s failed", route)
        response = _json(500, {"detail": "the actor failed; its log says why"})
    REQUESTS.labels(route, response.status_code).inc()
    SECONDS.labels(route).observe(time.perf_counter() - started)
    return response


def _json(status: int, content: Any) -> Response:
    return Response(_encode(content), status_code=status, media_type="application/json")


def _documented(body: type, answer: type) -> dict[str, Any]:
    """OpenAPI of a route whose body msgspec reads."""

    def content(schema: type) -> dict[str, Any]:
        (shown,), parts = msgspec.json.schema_components([schema], ref_template="#/$defs/{name}")
        return {"application/json": {"schema": _inlined(shown, parts)}}

    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content(body)}},
        "responses": {
            200: {"description": "Done", "content": content(answer)},
            422: {"description": "The body is wrong; the field is named"},
            429: {"description": "Too many requests wait: come again"},
            503: {
                "description": "Not ready, or Kafka is away and the spool full: not acknowledged"
            },
        },
    }


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """The schema with its references replaced: the structs do not refer to themselves."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
        return {key: _inlined(value, parts) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_inlined(value, parts) for value in schema]
    return schema
