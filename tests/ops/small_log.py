"""A small feed log in KuaiRand's format, written to a folder."""

from pathlib import Path

import numpy as np

USERS = 24
VIDEOS = 40
GENRES = 4
WATCHED = 14
HOUR_MS = 3_600_000
BEGIN_MS = 1_650_816_000_000 + HOUR_MS  # an hour into 25 April 2022 in China

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,"
    "long_view,play_time_ms,duration_ms,profile_stay_time,tab"
)


def write_log(
    folder: Path, rows: int, begin_ms: int = BEGIN_MS, seed: int = 1, gap_ms: int = HOUR_MS // 4
) -> dict[str, int]:
    """Write a log of `rows` lines, and return how many there are of each class.

    Everybody likes one of four genres, watches it long, and saw much of it before the log.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    videos = ["video_id,author_id,video_type,upload_dt,video_duration,music_id,tag"]
    videos += [
        f"{v},{v % 7},NORMAL,2022-04-01,{duration_ms(v)},{v},{v % GENRES}" for v in range(VIDEOS)
    ]
    (folder / "video_features_basic_pure.csv").write_text("\n".join(videos) + "\n")
    history = ["user_id,order,video_id,in_like_seq,in_long_seq"]
    for user in range(USERS):
        for order in range(WATCHED):
            video, liked = choice(user, rng)
            history.append(f"{user},{order},{video},0,{int(liked)}")
    (folder / "watch_history_4_09_to_4_24.csv").write_text("\n".join(history) + "\n")
    counts = {"exposed": 0, "repeated": 0, "no_duration": 0, "malformed": 0}
    lines = [LOG]
    for row in range(rows):
        time_ms = begin_ms + row * gap_ms
        user = int(rng.integers(USERS))
        video, liked = choice(user, rng)
        if row % 20 == 7:
            counts["repeated"] += 1
            lines.append(lines[-1])
            continue
        known = row % 25 != 3
        counts["exposed" if known else "no_duration"] += 1
        play_ms = int(rng.integers(18_000, 400_000)) if liked else int(rng.integers(0, 3)) * 900
        actions = f"{int(liked and row % 3 == 0)},0,0,0,{int(not liked and row % 9 == 0)}"
        length = duration_ms(video) if known else 0
        lines.append(
            f"{user},{video},20220425,100,{time_ms},1,{actions},{int(liked)},{play_ms},{length},0,1"
        )
    (folder / "log_standard_pure.csv").write_text("\n".join(lines) + "\n")
    return counts


def duration_ms(video: int) -> int:
    """Of a video."""
    return 20_000 + 9_000 * video


def choice(user: int, rng: np.random.Generator) -> tuple[int, bool]:
    """A video that the user might see, and whether it is of the genre that they like."""
    liked = bool(rng.random() < 0.7)
    genre = user % GENRES if liked else int(rng.integers(GENRES))
    video = int(rng.integers(VIDEOS // GENRES)) * GENRES + genre
    return video, genre == user % GENRES
