"""What an actor knows of its users: `histories` from the log, overlaid with what it has just seen itself.

So a user's own feedback is in the context of the next request, seconds before the join has closed the request. A
play leaves the overlay when the history that contains it arrives. Histories are kept packed and read on request.
Feedback need not name its item: this actor remembers what it showed where in a user's last slates.
"""

from collections import OrderedDict, deque

from actor.settings import ActorSettings
from streams.events import (
    ACTION_BITS,
    PLAY_KINDS,
    Behaviour,
    Feedback,
    History,
    decode,
    history_decoder,
)

_OVERLAY = 64  # plays of one user that no history has confirmed yet
_SLATES = 8  # a user's last slates whose positions are remembered


class Users:
    """The users' recent plays and shown items."""

    def __init__(self, settings: ActorSettings) -> None:
        self._exclude = settings.exclude_shown
        self._histories: dict[str, bytes] = {}
        self._overlay: dict[str, OrderedDict[tuple[str, int], Behaviour]] = {}
        self._shown: dict[str, deque[str]] = {}
        self._slates: dict[str, OrderedDict[str, list[str]]] = {}
        self._read: tuple[bytes, History] | None = None

    def take_history(self, user: str, value: bytes | None) -> None:
        """A record of `histories`; raises `UnreadableError` and keeps what was there."""
        if value is None:
            self._histories.pop(user, None)
            return
        history = decode(history_decoder, value)
        overlay = self._overlay.get(user)
        if overlay is not None:
            for behaviour in history.behaviours:
                overlay.pop((behaviour.request, behaviour.position), None)
            if not overlay:
                del self._overlay[user]
        self._histories[user] = value

    def exposed(self, user: str, items: list[str], request: str = "") -> None:
        """This actor showed `items` to `user`, in the order of their positions."""
        self._shown.setdefault(user, deque(maxlen=self._exclude)).extend(items)
        if request:
            slates = self._slates.setdefault(user, OrderedDict())
            slates[request] = items
            if len(slates) > _SLATES:
                slates.popitem(last=False)

    def item_of(self, event: Feedback) -> str:
        """The item that an event is about; empty where neither the event nor this actor knows it."""
        if event.item or event.user not in self._slates:
            return event.item
        slate = self._slates[event.user].get(event.request, [])
        return slate[event.position] if 0 <= event.position < len(slate) else ""

    def feedback(self, event: Feedback, duration_ms: int) -> None:
        """A feedback event, as soon as it is accepted; `duration_ms` is its item's."""
        if event.kind == "left":
            return
        overlay = self._overlay.setdefault(event.user, OrderedDict())
        key = (event.request, event.position)
        play = overlay.get(key)
        if play is None:
            play = overlay[key] = Behaviour(
                request=event.request,
                position=event.position,
                item=self.item_of(event),
                end_ms=event.time_ms,
                play_ms=0,
                duration_ms=duration_ms,
            )
            if len(overlay) > _OVERLAY:
                overlay.popitem(last=False)
        if event.kind in PLAY_KINDS:
            play.play_ms = max(play.play_ms, event.play_ms)
            play.end_ms = max(play.end_ms, event.time_ms)
        elif event.withdrawn:
            play.actions &= ~ACTION_BITS[event.kind]
        else:
            play.actions |= ACTION_BITS[event.kind]

    def behaviours(self, user: str, most: int) -> list[Behaviour]:
        """The user's latest plays, oldest first."""
        history = self._history(user)
        known = history.behaviours if history else []
        final = {(behaviour.request, behaviour.position) for behaviour in known}
        fresh = [
            behaviour
            for key, behaviour in self._overlay.get(user, {}).items()
            if key not in final and (behaviour.play_ms or behaviour.actions)
        ]
        if not fresh:
            return known[-most:]
        return sorted([*known, *fresh], key=lambda behaviour: behaviour.end_ms)[-most:]

    def shown(self, user: str) -> set[str]:
        """The items shown to the user last, at most `exclude_shown` of them."""
        if not self._exclude:
            return set()
        history = self._history(user)
        newest: dict[str, None] = {}
        for item in [
            *reversed(self._shown.get(user, ())),
            *reversed(history.shown if history else []),
        ]:
            newest.setdefault(item)
            if len(newest) == self._exclude:
                break
        return set(newest)

    def _history(self, user: str) -> History | None:
        value = self._histories.get(user)
        if value is None:
            return None
        if self._read is None or self._read[0] is not value:  # a request reads its user's twice
            self._read = value, decode(history_decoder, value)
        return self._read[1]
