"""The shape of the HTTP API, over a service that only remembers what it was asked."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
from aiokafka.errors import KafkaConnectionError
from fastapi import FastAPI

from actor.api import application
from actor.outgoing import SpoolFullError
from actor.producing import RefusedError
from actor.service import BusyError, FeedbackLike, NotReadyError, Service
from actor.settings import ActorSettings
from storage.kv import StoreError
from streams.events import Exposure, ShownItem
from tests.actor.asgi import call


class Stand:
    """Answers as a service would, or raises what it is told to."""

    settings = ActorSettings(slate=2, max_slate=5)

    def __init__(self) -> None:
        self.raises: Exception | None = None
        self.asked: list[tuple[str, int]] = []
        self.fed: list[FeedbackLike] = []
        self.lacks: list[str] = []

    async def recommend(self, user: str, count: int) -> Exposure:
        if self.raises is not None:
            raise self.raises
        self.asked.append((user, count))
        return Exposure(
            request="r1",
            user=user,
            time_ms=7,
            arm="learning",
            policy_version=3,
            catalogue_version=9,
            decode_mode="gumbel_top_k",
            temperature=1.0,
            context=b"",
            excluded=b"",
            items=[
                ShownItem(
                    item=f"i{position}",
                    sid=(0, 0, position),
                    position=position,
                    duration_ms=1000,
                    source="policy",
                    logp_levels=(-1.0, -2.0, -3.0),
                    logp_decision=-5.5,
                )
                for position in range(count)
            ],
        )

    async def feedback(self, events: Sequence[FeedbackLike], received_ms: int) -> int:
        if self.raises is not None:
            raise self.raises
        self.fed += events
        self.received_ms = received_ms
        return len(events)

    def missing(self) -> list[str]:
        return self.lacks

    def versions(self) -> dict[str, Any]:
        return {"dwell": "0", "arms": {"control": 1}, "catalogue_version": 9}


@pytest.fixture
def stand() -> Stand:
    return Stand()


@pytest.fixture
def app(stand: Stand) -> FastAPI:
    return application(cast(Service, stand))


def event(**changes: object) -> dict[str, object]:
    made: dict[str, object] = {
        "event": "e1",
        "user": "u",
        "request": "r1",
        "kind": "heartbeat",
        "position": 0,
        "play_ms": 1500,
    }
    made.update(changes)
    return {name: value for name, value in made.items() if value is not ...}


async def test_a_slate_names_request_arm_versions_items_and_probabilities(app: FastAPI) -> None:
    answer = await call(app, "POST", "/recommend", {"user": "u", "count": 1})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == {
        "request": "r1",
        "user": "u",
        "arm": "learning",
        "policy_version": 3,
        "catalogue_version": 9,
        "items": [{"item": "i0", "position": 0, "logp": -5.5}],
        "fallback": False,
    }


async def test_without_a_count_the_configured_slate_is_served(app: FastAPI, stand: Stand) -> None:
    for body in ({"user": "u"}, {"user": "u", "count": None}):
        assert len((await call(app, "POST", "/recommend", body)).json["items"]) == 2
    assert stand.asked == [("u", 2), ("u", 2)]


async def test_a_beam_bounds_what_may_be_asked_for(app: FastAPI, stand: Stand) -> None:
    stand.settings = ActorSettings(slate=2, max_slate=5, decoding="beam", beam=1)
    assert (await call(app, "POST", "/recommend", {"user": "u"})).status == 200
    assert stand.asked == [("u", 1)]
    refused = await call(app, "POST", "/recommend", {"user": "u", "count": 2})
    assert refused.status == 422
    assert "allowed 1..1" in refused.json["detail"][0]["msg"]


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({}, "$.user", "user"),
        ({"count": 3}, "$.user", "user"),
        ({"user": ""}, "$.user", "length >= 1"),
        ({"user": "u" * 257}, "$.user", "length <= 256"),
        ({"user": 7}, "$.user", "`str`"),
        ({"user": "u", "count": 0}, "$.count", ">= 1"),
        ({"user": "u", "count": -1}, "$.count", ">= 1"),
        ({"user": "u", "count": 6}, "$.count", "allowed 1..5"),
        ({"user": "u", "count": 10**30}, "$.count", ""),
        ({"user": "u", "count": 1.5}, "$.count", "`int"),
        ({"user": "u", "count": "2"}, "$.count", "`int"),
        ({"user": "u", "counts": 2}, "$.counts", "unknown field"),
        ([], "$", "`object`"),
        (b"", "$", "not JSON"),
        (b"{user: u}", "$", "not JSON"),
        (b'{"user": "u"', "$", "not JSON"),
        (b'{"user": "\xff"}', "$", "not JSON"),
        (b'{"user": "\\ud800"}', "$", "not JSON"),
        (b"[" * 100_000, "$", ""),
    ],
)
async def test_a_wrong_request_is_422_with_the_path_of_its_field(
    app: FastAPI, stand: Stand, body: object, field: str, says: str
) -> None:
    answer = await call(app, "POST", "/recommend", body)
    assert answer.status == 422, answer
    (detail,) = answer.json["detail"]
    assert detail["loc"] == ["body", field]
    assert says in detail["msg"]
    assert stand.asked == []


@pytest.mark.parametrize(
    ("events", "field", "says"),
    [
        ([event(user=...)], "$.events[0].user", "user"),
        ([event(), event(event=...)], "$.events[1].event", "event"),
        ([event(request="")], "$.events[0].request", "length >= 1"),
        ([event(kind="watch")], "$.events[0].kind", "watch"),
        ([event(kind=...)], "$.events[0].kind", "kind"),
        ([event(position=...)], "$.events[0].position", "needs field `position` >= 0"),
        ([event(position=-1)], "$.events[0].position", "needs field `position` >= 0"),
        ([event(position=-2)], "$.events[0].position", ">= -1"),
        ([event(position=1001)], "$.events[0].position", "<= 1000"),
        ([event(play_ms=-1)], "$.events[0].play_ms", ">= 0"),
        ([event(play_ms=1 << 32)], "$.events[0].play_ms", "<= 4294967295"),
        ([event(play_ms=0.5)], "$.events[0].play_ms", "`int`"),
        ([event(client_time_ms=1 << 64)], "$.events[0].client_time_ms", ""),
        ([event(client_time_ms=-5)], "$.events[0].client_time_ms", ">= 0"),
        ([event(time_ms=5)], "$.events[0].time_ms", "unknown field"),
        ([event(withdrawn=1)], "$.events[0].withdrawn", "`bool`"),
        ([event(item="i" * 257)], "$.events[0].item", "length <= 256"),
        ([7], "$.events[0]", "`object`"),
        ([], "$.events", "length >= 1"),
        ([event()] * 257, "$.events", "length <= 256"),
        ({"event": "e1"}, "$.events", "`array`"),
        (None, "$.events", "`array`"),
    ],
)
async def test_wrong_feedback_is_422_with_the_path_of_its_field_and_nothing_is_taken(
    app: FastAPI, stand: Stand, events: object, field: str, says: str
) -> None:
    answer = await call(app, "POST", "/feedback", {"events": events})
    assert answer.status == 422, answer
    (detail,) = answer.json["detail"]
    assert detail["loc"] == ["body", field]
    assert says in detail["msg"]
    assert stand.fed == []


async def test_up_to_256_events_are_taken_as_they_are(app: FastAPI, stand: Stand) -> None:
    kinds = ("begin", "heartbeat", "end", "like", "dislike", "left")
    events = [
        event(event=f"e{n}", kind=kinds[n % 6], position=-1 if n % 6 == 5 else n % 3)
        for n in range(256)
    ]
    answer = await call(app, "POST", "/feedback", {"events": events})
    assert (answer.status, answer.json) == (200, {"accepted": 256})
    assert [one.event for one in stand.fed] == [f"e{n}" for n in range(256)]
    assert (stand.fed[1].kind, stand.fed[1].play_ms) == ("heartbeat", 1500)


async def test_who_leaves_a_slate_needs_no_position(app: FastAPI, stand: Stand) -> None:
    answer = await call(app, "POST", "/feedback", {"events": [event(kind="left", position=...)]})
    assert answer.status == 200
    assert stand.fed[0].position == -1


@pytest.mark.parametrize("path", ["/recommend", "/feedback"])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (NotReadyError("not ready: weights missing"), "weights missing"),
        (KafkaConnectionError("gone"), "Kafka does not answer"),
        (TimeoutError(), "Kafka does not answer"),
    ],
)
async def test_what_cannot_be_done_now_is_503_with_a_reason(
    app: FastAPI, stand: Stand, path: str, error: Exception, says: str
) -> None:
    stand.raises = error
    body = {"user": "u"} if path == "/recommend" else {"events": [event()]}
    answer = await call(app, "POST", path, body)
    assert answer.status == 503
    assert says in answer.json["detail"]
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "error",
    [
        SpoolFullError("Kafka is away and the spool is full"),
        StoreError("the store cannot be written: No space left on device"),
        RefusedError("Kafka refused a record of feedback"),
    ],
)
async def test_what_cannot_be_made_durable_is_503_with_its_sentence(
    app: FastAPI, stand: Stand, error: Exception
) -> None:
    stand.raises = error
    answer = await call(app, "POST", "/feedback", {"events": [event()]})
    assert (answer.status, answer.json["detail"]) == (503, str(error))
    assert answer.headers["retry-after"] == "5"


async def test_too_many_at_once_is_429_with_a_time_to_come_again(
    app: FastAPI, stand: Stand
) -> None:
    stand.raises = BusyError("512 requests wait already, try again")
    answer = await call(app, "POST", "/recommend", {"user": "u"})
    assert answer.status == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.json["detail"] == "512 requests wait already, try again"


async def test_a_failure_of_ours_is_500_without_a_trace(
    app: FastAPI, stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    stand.raises = ValueError("the policy's logits of level 1 are not finite")
    answer = await call(app, "POST", "/recommend", {"user": "u"})
    assert answer.status == 500
    assert "Traceback" not in answer.body.decode()
    assert "logits" not in answer.body.decode()
    assert "logits" in caplog.text


async def test_health_ready_and_version_say_how_it_stands(app: FastAPI, stand: Stand) -> None:
    assert (await call(app, "GET", "/health")).status == 200
    ready = await call(app, "GET", "/ready")
    assert (ready.status, ready.json) == (200, {"ready": True, "missing": []})
    stand.lacks = ["catalogue", "weights"]
    ready = await call(app, "GET", "/ready")
    assert (ready.status, ready.json) == (
        503,
        {"ready": False, "missing": ["catalogue", "weights"]},
    )
    assert (await call(app, "GET", "/health")).status == 200
    assert (await call(app, "GET", "/version")).json["arms"] == {"control": 1}


async def test_metrics_count_what_was_answered(app: FastAPI) -> None:
    def count(text: str) -> float:
        name = 'dwell_actor_requests_total{route="recommend",status="422"}'
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    before = count((await call(app, "GET", "/metrics")).body.decode())
    await call(app, "POST", "/recommend", {})
    answer = await call(app, "GET", "/metrics")
    assert count(answer.body.decode()) == before + 1
    assert answer.headers["content-type"].startswith("text/plain")


async def test_the_openapi_document_has_the_schemas_of_the_bodies(app: FastAPI) -> None:
    document = (await call(app, "GET", "/openapi.json")).json
    assert {"/recommend", "/feedback", "/health", "/ready", "/version", "/metrics"} <= set(
        document["paths"]
    )
    recommend = document["paths"]["/recommend"]["post"]
    body = recommend["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["user"]
    assert body["properties"]["user"]["maxLength"] == 256
    feedback = document["paths"]["/feedback"]["post"]["requestBody"]
    events = feedback["content"]["application/json"]["schema"]["properties"]["events"]
    assert events["maxItems"] == 256
    assert "heartbeat" in events["items"]["properties"]["kind"]["enum"]
    answer = recommend["responses"]["200"]["content"]["application/json"]["schema"]
    assert "policy_version" in answer["properties"]
    assert "$ref" not in str(document["paths"]["/recommend"])


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/recommend", 405), ("GET", "/x", 404)]
)
async def test_an_unknown_route_or_method_is_said_so(
    app: FastAPI, method: str, path: str, status: int
) -> None:
    assert (await call(app, method, path)).status == status
