"""What an operator may set about the policy and how it learns."""

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from msgspec import Meta

from learner.presets import shape_name
from storage.settings import Count, NotNegative, PathOrNone, Positive, Whole

MAX_CONTEXT: Final = 3_000
"""A behaviour is 20 bytes of an exposure and of a sample, some 150 of a history: all stay below a record's 1 MB."""


@dataclass(frozen=True)
class PolicySettings:
    """The shape of the policy; fixed for a lineage."""

    preset: Literal["tiny", "small", "0.1B", "0.2B", "0.5B", "1B", "2B", "4B", "8B", "4B-MoE"] = (
        "tiny"
    )
    """Size of the lazy decoder; see learner/presets.py."""
    context: Annotated[int, Meta(ge=0, le=MAX_CONTEXT)] = 0
    """Behaviours in a context; 0 is the preset's own. Not more than `streams.history_behaviours` come together."""
    codes: Annotated[int, Meta(ge=2)] = 32
    """Codes of each of the three levels of a semantic ID."""
    user_rows: Count = 16_384
    """Rows of the user table; user ids are hashed onto them."""
    threads: Count = 1
    """Threads of torch in each process."""

    @property
    def shape(self) -> str:
        """Preset and context, as checkpoints and manifests name them."""
        return shape_name(self.preset, self.context)


@dataclass(frozen=True)
class LearnSettings:
    """The online update."""

    batch: Count = 64
    """Requests of one step."""
    batch_wait_s: NotNegative = 0.5
    """A step takes what is there this long after the first waiting request (wall clock)."""
    publish_every_s: NotNegative = 0.5
    """Least distance between two publications (wall clock)."""
    lr: Positive = 2e-3
    """Learning rate of AdamW; 5e-4 and 1e-2 were both much worse at `tiny`."""
    clip: Positive = 1.0
    """Largest norm of the dense gradient."""
    objective: Literal[
        "gbpo_level", "gbpo_item", "ppo_clip", "ecpo", "dual_clip", "supervised", "unlikelihood"
    ] = "gbpo_level"
    """What is made of likes and dislikes; docs/objectives.md compares them."""
    supervised: NotNegative = 0.3
    """Weight of the streaming supervised loss on the upper half of plays."""
    entropy: NotNegative = 0.1
    """Weight of the entropy bonus (mean per level); keeps coverage from falling."""
    entropy_floor: NotNegative = 0.5
    """Warn when the entropy falls below this (nats, mean per level); good runs end near 1.5, collapsed near 0."""
    divergence_ceiling: Positive = 0.5
    """Warn when the policy has moved further than this from what was served (KL, nats a level)."""
    guard_divergence: Positive = 0.5
    """Do not publish what is further than this from the last good version (KL, nats a level); docs/guard.md."""
    guard_entropy: NotNegative = 0.1
    """Do not publish below this share of the uniform law's entropy."""
    guard_top_share: Positive = 0.5
    """Do not publish what gives one item more than this of all probability, and thrice as much as before."""
    reward_alarm: NotNegative = 1e8
    """Go back when the learning arm earns less than control; a false alarm once in so many requests of each, at most
    (0: never go back for that)."""
    seed: Whole = 7
    """Seed of initial weights and of everything random in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner computes; auto is a GPU where there is one."""
    compile: bool = False
    """Let torch compile the decoder's blocks: faster at larger sizes, minutes slower to start, other roundings."""
    shard: bool = False
    """With several ranks: shard the dense part (FSDP2) instead of holding all of it on each (DDP)."""
    keep_checkpoints: Count = 3
    """Checkpoints kept on disk."""
    weights_horizon_s: NotNegative = 900.0
    """Published versions can be had from the log for at least this long, those that an arm names for ever."""
    anchor_every_s: NotNegative = 30.0
    """Between full versions this far apart, each is published as what it changed."""
    signing_key: PathOrNone = ""
    """Private key that signs the versions (`dwell weights key`); empty: they are not signed."""


@dataclass(frozen=True)
class PretrainSettings:
    """The warm-up before the loop starts."""

    steps: Whole = 400
    """Training steps."""
    batch: Count = 64
    """Requests of one step."""
    lr: Positive = 3e-3
    """Learning rate of AdamW."""
