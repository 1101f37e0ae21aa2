"""Reads a feed log in KuaiRand's format (Gao et al., CIKM 2022) and orders its events in time.

Notable choices
- File names, columns and units are those of the public release; more columns and several log files
  are fine. `watch_history_*.csv` (plays before the log) is not in the release and may be absent.
- Every line is in exactly one class. A row that repeats (user, video, time) is `repeated` whatever
  its duration, of the others one without a duration is `no_duration`, the rest are `exposed`; what
  is no row at all is `malformed`. `tab` is a feature, not dirt.
- One row is one request with one slot. A play of 0 ms never began: the viewer leaves at once, so
  the slot is unseen and carries no target (contract of the streams, "Join"). Any other play begins
  at the row's time, reports cumulative heartbeats, and ends at time + play; its actions come just
  before the end, because the end decides the slot.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from ops.csvtable import Column, Malformed, check_columns, read_numbers, read_texts, whole
from ops.errors import UserError

ROW: Final = np.dtype(
    [
        ("user", "i4"),
        ("video", "i4"),
        ("time_ms", "i8"),
        ("play_ms", "i4"),
        ("duration_ms", "i4"),
        ("long_view", "?"),
        ("like", "?"),
        ("follow", "?"),
        ("comment", "?"),
        ("forward", "?"),
        ("hate", "?"),
        ("tab", "i2"),
    ]
)
"""One exposure of the log."""

EXPOSED: Final = 0
REPEATED: Final = 1
NO_DURATION: Final = 2
CLASSES: Final = ("exposed", "repeated", "no_duration")
"""Names of the codes that `classify` gives."""

HEARTBEAT_MS: Final = 10_000
DAY_MS: Final = 86_400_000
UTC_OFFSET_MS: Final = 8 * 3_600_000
"""The log's viewers live in China: its days are theirs."""

EventKind = Literal[
    "exposure",
    "begin",
    "heartbeat",
    "end",
    "left",
    "like",
    "follow",
    "comment",
    "forward",
    "dislike",
]
Event = tuple[int, EventKind, int, int]
"""Event time in ms, kind, index of its row, play so far in ms (0 but for heartbeat and end)."""

_ACTIONS: Final[tuple[tuple[str, EventKind], ...]] = (
    ("like", "like"),
    ("follow", "follow"),
    ("comment", "comment"),
    ("forward", "forward"),
    ("hate", "dislike"),
)

_I4: Final = 2**31 - 1
_YEAR_10000_MS: Final = 253_402_300_800_000
_LOG: Final = (
    Column("user_id", "user", _I4),
    Column("video_id", "video", _I4),
    Column("time_ms", "time_ms", _YEAR_10000_MS),
    Column("play_time_ms", "play_ms", _I4),
    Column("duration_ms", "duration_ms", _I4),
    Column("long_view", "long_view", 1),
    Column("is_like", "like", 1),
    Column("is_follow", "follow", 1),
    Column("is_comment", "comment", 1),
    Column("is_forward", "forward", 1),
    Column("is_hate", "hate", 1),
    Column("tab", "tab", 2**15 - 1),
)
_HISTORY: Final = (
    Column("user_id", "user", _I4),
    Column("order", "order", _I4),
    Column("video_id", "video", _I4),
    Column("in_like_seq", "like", 1),
    Column("in_long_seq", "long", 1),
)
_VIDEO: Final = ("video_id", "author_id", "video_duration", "tag")

_LOG_FILES: Final = "log_standard_*.csv"
_VIDEO_FILES: Final = "video_features_basic_*.csv"
_HISTORY_FILES: Final = "watch_history_*.csv"

_REQUEST_BLOCK: Final = 65_536


@dataclass(frozen=True)
class Log:
    """The rows `[n]` of dtype `ROW` by `time_ms` (ties as in the files), and what was no row."""

    rows: NDArray[np.void]
    malformed: Malformed


@dataclass(frozen=True)
class Videos:
    """What is known of each video, by ascending id."""

    id: NDArray[np.int64]
    duration_ms: NDArray[np.int64]
    """0 where the release gives none (sets of pictures)."""
    author: list[str]
    tags: list[tuple[str, ...]]
    malformed: Malformed

    def positions(self, videos: NDArray[np.integer]) -> NDArray[np.int64]:
        """Where the given ids `[n]` stand in `id`; -1 for an unknown one."""
        if not len(self.id):
            return np.full(len(videos), -1, np.int64)
        at = np.searchsorted(self.id, videos)
        known = self.id[np.minimum(at, len(self.id) - 1)] == videos
        return np.where(known, at, -1).astype(np.int64)


@dataclass(frozen=True)
class WatchHistory:
    """What each user watched before the log, oldest first.

    The plays of `user[k]` are `start[k]:start[k + 1]` of `video`, `like` and `long`.
    """

    user: NDArray[np.int64]
    start: NDArray[np.int64]
    video: NDArray[np.int64]
    like: NDArray[np.bool_]
    long: NDArray[np.bool_]
    malformed: Malformed

    def of(self, user: int) -> slice:
        """Where this user's plays stand; empty for an unknown user."""
        k = int(np.searchsorted(self.user, user))
        if k == len(self.user) or self.user[k] != user:
            return slice(0, 0)
        return slice(int(self.start[k]), int(self.start[k + 1]))


@dataclass(frozen=True)
class FeedLog:
    """The files of one log, checked to be there with the columns that are read."""

    directory: Path
    log_files: list[Path]
    video_files: list[Path]
    history_files: list[Path]
    """Empty for the public release."""

    def read_log(self) -> Log:
        """All exposures, in event-time order."""
        malformed = Malformed()
        rows = read_numbers(self.log_files, _LOG, ROW, malformed)
        if (np.diff(rows["time_ms"]) < 0).any():
            rows = rows[np.argsort(rows["time_ms"], kind="stable")]
        return Log(rows, malformed)

    def read_videos(self) -> Videos:
        """All videos; the first line of an id counts."""
        malformed = Malformed()
        found: dict[int, tuple[int, str, tuple[str, ...]]] = {}
        for path, line, texts in read_texts(self.video_files, _VIDEO, malformed):
            video, author, duration, tag = texts
            try:
                key = whole(video, "video_id", _I4)
                duration_ms = whole(duration or "0", "video_duration", _I4)
            except ValueError as error:
                malformed.note(path, line, str(error))
                continue
            tags = tuple(part.strip() for part in tag.split(",") if part.strip())
            found.setdefault(key, (duration_ms, author, tags))
        ids = sorted(found)
        return Videos(
            id=np.array(ids, np.int64),
            duration_ms=np.array([found[video][0] for video in ids], np.int64),
            author=[found[video][1] for video in ids],
            tags=[found[video][2] for video in ids],
            malformed=malformed,
        )

    def read_history(self) -> WatchHistory:
        """The watch history; without users where the log has none."""
        malformed = Malformed()
        dtype = np.dtype([(column.field, "i4") for column in _HISTORY])
        plays = read_numbers(self.history_files, _HISTORY, dtype, malformed)
        plays = plays[np.lexsort((plays["order"], plays["user"]))]
        user, first = np.unique(plays["user"], return_index=True)
        return WatchHistory(
            user=user.astype(np.int64),
            start=np.append(first, len(plays)).astype(np.int64),
            video=plays["video"].astype(np.int64),
            like=plays["like"].astype(np.bool_),
            long=plays["long"].astype(np.bool_),
            malformed=malformed,
        )


def open_log(directory: Path) -> FeedLog:
    """Find the files of a log in DIR or DIR/data and check their columns; reads headers only.

    Raises `UserError` that names the missing file or column.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; name the one that holds {_LOG_FILES}")
    inner = directory / "data"
    place = next((p for p in (directory, inner) if any(p.glob(_LOG_FILES))), None)
    if place is None:
        raise UserError(
            f"no {_LOG_FILES} in {directory} or {inner}; "
            "a log in KuaiRand's format has at least one such file"
        )
    log = FeedLog(
        directory=place,
        log_files=sorted(place.glob(_LOG_FILES)),
        video_files=sorted(place.glob(_VIDEO_FILES)),
        history_files=sorted(place.glob(_HISTORY_FILES)),
    )
    if not log.video_files:
        raise UserError(f"no {_VIDEO_FILES} in {place}; it gives the videos' authors and tags")
    for path in log.log_files:
        check_columns(path, [column.name for column in _LOG])
    for path in log.video_files:
        check_columns(path, _VIDEO)
    for path in log.history_files:
        check_columns(path, [column.name for column in _HISTORY])
    return log


def classify(rows: NDArray[np.void]) -> NDArray[np.uint8]:
    """The class code `[n]` of each row: `EXPOSED`, `REPEATED` or `NO_DURATION`."""
    codes = np.where(rows["duration_ms"] > 0, EXPOSED, NO_DURATION).astype(np.uint8)
    keys = ("user", "video", "time_ms")
    order = np.lexsort([rows[key] for key in reversed(keys)])  # stable: the first of equals stays
    same = np.ones(max(len(rows) - 1, 0), np.bool_)
    for key in keys:
        values = rows[key][order]
        same &= values[1:] == values[:-1]
    codes[order[1:][same]] = REPEATED
    return codes


def class_counts(log: Log, codes: NDArray[np.uint8]) -> dict[str, int]:
    """How many lines of the log are in each class; together all its lines."""
    counts = np.bincount(codes, minlength=len(CLASSES)).tolist()
    return {**dict(zip(CLASSES, counts, strict=True)), "malformed": log.malformed.count}


def days(time_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """The viewers' calendar day of each time `[n]`, in days since 1970-01-01."""
    return (time_ms + UTC_OFFSET_MS) // DAY_MS


def events(
    rows: NDArray[np.void],
    indices: NDArray[np.integer] | None = None,
    heartbeat_ms: int = HEARTBEAT_MS,
) -> Iterator[Event]:
    """What happened, in event-time order: the exposures, and the feedback that followed each.

    `indices` (ascending) picks the rows that become requests; by default all do. At one time the
    events come by row, those of a row in causal order. Memory: one entry a play that is going on.
    Raises `ValueError` if the rows are not in order of time.
    """
    chosen = np.arange(len(rows)) if indices is None else np.asarray(indices)
    if (np.diff(rows["time_ms"][chosen]) < 0).any():
        raise ValueError("rows must be in order of time_ms")
    playing: list[tuple[int, int, Event, Iterator[Event]]] = []
    for time_ms, row, feedback in _requests(rows, chosen, heartbeat_ms):
        while playing and playing[0][0] <= time_ms:
            yield _pop(playing)
        yield time_ms, "exposure", row, 0
        first = next(feedback)
        heappush(playing, (first[0], row, first, feedback))
    while playing:
        yield _pop(playing)


def _pop(playing: list[tuple[int, int, Event, Iterator[Event]]]) -> Event:
    """Take the earliest event; its row's next one, if any, takes its place."""
    _, row, event, feedback = playing[0]
    after = next(feedback, None)
    if after is None:
        heappop(playing)
    else:
        heapreplace(playing, (after[0], row, after, feedback))
    return event


def _requests(
    rows: NDArray[np.void], chosen: NDArray[np.integer], heartbeat_ms: int
) -> Iterator[tuple[int, int, Iterator[Event]]]:
    """Time, index and feedback of each chosen row; a block at a time becomes Python's numbers."""
    for low in range(0, len(chosen), _REQUEST_BLOCK):
        block = chosen[low : low + _REQUEST_BLOCK]
        picked = rows[block]
        masks = np.zeros(len(block), np.int64)
        for bit, (field, _) in enumerate(_ACTIONS):
            masks |= picked[field].astype(np.int64) << bit
        for row, time_ms, play_ms, mask in zip(
            block.tolist(),
            picked["time_ms"].tolist(),
            picked["play_ms"].tolist(),
            masks.tolist(),
            strict=True,
        ):
            yield time_ms, row, _feedback(row, time_ms, play_ms, mask, heartbeat_ms)


def _feedback(
    row: int, time_ms: int, play_ms: int, mask: int, heartbeat_ms: int
) -> Iterator[Event]:
    end_ms = time_ms + play_ms
    if play_ms:
        yield time_ms, "begin", row, 0
        for played in range(heartbeat_ms, play_ms, heartbeat_ms):
            yield time_ms + played, "heartbeat", row, played
    for bit, (_, kind) in enumerate(_ACTIONS):
        if mask >> bit & 1:
            yield end_ms, kind, row, 0
    yield (end_ms, "end", row, play_ms) if play_ms else (end_ms, "left", row, 0)
