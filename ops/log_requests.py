"""From the rows of a feed log to the events that a live actor would have written, block by block.

Notable choices (contract of evidence, "Real logs")
- One row is one request of the learning arm with one slot, of another system: source and decode mode `other`,
  no logged probability. Ids are functions of what makes a row one: user, video and time.
- A block ends with its last exposure; what was played meanwhile comes with the blocks it falls into.
- A request's context is what an actor knew at that moment: histories, overlaid with all feedback of the log up
  to then, that of plays still going on included.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actor.users import Users
from learner.catalogue import Catalogue
from learner.context import pack_behaviours
from ops.errors import UserError
from ops.feedlog import Event, events
from streams.control import LEARNING_ARM
from streams.events import Exposure, Feedback, ShownItem


@dataclass
class Block:
    """Some requests, and all that happened until the last of them."""

    rows: list[int] = field(default_factory=list)
    """Rows of the log, one a request."""
    users: list[str] = field(default_factory=list)
    contexts: list[bytes] = field(default_factory=list)
    events: list[Exposure | Feedback] = field(default_factory=list)
    """In event-time order; after the log's last row, all that was left."""


class Requests:
    """Walks the chosen rows of a log in event time."""

    def __init__(
        self,
        rows: NDArray[np.void],
        chosen: NDArray[np.integer],
        users: Users,
        catalogue: Catalogue,
        context: int,
    ) -> None:
        """`chosen` are the indices, ascending, of the rows that become requests.

        Raises `UserError` for a row whose video is not in the catalogue.
        """
        self._events: Iterator[Event] = events(rows, chosen)
        self._user = [str(user) for user in rows["user"].tolist()]
        self._item = [str(video) for video in rows["video"].tolist()]
        self._time_ms: list[int] = rows["time_ms"].tolist()
        self._duration_ms: list[int] = rows["duration_ms"].tolist()
        self._users = users
        self._catalogue = catalogue
        self._context = context
        unknown = {self._item[row] for row in chosen.tolist()} - set(catalogue.items)
        if unknown:
            raise UserError(
                f"{len(unknown)} videos of the log are not in the lineage's catalogue, such as {min(unknown)}: "
                "start from a policy that `dwell pretrain` made of this log's own files."
            )

    def take(self, most: int, policy_version: int) -> Block:
        """The next `most` requests, as served under a version; one without requests is the log's end."""
        block = Block()
        for event in self._events:
            row = event[2]
            if event[1] != "exposure":
                feedback = self._feedback(event)
                self._users.feedback(feedback, self._duration_ms[row])
                block.events.append(feedback)
                continue
            exposure = self._exposure(event[0], row, policy_version)
            block.rows.append(row)
            block.users.append(exposure.user)
            block.contexts.append(exposure.context)
            block.events.append(exposure)
            if len(block.rows) == most:
                break
        return block

    def _exposure(self, time_ms: int, row: int, policy_version: int) -> Exposure:
        """A row as a request that another system answered."""
        user, item = self._user[row], self._item[row]
        items = self._catalogue.items
        known = self._users.behaviours(user, self._context)
        return Exposure(
            request=self._request(row),
            user=user,
            time_ms=time_ms,
            arm=LEARNING_ARM,
            policy_version=policy_version,
            catalogue_version=self._catalogue.version,
            decode_mode="other",
            temperature=1.0,
            context=pack_behaviours(
                ((one, items[one.item].sid) for one in known if one.item in items), time_ms
            ),
            excluded=b"",
            items=[
                ShownItem(
                    item=item,
                    sid=items[item].sid,
                    position=0,
                    duration_ms=self._duration_ms[row],
                    source="other",
                )
            ],
        )

    def _feedback(self, event: Event) -> Feedback:
        """What the viewer of a row did."""
        time_ms, kind, row, play_ms = event
        assert kind != "exposure"
        request = self._request(row)
        return Feedback(
            event=f"{request}-{kind}-{play_ms}",
            user=self._user[row],
            request=request,
            position=-1 if kind == "left" else 0,
            item=self._item[row],
            time_ms=time_ms,
            kind=kind,
            play_ms=play_ms,
        )

    def _request(self, row: int) -> str:
        return f"{self._user[row]}-{self._item[row]}-{self._time_ms[row]}"
