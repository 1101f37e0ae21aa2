"""`dwell bench weights`, small: on a real broker with a real actor."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learner.policy import USERS, build, state_of
from ops import bench_weights_swaps
from ops.bench_weights import checks_of
from ops.bench_weights_dense import exact_after, rounded
from ops.bench_weights_parts import REQUESTS_PER_S, VERSIONS_PER_S, Moving, served, transport
from ops.bench_weights_swaps import swaps
from ops.config import Config
from streams.blocks import blocked_state
from streams.delta import changes


def test_a_version_moves_all_that_is_dense_and_the_rows_of_its_requests() -> None:
    moving = Moving(state_of(build("tiny", 5, 5000)), 1)
    base = blocked_state(moving.state)
    content, _ = changes(base, moving.step())
    rows = content.pop(f"rows@{USERS}")
    assert 1 < len(rows) <= REQUESTS_PER_S / VERSIONS_PER_S
    del content[f"rows:{USERS}"]
    assert {name.partition(":")[0] for name in content} == {"whole"}
    assert len(content) == len(base) - 1


def test_many_deltas_through_the_wire_lose_no_bit() -> None:
    state = state_of(build("tiny", 5, 300))
    assert exact_after(state, 40, 1)


def test_bf16_isrounded_to_nearest_even() -> None:
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -2.5, 3.1415927], np.float32)
    bits = rounded({"x": values})["x"].astype(np.uint32) << 16
    assert bits.view(np.float32).tolist() == [1.0, 1.0, 1.015625, -2.5, 3.140625]


@pytest.mark.timeout(180)
def test_versions_are_served_through_swaps_without_a_failed_or_mixed_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_weights_swaps, "BLOCK_S", 1.6)
    monkeypatch.setattr(bench_weights_swaps, "CLIENTS", 4)
    config = replace(Config(), policy=replace(Config().policy, user_rows=2000))
    with served(config, tmp_path / "run", 200, 10, 1) as made:
        moved = transport(made, 12, 0.1, 1)
        through = swaps(made, 8, 10, 1)
    assert moved["versions"] == 12
    assert 1 <= moved["applied"] <= 12
    assert 0 < moved["p50_s"] <= moved["p99_s"] < 30
    assert 0 < moved["delta_share"] < 1
    assert through["swaps"] == 8
    assert through["requests"] > 0
    assert through["failed"] == through["mixed"] == 0
    assert through["drawn_again"] > 0
    assert through["max_difference_nats"] < 1e-5
    results = {
        "applied": {"tiny": moved},
        "delta_share": {"table": moved["delta_share"]},
        "deltas": 40,
        "exact_after_deltas": True,
        "serving": through,
    }
    assert all(check.ok for check in checks_of(results) if check.correctness)
    results["serving"] = {**through, "mixed": 1}
    assert [check.name for check in checks_of(results) if check.correctness and not check.ok] == [
        "mixed"
    ]
