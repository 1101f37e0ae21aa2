"""What `dwell bench serve` asks: actors as processes, on a lineage of their own on a real broker.

Notable choices
- The policy is untrained and the catalogue synthetic: the cost of serving depends on sizes, not on what was learned.
- Its first version is published by `dwell learner`, as always; the learner ends before the load begins.
- Users come in groups by the length of their histories. A user's requests exclude what was shown to them, as live.
"""

import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.error import URLError

import numpy as np
import torch

from learner.checkpoint import Progress, to_bytes
from learner.policy import build, state_of
from learner.semantic_ids import fit
from learner.step import Trainer
from ops.bench_tokeniser import mixture
from ops.cluster import open_cluster
from ops.config import Config
from ops.errors import UserError
from ops.roles import Role, write_config
from ops.start import Start, publish, write
from ops.up import free_port
from streams.blocks import digest_of
from streams.events import Behaviour, History, Upsert

READY_S: Final = 60.0
MOST_USERS: Final = 2_000
"""Of a group."""
MOST_BEHAVIOURS: Final = 200_000
"""Of a group's users together."""


def users_of(length: int) -> list[str]:
    """The users who have histories of this length."""
    count = max(16, min(MOST_USERS, MOST_BEHAVIOURS // max(1, length)))
    return [f"h{length}-{number}" for number in range(count)]


def start_of(config: Config, folder: Path, items: int, lengths: Sequence[int], seed: int) -> Start:
    """A lineage to begin with: an untrained policy, a catalogue, and histories of these lengths."""
    policy = config.policy
    torch.manual_seed(seed)
    embeddings = mixture(items, seed)
    codebooks = fit(embeddings, policy.codes, seed)
    names = [f"i{number}" for number in range(items)]
    digest = codebooks.digest()
    upserts = [
        Upsert(item=item, sid=(c1, c2, c3), codebook=digest, duration_ms=30_000)
        for item, (c1, c2, c3) in zip(names, codebooks.assign(embeddings).tolist(), strict=True)
    ]
    model = build(policy.shape, policy.codes, policy.user_rows)
    model.start_from_centroids(codebooks.centroids)
    progress = Progress(
        version=0,
        lineage=digest_of(state_of(model))[:12],
        preset=policy.shape,
        codes=policy.codes,
        user_rows=policy.user_rows,
    )
    checkpoint = to_bytes(Trainer(model, config.learn, config.learn.lr), progress, codebooks)
    rng = np.random.default_rng([seed, 2])
    now_ms = int(time.time() * 1000)
    histories = [
        _history(user, length, names, now_ms, rng)
        for length in lengths
        for user in users_of(length)
    ]
    return write(folder, checkpoint, upserts, histories, [])


def _history(
    user: str, length: int, names: list[str], now_ms: int, rng: np.random.Generator
) -> History:
    shown = rng.integers(len(names), size=length).tolist()
    play_ms = rng.integers(1_000, 30_000, size=length).tolist()
    return History(
        user=user,
        behaviours=[
            Behaviour(
                request=f"{user}-{place // 6:026d}",
                position=place % 6,
                item=names[item],
                end_ms=now_ms - 60_000 * (length - place),
                play_ms=play,
                duration_ms=30_000,
            )
            for place, (item, play) in enumerate(zip(shown, play_ms, strict=True))
        ],
        shown=[],
    )


@contextmanager
def actors(
    config: Config,
    folder: Path,
    items: int,
    lengths: Sequence[int],
    settings: Mapping[str, tuple[str, ...]],
    seed: int,
) -> Iterator[dict[str, str]]:
    """Actors with these settings each, by name, on an embedded broker in an empty `folder`; yields their addresses
    once all are ready.

    Raises `UserError` where there is a folder already, or a process ends.
    """
    if folder.exists():
        raise UserError(f"{folder} holds an earlier run; remove it, or name another --data-dir.")
    folder.mkdir(parents=True)
    config = replace(config, storage=replace(config.storage, data_dir=str(folder)))
    start = start_of(config, folder / "start", items, lengths, seed)
    with open_cluster(config, lambda _: None) as cluster:
        publish(start, cluster.config.kafka)
        roles: list[Role] = []

        def begin(role: str, name: str, *arguments: str) -> None:
            own = folder / "run" / name
            path = write_config(cluster.config, own)
            roles.append(Role(role, ["--config", str(path), *arguments], own))

        try:
            begin("learner", "learner", "--start-from", str(start.folder))
            found = {}
            for name, sets in settings.items():
                port = free_port()
                given = (f"actor.port={port}", f"actor.member={name}", *sets)
                begin("actor", name, *(f"--set={one}" for one in given))
                found[name] = f"http://{config.actor.host}:{port}"
            for url in found.values():
                _await_ready(url, roles)
            roles.pop(0).stop()  # its version is served: it has nothing more to do
            yield found
        finally:
            for role in roles:
                role.stop()


def _await_ready(url: str, roles: Sequence[Role]) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        for role in roles:
            role.check()
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.1)
    raise UserError(f"an actor was not ready within {READY_S:.0f} s; see {roles[-1].log_file}.")
