"""`dwell bench freshness`: the whole loop at a rate, and how long a decided play takes to be learned from.

Each rate is a demonstration of its own, as a user would start it; its log is read afterwards (ops/freshness.py). The
first third of a run is for warming up. A rate holds when both goals hold and the viewers got their answers.
"""

from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from ops.cluster import visited
from ops.config import Config
from ops.demonstration import Demonstration
from ops.errors import UserError
from ops.freshness import STAGES, Run, stages
from ops.results import Check, report
from streams.clients import records
from streams.control import LEARNING_ARM
from streams.events import (
    Exposure,
    UnreadableError,
    decode,
    exposure_decoder,
    sample_decoder,
)
from streams.settings import KafkaSettings
from streams.topics import EXPOSURES, SAMPLES, WEIGHTS, WEIGHTS_ACKS
from streams.weights import Commit, Manifest, ack_decoder, weights_decoder

GOAL_P50_S: Final = 1.0
GOAL_P99_S: Final = 2.4
KEPT_UP: Final = 0.98
"""Share of the asked-for rate that must have been served."""


def run(config: Config, rates: str, for_s: float, json: Path | None) -> int:
    """Bench, print, and return the exit status."""
    if config.kafka.bootstrap:
        raise UserError("the bench starts clusters of its own: leave --bootstrap out.")
    asked = _rates(rates)
    console = Console()
    results: dict[str, Any] = {"runs": {}}
    with console.status("") as status:
        for rate in asked:
            here = _at(config, rate)
            folder = Path(here.storage.data_dir)
            if folder.exists():
                raise UserError(
                    f"{folder} holds an earlier run; remove it, or name another --data-dir."
                )
            status.update(f"{rate:g} requests a second for {for_s:g} s")
            with Demonstration(here, folder / "bench", for_s) as demonstration:
                demonstration.results()
            results["runs"][f"{rate:g}"] = figures(read_run(here), rate, for_s)
    first = results["runs"][f"{asked[0]:g}"]
    held = [rate for rate in asked if results["runs"][f"{rate:g}"]["holds"]]
    results |= {name: first[name] for name in ("stages", "total", "requests_per_second")}
    results["highest_rate_that_holds"] = max(held, default=None)
    total = first["total"]
    checks = [
        Check(
            "total.p50_s", total["p50_s"], f"<= {GOAL_P50_S}", total["p50_s"] <= GOAL_P50_S, False
        ),
        Check(
            "total.p99_s", total["p99_s"], f"<= {GOAL_P99_S}", total["p99_s"] <= GOAL_P99_S, False
        ),
    ]
    return report(
        "dwell bench freshness", config, [config.learn.seed], results, checks, json, console
    )


def read_run(config: Config) -> Run:
    """The times of a run that has ended."""
    found = Run()
    with visited(config, lambda _: None) as here:
        _read_partitions(here.kafka, found)
        bootstrap = here.kafka.bootstrap
        begun: dict[int, Manifest] = {}
        with closing(records(bootstrap, WEIGHTS)) as chain:
            for record in chain:
                part = decode(weights_decoder, record.value)
                if isinstance(part, Manifest):
                    begun[part.version] = part
                elif isinstance(part, Commit):
                    found.manifests.append(begun.pop(part.version))
                    found.committed[part.version] = record.timestamp
        with closing(records(bootstrap, WEIGHTS_ACKS)) as acks:
            for record in acks:
                ack = decode(ack_decoder, record.value)
                if ack.applied:
                    found.applied.setdefault(ack.version, ack.applied_ms)
    return found


def figures(run: Run, rate: float, for_s: float) -> dict[str, Any]:
    """Quantiles of the stages at one rate, and whether it holds."""
    times = [at_ms for at_ms, _ in run.answers]
    if not times:
        raise UserError(f"at {rate:g} requests a second the run has no answers.")
    began_ms = min(times)
    found = stages(run, began_ms + round(for_s * 1000 / 3))
    if not len(found["total"]):
        raise UserError(f"at {rate:g} requests a second no sample has passed all stages.")
    served = 2 * len(times) / ((max(times) - began_ms) / 1000)  # the arms are halves
    quantiles = {
        name: {f"p{q}_s": float(np.quantile(values, q / 100)) for q in (50, 95, 99)}
        for name, values in found.items()
    }
    total = quantiles["total"]
    return {
        "samples": len(found["total"]),
        "requests_per_second": served,
        "stages": {name: quantiles[name] for name in STAGES},
        "total": total,
        "to_answers": quantiles["to_answers"],
        "holds": (
            total["p50_s"] <= GOAL_P50_S
            and total["p99_s"] <= GOAL_P99_S
            and served >= KEPT_UP * rate
        ),
    }


def _read_partitions(kafka: KafkaSettings, found: Run) -> None:
    for number in range(kafka.partitions):
        with closing(records(kafka.bootstrap, SAMPLES, number)) as samples:
            for record in samples:
                sample = decode(sample_decoder, record.value)
                if sample.arm == LEARNING_ARM:
                    times = sample.closable_ms, record.timestamp
                    found.samples[number, record.offset] = times
        with closing(records(kafka.bootstrap, EXPOSURES, number)) as exposures:
            for record in exposures:
                with suppress(UnreadableError):
                    exposure = decode(exposure_decoder, record.value)
                    if isinstance(exposure, Exposure) and exposure.arm == LEARNING_ARM:
                        found.answers.append((exposure.time_ms, exposure.policy_version))


def _at(config: Config, rate: float) -> Config:
    folder = Path(config.storage.data_dir) / "bench-freshness" / f"{rate:g}"
    return replace(
        config,
        storage=replace(config.storage, data_dir=str(folder)),
        simulate=replace(config.simulate, requests_per_s=rate),
    )


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0:
        raise UserError(f"--rates {text!r}: numbers above 0 with commas between, such as 100,150.")
    return rates
