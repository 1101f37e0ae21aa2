"""Arms and what they serve: the fold over `control`, and the hash that gives a user an arm.

Roll-back and pin are desired state, not messages: whoever folds the log knows what each arm must serve, with or
without the learner (contract of the policy, "Versions").

A roll-back pins at once and stays pending until the learner has gone back: its answer is a `follow` that names the
version it restored, written in one transaction with the version that it publishes. Several may ask for the same at
once, before or after the answer, so
- pending roll-backs of an arm come to the oldest version asked for, in whatever order they stand;
- one that came about by a version which an answer has condemned since changes nothing;
- an answer ends only what it satisfies: not a roll-back further back, and not a pin that somebody has set meanwhile.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, NamedTuple

from streams.events import Command

CONTROL_ARM: Final = "control"
LEARNING_ARM: Final = "learning"
DEFAULT_SHARES: Final[Mapping[str, float]] = {CONTROL_ARM: 0.5, LEARNING_ARM: 0.5}


class Rollback(NamedTuple):
    """A return that the learner has not made yet."""

    version: int
    upto: int
    """The newest version that was found harmful."""


@dataclass
class ControlState:
    """What `control` says: arm -> pinned version (absent: the newest), and the arms' shares of users."""

    pinned: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))
    rollbacks: dict[str, Rollback] = field(default_factory=dict)
    """By arm, until the learner's answer; the arm is pinned as long."""
    condemned: list[tuple[int, int]] = field(default_factory=list)
    """Versions (first, last) that a return has left behind: not to be served or learned from."""

    def apply(self, command: Command) -> bool:
        """Take one command, in the order of the log; one that makes no sense changes nothing and is False."""
        if command.action == "shares":
            if not _can_be_shares(command.shares):
                return False
            self.shares = dict(command.shares)
            return True
        if not _makes_sense(command):
            return False
        if command.action == "pin":
            self.pinned[command.arm] = command.version
            self.rollbacks.pop(command.arm, None)
        elif command.action == "rollback":
            self._roll_back(command)
        elif command.action == "follow" and command.restored:
            self._returned(command)
        elif command.action == "follow":
            self.pinned.pop(command.arm, None)
            self.rollbacks.pop(command.arm, None)
        return True  # a refusal says what the learner did not publish, and changes nothing

    def _roll_back(self, command: Command) -> None:
        if is_condemned(command.upto, self.condemned):
            return
        pending = self.rollbacks.get(command.arm, Rollback(command.version, command.upto))
        both = Rollback(min(pending.version, command.version), max(pending.upto, command.upto))
        self.rollbacks[command.arm] = both
        self.pinned[command.arm] = both.version

    def _returned(self, command: Command) -> None:
        self.condemned += condemned_by(command.restored, command.version)
        pending = self.rollbacks.get(command.arm)
        if pending is not None and pending.version >= command.restored:
            del self.rollbacks[command.arm]
            self.pinned.pop(command.arm, None)


def condemned_by(restored: int, version: int) -> list[tuple[int, int]]:
    """The versions (first, last) left behind where `version` is `restored` again: none, or one range."""
    return [(restored + 1, version - 1)] if 0 < restored < version - 1 else []


def is_condemned(version: int, ranges: Iterable[tuple[int, int]]) -> bool:
    """Whether a version is in one of the ranges (first, last)."""
    return any(first <= version <= last for first, last in ranges)


def _makes_sense(command: Command) -> bool:
    if not command.arm:
        return False
    if command.action == "rollback":
        return 1 <= command.version < command.upto
    if command.action == "follow":
        return command.restored == 0 or 1 <= command.restored < command.version
    return command.version >= 1


def _can_be_shares(shares: Mapping[str, float]) -> bool:
    return bool(shares) and all(
        arm and "/" not in arm and 0 < share < math.inf for arm, share in shares.items()
    )


def stable_hash(text: str, salt: bytes) -> int:
    """64 bits that are the same in every process, machine and release."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, person=salt).digest(), "little")


def arm_of(user: str, shares: Mapping[str, float]) -> str:
    """The user's arm: sticky, by hash, in proportion to `shares` (any positive numbers)."""
    point = stable_hash(user, b"dwell-arm") / 2.0**64 * sum(shares.values())
    for arm, share in sorted(shares.items()):
        point -= share
        if point < 0:
            return arm
    return max(shares)
