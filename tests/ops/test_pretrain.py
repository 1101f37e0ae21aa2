import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from learner.catalogue import Catalogue
from learner.checkpoint import load as load_checkpoint
from ops.config import LOG, Config, load, value_of
from ops.errors import UserError
from ops.feedlog import Videos, WatchHistory, open_log
from ops.log_start import LONG_MS, histories_of, plays_before
from ops.pretrain import pretrained
from ops.start import Start
from ops.watched import AHEAD, HELD_OUT, TARGETS, Watched
from streams.events import Upsert, encode, unpack_context
from tests.ops.small_log import BEGIN_MS, USERS, VIDEOS, WATCHED, write_log

REAL = Path(
    os.environ.get("DWELL_LOG_DIR") or Path(__file__).parents[2] / "../shared/data/kuairand-pure"
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    write_log(tmp_path / "log", 30)
    return tmp_path / "log"


def small(*sets: str) -> Config:
    return load(sets=["policy.codes=8", "pretrain.steps=10", *sets], log=True).config


def watched_of(folder: Path, context: int = 6) -> tuple[Watched, WatchHistory, Videos]:
    """The small log's history; video v has the semantic ID (v // 16, v // 4 % 4, v % 4)."""
    feed = open_log(folder)
    history, videos = feed.read_history(), feed.read_videos()
    catalogue = Catalogue(4)
    for offset, video in enumerate(videos.id.tolist()):
        sid = (video // 16, video // 4 % 4, video % 4)
        entry = Upsert(item=str(video), sid=sid, codebook="c", duration_ms=1)
        catalogue.take(offset, entry.item.encode(), encode(entry))
    return Watched(history, videos, catalogue, BEGIN_MS, context), history, videos


def video_of(codes: np.ndarray[tuple[int], np.dtype[np.uint16]]) -> int:
    return int(codes[0]) * 16 + int(codes[1]) * 4 + int(codes[2])


# The watch history


def test_plays_before_the_log_end_before_it_in_their_order(log: Path) -> None:
    _, history, videos = watched_of(log)
    end_ms, play_ms, duration_ms = plays_before(history, videos, BEGIN_MS)
    assert (end_ms < BEGIN_MS).all()
    for k in range(len(history.user)):
        assert (np.diff(end_ms[history.start[k] : history.start[k + 1]]) > 0).all()
    assert (play_ms[~history.long] == 0).all()
    assert (play_ms[history.long] == np.minimum(duration_ms, LONG_MS)[history.long]).all()
    assert history.long.any() and not history.long.all()


def test_a_lineage_begins_with_what_its_users_watched_and_does_not_show_it_again(log: Path) -> None:
    _, history, videos = watched_of(log)
    found = {one.user: one for one in histories_of(history, videos, BEGIN_MS)}
    assert set(found) == {str(user) for user in range(USERS)}
    for k, user in enumerate(history.user.tolist()):
        videos_seen = [str(v) for v in history.video[history.start[k] : history.start[k + 1]]]
        assert [play.item for play in found[str(user)].behaviours] == videos_seen
        assert found[str(user)].shown == videos_seen
        assert len({(p.request, p.position) for p in found[str(user)].behaviours}) == WATCHED


def test_a_context_stands_before_its_targets_and_targets_were_watched_long(log: Path) -> None:
    watched, history, _ = watched_of(log)
    for sample in watched.draw(np.random.default_rng(0), 300):
        plays = history.of(int(sample.user))
        place = int(sample.request.removeprefix("watched-")) - plays.start
        listed = history.video[plays].tolist()
        long = history.long[plays]
        context = unpack_context(sample.context)
        assert [video_of(codes) for codes in context["codes"]] == listed[:place][-6:]
        good = [at for at in range(place, min(place + AHEAD, len(listed))) if long[at]]
        if int(sample.user) % HELD_OUT == 0:
            good = [at for at in good if at < len(listed) - 1]
        assert [item.item for item in sample.items] == [str(listed[at]) for at in good[:TARGETS]]
        assert sample.items
        if place:
            ages = context["age_ms"].astype(np.int64)
            assert (np.diff(ages) < 0).all() and ages[-1] > 0


def test_held_out_plays_are_never_targets(log: Path) -> None:
    watched, history, _ = watched_of(log)
    held = watched.held_out()
    last = [
        str(int(history.video[history.of(user).stop - 1])) for user in range(0, USERS, HELD_OUT)
    ]
    long = [bool(history.long[history.of(user).stop - 1]) for user in range(0, USERS, HELD_OUT)]
    assert [s.items[0].item for s in held] == [
        v for v, good in zip(last, long, strict=True) if good
    ]
    stops = {history.of(user).stop - 1 for user in range(0, USERS, HELD_OUT)}
    for sample in watched.draw(np.random.default_rng(1), 500):
        assert int(sample.request.removeprefix("watched-")) not in stops


# The command's work


def test_pretraining_writes_a_start_that_learners_and_actors_can_read(
    log: Path, tmp_path: Path
) -> None:
    config = small()
    done = pretrained(config, open_log(log), tmp_path / "start", Console(quiet=True))
    start = Start.at(tmp_path / "start")
    trainer, progress, codebooks = load_checkpoint(start.policy, config.learn, config.learn.lr)
    assert (progress.version, progress.codes, trainer.model.codes) == (0, 8, 8)
    upserts = start.catalogue()
    assert len(upserts) == VIDEOS
    assert {upsert.codebook for upsert in upserts} == {codebooks.digest()}
    vectors = np.stack([np.frombuffer(upsert.embedding, "<f4") for upsert in upserts])
    assert [upsert.sid for upsert in upserts] == [
        tuple(sid) for sid in codebooks.assign(vectors).tolist()
    ]
    assert len(start.histories()) == USERS and start.shaping() == []
    assert not trainer.dense_optimiser.state
    assert done.results["leaves"] == len({upsert.sid for upsert in upserts})


def test_pretraining_learns_what_is_watched_next_and_repeats_under_its_seed(
    log: Path, tmp_path: Path
) -> None:
    console = Console(quiet=True)
    runs = [
        pretrained(small(*sets), open_log(log), tmp_path / name, console)
        for name, sets in (
            ("a", ("pretrain.steps=30",)),
            ("b", ("pretrain.steps=30",)),
            ("short", ("pretrain.steps=1",)),
            ("other", ("pretrain.steps=1", "learn.seed=8")),
        )
    ]
    policies = [run.start.policy.read_bytes() for run in runs]
    assert policies[0] == policies[1]
    assert policies[2] != policies[3]
    assert runs[0].results["loss"] < runs[2].results["loss"] - 0.1


def test_without_a_watch_history_pretraining_says_what_is_missing(
    log: Path, tmp_path: Path
) -> None:
    (log / "watch_history_4_09_to_4_24.csv").unlink()
    with pytest.raises(UserError, match=r"no watch_history_\*\.csv in .*log"):
        pretrained(small(), open_log(log), tmp_path / "start", Console(quiet=True))


def test_the_logs_profile_yields_to_the_users_own_values() -> None:
    config = load(log=True).config
    assert {name: value_of(config, name) for name in LOG} == LOG
    assert load(sets=["policy.codes=16"], log=True).config.policy.codes == 16
    assert load(environment={"DWELL_LEARN_LR": "0.5"}, log=True).config.learn.lr == 0.5


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real log at {REAL}; set DWELL_LOG_DIR")
def test_the_real_history_gives_almost_every_user_something_to_predict() -> None:
    feed = open_log(REAL)
    history, videos = feed.read_history(), feed.read_videos()
    watched = Watched(history, videos, Catalogue(4), BEGIN_MS, 32)
    assert len(watched) == 0  # nothing is in that catalogue
    catalogue = Catalogue(4)
    for offset, video in enumerate(videos.id.tolist()):
        entry = Upsert(item=str(video), sid=(0, 0, 0), codebook="c", duration_ms=1)
        catalogue.take(offset, entry.item.encode(), encode(entry))
    watched = Watched(history, videos, catalogue, BEGIN_MS, 32)
    assert len(watched) > 0.9 * len(history.user)
    assert 300 < len(watched.held_out()) < len(history.user) / HELD_OUT
