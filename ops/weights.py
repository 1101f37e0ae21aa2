"""`dwell weights`: which versions there are, whether they are what they say, and which one an arm serves.

Notable choices
- Everything is read from the log, as actors read it: a version counts when it is whole there.
- What an arm serves is desired state on `control` (contract of the policy, "Versions"): `pin` and `follow` write one
  command with who and why, actors obey with or without a learner, and say so on `weights.acks`.
- A pin to a version that is not whole in the log is refused: actors would keep what they have, and nobody would know
  why. A pinned version never expires; one that was unpinned may.
- `rollback` is a pin until the learner has gone back too (docs/guard.md).
"""

import getpass
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal
from uuid import uuid4

from rich.console import Console
from rich.table import Table

from ops.config import Config
from ops.errors import UserError
from streams.blocks import not_finite
from streams.chain import Version
from streams.clients import producer, records
from streams.control import ControlState
from streams.events import Command, UnreadableError, command_decoder, decode, encode
from streams.signing import KeyFileError, Trust, make_pair, trust
from streams.topics import CONTROL, WEIGHTS_ACKS
from streams.weights import Ack, Manifest, WeightError, ack_decoder
from streams.weights_log import manifests_after, version_at, walk


@dataclass
class Kept:
    """What the log holds of the versions."""

    manifests: dict[int, Manifest]
    """By version, ascending; some may not be whole."""
    acks: dict[int, list[Ack]] = field(default_factory=dict)
    control: ControlState = field(default_factory=ControlState)

    def arms_of(self, version: int) -> list[str]:
        """Arms that must serve this version."""
        newest = max(self.manifests, default=0)
        wanted = {arm: self.control.pinned.get(arm, newest) for arm in self.control.shares}
        return sorted(arm for arm, serves in wanted.items() if serves == version)


def kept(bootstrap: str) -> Kept:
    """Read manifests, acknowledgements and control."""
    here = Kept({manifest.version: manifest for manifest in manifests_after(bootstrap, 0)})
    for record in records(bootstrap, WEIGHTS_ACKS):
        ack = decode(ack_decoder, record.value)
        here.acks.setdefault(ack.version, []).append(ack)
    for record in records(bootstrap, CONTROL):
        with suppress(UnreadableError):
            here.control.apply(decode(command_decoder, record.value))
    return here


def fault_of(version: Version | WeightError) -> str:
    """Why a version must not be served: not what its manifest says, or not finite. Empty where it may."""
    if isinstance(version, WeightError):
        return str(version)
    broken = not_finite(version.state)
    return f"version {version.number}: not finite: {', '.join(broken)}" if broken else ""


def show_all(config: Config, most: int) -> int:
    """Print the newest `most` versions; exit status 0."""
    console = Console()
    here = kept(config.kafka.bootstrap)
    heads = ("version", "published", "MB", "steps", "trained", "taken by", "refused by", "arms")
    table = Table(*heads)
    for version, manifest in list(here.manifests.items())[-most:]:
        acks = here.acks.get(version, [])
        table.add_row(
            str(version),
            _time(manifest.created_ms),
            f"{manifest.size_bytes / 1e6:.2f}",
            str(len(manifest.journal)),
            str(sum(step.trained for step in manifest.journal)),
            str(len({ack.actor for ack in acks if ack.applied})),
            str(len({ack.actor for ack in acks if not ack.applied})),
            ", ".join(here.arms_of(version)),
        )
    console.print(table)
    count = len(here.manifests)
    console.print(f"{count} versions" + (f", the last {most} shown" * (count > most)))
    return 0


def show_one(config: Config, version: int) -> int:
    """Print what a version is and what became of it; exit status 0. Raises `UserError` for one that is not there."""
    console = Console()
    here = kept(config.kafka.bootstrap)
    manifest = _one(here, version)
    table = Table("field", "value")
    said: dict[str, object] = {
        "published": _time(manifest.created_ms),
        "lineage": manifest.lineage,
        "policy": f"{manifest.preset}, {manifest.codes} codes, {manifest.user_rows} user rows",
        "codebook": manifest.codebook,
        "digest": manifest.digest,
        "bytes": f"{manifest.size_bytes:,} in {manifest.chunks} chunks",
        "changes": f"version {manifest.base}" if manifest.base else "all: it is in full",
        "newest in full": str(manifest.anchor),
        "samples until": _time(manifest.watermark_ms) if manifest.watermark_ms else "none",
        "restored": f"the weights of version {manifest.restored}" if manifest.restored else "no",
        "arms": ", ".join(here.arms_of(version)) or "none",
    }
    for name, value in said.items():
        table.add_row(name, str(value))
    for step in manifest.journal:
        taken = sum(upto - first for _, first, upto in step.ranges)
        dropped = f", {step.condemned} condemned" if step.condemned else ""
        told = f"{step.trained} trained of {taken} offsets, {step.control} control{dropped}"
        table.add_row("step", told)
    for tensor in manifest.schema:
        table.add_row("tensor", f"{tensor.name} {tensor.dtype} {tensor.shape}")
    for ack in here.acks.get(version, []):
        after = f"{(ack.applied_ms - ack.created_ms) / 1000:.3f} s after it was made"
        said_so = f"applied {after}" if ack.applied else f"refused: {ack.reason}"
        table.add_row("actor", f"{ack.actor} {said_so}")
    console.print(table)
    return 0


def verify(config: Config, only: int | None) -> int:
    """Check the bytes of one version, or of all; exit status 1 where one is wrong or not whole."""
    console = Console()
    with console.status("reading the log"):
        wanted = kept(config.kafka.bootstrap).manifests
        if only is not None:
            wanted = {only: _one(Kept(wanted), only)}
        faults = {version: f"version {version}: not whole in the log" for version in wanted}
        for manifest, version in walk(config.kafka.bootstrap, _trust(config), only or 0):
            if manifest.version in wanted:
                faults[manifest.version] = fault_of(version)
    wrong = [fault for fault in faults.values() if fault]
    for fault in wrong:
        console.print(fault, markup=False)
    console.print(f"{len(faults) - len(wrong)} of {len(faults)} versions are what they say")
    return 1 if wrong else 0


def say(
    config: Config, action: Literal["pin", "follow", "rollback"], arm: str, version: int, why: str
) -> int:
    """Say on `control` what an arm must serve; exit status 0. Raises `UserError` where that cannot be."""
    here = kept(config.kafka.bootstrap)
    if arm not in here.control.shares:
        raise UserError(
            f"there is no arm {arm!r}; there are: {', '.join(sorted(here.control.shares))}."
        )
    newest = max(here.manifests, default=0)
    if action == "rollback" and version >= newest:
        raise UserError(
            f"the newest version is {newest}, and there is no rolling back to {version}; name an older one, or "
            "`dwell weights pin` it."
        )
    if action != "follow":
        _one(here, version)
        try:
            fault = fault_of(version_at(config.kafka.bootstrap, version, _trust(config)))
        except WeightError as error:
            fault = str(error)
        if fault:
            raise UserError(f"{fault}; name another: `dwell weights verify` says which are whole.")
    now_ms = int(time.time() * 1000)
    said = Command(
        id=uuid4().hex,
        time_ms=now_ms,
        who=getpass.getuser(),
        why=why,
        action=action,
        arm=arm,
        version=version,
        upto=newest if action == "rollback" else 0,
    )
    client = producer(config.kafka.bootstrap)
    try:
        client.send(CONTROL, encode(said), partition=0).get(timeout=60)
    finally:
        client.close()
    serves = "the newest version" if action == "follow" else f"version {version}"
    if action == "rollback":
        serves += f", and the learner goes back to it; {version + 1} to {newest} are condemned"
    Console().print(f"{arm} serves {serves}: {why}", markup=False)
    return 0


def make_keys(folder: Path) -> int:
    """Make a pair of keys; exit status 0. Raises `UserError`."""
    try:
        private, public = make_pair(folder)
    except KeyFileError as error:
        raise UserError(f"{error}.") from None
    Console().print(
        f"the learner signs with learn.signing_key = {str(private)!r}, which nobody else should read; "
        f"actors take only what it signed with actor.trusted_key = {str(public)!r}",
        markup=False,
    )
    return 0


def _trust(config: Config) -> Trust | None:
    try:
        return trust(config.actor.trusted_key)
    except KeyFileError as error:
        raise UserError(f"actor.trusted_key: {error}.") from None


def _one(here: Kept, version: int) -> Manifest:
    if version not in here.manifests:
        known = list(here.manifests)
        there = f"there are {known[0]} to {known[-1]}" if known else "there is none"
        raise UserError(
            f"version {version} is not in the log; {there}, as `dwell weights list` shows."
        )
    return here.manifests[version]


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000).isoformat(" ", "seconds")
