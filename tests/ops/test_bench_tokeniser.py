"""The bench of the tokeniser: its embeddings, its checks, and a small run of the whole."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ops.bench_tokeniser import WIDTH, checks_of, measure, mixture


def test_embeddings_are_a_mixture_that_the_seed_decides() -> None:
    x = mixture(5000, seed=1)
    assert x.shape == (5000, WIDTH)
    assert x.dtype == np.float32
    assert np.array_equal(x, mixture(5000, seed=1))
    assert not np.array_equal(x, mixture(5000, seed=2))
    assert np.square(x).sum(axis=1).mean() == pytest.approx(1.3, abs=0.4)
    # Most items stand beside others of their Gaussian.
    nearest = np.array([np.sort(np.square(x - row).sum(axis=1))[1] for row in x[:50]])
    assert np.median(nearest) < 0.6


def test_a_small_run_measures_all_and_passes() -> None:
    said: list[str] = []
    results = measure(4000, 64, 1, True, said.append)
    assert [check.name for check in checks_of(results) if check.correctness and not check.ok] == []
    fitted, random, balanced = (results[name] for name in ("fitted", "random", "balanced"))
    for level in ("level_1", "level_2", "level_3"):
        assert fitted[level]["reconstruction"] < 0.9 * random[level]["reconstruction"]
        assert fitted[level]["entropy"] > random[level]["entropy"]
        assert balanced[level]["gini"] < fitted[level]["gini"]
    assert 1.0 < balanced["reconstruction_over_fitted"] < 1.2
    assert fitted["largest_group"] >= 1
    assert results["peak_resident_bytes"] >= results["resident_before_bytes"] > 0
    assert 0 < results["one_item"]["p50_s"] <= results["one_item"]["p99_s"]
    assert any(line.startswith("fit: level 3") for line in said)


@pytest.mark.parametrize(
    ("part", "figure", "value", "failed"),
    [
        ("fitted", ("level_2", "utilisation"), 0.99, "utilisation, the least of a level"),
        ("one_item", ("different",), 1, "one_item.different"),
        ("balanced", ("level_3", "largest_apart"), 1.51, "balanced, largest_apart of a level"),
    ],
)
def test_a_figure_that_is_wrong_fails_its_check(
    part: str, figure: tuple[str, ...], value: float, failed: str
) -> None:
    level = {"utilisation": 1.0, "largest_apart": 1.5}
    levels = {f"level_{number}": dict(level) for number in (1, 2, 3)}
    results = {
        "fitted": {name: dict(of) for name, of in levels.items()},
        "balanced": {name: dict(of) for name, of in levels.items()},
        "one_item": {"different": 0, "p99_s": 9.0},
        "fit_s": 1.0,
    }
    assert [check.ok for check in checks_of(results)] == [True, True, True, False, True]
    place = results[part]
    assert isinstance(place, dict)
    for key in figure[:-1]:
        place = place[key]
    place[figure[-1]] = value
    wrong = [check.name for check in checks_of(results) if check.correctness and not check.ok]
    assert wrong == [failed]


def test_the_command_writes_its_results(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "ops.cli", "bench", "tokeniser", "--json", str(out)]
    sizes = ["--items", "1000", "--codes", "16", "--data-dir", str(tmp_path / "data")]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert document["command"] == "dwell bench tokeniser"
    assert document["results"]["fitted"]["level_1"]["utilisation"] == 1.0
    fewer = subprocess.run(
        [*command, "--items", "10", "--codes", "16"], capture_output=True, text=True, check=False
    )
    assert fewer.returncode == 2
    assert "--items 10 are fewer than --codes 16" in fewer.stdout + fewer.stderr
