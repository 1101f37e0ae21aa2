"""What each arm serves: version and weights behind one pointer.

A request is drawn by what its arm's pointer is when its decode begins, whole, so an answer is of one version, and a
swap pauses nobody (invariant 2 of the design).
"""

from dataclasses import dataclass

from learner.decoder import LazyDecoder
from learner.policy import served
from streams.chain import Version
from streams.control import ControlState, is_condemned
from streams.weights import Manifest, WeightError


@dataclass(frozen=True)
class ServedPolicy:
    """One version, immutable."""

    version: int
    manifest: Manifest
    model: LazyDecoder

    @property
    def shape(self) -> tuple[str, int, int]:
        """Preset and context, codes, user rows."""
        return self.manifest.preset, self.manifest.codes, self.manifest.user_rows


def materialise(
    version: Version, codebook: str, codes: int, before: ServedPolicy | None = None
) -> ServedPolicy:
    """Build a version aside, from its checked state; raises `WeightError` and nothing has changed.

    `before` is any other version: of the same shape, its modules serve as the pattern.

    `codebook` is the catalogue's: weights of another codebook would give semantic IDs another meaning. `codes` are
    those of a level, as the actor is configured.
    """
    manifest = version.manifest
    name = f"version {manifest.version}"
    if manifest.codebook != codebook:
        raise WeightError(f"{name} is of codebook {manifest.codebook}, the catalogue of {codebook}")
    if manifest.codes != codes:
        raise WeightError(f"{name} has {manifest.codes} codes a level, policy.codes is {codes}")
    shape = (manifest.preset, manifest.codes, manifest.user_rows)
    like = before.model if before is not None and before.shape == shape else None
    try:
        model = served(*shape, version.blocks, like)
    except ValueError as error:
        raise WeightError(f"{name}: {' '.join(str(error).split())}") from None
    return ServedPolicy(manifest.version, manifest, model)


class Arms:
    """The arms' pointers, and what `control` wants them to be."""

    def __init__(self) -> None:
        self.control = ControlState()
        self.newest: ServedPolicy | None = None
        self._served: dict[str, ServedPolicy] = {}

    def served(self, arm: str) -> ServedPolicy | None:
        """What the arm serves now."""
        return self._served.get(arm)

    def wanted(self, arm: str) -> int | None:
        """The version that `control` says the arm must serve; None where there is none yet."""
        pinned = self.control.pinned.get(arm)
        if pinned is not None or self.newest is None:
            return pinned
        if is_condemned(self.newest.version, self.control.condemned) and arm in self._served:
            return self._served[arm].version  # what the learner went back to is about to come
        return self.newest.version

    def missing(self) -> set[int]:
        """Versions that an arm must serve and that are not at hand."""
        at_hand = {policy.version for policy in [*self._served.values(), self.newest] if policy}
        wanted = {self.wanted(arm) for arm in self.control.shares}
        return {version for version in wanted if version is not None} - at_hand

    def settle(self, fetched: dict[int, ServedPolicy]) -> list[ServedPolicy]:
        """Swap every arm whose wanted version is at hand; returns what is newly served."""
        at_hand = dict(fetched)
        for policy in [*self._served.values(), self.newest]:
            if policy is not None:
                at_hand[policy.version] = policy
        before = {policy.version for policy in self._served.values()}
        for arm in self.control.shares:
            policy = at_hand.get(self.wanted(arm) or -1)
            if policy is not None:
                self._served[arm] = policy
        after = {policy.version: policy for policy in self._served.values()}
        return [policy for version, policy in after.items() if version not in before]

    @property
    def ready(self) -> bool:
        """Whether every arm serves what it should."""
        return bool(self.control.shares) and all(
            (policy := self._served.get(arm)) is not None and policy.version == self.wanted(arm)
            for arm in self.control.shares
        )
