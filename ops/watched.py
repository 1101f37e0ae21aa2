"""Samples from a watch history: what a user watched next, given what they had watched.

Notable choices
- A sample is a place in a user's list: the context is what stands before it, the targets are the first long
  views or likes behind it, at most 8 among the next 16 plays. They share one context and do not see one another.
  Several targets a context make a step cheaper by far than one each, and predict better for the same time.
- A user is drawn evenly, then a place: heavy users do not outweigh the rest.
- The last play of every twentieth user is held out: never a target, and the measure of how well it goes.
- What a context says of such plays is what `ops.log_start` writes into the histories of a lineage.

Shapes: N plays of all users, T behaviours of a context.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from learner.catalogue import Catalogue
from ops.feedlog import Videos, WatchHistory
from ops.log_start import plays_before
from streams.control import LEARNING_ARM
from streams.events import ACTION_BITS, BEHAVIOUR, Sample, SampleItem

TARGETS: Final = 8
AHEAD: Final = 16
HELD_OUT: Final = 20
SHORTEST: Final = 2
"""Plays that a user must have for the last to be held out: one to know, one to predict."""


class Watched:
    """The plays of a watch history, ready to be drawn from."""

    def __init__(
        self,
        history: WatchHistory,
        videos: Videos,
        catalogue: Catalogue,
        before_ms: int,
        context: int,
    ) -> None:
        """`before_ms` is when the log begins, `context` how many behaviours a context holds."""
        end_ms, play_ms, duration_ms = plays_before(history, videos, before_ms)
        item = [str(video) for video in history.video.tolist()]
        sids = {video: entry.sid for video, entry in catalogue.items.items()}
        self._plays = np.zeros(len(item), BEHAVIOUR)
        self._plays["codes"] = [sids.get(video, (0, 0, 0)) for video in item]
        self._plays["actions"] = history.like * ACTION_BITS["like"]
        self._plays["play_ms"] = play_ms
        self._plays["duration_ms"] = duration_ms
        self._known = np.array([video in sids for video in item], np.bool_)
        self._good = (history.long | history.like) & self._known
        self._end_ms = end_ms
        self._item = item
        self._user = [str(user) for user in history.user.tolist()]
        self._start = history.start
        self._version = catalogue.version
        self._context = context
        enough = np.diff(history.start) >= SHORTEST
        held = enough & (np.arange(len(enough)) % HELD_OUT == 0)
        self._held = np.flatnonzero(held)
        self._stop = history.start[1:] - held
        good_before = np.cumsum([0, *self._good])
        self._users = np.flatnonzero(good_before[self._stop] > good_before[self._start[:-1]])

    def __len__(self) -> int:
        """Users to draw from: those with a target."""
        return len(self._users)

    def draw(self, rng: np.random.Generator, count: int) -> list[Sample]:
        """`count` samples at random; raises `ValueError` when there are no users."""
        samples: list[Sample] = []
        while len(samples) < count:
            k = int(self._users[rng.integers(len(self._users))])
            stop = int(self._stop[k])
            place = int(rng.integers(self._start[k], stop))
            ahead = slice(place, min(stop, place + AHEAD))
            targets = (place + np.flatnonzero(self._good[ahead])[:TARGETS]).tolist()
            if targets:
                samples.append(self._sample(k, place, targets))
        return samples

    def held_out(self) -> list[Sample]:
        """The held-out plays that were long views or liked, one a sample."""
        places = [(k, int(self._start[k + 1]) - 1) for k in self._held.tolist()]
        return [self._sample(k, place, [place]) for k, place in places if self._good[place]]

    def _sample(self, k: int, place: int, targets: list[int]) -> Sample:
        return Sample(
            request=f"watched-{place}",
            user=self._user[k],
            time_ms=int(self._end_ms[place]),
            arm=LEARNING_ARM,
            policy_version=0,
            catalogue_version=self._version,
            decode_mode="other",
            temperature=1.0,
            context=self._seen(k, place),
            excluded=b"",
            items=[self._target(play, slot) for slot, play in enumerate(targets)],
            threshold=0.0,
            median=0.0,
            start_ms=int(self._end_ms[place]),
            decided_ms=int(self._end_ms[place]),
            closed_by="decided",
            watermark_ms=0,
            closable_ms=0,
            exposure_offset=-1,
            feedback_upto=0,
        )

    def _target(self, play: int, slot: int) -> SampleItem:
        codes = self._plays["codes"][play]
        return SampleItem(
            item=self._item[play],
            sid=(int(codes[0]), int(codes[1]), int(codes[2])),
            position=slot,
            duration_ms=int(self._plays["duration_ms"][play]),
            source="other",
            outcome="ended",
            play_ms=int(self._plays["play_ms"][play]),
            actions=int(self._plays["actions"][play]),
            advantage=1,
        )

    def _seen(self, k: int, place: int) -> bytes:
        """The user's known plays before a place, as of that place's time."""
        before = slice(int(self._start[k]), place)
        known: NDArray[np.bool_] = self._known[before]
        plays = self._plays[before][known][-self._context :]
        age_ms = self._end_ms[place] - self._end_ms[before][known][-self._context :]
        plays["age_ms"] = np.minimum(age_ms, 0xFFFFFFFF)
        return plays.tobytes()
