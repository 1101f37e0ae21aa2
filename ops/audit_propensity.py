"""`dwell audit propensity`: what exposures say of their own probability, computed again from the stored versions.

Notable choices
- Weights are taken from the log as an actor takes them (schema and digest verified), the catalogue as every process
  folds it: the audit knows nothing but the topics. Exposures are read before the catalogue, so that it holds every
  version that they name.
- Exposures wait packed until their version comes by, so memory is that of their bytes.
- A version that has expired (`learn.weights_horizon_s`) cannot be judged; what waits for it is counted, not passed.
- Bits are the same on the machine, with the torch and the threads of the run; elsewhere nearly equal scores may
  change places. The differences in nats hold anywhere.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from kafka import KafkaConsumer
from numpy.typing import NDArray
from rich.console import Console

from actor.explore import Exploration
from actor.policy import ServedPolicy, materialise
from learner.catalogue import Catalogue, CatalogueError
from learner.valid_ids import UnknownVersionError
from ops.cluster import visited
from ops.config import Config
from ops.propensity import chooser, differences, drawn_again, in_order, together
from ops.results import Check, report
from streams.clients import consumer, read
from streams.events import Exposure, SkippedItem, UnreadableError, decode, exposure_decoder
from streams.settings import KafkaSettings
from streams.topics import CATALOGUE, EXPOSURES
from streams.weights import WeightError
from streams.weights_log import walk

GOAL_NATS: Final = 1e-5
"""Largest difference per level (invariant 1 of the design)."""


@dataclass
class Audited:
    """What was computed again."""

    exposures: int = 0
    """Those of the policy, computed again."""
    beams: int = 0
    """Of these, by deterministic beam."""
    slots: int = 0
    """What their draws chose, shown or skipped."""
    skipped: int = 0
    """Of these, skipped for the cap on authors or since they were deleted."""
    versions: int = 0
    """Versions that served them."""
    catalogue_changes: int = 0
    """Catalogue versions between the first and the last that they name."""
    max_difference_nats: float = 0.0
    p999_difference_nats: float = 0.0
    drawn_again: int = 0
    """Exposures of whole batches, decoded again from their seeds."""
    bit_equal: float = 0.0
    """Share of those that came out the same to the last bit."""
    partial_batches: int = 0
    """Exposures whose batch is not whole in the log, or that do not say how they were drawn."""
    not_at_hand: dict[str, int] = field(default_factory=dict)
    """Exposures that could not be judged, by what is missing."""
    wrong: list[str] = field(default_factory=list)
    """The first found wrong."""


TOLD: Final = 10
"""Of what is wrong, so much is named."""


def audit_propensity(config: Config, tell: Callable[[str], None] = lambda _: None) -> Audited:
    """Audit the exposures on the cluster at `kafka.bootstrap`; raises kafka-python's errors."""
    torch.set_num_threads(config.policy.threads)
    found = Audited()
    explore = Exploration.of(config.actor)
    client = consumer(config.kafka.bootstrap)
    try:
        tell("reading exposures")
        waiting, span = _exposures(client, config.kafka)
        tell("reading the catalogue")
        catalogue, found.catalogue_changes = _catalogue(client, config, span)
        total = sum(map(len, waiting.values()))
        missing: Counter[str] = Counter()
        off: list[NDArray[np.float64]] = []
        equal = 0
        with closing(walk(config.kafka.bootstrap)) as weights:
            for manifest, version in weights:
                exposures = [_policys(value) for value in waiting.pop(manifest.version, [])]
                if exposures:
                    try:
                        if isinstance(version, WeightError):
                            raise version
                        policy = materialise(version, catalogue.codebook, catalogue.valid.codes)
                        off.append(_judged(policy, exposures, catalogue, found))
                        equal += _again(policy, exposures, catalogue, explore, found)
                    except (WeightError, UnknownVersionError) as error:
                        missing[str(error)] += len(exposures)
                    except (
                        ValueError
                    ) as error:  # codes outside the codebook, logits that are not finite
                        _tell_of(found, f"version {manifest.version}: {error}")
                        off.append(np.array([np.inf]))
                    tell(f"version {manifest.version}: {found.exposures} of {total} exposures")
                if not waiting:
                    break
    finally:
        client.close()
    if waiting:
        missing["the version is not in the log"] += sum(map(len, waiting.values()))
    found.not_at_hand = dict(missing)
    every = np.concatenate(off) if off else np.empty(0)
    found.slots = len(every)
    if len(every):
        found.max_difference_nats = float(every.max())
        found.p999_difference_nats = float(np.quantile(every, 0.999, method="higher"))
    found.bit_equal = equal / found.drawn_again if found.drawn_again else 0.0
    return found


def _exposures(client: KafkaConsumer, kafka: KafkaSettings) -> tuple[dict[int, list[bytes]], range]:
    """The policy's exposures, packed, by version; and the catalogue versions from their first to their last."""
    waiting: dict[int, list[bytes]] = {}
    known: set[str] = set()
    catalogue_versions: list[int] = []
    for number in range(kafka.partitions):
        for record in read(client, EXPOSURES, number):
            try:
                event = decode(exposure_decoder, record.value)
            except UnreadableError:
                continue  # a dead letter, which is the other audit's affair
            if not isinstance(event, Exposure) or event.request in known:
                continue
            known.add(event.request)
            if any(item.source == chooser(event) for item in event.items):
                waiting.setdefault(event.policy_version, []).append(record.value)
                catalogue_versions.append(event.catalogue_version)
    low, high = min(catalogue_versions, default=0), max(catalogue_versions, default=0)
    return waiting, range(low, high + 1)


def _policys(value: bytes) -> Exposure:
    event = decode(exposure_decoder, value)
    assert isinstance(event, Exposure)
    return event


def _catalogue(client: KafkaConsumer, config: Config, span: range) -> tuple[Catalogue, int]:
    """The catalogue with all its versions, and how many records came after the first of `span` and in it."""
    catalogue = Catalogue(config.policy.codes)
    changes = 0
    for record in read(client, CATALOGUE):
        changes += record.offset in span[1:]
        with suppress(CatalogueError):  # passed over by every process
            catalogue.take(record.offset, record.key, record.value)
    return catalogue, changes


def _judged(
    policy: ServedPolicy, exposures: list[Exposure], catalogue: Catalogue, found: Audited
) -> NDArray[np.float64]:
    """Differences of one version's slots."""
    off = differences(policy, exposures, catalogue)
    found.exposures += len(exposures)
    found.versions += 1
    found.beams += sum(chooser(exposure) == "other" for exposure in exposures)
    found.skipped += sum(
        isinstance(slot, SkippedItem)
        for exposure in exposures
        for slot in in_order(exposure, chooser(exposure))
    )
    if off.max() > GOAL_NATS:
        _tell_of(found, f"version {policy.version}: levels differ by {off.max():.2e} nats")
    return off


def _again(
    policy: ServedPolicy,
    exposures: list[Exposure],
    catalogue: Catalogue,
    explore: Exploration,
    found: Audited,
) -> int:
    """Draw one version's whole batches again; how many slates are equal."""
    equal = there = 0
    for batch in together(exposures):
        again = drawn_again(policy, batch, catalogue, explore)
        for exposure, same in zip(batch, again, strict=True):
            there += 1
            equal += same
            if not same:
                _tell_of(found, f"request {exposure.request}: drawn again, its slate is another")
    found.drawn_again += there
    found.partial_batches += len(exposures) - there
    return equal


def _tell_of(found: Audited, what: str) -> None:
    if len(found.wrong) < TOLD:
        found.wrong.append(what)


def checks(found: Audited) -> list[Check]:
    """What must hold of any run; bits only on the machine of the run."""
    most = found.max_difference_nats
    return [
        Check("exposures", found.exposures, ">= 1", found.exposures >= 1),
        Check("max_difference_nats", most, f"<= {GOAL_NATS:g}", most <= GOAL_NATS),
        Check("bit_equal", found.bit_equal, "1.0", found.bit_equal == 1.0, correctness=False),
    ]


def run(config: Config, json: Path | None) -> int:
    """Audit, print, and return the exit status; raises `UserError` where Kafka cannot be reached."""
    console = Console()
    with visited(config, console.print) as config, console.status("reading the log") as status:
        found = audit_propensity(config, status.update)
    return report("dwell audit propensity", config, [], asdict(found), checks(found), json, console)
