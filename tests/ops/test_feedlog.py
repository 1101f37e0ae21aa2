import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops import feedlog
from ops.csvtable import Column, Malformed, read_numbers
from ops.errors import UserError
from ops.feedlog import EXPOSED, NO_DURATION, REPEATED, ROW, classify, events, open_log

LOG = (
    "user_id,video_id,date,time_ms,is_like,is_follow,is_comment,is_forward,is_hate,"
    "long_view,play_time_ms,duration_ms,tab"
)
VIDEOS = "video_id,author_id,video_type,video_duration,tag"
HISTORY = "user_id,order,video_id,in_like_seq,in_long_seq"
REAL = Path(
    os.environ.get("DWELL_LOG_DIR") or Path(__file__).parents[2] / "../shared/data/kuairand-pure"
)


def line(user: int = 1, video: int = 2, time: int = 1000, play: int = 5, dur: int = 9) -> str:
    return f"{user},{video},20220425,{time},0,0,0,0,0,1,{play},{dur},1"


def write(folder: Path, name: str, header: str, *lines: str) -> None:
    (folder / name).write_text("\n".join([header, *lines]) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log of two rows and two videos."""
    write(tmp_path, "log_standard_a.csv", LOG, line(time=1000), line(user=3, time=2000))
    write(tmp_path, "video_features_basic_a.csv", VIDEOS, "2,7,NORMAL,9.0,5", "1,8,NORMAL,,")
    return tmp_path


def table(*rows: tuple[int, int, int], **fields: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Rows of (time, play, user), each field else the same for all."""
    out = np.zeros(len(rows), ROW)
    out["duration_ms"] = 60_000
    for i, (time, play, user) in enumerate(rows):
        out[i]["time_ms"], out[i]["play_ms"], out[i]["user"] = time, play, user
    for name, value in fields.items():
        out[name] = value
    return out


def test_a_row_carries_what_its_line_says(folder: Path) -> None:
    write(folder, "log_standard_a.csv", LOG, "11,12,20220425,13,1,0,1,0,1,0,14,15,4")
    (row,) = open_log(folder).read_log().rows
    said = {name: row[name].item() for name in ROW.fields or ()}
    assert said == {
        "user": 11,
        "video": 12,
        "time_ms": 13,
        "play_ms": 14,
        "duration_ms": 15,
        "long_view": False,
        "like": True,
        "follow": False,
        "comment": True,
        "forward": False,
        "hate": True,
        "tab": 4,
    }


def test_a_log_is_found_in_a_folder_named_data(folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "data"
    inner.mkdir(parents=True)
    for path in folder.glob("*.csv"):
        path.rename(inner / path.name)
    assert len(open_log(inner.parent).read_log().rows) == 2


def test_columns_may_stand_in_another_order_among_others(folder: Path) -> None:
    names = LOG.split(",")
    header = ",".join(["note", *reversed(names)])
    values = ",".join(["free text", *reversed(line(user=9).split(","))])
    write(folder, "log_standard_a.csv", header, values)
    assert open_log(folder).read_log().rows["user"].tolist() == [9]


def test_several_files_become_one_log_in_order_of_time(folder: Path) -> None:
    write(folder, "log_standard_b.csv", LOG, line(user=8, time=500), line(user=9, time=1000))
    rows = open_log(folder).read_log().rows
    assert rows["time_ms"].tolist() == [500, 1000, 1000, 2000]
    assert rows["user"].tolist() == [8, 1, 9, 3]  # ties: file a before file b


def test_lines_that_end_as_on_windows_and_a_byte_order_mark_are_read(folder: Path) -> None:
    text = "\ufeff" + "\r\n".join([LOG, line(), line(time=1001), ""])
    (folder / "log_standard_a.csv").write_bytes(text.encode())
    log = open_log(folder).read_log()
    assert (len(log.rows), log.malformed.count) == (2, 0)


def test_a_log_without_rows_is_empty(folder: Path) -> None:
    write(folder, "log_standard_a.csv", LOG)
    log = open_log(folder).read_log()
    assert feedlog.class_counts(log, classify(log.rows)) == {
        "exposed": 0,
        "repeated": 0,
        "no_duration": 0,
        "malformed": 0,
    }
    assert list(events(log.rows)) == []


def test_a_place_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a directory"):
        open_log(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no log_standard_\*\.csv in .*data"):
        open_log(tmp_path)


def test_a_log_without_video_features_is_refused(folder: Path) -> None:
    (folder / "video_features_basic_a.csv").unlink()
    with pytest.raises(UserError, match=r"no video_features_basic_\*\.csv in"):
        open_log(folder)


@pytest.mark.parametrize(
    ("file", "header", "column"),
    [
        ("log_standard_b.csv", LOG, "time_ms"),
        ("video_features_basic_a.csv", VIDEOS, "tag"),
        ("watch_history_a.csv", HISTORY, "order"),
    ],
)
def test_a_missing_column_is_named_with_its_file(
    folder: Path, file: str, header: str, column: str
) -> None:
    write(folder, file, ",".join(name for name in header.split(",") if name != column))
    with pytest.raises(UserError, match=rf"{file} has no column {column};"):
        open_log(folder)


def test_an_empty_file_has_no_columns(folder: Path) -> None:
    (folder / "log_standard_a.csv").write_text("")
    with pytest.raises(UserError, match=r"log_standard_a\.csv has no column user_id, video_id"):
        open_log(folder)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (line()[:20], "has 6 of 13 fields"),
        (line() + ",1", "has 14 of 13 fields"),
        (
            line().replace("1000", "soon"),
            "has time_ms 'soon', expected a whole number from 0 to 253402300800000",
        ),
        (line(time=-1), "has time_ms -1, expected a whole number from 0 to"),
        (line().replace("1000", "1000.5"), "has time_ms 1000.5"),
        (line().replace("1000", "nan"), "has time_ms nan"),
        (line(play=2**31), "has play_time_ms 2147483648"),
        (line().replace(",0,0,0,0,0,", ",2,0,0,0,0,"), "has is_like 2, expected a whole number"),
        ('"' + line(), "fields"),
        ("\x00\xff\xfe", "has 1 of 13 fields"),
    ],
)
def test_a_malformed_line_is_counted_and_named_and_costs_nothing_else(
    folder: Path, bad: str, why: str
) -> None:
    write(folder, "log_standard_a.csv", LOG, line(time=1), bad, line(time=3), bad)
    log = open_log(folder).read_log()
    assert log.rows["time_ms"].tolist() == [1, 3]
    assert (log.malformed.count, log.malformed.file, log.malformed.line) == (
        2,
        "log_standard_a.csv",
        3,
    )
    assert why in log.malformed.why
    assert feedlog.class_counts(log, classify(log.rows))["malformed"] == 2


def test_a_last_line_cut_short_is_malformed(folder: Path) -> None:
    (folder / "log_standard_a.csv").write_text(f"{LOG}\n{line()}\n{line()[:-4]}")
    log = open_log(folder).read_log()
    assert (len(log.rows), log.malformed.count, log.malformed.line) == (1, 1, 3)


def test_whole_numbers_may_be_quoted_or_carry_a_point(folder: Path) -> None:
    write(folder, "log_standard_a.csv", LOG, line(user=4).replace("4,2", '"4",2.0'))
    assert open_log(folder).read_log().rows[["user", "video"]].tolist() == [(4, 2)]


@given(
    st.lists(st.sampled_from([line(), line(user=77, time=12345), "1,2", "x" * 40, ""])),
    st.integers(1, 200),
)
def test_the_size_of_a_block_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], block_bytes: int
) -> None:
    columns = [Column("user_id", "user", 99), Column("time_ms", "time_ms", 10**6)]
    path = tmp_path_factory.mktemp("blocks") / "log.csv"
    path.write_text("\n".join([LOG, *lines]))
    whole, parts = Malformed(), Malformed()
    at_once = read_numbers([path], columns, ROW, whole)
    in_parts = read_numbers([path], columns, ROW, parts, block_bytes)
    assert in_parts.tolist() == at_once.tolist()
    assert parts == whole
    assert whole.count == sum(text in ("1,2", "x" * 40) for text in lines)


def test_each_row_is_in_one_class() -> None:
    rows = table((1, 0, 5), (1, 0, 5), (1, 0, 6), (2, 0, 5), (2, 0, 5))
    rows["duration_ms"] = [9, 9, 0, 0, 9]
    assert classify(rows).tolist() == [EXPOSED, REPEATED, NO_DURATION, NO_DURATION, REPEATED]


def test_tab_is_a_feature_and_not_dirt() -> None:
    assert classify(table((1, 0, 5), tab=0)).tolist() == [EXPOSED]


def test_a_row_repeats_only_the_same_user_video_and_time() -> None:
    rows = table((1, 0, 5), (1, 9, 6), (2, 0, 5), (2, 0, 5))
    rows["video"] = [1, 1, 1, 2]
    assert set(classify(rows)) == {EXPOSED}


def test_videos_are_sorted_and_may_lack_duration_and_tags(folder: Path) -> None:
    write(
        folder,
        "video_features_basic_a.csv",
        VIDEOS,
        '5,70,NORMAL,9000.0,"20, 43"',
        "2,71,NORMAL,,",
        "5,99,NORMAL,1.0,1",
        "six,1,NORMAL,1.0,1",
        "7,1,NORMAL",
    )
    videos = open_log(folder).read_videos()
    assert videos.id.tolist() == [2, 5]
    assert videos.duration_ms.tolist() == [0, 9000]
    assert videos.author == ["71", "70"]
    assert videos.tags == [(), ("20", "43")]
    assert (videos.malformed.count, videos.malformed.line) == (2, 5)
    assert videos.positions(np.array([5, 3, 2, 6])).tolist() == [1, -1, 0, -1]


def test_a_history_lists_each_users_plays_oldest_first(folder: Path) -> None:
    write(folder, "watch_history_a.csv", HISTORY, "4,1,20,0,1", "3,0,10,1,0", "4,0,30,0,0")
    history = open_log(folder).read_history()
    assert history.user.tolist() == [3, 4]
    assert history.video[history.of(4)].tolist() == [30, 20]
    assert history.long[history.of(4)].tolist() == [False, True]
    assert history.like[history.of(3)].tolist() == [True]
    assert history.video[history.of(5)].tolist() == []


def test_a_log_without_a_history_has_an_empty_one(folder: Path) -> None:
    history = open_log(folder).read_history()
    assert history.user.tolist() == []
    assert history.start.tolist() == [0]
    assert history.video[history.of(1)].tolist() == []


def test_a_play_begins_reports_and_ends_after_its_actions() -> None:
    rows = table((1000, 25_000, 1), like=1, hate=1)
    assert list(events(rows)) == [
        (1000, "exposure", 0, 0),
        (1000, "begin", 0, 0),
        (11_000, "heartbeat", 0, 10_000),
        (21_000, "heartbeat", 0, 20_000),
        (26_000, "like", 0, 0),
        (26_000, "dislike", 0, 0),
        (26_000, "end", 0, 25_000),
    ]


def test_a_play_as_long_as_a_heartbeat_ends_without_one() -> None:
    kinds = [kind for _, kind, _, _ in events(table((0, 10_000, 1)))]
    assert kinds == ["exposure", "begin", "end"]


def test_a_row_without_a_play_never_begins_and_is_left_at_once() -> None:
    assert list(events(table((1000, 0, 1), forward=1))) == [
        (1000, "exposure", 0, 0),
        (1000, "forward", 0, 0),
        (1000, "left", 0, 0),
    ]


def test_only_chosen_rows_become_requests_under_their_own_index() -> None:
    rows = table((1, 0, 1), (2, 0, 1), (3, 0, 1))
    chosen = {row for _, _, row, _ in events(rows, np.array([0, 2]))}
    assert chosen == {0, 2}


def test_rows_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="order of time_ms"):
        list(events(table((2, 0, 1), (1, 0, 1))))


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 60)), max_size=30),
    st.integers(0, 1),
)
def test_events_of_all_rows_are_merged_in_event_time_order(
    plays: list[tuple[int, int]], like: int
) -> None:
    rows = table(*[(time, play, 1) for time, play in sorted(plays)], like=like)
    merged = list(events(rows, heartbeat_ms=7))
    alone = [list(events(rows, np.array([row]), heartbeat_ms=7)) for row in range(len(rows))]
    assert [event[0] for event in merged] == sorted(event[0] for event in merged)
    for row, expected in enumerate(alone):
        assert [event for event in merged if event[2] == row] == expected
    assert len(merged) == sum(map(len, alone))


def test_a_day_begins_at_the_viewers_midnight() -> None:
    midnight_utc = 19_107 * feedlog.DAY_MS  # 25 April 2022
    times = np.array([midnight_utc - 8 * 3_600_000 - 1, midnight_utc - 8 * 3_600_000])
    assert feedlog.days(times).tolist() == [19_106, 19_107]


def test_the_real_log_falls_into_the_classes_it_is_known_for() -> None:
    if not REAL.is_dir():
        pytest.skip(f"NO REAL LOG at {REAL}: set DWELL_LOG_DIR to a KuaiRand-Pure directory")
    files = open_log(REAL)
    log = files.read_log()
    codes = classify(log.rows)
    counts = feedlog.class_counts(log, codes)
    assert counts == {
        "exposed": 164_286,
        "repeated": 4_739,
        "no_duration": 2_646,
        "malformed": 0,
    }
    videos = files.read_videos()
    assert len(videos.id) == 7_583
    assert videos.positions(log.rows["video"]).min() >= 0
    kinds = [kind for _, kind, _, _ in events(log.rows, np.flatnonzero(codes == EXPOSED))]
    assert kinds.count("exposure") == 164_286
    assert kinds.count("end") + kinds.count("left") == 164_286
