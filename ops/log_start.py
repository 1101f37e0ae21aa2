"""What a lineage on a real log begins with: the catalogue, and the users' histories before the log.

Notable choices
- The log brings no item embeddings: semantic IDs come from `ops.item_vectors`.
- The watch history tells neither times nor dwell. A user's plays are spread evenly over the 16 days that it
  covers. A play on the user's long-view list counts as just long enough to be there (the whole of videos up
  to 18 s, else 18 s: the smallest such plays of the log), any other one has play time 0: unknown, but not long.
- Watched videos count as shown, so that an actor started from here does not show them again.

Shapes: V videos, D dimensions.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from learner.semantic_ids import Codebooks
from ops.feedlog import Videos, WatchHistory
from streams.events import ACTION_BITS, Behaviour, History, Upsert

SPAN_MS: Final = 16 * 86_400_000
LONG_MS: Final = 18_000
REQUEST: Final = "watched"
"""Request id of all plays of the watch history; their positions tell them apart."""


def catalogue_of(
    videos: Videos, vectors_VD: NDArray[np.float32], codebooks: Codebooks
) -> list[Upsert]:
    """The log's videos as catalogue entries, in the order of `videos`."""
    sids_V3 = codebooks.assign(vectors_VD).tolist()
    digest = codebooks.digest()
    return [
        Upsert(
            item=str(video),
            sid=(sid[0], sid[1], sid[2]),
            codebook=digest,
            duration_ms=duration_ms,
            author=author,
            tags=list(tags),
            embedding=vectors_VD[at].astype("<f4").tobytes(),
        )
        for at, (video, sid, duration_ms, author, tags) in enumerate(
            zip(
                videos.id.tolist(),
                sids_V3,
                videos.duration_ms.tolist(),
                videos.author,
                videos.tags,
                strict=True,
            )
        )
    ]


def plays_before(
    history: WatchHistory, videos: Videos, before_ms: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """When each play of the history ended, its play time and its video's duration, in ms.

    0 of an unknown video's duration; all ends lie before `before_ms`.
    """
    count = np.diff(history.start)
    of_user = np.repeat(np.arange(len(count)), count)
    place = np.arange(len(history.video)) - history.start[:-1][of_user]
    back = (count[of_user] - place) / np.maximum(count[of_user], 1)
    end_ms = before_ms - np.maximum(1, np.round(back * SPAN_MS)).astype(np.int64)
    at = videos.positions(history.video)
    duration_ms = np.where(at >= 0, videos.duration_ms[at], 0)
    long_ms = np.where(duration_ms > 0, np.minimum(duration_ms, LONG_MS), LONG_MS)
    return end_ms, np.where(history.long, long_ms, 0), duration_ms


def histories_of(history: WatchHistory, videos: Videos, before_ms: int) -> Iterator[History]:
    """The users' records of `histories` just before `before_ms`."""
    columns = [column.tolist() for column in plays_before(history, videos, before_ms)]
    end_ms, play_ms, duration_ms = columns
    item = [str(video) for video in history.video.tolist()]
    like = history.like.tolist()
    start = history.start.tolist()
    for k, user in enumerate(history.user.tolist()):
        plays = range(start[k], start[k + 1])
        yield History(
            user=str(user),
            behaviours=[
                Behaviour(
                    request=REQUEST,
                    position=position,
                    item=item[play],
                    end_ms=end_ms[play],
                    play_ms=play_ms[play],
                    duration_ms=duration_ms[play],
                    actions=ACTION_BITS["like"] if like[play] else 0,
                )
                for position, play in enumerate(plays)
            ],
            shown=[item[play] for play in plays],
        )
