"""`dwell bench decoder`: the lazy decoder beside an encoder-decoder and a naive decoder of the same size.

Notable choices
- All architectures in one process, taking turns in every repeat, each in its own place before and after the others;
  ratios are formed within a repeat and their median is told, with the least and the largest.
- A trained sample: forward and backward of the supervised loss, cross entropy over all codes, on full contexts. The
  live learner's loss is over the request's valid tree and costs more elementwise work, the same for all
  architectures; optimisers do, too, and are told apart.
- A batch is one after which an architecture gets no faster, in context positions; the lazy decoder, which does little
  with a position, takes three times as many as the others.
- A served request: one context and one slate, drawn from the policy as the actor draws it.
- The peak that achieved FLOP/s are held against is a product of large square float32 matrices by the same threads,
  measured in every repeat.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from learner.counting import Load
from learner.presets import PRESETS, REPORT_CODES
from ops.bench_decoder_memory import MEMORY_REQUESTS, Memory, memory_of
from ops.bench_decoder_parts import (
    ARCHITECTURES,
    ENCODER_DECODER,
    LAZY,
    Architecture,
    Peak,
    Serving,
    Setting,
    Step,
    catalogue,
    device_named,
    optimiser_s,
    timed,
)
from ops.config import Config
from ops.errors import UserError
from ops.results import Check, exit_status, print_results, write_results

POSITIONS: Final = (128, 512, 1024)
TARGETS: Final = (1, 5)
USER_ROWS: Final = 16_384
AT: Final = 512
"""Context positions that the goals are for."""
TURN_S: Final = 1.5
"""An architecture's turn: as many training steps as this takes, at least one."""
SERVED: Final = 4
"""Served requests of a turn."""
RATIO_GOAL: Final = 10.0
COUNTED_GOAL: Final = 0.6
SHARE_GOALS: Final = {"cpu": 0.4, "cuda": 0.5}
SUMMARY: Final = ("matmul_peak_flops", "optimiser_s", "bfloat16", "share_of_peak", "took_s")
"""Results that are printed beside the table and the checks."""
LARGE: Final = {"cpu": 2048, "cuda": 8192}
"""Width of the square matrices whose product is the peak."""

Times = dict[Architecture, list[float]]


class Cell:
    """One context length and number of targets: everything that was measured there."""

    def __init__(self, setting: Setting, positions: int, targets: int) -> None:
        self.positions, self.targets = positions, targets
        self.setting = setting
        self.step_s: Times = {each: [] for each in ARCHITECTURES}
        self.served_s: Times = {each: [] for each in ARCHITECTURES}
        self.model_s: Times = {each: [] for each in ARCHITECTURES}
        self.peaks: list[float] = []
        self.memory: dict[Architecture, Memory] = {}

    def items(self, architecture: Architecture) -> int:
        """Of a training batch."""
        return architecture.requests(self.setting.at(self.positions)) * self.targets

    def flops(self, architecture: Architecture) -> float:
        """Of a trained item."""
        load = Load(self.positions, self.targets)
        return architecture.flops(self.setting.at(self.positions), self.setting.codes, load)

    def item_s(self, architecture: Architecture) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Seconds of a trained item, a figure a repeat."""
        return np.array(self.step_s[architecture]) / self.items(architecture)

    def ratio(self, other: Architecture) -> dict[str, float]:
        """Of an architecture's time to the lazy decoder's."""
        return spread(self.item_s(other) / self.item_s(LAZY))

    def counted_ratio(self, other: Architecture) -> float:
        """Of its counted FLOPs to the lazy decoder's."""
        return self.flops(other) / self.flops(LAZY)

    def share_of_peak(self, architecture: Architecture) -> dict[str, float]:
        """Of the largest matrix products' rate that is achieved, forward and backward."""
        return spread(self.flops(architecture) / self.item_s(architecture) / np.array(self.peaks))

    def figures(self, architecture: Architecture) -> dict[str, Any]:
        """For the results."""
        return {
            "trained_sample_s": spread(self.item_s(architecture)),
            "trained_sample_flops": self.flops(architecture),
            "share_of_peak": self.share_of_peak(architecture),
            "training_requests": self.items(architecture) // self.targets,
            "served_request_s": spread(self.served_s[architecture]),
            "served_request_model_s": spread(self.model_s[architecture]),
            "memory": self.memory.get(architecture),
        }


def spread(values: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    """The median of repeats, the least and the largest."""
    return {
        "median": float(np.median(values)),
        "least": float(np.min(values)),
        "largest": float(np.max(values)),
    }


def measure(cell: Cell, repeats: int, peak: Peak) -> None:
    """Train and serve in turns; what comes first in one repeat comes last in the next."""
    setting, tree = cell.setting, catalogue(cell.setting.codes)
    models = {each: setting.model(each, cell.positions) for each in ARCHITECTURES}
    steps = {
        each: Step(setting, models[each], cell.items(each) // cell.targets, cell.targets)
        for each in ARCHITECTURES
    }
    serving = {each: Serving(setting, models[each], tree, cell.targets) for each in ARCHITECTURES}
    counts = {}
    for each in ARCHITECTURES:
        counts[each] = max(1, round(TURN_S / timed(steps[each], setting.device)))
        serving[each]()
    peak()
    for repeat in range(repeats):
        order = ARCHITECTURES if repeat % 2 else ARCHITECTURES[::-1]
        rates = []
        for each in order:
            rates.append(peak())
            taken = timed(partial(_times, counts[each], steps[each]), setting.device)
            cell.step_s[each].append(taken / counts[each])
        cell.peaks.append(float(np.median(rates)))
        for each in ARCHITECTURES:
            models[each].zero_grad(set_to_none=True)
        for _ in range(SERVED):
            for each in order:
                before = serving[each].model_s
                cell.served_s[each].append(timed(serving[each], setting.device))
                cell.model_s[each].append(serving[each].model_s - before)


def _times(count: int, work: Callable[[], object]) -> None:
    for _ in range(count):
        work()


def bfloat16(setting: Setting, positions: int, targets: int, repeats: int) -> dict[str, Any]:
    """The lazy decoder's step under autocast beside float32, on few requests: it may be very slow."""
    step = Step(setting, setting.model(LAZY, positions), 2, targets)
    taken = [
        (timed(step.in_bfloat16, setting.device), timed(step, setting.device))
        for _ in range(repeats + 1)
    ]
    ratios = [half / single for half, single in taken[1:]]
    return {"requests": 2, "time_of_float32": spread(ratios)}


def results_of(
    setting: Setting, cells: Sequence[Cell], optimiser: dict[str, float], half: dict[str, Any]
) -> dict[str, Any]:
    """What is told."""
    most = max(TARGETS)
    shared = [cell for cell in cells if cell.targets == most]
    others = [each for each in ARCHITECTURES if each is not LAZY]
    models = {each: setting.model(each, shared[0].positions) for each in ARCHITECTURES}
    named = {f"context_{cell.positions}": cell for cell in shared}
    return {
        "setting": setting,
        "matmul_peak_flops": spread([rate for cell in cells for rate in cell.peaks]),
        "ratio_encoder_decoder_to_lazy": {
            name: cell.ratio(ENCODER_DECODER)["median"] for name, cell in named.items()
        },
        "counted_ratio_encoder_decoder_to_lazy": {
            name: cell.counted_ratio(ENCODER_DECODER) for name, cell in named.items()
        },
        "ratios_to_lazy": {
            f"{name}.k_{most}.{each.name}": {
                "measured": cell.ratio(each),
                "counted": cell.counted_ratio(each),
            }
            for name, cell in named.items()
            for each in others
        },
        "share_of_peak": {name: cell.share_of_peak(LAZY)["median"] for name, cell in named.items()},
        "optimiser_s": optimiser,
        "bfloat16": half,
        "memory_requests": MEMORY_REQUESTS,
        "parameters": {
            each.name: {
                "all": sum(value.numel() for value in model.parameters()),
                "blocks": sum(
                    value.numel()
                    for name, value in model.named_parameters()
                    if name.startswith(("blocks.", "encoder."))
                ),
            }
            for each, model in models.items()
        },
        "cells": {
            f"context_{cell.positions}.k_{cell.targets}": {
                each.name: cell.figures(each) for each in ARCHITECTURES
            }
            for cell in cells
        },
    }


def checks_of(results: dict[str, Any], device: str) -> list[Check]:
    """Goals of speed, at a context of 512 or what is nearest to it."""
    at = min(
        results["ratio_encoder_decoder_to_lazy"],
        key=lambda name: abs(int(name.split("_")[1]) - AT),
    )
    ratio = results["ratio_encoder_decoder_to_lazy"][at]
    part = ratio / results["counted_ratio_encoder_decoder_to_lazy"][at]
    share, goal = results["share_of_peak"][at], SHARE_GOALS[device]
    return [
        Check(
            f"ratio_encoder_decoder_to_lazy.{at}",
            ratio,
            f">= {RATIO_GOAL:g}",
            ratio >= RATIO_GOAL,
            correctness=False,
        ),
        Check(
            f"measured_of_counted.{at}",
            part,
            f">= {COUNTED_GOAL}",
            part >= COUNTED_GOAL,
            correctness=False,
        ),
        Check(f"share_of_peak.{at}", share, f">= {goal}", share >= goal, correctness=False),
    ]


def table_of(cells: Sequence[Cell]) -> Table:
    """Medians, for people: of a trained item, a served request, and a step's activations."""
    heads = ("N", "k", "", "ms/item", "MFLOP", "of peak", "/lazy", "counted", "ms/req", "MB")
    table = Table(*heads, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for cell in cells:
        for each in ARCHITECTURES:
            memory = cell.memory.get(each)
            figures = (
                str(cell.positions),
                str(cell.targets),
                each.name.replace("encoder_decoder_1_", "enc-dec 1:"),
                f"{1e3 * np.median(cell.item_s(each)):.2f}",
                f"{cell.flops(each) / 1e6:,.0f}",
                f"{cell.share_of_peak(each)['median']:.2f}",
                f"{cell.ratio(each)['median']:.2f}",
                f"{cell.counted_ratio(each):.2f}",
                f"{1e3 * np.median(cell.served_s[each]):.1f}",
                f"{memory['activation_bytes'] / 1e6:,.0f}" if memory else "-",
            )
            table.add_row(*(Text(figure) for figure in figures))
    return table


def compare(
    setting: Setting,
    positions: Sequence[int],
    repeats: int,
    peak: Peak,
    tell: Callable[[str], None],
) -> tuple[list[Cell], dict[str, Any]]:
    """Measure everything; what was found, and what is told of it."""
    began = time.monotonic()
    cells = [Cell(setting, length, targets) for length in positions for targets in TARGETS]
    for cell in cells:
        tell(f"context {cell.positions}, {cell.targets} targets")
        measure(cell, repeats, peak)
    tell("optimisers and bfloat16")
    near = min(positions, key=lambda length: abs(length - AT))
    optimiser = {each.name: optimiser_s(setting, near, each) for each in ARCHITECTURES}
    half = bfloat16(setting, near, max(TARGETS), repeats)
    for each in ARCHITECTURES:
        tell(f"memory of {each.name}")
        sizes = [(cell.positions, cell.targets) for cell in cells]
        for cell, memory in zip(cells, memory_of(setting, each, sizes), strict=True):
            cell.memory[each] = memory
    results = results_of(setting, cells, optimiser, half)
    results["took_s"] = time.monotonic() - began
    return cells, results


def run(
    config: Config,
    preset: str,
    device: str,
    threads: int | None,
    repeats: int,
    json: Path | None,
) -> int:
    """Bench, print, and return the exit status."""
    able = [name for name, each in PRESETS.items() if not each.experts and each.layers >= 3]
    if preset not in able:
        raise UserError(f"--preset {preset}: there are baselines of {', '.join(able)}.")
    on = device_named(device)
    threads = threads or config.policy.threads
    setting = Setting(PRESETS[preset], REPORT_CODES, USER_ROWS, on, threads)
    torch.set_num_threads(threads)
    console = Console()
    with console.status("") as status:
        cells, results = compare(setting, POSITIONS, repeats, Peak(on, LARGE[on]), status.update)
    checks = checks_of(results, on)
    console.print(table_of(cells))
    print_results({name: results[name] for name in SUMMARY}, checks, console)
    if json is not None:
        write_results(json, "dwell bench decoder", config, [0], results, checks)
    return exit_status(checks)
