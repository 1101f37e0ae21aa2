"""A user's record of `histories` with one request more. Pure.

Behaviours that are there already stay packed as they were written: a user has dozens, and unpacking them at every
request took as long as all the rest of shaping.
"""

from operator import itemgetter
from typing import Final

import msgspec

from streams.events import VERSION, Behaviour, Sample, encode
from streams.join import Joined


class PackedHistory(msgspec.Struct, tag_field="type", tag="history", kw_only=True):
    """A `History` (streams/events.py) whose behaviours are not unpacked; the same on the wire."""

    v: str = VERSION
    user: str
    behaviours: list[msgspec.Raw]
    shown: list[str]


class _End(msgspec.Struct):
    end_ms: int


packed_history_decoder: Final = msgspec.msgpack.Decoder(PackedHistory)
_end_decoder: Final = msgspec.msgpack.Decoder(_End)


def grown(
    before: PackedHistory | None, sample: Sample, joined: Joined, behaviours: int, shown: int
) -> PackedHistory:
    """The history with this request's final plays, by their ends, and what was shown; at most so many of each."""
    kept = list(before.behaviours) if before else []
    for end_ms, play in _plays(sample, joined):
        place = len(kept)
        while place and _end_decoder.decode(kept[place - 1]).end_ms > end_ms:
            place -= 1
        kept.insert(place, msgspec.Raw(encode(play)))
    slots = [*(before.shown if before else ()), *(item.item for item in sample.items)]
    return PackedHistory(
        user=sample.user,
        behaviours=kept[-behaviours:],
        shown=slots[max(0, len(slots) - shown) :],
    )


def _plays(sample: Sample, joined: Joined) -> list[tuple[int, Behaviour]]:
    """Final plays by their ends: a censored one is not final."""
    plays = [
        (
            end_ms,
            Behaviour(
                request=sample.request,
                position=item.position,
                item=item.item,
                end_ms=end_ms,
                play_ms=item.play_ms,
                duration_ms=item.duration_ms,
                actions=item.actions,
            ),
        )
        for item in sample.items
        if item.outcome not in ("unseen", "censored")
        for end_ms in (joined.decision.positions[item.position].last_ms,)
    ]
    plays.sort(key=itemgetter(0))
    return plays
