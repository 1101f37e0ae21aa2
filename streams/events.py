"""Every record on Kafka: msgspec structs, packed as MessagePack maps with named fields.

Notable choices
- One record is one event, so that other systems can read and write these topics. `docs/events.md` documents
  the wire format field by field; a test keeps it in step with this module.
- Times are integer milliseconds since the epoch (UTC), plays and durations integer milliseconds: ties are
  exact and digests reproducible. Probabilities are natural logarithms.
- `type` names the record where a topic carries more than one kind; `v` is "major.minor". Added fields are
  ignored by older readers; an unknown major is refused by name.
- Contexts and lists of leaves are packed little-endian arrays: they are most of an exposure's bytes.
- The smallest structs are not tracked by the garbage collector (`gc=False`): they are held by the million and
  cannot be part of a cycle.
"""

from typing import Any, Final, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

VERSION: Final = "1.0"
MAJOR: Final = "1"

LEVELS: Final = 3
"""Levels of a semantic ID."""

SemanticId = tuple[int, int, int]
LogpLevels = tuple[float, float, float]

Action = Literal["like", "follow", "comment", "forward", "dislike"]
ACTION_BITS: Final[dict[str, int]] = {
    "like": 1,
    "follow": 2,
    "comment": 4,
    "forward": 8,
    "dislike": 16,
}
"""Actions of one item travel as a bit mask."""

FeedbackKind = Literal[
    "begin", "heartbeat", "end", "like", "follow", "comment", "forward", "dislike", "left"
]
PLAY_KINDS: Final = frozenset({"begin", "heartbeat", "end"})

Source = Literal["policy", "explore", "other"]
Outcome = Literal["unseen", "ended", "left", "abandoned", "censored"]

BEHAVIOUR: Final = np.dtype(
    [
        ("codes", "<u2", (LEVELS,)),
        ("actions", "<u2"),
        ("play_ms", "<u4"),
        ("duration_ms", "<u4"),
        ("age_ms", "<u4"),
    ]
)
"""One context position as the policy saw it, oldest first: 20 bytes, little-endian."""


class UnreadableError(ValueError):
    """A record that cannot be used; `reason` is a dead letter's reason code."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class ShownItem(msgspec.Struct, kw_only=True, gc=False):
    """One slot of a slate as it was served."""

    item: str
    sid: SemanticId
    position: int
    duration_ms: int
    source: Source
    logp_levels: LogpLevels | None = None
    logp_decision: float | None = None
    score: float | None = None


class SkippedItem(ShownItem, kw_only=True, gc=False):
    """What was drawn for a slot and not shown in it; its probabilities are those of the draw."""

    reason: str


class Draw(msgspec.Struct, kw_only=True, gc=False):
    """Where a slate's noise came from, so that it can be drawn again."""

    seed: int
    row: int
    rows: int
    slots: int
    spare: int = 0
    beam: int = 0


class Exposure(msgspec.Struct, tag_field="type", tag="exposure", kw_only=True):
    """One request and the slate that answered it."""

    v: str = VERSION
    request: str
    user: str
    time_ms: int
    arm: str
    policy_version: int
    catalogue_version: int
    decode_mode: str
    temperature: float
    context: bytes
    excluded: bytes
    items: list[ShownItem]
    next_score: float | None = None
    draw: Draw | None = None
    author_cap: int = 0
    skipped: list[SkippedItem] | None = None


class Feedback(msgspec.Struct, tag_field="type", tag="feedback", kw_only=True, gc=False):
    """One thing a viewer did; plays are cumulative per (request, position)."""

    v: str = VERSION
    event: str
    user: str
    request: str
    position: int = -1
    item: str = ""
    time_ms: int
    kind: FeedbackKind
    play_ms: int = 0
    withdrawn: bool = False
    client_time_ms: int | None = None


class Tick(msgspec.Struct, tag_field="type", tag="tick", kw_only=True, gc=False):
    """A promise: nothing older than `time_ms` minus the lateness is still to be written."""

    v: str = VERSION
    time_ms: int
    writer: str


class SampleItem(msgspec.Struct, kw_only=True, gc=False):
    """One slot after join and shaping."""

    item: str
    sid: SemanticId
    position: int
    duration_ms: int
    source: Source
    logp_levels: LogpLevels | None = None
    outcome: Outcome
    play_ms: int
    actions: int
    bucket: int | None = None
    percentile: float | None = None
    own_plays: int = 0
    population: float = 0.0
    advantage: int | None = None
    supervised: bool = False


class Sample(msgspec.Struct, tag_field="type", tag="sample", kw_only=True):
    """One request at the learner: what was shown, what came of it, and what it is worth."""

    v: str = VERSION
    request: str
    user: str
    time_ms: int
    arm: str
    policy_version: int
    catalogue_version: int
    decode_mode: str
    temperature: float
    context: bytes
    excluded: bytes
    items: list[SampleItem]
    threshold: float
    median: float
    start_ms: int
    decided_ms: int
    closed_by: Literal["decided", "deadline", "memory"]
    watermark_ms: int
    closable_ms: int
    exposure_offset: int
    feedback_upto: int


class Behaviour(msgspec.Struct, kw_only=True, gc=False):
    """One finished play of a user."""

    request: str
    position: int
    item: str
    end_ms: int
    play_ms: int
    duration_ms: int
    actions: int = 0


class History(msgspec.Struct, tag_field="type", tag="history", kw_only=True):
    """A user's latest finished plays and shown items, both oldest first; replaces the one before."""

    v: str = VERSION
    user: str
    behaviours: list[Behaviour]
    shown: list[str]


class UserShaping(msgspec.Struct, tag_field="type", tag="user", kw_only=True):
    """Changelog of a user's finished plays: (end, play) in ms, oldest first, by log-duration bucket."""

    v: str = VERSION
    arm: str
    user: str
    plays: dict[int, list[tuple[int, int]]]


class BucketShaping(msgspec.Struct, tag_field="type", tag="bucket", kw_only=True):
    """Changelog of a population's plays in one log-duration bucket: counts by play bin."""

    v: str = VERSION
    arm: str
    bucket: int
    counts: dict[int, float]


class QuantileShaping(msgspec.Struct, tag_field="type", tag="quantile", kw_only=True):
    """Changelog of the running distribution of percentiles: weights (f64) and the next weight."""

    v: str = VERSION
    arm: str
    weights: bytes
    weight: float


class LateStart(msgspec.Struct, tag_field="type", tag="late", kw_only=True):
    """Changelog of an open request whose exposure came late: from when it counts. Deleted when it closes."""

    v: str = VERSION
    offset: int
    start_ms: int


class PositionOutcome(msgspec.Struct, frozen=True, gc=False):
    """What became of one position; `last_ms` is the event time of its last play event."""

    outcome: Outcome
    play_ms: int
    last_ms: int
    actions: int


class Held(msgspec.Struct, tag_field="type", tag="held", kw_only=True):
    """Changelog of a closed request that waits for older ones (order `exposure`). Deleted when its sample is made."""

    v: str = VERSION
    offset: int
    start_ms: int
    decided_ms: int
    closed_by: Literal["decided", "deadline", "memory"]
    watermark_ms: int
    closable_ms: int
    feedback_upto: int
    positions: dict[int, PositionOutcome]


Shaping = UserShaping | BucketShaping | QuantileShaping | LateStart | Held


class Upsert(msgspec.Struct, tag_field="type", tag="upsert", kw_only=True):
    """One item of the catalogue; a record with the same key and no value deletes it."""

    v: str = VERSION
    item: str
    sid: SemanticId
    codebook: str
    duration_ms: int
    author: str = ""
    tags: list[str] = []
    embedding: bytes = b""


class CatalogueAck(msgspec.Struct, tag_field="type", tag="catalogue_ack", kw_only=True):
    """An actor's sign of life: no answer of its is of an older catalogue version any more."""

    v: str = VERSION
    actor: str
    run: str
    catalogue_version: int
    leaving: bool = False


class Command(msgspec.Struct, tag_field="type", tag="command", kw_only=True):
    """One decision on `control`; the state is the fold over all of them."""

    v: str = VERSION
    id: str
    time_ms: int
    who: str
    why: str
    action: Literal["pin", "follow", "shares", "rollback", "refuse"]
    arm: str = ""
    version: int = 0
    shares: dict[str, float] = {}
    upto: int = 0
    restored: int = 0


class Insight(msgspec.Struct, tag_field="type", tag="insight", kw_only=True):
    """Sums over the samples of one arm that closed in one window of event time; approximate by nature.

    A window is published again as it grows. A later record replaces every earlier one of the same window and
    arm that shares an input partition with it; what remains may be added up.
    """

    v: str = VERSION
    window_start_ms: int
    window_ms: int
    arm: str
    partitions: list[int]
    final: bool
    requests: int
    shown: int
    seen: int
    plays_ms: int
    judged: int
    positives: int
    dislikes: int
    censored: int
    distinct_items: int
    top_items: list[tuple[str, int]] = []


class DeadLetter(msgspec.Struct, tag_field="type", tag="dead_letter", kw_only=True):
    """A record that could not be used, why, and where it stands."""

    v: str = VERSION
    reason: str
    detail: str
    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes


class _Header(msgspec.Struct):
    v: str = ""


_encoder = msgspec.msgpack.Encoder()
_header = msgspec.msgpack.Decoder(_Header)

exposure_decoder: Final[msgspec.msgpack.Decoder[Exposure | Tick]] = msgspec.msgpack.Decoder(
    Exposure | Tick
)
feedback_decoder: Final[msgspec.msgpack.Decoder[Feedback | Tick]] = msgspec.msgpack.Decoder(
    Feedback | Tick
)
sample_decoder: Final = msgspec.msgpack.Decoder(Sample)
history_decoder: Final = msgspec.msgpack.Decoder(History)
shaping_decoder: Final[msgspec.msgpack.Decoder[Shaping]] = msgspec.msgpack.Decoder(Shaping)
upsert_decoder: Final = msgspec.msgpack.Decoder(Upsert)
catalogue_ack_decoder: Final = msgspec.msgpack.Decoder(CatalogueAck)
command_decoder: Final = msgspec.msgpack.Decoder(Command)
insight_decoder: Final = msgspec.msgpack.Decoder(Insight)
dead_letter_decoder: Final = msgspec.msgpack.Decoder(DeadLetter)

_NOT_DECODED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises: text that is not UTF-8 and endless nesting have errors of their own."""

T = TypeVar("T")


def encode(event: msgspec.Struct) -> bytes:
    """The record's value on the wire."""
    return _encoder.encode(event)


def decode(decoder: msgspec.msgpack.Decoder[T], value: bytes | None) -> T:
    """Read one record; raises `UnreadableError` with reason `empty`, `unknown_major` or `malformed`."""
    if value is None:
        raise UnreadableError("empty", "the record has no value")
    try:
        event: Any = decoder.decode(value)
    except _NOT_DECODED as error:
        raise UnreadableError(_why(value), str(error)) from None
    if event.v != VERSION and event.v.partition(".")[0] != MAJOR:
        raise UnreadableError("unknown_major", f"version {event.v}, this reader knows {MAJOR}.x")
    return event  # type: ignore[no-any-return]


def _why(value: bytes) -> str:
    """A record of a newer major may well not fit our structs: say that, not `malformed`."""
    try:
        version = _header.decode(value).v
    except _NOT_DECODED:
        return "malformed"
    return "unknown_major" if version and version.partition(".")[0] != MAJOR else "malformed"


def pack_leaves(sids: NDArray[np.integer[Any]]) -> bytes:
    """Semantic IDs `[n, 3]` as little-endian u16 triples."""
    return np.ascontiguousarray(sids, dtype="<u2").tobytes()


def unpack_leaves(packed: bytes) -> NDArray[np.int64]:
    """The semantic IDs `[n, 3]` that `pack_leaves` wrote."""
    return np.frombuffer(packed, dtype="<u2").reshape(-1, LEVELS).astype(np.int64)


def unpack_context(packed: bytes) -> NDArray[np.void]:
    """The context positions `[n]` of dtype `BEHAVIOUR`, oldest first."""
    return np.frombuffer(packed, dtype=BEHAVIOUR)


def action_mask(actions: dict[str, bool]) -> int:
    """Actions that hold, as a bit mask."""
    return sum(bit for name, bit in ACTION_BITS.items() if actions.get(name))
