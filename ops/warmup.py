"""An honest start for the demonstration: a policy pre-trained on the log of a mediocre one.

The log is written under both ids of each twin pair and goes through the same shaping and histories as live
events do; what they come to is the seed of `shaping` and `histories`, so that both arms start alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from learner.catalogue import Catalogue
from learner.checkpoint import Progress, to_bytes
from learner.context import pack_behaviours, user_row
from learner.policy import state_of
from learner.presets import preset_of
from learner.pretrain import copy_user_rows, pretrain
from learner.semantic_ids import Codebooks, fit
from learner.step import Trainer
from ops.config import Config
from ops.world import LogVisit, World, all_twins
from storage.kv import MemoryKv
from streams.blocks import digest_of
from streams.control import CONTROL_ARM, DEFAULT_SHARES, LEARNING_ARM, arm_of
from streams.decision import Decision
from streams.events import (
    ACTION_BITS,
    Behaviour,
    Exposure,
    PositionOutcome,
    Sample,
    Shaping,
    ShownItem,
    Upsert,
    encode,
)
from streams.history import PackedHistory
from streams.intake import partition_of
from streams.join import Joined
from streams.partition import Partition
from streams.state import PartitionState

ARMS = (CONTROL_ARM, LEARNING_ARM)
LOG_VISITS = 8
LOG_SPAN_S = 4 * 86_400.0

Tell = Callable[[str, int, int], None]
"""Progress of a phase: what, done, in all."""


@dataclass(frozen=True)
class Seeds:
    """What one partition's `histories` and `shaping` begin with."""

    histories: list[PackedHistory]
    shaping: list[Shaping]


@dataclass(frozen=True)
class WarmStart:
    """Everything a new lineage of the simulated world begins with."""

    world: World
    twins: list[Mapping[str, str]]
    codebooks: Codebooks
    upserts: list[Upsert]
    catalogue: Catalogue
    seeds: list[Seeds]
    trainer: Trainer
    progress: Progress
    loss: float

    def checkpoint(self) -> bytes:
        """The checkpoint to start learners from."""
        return to_bytes(self.trainer, self.progress, self.codebooks)


def world_of(config: Config) -> tuple[World, list[Mapping[str, str]]]:
    """The simulated world and its viewers' ids; the same for the same settings."""
    simulate = config.simulate
    world = World.easy(simulate.seed, simulate.items, simulate.people)
    twins = all_twins(
        world.person_ids,
        lambda user: arm_of(user, DEFAULT_SHARES),
        ARMS,
        lambda user: user_row(user, config.policy.user_rows),
    )
    return world, twins


def warm_start(config: Config, now_ms: int, tell: Tell) -> WarmStart:
    """Make the world, its catalogue, its log, and a policy trained on it."""
    torch.set_num_threads(config.policy.threads)
    world, twins = world_of(config)
    codebooks = fit(world.embeddings, config.policy.codes, config.simulate.seed)
    upserts = catalogue_of(world, codebooks)
    catalogue = Catalogue(config.policy.codes)
    for offset, upsert in enumerate(upserts):
        catalogue.take(offset, upsert.item.encode(), encode(upsert))
    samples, seeds = _shaped_log(config, world, twins, catalogue, now_ms, tell)
    trainer, loss = pretrain(
        config.policy,
        config.pretrain,
        config.learn.seed,
        codebooks,
        samples,
        catalogue,
        lambda done, steps, loss: tell(f"pre-training, loss {loss:.3f}", done, steps),
    )
    copy_user_rows(trainer.model, ((ids[LEARNING_ARM], ids[CONTROL_ARM]) for ids in twins))
    fresh = Trainer(trainer.model, config.learn, config.learn.lr)
    progress = Progress(
        version=0,
        lineage=digest_of(state_of(trainer.model))[:12],
        preset=config.policy.shape,
        codes=config.policy.codes,
        user_rows=config.policy.user_rows,
    )
    return WarmStart(world, twins, codebooks, upserts, catalogue, seeds, fresh, progress, loss)


def catalogue_of(world: World, codebooks: Codebooks) -> list[Upsert]:
    """The world's items as catalogue entries."""
    sids = codebooks.assign(world.embeddings)
    digest = codebooks.digest()
    return [
        Upsert(
            item=item,
            sid=(int(sids[at, 0]), int(sids[at, 1]), int(sids[at, 2])),
            codebook=digest,
            duration_ms=int(world.duration_ms[at]),
            tags=[world.tags[at]],
            embedding=world.embeddings[at].astype("<f4").tobytes(),
        )
        for at, item in enumerate(world.item_ids)
    ]


def _shaped_log(
    config: Config,
    world: World,
    twins: list[Mapping[str, str]],
    catalogue: Catalogue,
    now_ms: int,
    tell: Tell,
) -> tuple[list[Sample], list[Seeds]]:
    """The mediocre policy's log through shaping and histories, under both ids of each person."""
    rng = np.random.default_rng([config.simulate.seed, 1])
    log = world.mediocre_log(rng, LOG_VISITS, now_ms, LOG_SPAN_S, config.simulate.slate)
    states = [PartitionState(MemoryKv()) for _ in range(config.kafka.partitions)]
    partitions = [Partition(config.join, config.shape, config.streams, state) for state in states]
    behaviours: dict[int, list[Behaviour]] = {person: [] for person in log}
    length = preset_of(config.policy.shape).context
    visits = sorted(
        ((visit.time_ms, person, visit) for person, of in log.items() for visit in of),
        key=lambda entry: entry[:2],
    )
    for done, (_, person, visit) in enumerate(visits):
        context = pack_behaviours(
            (
                (behaviour, catalogue.items[behaviour.item].sid)
                for behaviour in behaviours[person][-length:]
            ),
            visit.time_ms,
        )
        for arm, user in twins[person].items():
            partition = partitions[partition_of(user, config.kafka.partitions)]
            partition.admit([_joined(visit, user, arm, context, catalogue)])
        behaviours[person] += _behaviours(visit, catalogue)
        tell("shaping the log", done + 1, len(visits))
    outputs = [partition.take() for partition in partitions]
    samples = [sample for output in outputs for sample in output.samples]
    samples = sorted(
        (sample for sample in samples if sample.arm == LEARNING_ARM),
        key=lambda sample: (sample.time_ms, sample.user),
    )
    return samples, [Seeds(output.histories, output.shaping) for output in outputs]


def _behaviours(visit: LogVisit, catalogue: Catalogue) -> list[Behaviour]:
    return [
        Behaviour(
            request="",
            position=position,
            item=item,
            end_ms=end_ms,
            play_ms=play.dwell_ms,
            duration_ms=catalogue.items[item].duration_ms,
            actions=_actions(play),
        )
        for position, (item, play, end_ms) in enumerate(
            zip(visit.items, visit.plays, visit.ends_ms, strict=True)
        )
    ]


def _actions(play: object) -> int:
    return sum(bit for name, bit in ACTION_BITS.items() if getattr(play, name))


def _joined(visit: LogVisit, user: str, arm: str, context: bytes, catalogue: Catalogue) -> Joined:
    """A slate of the log as a closed request: every slot was watched to its end."""
    return Joined(
        exposure=Exposure(
            request=f"log-{user}-{visit.visit}",
            user=user,
            time_ms=visit.time_ms,
            arm=arm,
            policy_version=0,
            catalogue_version=catalogue.version,
            decode_mode="other",
            temperature=1.0,
            context=context,
            excluded=b"",
            items=[
                ShownItem(
                    item=item,
                    sid=catalogue.items[item].sid,
                    position=position,
                    duration_ms=catalogue.items[item].duration_ms,
                    source="other",
                )
                for position, item in enumerate(visit.items)
            ],
        ),
        exposure_offset=-1,
        start_ms=visit.time_ms,
        decision=Decision(
            visit.ends_ms[-1],
            "decided",
            {
                position: PositionOutcome("ended", play.dwell_ms, end_ms, _actions(play))
                for position, (play, end_ms) in enumerate(
                    zip(visit.plays, visit.ends_ms, strict=True)
                )
            },
        ),
        watermark_ms=visit.ends_ms[-1],
        closable_ms=visit.ends_ms[-1],
        feedback_upto=0,
    )
