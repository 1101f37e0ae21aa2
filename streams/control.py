"""Arms and what they serve: the fold over `control`, and the hash that gives a user an arm.

Roll-back and pin are desired state, not messages: whoever folds the log knows what each arm must serve, with or
without the learner (contract of the policy, "Versions").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from streams.events import Command

CONTROL_ARM: Final = "control"
LEARNING_ARM: Final = "learning"
DEFAULT_SHARES: Final[Mapping[str, float]] = {CONTROL_ARM: 0.5, LEARNING_ARM: 0.5}


@dataclass
class ControlState:
    """What `control` says: arm -> pinned version (absent: the newest), and the arms' shares of users."""

    pinned: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))

    def apply(self, command: Command) -> bool:
        """Take one command, in the order of the log; one that makes no sense changes nothing and is False."""
        if command.action == "shares":
            if not _can_be_shares(command.shares):
                return False
            self.shares = dict(command.shares)
        elif not command.arm or (command.action == "pin" and command.version < 1):
            return False
        elif command.action == "pin":
            self.pinned[command.arm] = command.version
        else:
            self.pinned.pop(command.arm, None)
        return True


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
