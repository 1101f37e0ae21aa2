"""Replaying a log: the pure parts, then the whole on a real broker with real processes."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actor.settings import ActorSettings
from actor.users import Users
from learner.catalogue import Catalogue
from learner.policy import build
from ops.config import load
from ops.csvtable import Malformed
from ops.errors import UserError
from ops.feedlog import EXPOSED, ROW, Videos, WatchHistory, classify, days, open_log
from ops.log_requests import Block, Requests
from ops.pacing import Clock, Due
from ops.popularity import popularities, prequential_hits
from ops.replay import run
from ops.scoreboard import POLICY, Scoreboard, split_of
from ops.scoring import Ranker, difference
from streams.events import Exposure, Feedback, SemanticId, Upsert, encode, unpack_context
from streams.join import Join
from streams.settings import JoinSettings
from tests.ops.small_log import BEGIN_MS, HOUR_MS, write_log

CODES = 4


def catalogue_of(sids: list[SemanticId]) -> Catalogue:
    """Items 0, 1, ... at these leaves."""
    catalogue = Catalogue(CODES)
    for offset, sid in enumerate(sids):
        entry = Upsert(item=str(offset), sid=sid, codebook="c", duration_ms=60_000)
        catalogue.take(offset, entry.item.encode(), encode(entry))
    return catalogue


def rows_of(*rows: tuple[int, int, int, int]) -> np.ndarray[Any, np.dtype[np.void]]:
    """Rows of (user, video, time, play)."""
    out = np.zeros(len(rows), ROW)
    for at, (user, video, time_ms, play_ms) in enumerate(rows):
        out[at]["user"], out[at]["video"] = user, video
        out[at]["time_ms"], out[at]["play_ms"] = time_ms, play_ms
    out["duration_ms"] = 60_000
    return out


def requests_of(rows: np.ndarray[Any, np.dtype[np.void]]) -> Requests:
    catalogue = catalogue_of([(video % 4, video // 4 % 4, 0) for video in range(16)])
    return Requests(rows, np.arange(len(rows)), Users(ActorSettings()), catalogue, 32)


# Requests


def test_a_context_holds_what_the_user_did_until_then_and_nothing_later() -> None:
    rows = rows_of(
        (1, 5, 1000, 30_000), (1, 6, 12_000, 4000), (2, 7, 13_000, 100), (1, 8, 50_000, 9)
    )
    block = requests_of(rows).take(10, 1)
    first, second, other, last = (unpack_context(packed) for packed in block.contexts)
    assert len(first) == len(other) == 0
    # the first play is still going on: known up to its heartbeat after 10 s
    assert second["play_ms"].tolist() == [10_000]
    assert second["age_ms"].tolist() == [1000]
    assert last["play_ms"].tolist() == [4000, 30_000]
    assert last["age_ms"].tolist() == [50_000 - 16_000, 50_000 - 31_000]
    assert last["codes"].tolist() == [[6 % 4, 1, 0], [5 % 4, 1, 0]]


def test_blocks_together_hold_every_event_once_in_event_time_order() -> None:
    rows = rows_of(*((row % 3, row % 16, 700 * row, 900 * (row % 40)) for row in range(100)))
    requests = requests_of(rows)
    blocks: list[Block] = []
    while not blocks or blocks[-1].rows:
        blocks.append(requests.take(32, len(blocks)))
    assert [len(block.rows) for block in blocks] == [32, 32, 32, 4, 0]
    assert [row for block in blocks for row in block.rows] == list(range(100))
    events = [event for block in blocks for event in block.events]
    times = [event.time_ms for event in events]
    assert times == sorted(times)
    assert len(
        {(type(e), e.event if isinstance(e, Feedback) else e.request) for e in events}
    ) == len(events)
    exposures = [event for event in events if isinstance(event, Exposure)]
    assert {
        (e.arm, e.decode_mode, e.items[0].source, e.items[0].logp_levels) for e in exposures
    } == {("learning", "other", "other", None)}
    assert [e.policy_version for e in exposures] == [0] * 32 + [1] * 32 + [2] * 32 + [3] * 4


def test_a_log_of_videos_that_the_catalogue_lacks_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"2 videos of the log are not in the .* such as 16"):
        requests_of(rows_of((1, 5, 1000, 0), (1, 17, 1001, 0), (1, 16, 1002, 0)))


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 4000), st.sampled_from([0, 900, 9_000, 40_000, 301_000, 950_000])),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([2.0, 30.0]),
)
def test_what_is_due_at_a_watermark_is_what_the_join_closes(
    gaps: list[tuple[int, int]], abandon_s: float
) -> None:
    times = np.cumsum([gap * 100 for gap, _ in gaps]).tolist()
    rows = rows_of(*((at % 5, at % 16, times[at], play) for at, (_, play) in enumerate(gaps)))
    join_settings = JoinSettings(abandon_s=abandon_s)
    due, join = Due(join_settings), Join(join_settings, lambda _: False)
    requests, closed, offset = requests_of(rows), 0, 0
    while True:
        block = requests.take(7, 1)
        for event in block.events:
            due.take(event)
            offset += 1
            if isinstance(event, Exposure):
                closed += len(join.expose(event, offset, event.time_ms))
            else:
                closed += len(join.feed(event, offset, event.time_ms))
        now = block.events[-1].time_ms if block.rows else due.deadline_ms(rows["time_ms"][-1])
        for on_exposures in (True, False):
            closed += len(join.tick(now, on_exposures, now))
        assert due.at(now) == closed
        if not block.rows:
            break
    assert closed == len(rows)


def test_the_clock_sends_at_its_speed_and_stands_still_at_barriers() -> None:
    clock = Clock(100.0, 5000)
    began = time.monotonic()
    clock.wait_for(5000)
    assert time.monotonic() - began < 0.05
    with clock.stopped():
        time.sleep(0.1)
    clock.wait_for(15_000)  # 10 s of the log
    assert 0.19 < time.monotonic() - began < 0.5
    Clock(None, 0).wait_for(10**12)
    assert time.monotonic() - began < 0.5


# Scoring


def test_items_are_ranked_by_the_probability_that_serving_gives_them() -> None:
    rng = np.random.default_rng(0)
    sids = [tuple(int(c) for c in rng.integers(0, CODES, 3)) for _ in range(30)] + [(1, 2, 3)] * 5
    catalogue = catalogue_of([(a, b, c) for a, b, c in sids])
    torch.manual_seed(0)
    model = build("tiny", CODES, 8)
    for head in model.heads:
        assert isinstance(head, torch.nn.Linear)
        torch.nn.init.normal_(head.bias)
    number = {str(item): item for item in range(35)}
    users = ["a", "b"]
    ranked = Ranker(catalogue, number).rank(model, users, [b"", b""], 40)
    tree = catalogue.valid.tree(catalogue.version)
    for user, items in zip(users, ranked, strict=True):
        logp = {}
        for item, sid in enumerate(sids):
            kv = model.process(_context(model, user))
            with torch.no_grad():
                logits = model(kv, torch.tensor([[sid]]))
            mask = torch.from_numpy(tree.path_masks(np.array([[sid]])))
            law = logits.double().masked_fill(~mask, -torch.inf).log_softmax(-1)
            on_path = law.gather(-1, torch.tensor([[sid]]).unsqueeze(-1)).sum()
            logp[item] = float(on_path) - np.log(sids.count(sid))
        best = sorted(range(35), key=lambda item: -logp[item])
        found = items[items >= 0].tolist()
        assert sorted(found) == list(range(35))
        assert [logp[i] for i in found] == pytest.approx([logp[i] for i in best], abs=1e-5)
        assert (items[35:] == -1).all()


def _context(model: Any, user: str) -> Any:
    from learner.context import contexts

    return contexts([user], [b""], model.preset.context, model.user_rows, model.codes)


def test_a_difference_is_bootstrapped_over_users() -> None:
    ours = np.repeat([True, False], 50)
    one_user = difference(ours, ~ours, np.zeros(100, np.int64))
    assert one_user == {"mean": 0.0, "low": 0.0, "high": 0.0}  # one user: no variance to see
    two = difference(ours, ~ours, np.repeat([1, 2], 50))
    assert (two["mean"], two["low"], two["high"]) == (0.0, -1.0, 1.0)
    many = difference(np.ones(100, np.bool_), np.zeros(100, np.bool_), np.arange(100))
    assert many == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert np.isnan(difference(ours[:0], ours[:0], np.zeros(0, np.int64))["mean"])


def test_the_first_day_ends_at_the_midnight_nearest_to_a_day_after_the_first_row() -> None:
    midnight = 1_650_816_000_000  # 25 April 2022 in China
    for minutes in (-10, 0, 10):
        end = split_of(midnight + minutes * 60_000)
        assert end == midnight + 24 * HOUR_MS
        assert days(np.array([end - 1, end])).tolist() == [19107, 19108]


def videos_of(count: int) -> Videos:
    return Videos(
        id=np.arange(count),
        duration_ms=np.full(count, 60_000),
        author=[""] * count,
        tags=[()] * count,
        malformed=Malformed(),
    )


def test_the_scoreboard_tests_each_block_before_it_learns() -> None:
    rng = np.random.default_rng(3)
    log = rows_of(
        *(
            (int(rng.integers(9)), int(v), BEGIN_MS + at * HOUR_MS, 0)
            for at, v in enumerate(rng.zipf(1.5, 90) % 80)
        )
    )
    log["long_view"] = rng.random(90) < 0.5
    nobody = np.zeros(0, np.int64)
    history = WatchHistory(
        user=nobody,
        start=np.zeros(1, np.int64),
        video=nobody,
        like=nobody > 0,
        long=nobody > 0,
        malformed=Malformed(),
    )
    board = Scoreboard(log, videos_of(80), history)
    for _ in range(3):
        board.take(np.broadcast_to(np.arange(50), (30, 50)))
    split = split_of(int(log["time_ms"][0]))
    late = log["time_ms"] >= split
    results = board.results(split)
    assert board.done == 90
    assert results["recall_50_all"]["rows"] == late.sum()
    assert results["recall_50"]["rows"] == (late & log["long_view"]).sum()
    assert results["recall_50_all"]["policy"] == (log["video"] < 50)[late].mean()
    assert (
        results["recall_50_first_day"]["policy"]
        == (log["video"] < 50)[~late & log["long_view"]].mean()
    )
    for key, weight, of in (
        ("recall_50_all", np.ones(90), late),
        ("recall_50", log["long_view"].astype(float), late & log["long_view"]),
    ):
        for name, baseline in popularities(np.zeros(80, np.int64)).items():
            hits = prequential_hits(
                baseline,
                log["user"].astype(np.int64),
                log["video"].astype(np.int64),
                log["time_ms"],
                weight,
                30,
                50,
            )
            assert results[key][name] == hits[of].mean(), (key, name)
    assert results["recall_50"]["popularity"] == results["recall_50"]["decayed_6h"]
    gain = results["recall_50_all_gain"]["over_popularity"]["mean"]
    assert gain == pytest.approx(
        results["recall_50_all"]["policy"] - results["recall_50_all"]["popularity"]
    )
    assert board.recall(POLICY, "all") == (log["video"] < 50).mean()


# The whole


def dwell(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ops.cli", *arguments]


def settings_of(data_dir: Path) -> list[str]:
    return [
        f"--data-dir={data_dir}",
        "--set=policy.codes=8",
        "--set=pretrain.steps=20",
        "--set=kafka.partitions=2",
    ]


def replay(log: Path, data_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        dwell("replay", str(log), *settings_of(data_dir), *more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A small log, replayed once."""
    folder = tmp_path_factory.mktemp("replay")
    classes = write_log(folder / "log", 220)
    out = folder / "out.json"
    done = replay(folder / "log", folder / "data", "--barrier=64", f"--json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    yield {"folder": folder, "classes": classes, **json.loads(out.read_text())["results"]}


def test_every_row_is_in_one_class_and_every_request_becomes_one_sample(
    replayed: dict[str, Any],
) -> None:
    folder: Path = replayed["folder"]
    assert replayed["rows"] == 220
    rows = open_log(folder / "log").read_log().rows
    exposed = int((classify(rows) == EXPOSED).sum())
    assert replayed["classes"]["exposed"] == exposed == replayed["requests"] == replayed["samples"]
    assert (replayed["lost"], replayed["duplicated"], replayed["open"]) == (0, 0, 0)
    assert replayed["dead_letters"] == {}
    assert replayed["finished"] is True


def test_each_block_is_scored_with_a_version_that_knows_the_blocks_before(
    replayed: dict[str, Any],
) -> None:
    exposed = replayed["requests"]
    assert replayed["versions"] >= 1 + -(-exposed // 64)
    scored = replayed["recall_50_all"]["rows"] + replayed["recall_50_all_first_day"]["rows"]
    assert scored == exposed
    assert 0 < replayed["recall_50"]["rows"] < replayed["recall_50_all"]["rows"]
    assert replayed["recall_50"]["policy"] == 1.0  # 40 videos in lists of 50
    assert set(replayed["outcomes"]) == {"ended", "unseen", "censored"}


def test_a_replay_is_not_repeated_on_the_same_data(replayed: dict[str, Any]) -> None:
    folder: Path = replayed["folder"]
    config = load(sets=["kafka.partitions=2", f"storage.data_dir={folder / 'data'}"]).config
    with pytest.raises(
        UserError, match=r"already come to 2[78] Apr 2022.* not repeated or resumed"
    ):
        run(config, folder / "log", None, 64, None, None, None)


def test_a_later_log_goes_on_and_ctrl_c_ends_it_in_order_with_a_report(
    replayed: dict[str, Any],
) -> None:
    folder: Path = replayed["folder"]
    write_log(folder / "later", 400, BEGIN_MS + 30 * 24 * HOUR_MS, seed=2)
    out = folder / "later.json"
    process = subprocess.Popen(
        dwell(
            "replay",
            str(folder / "later"),
            *settings_of(folder / "data"),
            "--barrier=16",
            "--speed=20000",
            f"--json={out}",
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        logs = (folder / "data" / "run").iterdir()
        before = {path: path.stat().st_mtime_ns for path in logs}
        give_up = time.monotonic() + 60
        while all(path.stat().st_mtime_ns == at for path, at in before.items()):
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.1)
        time.sleep(5)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said
    results = json.loads(out.read_text())["results"]
    assert results["finished"] is False
    assert replayed["requests"] < results["requests"] < replayed["requests"] + 400
    assert results["samples"] + results["open"] == results["requests"]
    assert (results["lost"], results["duplicated"]) == (0, 0)
    assert results["versions"] > replayed["versions"]
