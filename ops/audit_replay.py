"""`dwell audit replay`: makes a run's learning again from its log, and compares every version.

Notable choices
- It begins at the oldest checkpoint from which the log holds all journals and samples, and follows them to the newest
  published version (learner/recovery.py: the same code with which a learner resumes). Nothing is written.
- Each version's digest is compared with its manifest, and at each checkpoint on the way all tensors, those of the
  optimisers too.
- Floats add up the same only in the same order: on the machine, with the threads and the torch of the run. The audit
  uses the configuration that the run wrote down.
"""

from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from learner.checkpoint import CheckpointError, differing, load, to_bytes
from learner.ranks import Ranks, RanksError
from learner.recovery import RunLog, follow
from learner.update import JournalError
from learner.versions import CHECKPOINTS
from ops.cluster import visited
from ops.config import Config
from ops.errors import UserError
from ops.results import Check, report
from storage.checkpoints import Checkpoints
from streams.weights import Manifest
from streams.weights_log import manifests_after


@dataclass
class Replayed:
    """What following the journals again came to."""

    equal: bool = True
    first: int = 0
    """The version that it began from."""
    last: int = 0
    """The newest published version."""
    versions: int = 0
    """Versions made again."""
    steps: int = 0
    samples: int = 0
    """Requests trained on."""
    checkpoints: int = 0
    """Checkpoints on the way whose tensors were all compared."""
    differs: list[str] = field(default_factory=list)
    """What was not equal, or could not be made again."""


def replay_again(config: Config, checkpoints: Checkpoints) -> Replayed:
    """Follow the journals of the run at `kafka.bootstrap`; raises `UserError` where there is nothing to follow."""
    manifests = manifests_after(config.kafka.bootstrap, 0)
    path = _oldest(checkpoints, manifests)
    try:
        ranks = Ranks.join(config.learn.device)
        trainer, progress, codebooks = load(path, config.learn, config.learn.lr, ranks)
    except (CheckpointError, RanksError) as error:
        raise UserError(f"{error}.") from None
    torch.set_num_threads(config.policy.threads)
    began, steps = progress.version, progress.steps
    found = Replayed(first=began, last=manifests[-1].version)
    after = [manifest for manifest in manifests if manifest.version > began]
    try:
        with closing(RunLog.of(config.kafka, progress)) as run:
            for manifest, digest in follow(trainer, progress, after, run):
                version = manifest.version
                found.versions += 1
                found.samples += sum(entry.trained for entry in manifest.journal)
                if digest != manifest.digest:
                    why = f"version {version}: digest {digest}, not {manifest.digest}"
                    found.differs.append(why)
                elif version in checkpoints.versions():
                    content = to_bytes(trainer, progress, codebooks)
                    names = differing(checkpoints.path(version), content)
                    found.checkpoints += 1
                    found.differs += [f"checkpoint {version}: {name}" for name in names]
                if found.differs:
                    break
    except JournalError as error:
        found.differs.append(f"after version {progress.version}: {error}")
    found.steps = progress.steps - steps
    found.equal = not found.differs
    return found


def _oldest(checkpoints: Checkpoints, manifests: list[Manifest]) -> Path:
    """The oldest checkpoint after which no version is missing in the log."""
    numbers = {manifest.version for manifest in manifests}
    last = max(numbers, default=0)
    for version in checkpoints.versions():
        if version < last and all(number in numbers for number in range(version + 1, last + 1)):
            return checkpoints.path(version)
    raise UserError(
        f"there is nothing to make again: no checkpoint in {checkpoints.folder} is older than version {last}, the "
        "newest, with all journals after it still in the log."
    )


def run(config: Config, json: Path | None) -> int:
    """Audit, print, and return the exit status."""
    console = Console()
    with visited(config, console.print) as config, console.status("making the steps again"):
        checkpoints = Checkpoints(Path(config.storage.data_dir) / CHECKPOINTS)
        found = replay_again(config, checkpoints)
    checks = [Check("equal", found.equal, "true", found.equal)]
    return report("dwell audit replay", config, [], asdict(found), checks, json, console)
