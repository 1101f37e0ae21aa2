"""`dwell eval shaping`: what the streams' shaping does to a real feed log; docs/shaping.md says what it found."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from ops.association import associations
from ops.config import Config
from ops.errors import UserError
from ops.feedlog import EXPOSED, class_counts, classify, open_log
from ops.pretrain import bar
from ops.results import exit_status, print_results, write_results
from ops.shaping_figures import (
    by_duration,
    censored,
    checks,
    errors,
    literal,
    own_weight_by_plays,
    shares,
    ties,
    variables,
)
from ops.shaping_fold import fold
from ops.shaping_plot import plot
from streams.shape import duration_bucket

SEED: Final = 0
"""Of the bootstrap: nothing else is random."""


def run(config: Config, directory: Path, json_path: Path | None, plot_path: Path | None) -> int:
    """Join and shape the log in `directory`, report on it and draw it; returns the exit status."""
    console = Console()
    if plot_path is not None and (plot_path.is_dir() or not plot_path.parent.is_dir()):
        raise UserError(f"--plot {plot_path}: name a file in a folder that exists.")
    feed = open_log(directory)
    with console.status("reading the log"):
        log = feed.read_log()
        codes = classify(log.rows)
    chosen = np.flatnonzero(codes == EXPOSED)
    if not len(chosen):
        raise UserError(f"{feed.directory} holds no exposure with a duration: nothing to shape.")
    with bar(console) as progress:
        task = progress.add_task("joining and shaping", total=len(chosen))
        folded = fold(
            log.rows,
            chosen,
            config.join,
            config.shape,
            config.kafka.partitions,
            lambda done: progress.update(task, completed=done),
        )
    plays = folded[folded["seen"]]
    if not len(plays):
        raise UserError(f"{feed.directory} holds no play longer than 0 ms: nothing to shape.")
    rows = log.rows[plays["row"]]
    values = variables(rows, plays)
    base = config.shape.bucket_base
    bucket = np.array([duration_bucket(one, base) for one in rows["duration_ms"].tolist()])
    window_s = min(config.join.window_s, config.join.cap_s)
    with console.status("resampling users"):
        associated = associations(values, rows["user"], SEED)
    counts = class_counts(log, codes)
    results: dict[str, Any] = {
        "rows": sum(counts.values()),
        **counts,
        "samples": len(folded),
        "plays": len(plays),
        "users": len(np.unique(rows["user"])),
        **associated,
        **shares(plays, config.shape),
        "ties": ties(values, bucket),
        "literal": literal(plays),
        "error": errors(plays),
        "censored": censored(
            rows["play_ms"],
            rows["duration_ms"],
            plays["target"] & (plays["advantage"] > 0),
            window_s,
        ),
    }
    held_to = checks(results, config.join)
    print_results(results, held_to, console)
    results["curves"] = {
        "by_duration": by_duration(values),
        "own_weight": own_weight_by_plays(plays, rows["user"], config.shape.prior_plays),
    }
    if json_path is not None:
        write_results(json_path, "dwell eval shaping", config, [SEED], results, held_to)
    if plot_path is not None:
        try:
            plot_path.write_text(plot(results, window_s), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--plot {plot_path}: this cannot be written ({error.strerror})."
            ) from None
    return exit_status(held_to)
