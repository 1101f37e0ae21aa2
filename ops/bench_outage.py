"""`dwell bench outage`: the demonstration with its broker killed under load and away for a while, then the audit.

Notable choices
- The broker is ours and outside of `dwell up`, which ends with its own broker; all roles see an existing cluster that
  is gone for a while.
- A request failed when the viewers' client had no good answer, whatever the reason.
- Drained = from the broker's first answer until new events go to Kafka directly again.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from ops.audit_samples import audit_samples, figures, journals
from ops.audit_samples import checks as audit_checks
from ops.broker import FOLDER
from ops.cluster import Cluster, held, open_cluster
from ops.config import Config, load
from ops.demonstration import Demonstration
from ops.errors import UserError
from ops.results import Check, report
from ops.up import free_port
from ops.view import scrape

BEFORE_S: Final = 10.0
AFTER_S: Final = 60.0
START_S: Final = 300.0
"""The demonstration's first start pre-trains a policy."""
BACK_S: Final = 120.0
AWAY: Final = "dwell_actor_kafka_away"
RECORDS: Final = "dwell_actor_spool_records"
BYTES: Final = "dwell_actor_spool_bytes"


def run(config: Config, away_s: float, json: Path | None) -> int:
    """Bench, print, and return the exit status."""
    console = Console()
    folder = Path(config.storage.data_dir) / "bench-outage"
    if (folder / FOLDER).exists():
        raise UserError(f"{folder} holds an earlier bench; remove it, or name another --data-dir.")
    config = replace(config, storage=replace(config.storage, data_dir=str(folder)))
    with held(folder), open_cluster(config, console.print) as cluster, console.status("") as status:
        outage, lived = _live(cluster, folder, away_s, status.update)
        status.update("auditing")
        ours = load(folder / "loop" / "run" / "config.toml").config
        found, journal = audit_samples(ours), journals(ours.kafka)
    client = lived["client"]
    results = {
        "requests": client["requests"],
        "requests_failed": client["requests_failed"],
        "events": client["events"],
        "events_dropped": client["events_dropped"],
        "missing": client["requests"] - found.exposures,
        "outage": outage,
        "audit": {**figures(found), "journal": journal},
    }
    checks = checks_of(results) + audit_checks(found, journal)
    return report("dwell bench outage", ours, [ours.learn.seed], results, checks, json, console)


def _live(
    cluster: Cluster, folder: Path, away_s: float, tell: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, Any]]:
    """The demonstration with an outage; what was seen of it, and the demonstration's own results."""
    if cluster.broker is None:
        raise UserError("the broker must be its own to be killed: leave --bootstrap out.")
    port, loop = free_port(), folder / "loop"
    config = replace(
        cluster.config,
        actor=replace(cluster.config.actor, port=port),
        storage=replace(cluster.config.storage, data_dir=str(loop)),
    )

    def wait(what: str, true: Callable[[], object], patience_s: float) -> None:
        tell(what)
        up.wait(what, true, patience_s)

    with Demonstration(config, folder, BEFORE_S + away_s + AFTER_S) as up:
        served = loop / "simulator" / "served.jsonl"
        wait("starting", lambda: served.exists() and served.stat().st_size, START_S)
        time.sleep(BEFORE_S)
        cluster.broker.kill()
        wait("the actor sees it", lambda: scrape(port).get(AWAY), BACK_S)
        tell(f"away for {away_s:.0f} s")
        time.sleep(away_s)
        spool = scrape(port)
        cluster.broker.start()
        began = time.monotonic()
        wait("draining", lambda: scrape(port).get(AWAY) == 0, BACK_S)
        drained_s = time.monotonic() - began
        tell("going on")
        results = up.results()
    outage = {
        "away_s": away_s,
        "spool_records": spool[RECORDS],
        "spool_bytes": spool[BYTES],
        "drained_s": drained_s,
    }
    return outage, results


def checks_of(results: dict[str, Any]) -> list[Check]:
    """Nobody noticed, and nothing is missing."""
    names = ("requests_failed", "events_dropped", "missing")
    return [Check(name, results[name], "0", results[name] == 0) for name in names]
