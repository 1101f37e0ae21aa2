"""Small records for the tests of the streams, and the world they are put together from."""

from typing import Any

from streams.events import Exposure, Feedback, FeedbackKind, Sample, SampleItem, ShownItem

T0 = 1_700_000_000_000


def exposure(request: str = "r", time_ms: int = T0, slots: int = 2, **more: Any) -> Exposure:
    """A slate of `slots` items of 20 s at positions 0, 1, ..."""
    items = [
        ShownItem(
            item=f"item-{position}",
            sid=(1, 2, position),
            position=position,
            duration_ms=20_000,
            source="policy",
            logp_levels=(-1.0, -2.0, -3.0),
        )
        for position in range(slots)
    ]
    fields: dict[str, Any] = {
        "request": request,
        "user": "user",
        "time_ms": time_ms,
        "arm": "learning",
        "policy_version": 3,
        "catalogue_version": 7,
        "decode_mode": "sample",
        "temperature": 1.0,
        "context": b"",
        "excluded": b"",
        "items": items,
    }
    return Exposure(**{**fields, **more})


class Feed:
    """Writes one request's feedback, with an event id of its own each time; `at` is relative to `T0`."""

    def __init__(self, request: str = "r", user: str = "user") -> None:
        self.request = request
        self.user = user
        self._count = 0

    def __call__(self, kind: FeedbackKind, position: int, at: int, **more: Any) -> Feedback:
        self._count += 1
        fields: dict[str, Any] = {
            "event": f"{self.request}/{self._count}",
            "user": self.user,
            "request": self.request,
            "position": position,
            "time_ms": T0 + at,
            "kind": kind,
        }
        return Feedback(**{**fields, **more})

    def left(self, at: int) -> Feedback:
        """The viewer left the slate."""
        return self("left", -1, at)


def sample(watermark_ms: int, arm: str, items: list[SampleItem]) -> Sample:
    """A request that was decided a second before the watermark that closed it."""
    return Sample(
        request="r",
        user="u",
        time_ms=watermark_ms - 3000,
        arm=arm,
        policy_version=1,
        catalogue_version=1,
        decode_mode="sample",
        temperature=1.0,
        context=b"",
        excluded=b"",
        items=items,
        threshold=0.75,
        median=0.5,
        start_ms=watermark_ms - 3000,
        decided_ms=watermark_ms - 1000,
        closed_by="decided",
        watermark_ms=watermark_ms,
        closable_ms=watermark_ms,
        exposure_offset=0,
        feedback_upto=0,
    )
