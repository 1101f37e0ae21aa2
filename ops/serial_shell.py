"""`dwell up --serial`: the loop in one process, and its report."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ops.config import Config
from ops.report import rewards
from ops.results import print_results, write_results
from ops.serial import Serial
from ops.up import phases
from ops.warmup import warm_start

EPOCH_MS = 1_700_000_000_000  # virtual time begins here, whatever the clock says


def run(config: Config, requests: int, json_path: Path | None) -> int:
    """Serve and learn from `requests` requests under the configured seeds; returns the exit status."""
    console = Console()
    seed = config.learn.seed
    with Progress(console=console, transient=True) as progress:
        tell = phases(progress)
        start = warm_start(config, EPOCH_MS, tell)
        loop = Serial(config, start, seed, EPOCH_MS)
        done = loop.run(requests, lambda at, total: tell("serving and learning", at, total))
    results = {
        **rewards(done.lines, config.simulate.items),
        "requests": done.requests,
        "samples": done.samples,
        "open": done.open,
        "steps": done.steps,
        "versions": done.versions,
        "pretraining_loss": start.loss,
        "weights_digest": done.weights_digest,
    }
    print_results(results, [], console)
    if json_path is not None:
        write_results(json_path, "up --serial", config, [seed, config.simulate.seed], results, [])
    return 0
