"""Starting from the copy: what an actor knew when it was last connected, brought back, or why that cannot be.

Every check that a log's records and versions pass is made again. Where the copy does not give what some arm must
serve, that arm waits for Kafka; where it gives that to none, or its catalogue is older than
`actor.max_catalogue_age_s`, the copy is of no use.
"""

import logging

from actor.copying import harmful
from actor.kept import Contents, Copy, CopyError, Cut
from actor.policy import Arms, ServedPolicy, materialise
from actor.users import Users
from learner.catalogue import Catalogue, CatalogueError
from streams.chain import Version
from streams.events import UnreadableError, command_decoder, decode
from streams.settings import KafkaSettings
from streams.signing import Trust
from streams.weights import Seal, WeightError

log = logging.getLogger("dwell.actor")


def usable(copy: Copy, kafka: KafkaSettings, max_age_s: float, now_ms: int) -> Cut:
    """The copy's moment; raises `CopyError` where it is of no use whatever its contents."""
    cut = copy.cut()
    if cut is None:
        raise CopyError("there is none yet, or none that is whole")
    if set(cut.bootstrap.split(",")) != set(kafka.bootstrap.split(",")):
        raise CopyError(f"it is of Kafka at {cut.bootstrap}")
    if cut.partitions != kafka.partitions:
        raise CopyError(
            f"it is of {cut.partitions} partitions, kafka.partitions is {kafka.partitions}"
        )
    age_s = (now_ms - cut.complete_ms) / 1000
    if age_s > max_age_s:
        raise CopyError(
            f"its catalogue is {age_s:.0f} s old, and after actor.max_catalogue_age_s = {max_age_s:g} nothing is "
            "served, for items may have been deleted"
        )
    return cut


def restore(
    copy: Copy, cut: Cut, trust: Trust | None, catalogue: Catalogue, users: Users, arms: Arms
) -> tuple[Version, Seal] | None:
    """Bring back what was copied, into empty hands; returns the version that arms follow, None where all are pinned.

    Raises `CopyError`, and those hands are not to be used.
    """
    contents = copy.read(cut)
    _restore_records(contents, cut, catalogue, users, arms)
    found, faults = _versions(copy, trust)
    policies: dict[int, ServedPolicy] = {}
    for number, (version, _) in found.items():
        try:
            policies[number] = materialise(version, catalogue.codebook, catalogue.valid.codes)
        except WeightError as error:
            faults.append(str(error))
    for fault in faults:
        log.error("the copy: %s", fault)
    newest = max((one for one in policies if not harmful(one, arms.control)), default=0)
    arms.newest = policies.get(newest)
    arms.settle(policies)
    if not any(arms.served(arm) for arm in arms.control.shares):
        raise CopyError("; ".join(faults) or "it holds no version that an arm may serve")
    return found.get(newest)


def _restore_records(
    contents: Contents, cut: Cut, catalogue: Catalogue, users: Users, arms: Arms
) -> None:
    takes = [(item.born, item) for item in contents.items if item.born != item.offset]
    takes += [(item.offset, item) for item in contents.items]
    try:
        for offset, item in sorted(takes, key=lambda take: take[0]):
            catalogue.take(offset, item.key, item.value)
        catalogue.take(cut.catalogue_version, None, None)  # what came last may have been a deletion
        for value in contents.control:
            arms.control.apply(decode(command_decoder, value))
    except (CatalogueError, UnreadableError, ValueError) as error:
        raise CopyError(str(error)) from None
    if not catalogue.items:
        raise CopyError("its catalogue is empty")
    for key, value in contents.histories:
        try:
            users.take_history(key.decode(), value)
        except (UnreadableError, UnicodeDecodeError) as error:
            log.warning("the copy: the history of %r: %s", key, error)


def _versions(copy: Copy, trust: Trust | None) -> tuple[dict[int, tuple[Version, Seal]], list[str]]:
    """The versions that can be read, and why others cannot."""
    found, faults = {}, []
    for number in copy.versions():
        try:
            found[number] = copy.version(number, trust)
        except (WeightError, OSError) as error:
            faults.append(str(error))
    return found, faults
