"""The bench of the architectures: its counting against torch's counter, and what it tells of what it measured."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from learner.counting import Load, lazy
from learner.presets import PRESETS, Preset
from ops import bench_decoder
from ops.bench_decoder import Cell, checks_of, measure, results_of, spread, table_of
from ops.bench_decoder_memory import MEMORY_REQUESTS, memory_of
from ops.bench_decoder_parts import (
    ARCHITECTURES,
    ENCODER_DECODER,
    LAZY,
    Architecture,
    Peak,
    Setting,
    Step,
    device_named,
    optimiser_s,
)
from ops.cli import main
from ops.errors import UserError
from streams.events import LEVELS

TOY = Preset(
    d_model=32, layers=4, heads=2, d_embed=8, d_ffn=64, d_user=4, context=15, short=4, tied=True
)
SETTING = Setting(TOY, codes=16, user_rows=32, device="cpu", threads=1)
NAIVE = ARCHITECTURES[-1]


def counted_otherwise(architecture: Architecture, load: Load) -> float:
    """What plain products do beyond the count: the upper half of causal attention, and targets' masked keys."""
    if architecture is not NAIVE:
        return 0.0
    upper = (TOY.layers - 1) * load.share * load.positions / 2
    masked = TOY.layers * LEVELS * (load.targets - 1) * LEVELS
    return 6 * 2 * TOY.d_model * (upper + masked)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=[each.name for each in ARCHITECTURES])
@pytest.mark.parametrize("targets", [1, 3])
def test_compute_is_what_torch_counts(architecture: Architecture, targets: int) -> None:
    requests, load = 2, Load(TOY.positions, targets)
    step = Step(SETTING, SETTING.model(architecture, TOY.positions), requests, targets)
    with sdpa_kernel(SDPBackend.MATH):  # plain products, which the counter sees
        with FlopCounterMode(display=False) as forward:
            loss = step.loss()
        with FlopCounterMode(display=False) as backward:
            loss.backward()  # type: ignore[no-untyped-call]
    done = architecture.flops(TOY, SETTING.codes, load) + counted_otherwise(architecture, load)
    # Behaviours' features are data: nothing flows back into them.
    features = lazy(TOY, SETTING.codes, load)["features"]
    assert forward.get_total_flops() == pytest.approx(step.items * done / 3)
    assert backward.get_total_flops() == pytest.approx(step.items * (2 * done - features) / 3)


def test_counted_ratios_at_small_are_those_of_the_goal() -> None:
    preset, load = PRESETS["small"], Load(512, 5)
    ours, even, uneven, naive = (each.flops(preset, 8192, load) for each in ARCHITECTURES)
    assert ours < uneven < even < naive
    assert 11.5 < even / ours < 12.5


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    """Two contexts, both numbers of targets, two repeats."""
    torch.set_num_threads(1)
    made = [Cell(SETTING, positions, k) for positions in (8, 16) for k in (1, 5)]
    for cell in made:
        measure(cell, 2, Peak("cpu", 64))
        cell.memory = dict.fromkeys(ARCHITECTURES)
    return made


def test_every_architecture_is_measured_in_every_repeat(cells: list[Cell]) -> None:
    for cell in cells:
        assert len(cell.peaks) == 2
        for each in ARCHITECTURES:
            assert len(cell.step_s[each]) == 2
            assert len(cell.served_s[each]) == 2 * bench_decoder.SERVED
            served, model = np.array(cell.served_s[each]), np.array(cell.model_s[each])
            assert (model > 0).all() and (model < served).all()


def test_results_are_made_of_what_was_measured(cells: list[Cell]) -> None:
    results = results_of(SETTING, cells, {}, {})
    cell = cells[-1]
    found = results["cells"]["context_16.k_5"]["lazy"]
    assert found["trained_sample_s"] == spread(cell.item_s(LAZY))
    assert found["training_requests"] == LAZY.positions // 16
    assert found["trained_sample_flops"] == LAZY.flops(TOY, 16, Load(16, 5))
    assert results["ratio_encoder_decoder_to_lazy"].keys() == {"context_8", "context_16"}
    each_repeat = cell.item_s(ENCODER_DECODER) / cell.item_s(LAZY)
    assert results["ratio_encoder_decoder_to_lazy"]["context_16"] == np.median(each_repeat)
    shares = cell.flops(LAZY) / cell.item_s(LAZY) / np.array(cell.peaks)
    assert results["share_of_peak"]["context_16"] == np.median(shares)
    parameters = results["parameters"]
    assert parameters["lazy"]["all"] > parameters["lazy"]["blocks"] > parameters["naive"]["blocks"]
    console = Console(width=80)
    with console.capture() as shown:
        console.print(table_of(cells))
    assert shown.get().count("enc-dec 1:1") == len(cells)


def test_goals_are_shown_and_are_no_errors() -> None:
    results = {
        "ratio_encoder_decoder_to_lazy": {"context_128": 99.0, "context_512": 9.0},
        "counted_ratio_encoder_decoder_to_lazy": {"context_128": 99.0, "context_512": 12.0},
        "share_of_peak": {"context_128": 0.9, "context_512": 0.45},
    }
    checks = checks_of(results, "cpu")
    assert [(check.name, check.ok) for check in checks] == [
        ("ratio_encoder_decoder_to_lazy.context_512", False),
        ("measured_of_counted.context_512", True),
        ("share_of_peak.context_512", True),
    ]
    assert not any(check.correctness for check in checks)
    assert not checks_of(results, "cuda")[2].ok


def test_memory_is_that_of_a_process_of_its_own() -> None:
    """At widths where activations stand out: of eight layers over 512 positions the naive decoder keeps every one."""
    wide = replace(TOY, d_model=64, d_ffn=256, layers=8, heads=4)
    setting = replace(SETTING, preset=wide)
    (found,) = memory_of(setting, NAIVE, [(512, 1)])
    if found is None:
        pytest.skip("this system does not tell a process its resident memory")
    kept = MEMORY_REQUESTS * 512 * 7 * (6 * 64 + 3 * 256) * 4
    assert 0.8 * kept < found["activation_bytes"] < 4 * kept
    assert found["peak_bytes"] > found["activation_bytes"]


def test_a_memory_run_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(UserError, match="the memory of lazy could not be measured"):
        memory_of(SETTING, LAZY, [(16, 1)])


def test_optimisers_are_timed_apart() -> None:
    assert 0 < optimiser_s(SETTING, 16, LAZY) < 5


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (device_named("auto"), device_named("cpu")) == ("cpu", "cpu")
    with pytest.raises(UserError, match="torch finds no GPU here"):
        device_named("cuda")


def test_a_preset_without_baselines_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for preset in ("tiny", "4B-MoE", "none"):
        with pytest.raises(SystemExit) as ended:
            main(["bench", "decoder", "--preset", preset])
        assert ended.value.code == 2
        assert "there are baselines of small, 0.1B" in capsys.readouterr().err


def test_the_command_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "small", TOY)
    for name, value in {
        "POSITIONS": (16,),
        "REPORT_CODES": 16,
        "USER_ROWS": 32,
        "LARGE": {"cpu": 64},
        "SERVED": 1,
        "memory_of": lambda _setting, _each, cells: [None] * len(cells),
    }.items():
        monkeypatch.setattr(bench_decoder, name, value)
    path = tmp_path / "results.json"
    arguments = ["--repeats", "1", "--device", "cpu", "--threads", "1", "--json", str(path)]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "decoder", *arguments])
    assert ended.value.code == 0
    found = json.loads(path.read_text())
    assert found["command"] == "dwell bench decoder"
    assert {check["name"].split(".")[0] for check in found["checks"]} == {
        "ratio_encoder_decoder_to_lazy",
        "measured_of_counted",
        "share_of_peak",
    }
    results = found["results"]
    assert results["setting"]["threads"] == 1
    assert set(results["optimiser_s"]) == {each.name for each in ARCHITECTURES}
    assert results["bfloat16"]["time_of_float32"]["median"] > 0
    assert results["cells"]["context_16.k_5"]["naive"]["memory"] is None
