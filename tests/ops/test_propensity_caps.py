"""What an audit makes of slates under a cap on authors, and each lie about them that it must find."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from actor.policy import ServedPolicy
from learner.catalogue import Catalogue
from ops.admin import ensure_topics
from ops.audit_propensity import GOAL_NATS, audit_propensity, checks
from ops.broker import EmbeddedBroker
from ops.config import Config
from ops.propensity import differences, drawn_again, in_order
from streams.events import Exposure, encode, exposure_decoder
from streams.settings import KafkaSettings
from streams.topics import CATALOGUE
from tests.actor.slates import CODES, authored, known_users, serve, served, some_authors
from tests.actor.world import POLICY, World, acting
from tests.learner.makers import random_catalogue, upsert

Lie = Callable[[Exposure], None]


@pytest.fixture(scope="module")
def capped() -> tuple[ServedPolicy, Catalogue, list[Exposure]]:
    """A batch under a cap of 1; its first slate skips one or more before and after its second item."""
    catalogue = authored(random_catalogue(CODES, 80, seed=1), some_authors(8, seed=2))
    rng = np.random.default_rng(3)
    users = known_users(catalogue, 40, rng)
    policy = served(seed=4)
    batch = [(f"u{n}", 5) for n in range(40)]
    return policy, catalogue, serve(policy, catalogue, users, batch, 0.9, rng, author_cap=1)


def copies(batch: list[Exposure]) -> list[Exposure]:
    read = [exposure_decoder.decode(encode(exposure)) for exposure in batch]
    return [exposure for exposure in read if isinstance(exposure, Exposure)]


def fit(exposure: Exposure) -> bool:
    """Whether the lies below are lies about this one: skips before its last item, and before its end."""
    places = Counter(item.position for item in exposure.skipped or ())
    return len(exposure.items) == 5 and places[5] == 1 and sum(places.values()) > 2


def forget_a_skip(exposure: Exposure) -> None:
    assert exposure.skipped
    del exposure.skipped[0]


def forget_all_skips(exposure: Exposure) -> None:
    exposure.skipped = []


def forget_the_last_skip(exposure: Exposure) -> None:
    """As if looking had ended with the last slot, and with the score after it."""
    assert exposure.skipped
    exposure.next_score = exposure.skipped.pop().score


def blame_a_deletion(exposure: Exposure) -> None:
    assert exposure.skipped
    exposure.skipped[0].reason = "deleted"


def give_another_reason(exposure: Exposure) -> None:
    assert exposure.skipped
    exposure.skipped[0].reason = "taste"


def claim_no_cap(exposure: Exposure) -> None:
    exposure.author_cap = 0


def claim_a_looser_cap(exposure: Exposure) -> None:
    exposure.author_cap = 2


def move_a_skip(exposure: Exposure) -> None:
    assert exposure.skipped
    exposure.skipped[0].position += 1


def show_what_was_skipped(exposure: Exposure) -> None:
    """In place of the last item, which would then never have been looked at."""
    assert exposure.skipped
    of = msgspec.structs.asdict(exposure.skipped[0])
    del of["reason"]
    at = of["position"]
    exposure.items = [
        *exposure.items[:at],
        type(exposure.items[0])(**of),
        *exposure.items[at:-1],
    ]
    for position, item in enumerate(exposure.items):
        item.position = position
    exposure.skipped = []


def redecide_a_skip(exposure: Exposure) -> None:
    assert exposure.skipped
    decision = exposure.skipped[0].logp_decision
    assert decision is not None
    exposure.skipped[0].logp_decision = decision - 1e-6


def claim_less_spare(exposure: Exposure) -> None:
    assert exposure.draw is not None
    exposure.draw.spare = 0


def leave_the_last_slot_empty(exposure: Exposure) -> None:
    last = exposure.items.pop()
    exposure.skipped = [one for one in exposure.skipped or () if one.position < last.position]
    exposure.next_score = last.score


@pytest.mark.parametrize(
    "lie",
    [
        forget_a_skip,
        forget_all_skips,
        forget_the_last_skip,
        blame_a_deletion,
        give_another_reason,
        claim_no_cap,
        claim_a_looser_cap,
        move_a_skip,
        show_what_was_skipped,
        redecide_a_skip,
        claim_less_spare,
        leave_the_last_slot_empty,
    ],
)
def test_a_lie_about_what_was_skipped_is_found_by_drawing_again(
    capped: tuple[ServedPolicy, Catalogue, list[Exposure]], lie: Lie
) -> None:
    policy, catalogue, batch = capped
    assert all(drawn_again(policy, batch, catalogue))
    told = copies(batch)
    at = next(row for row, exposure in enumerate(told) if fit(exposure))
    lie(told[at])
    found = drawn_again(policy, told, catalogue)
    assert found == [row != at for row in range(len(told))]


def test_what_was_skipped_is_computed_again_as_the_learner_does(
    capped: tuple[ServedPolicy, Catalogue, list[Exposure]],
) -> None:
    policy, catalogue, batch = capped
    off = differences(policy, batch, catalogue)
    assert len(off) == sum(len(in_order(exposure, "policy")) for exposure in batch)
    assert len(off) > sum(len(exposure.items) for exposure in batch) + 40
    assert off.max() < GOAL_NATS
    told = copies(batch)
    slot = next(exposure for exposure in told if exposure.skipped)
    assert slot.skipped
    levels = slot.skipped[0].logp_levels
    assert levels is not None
    slot.skipped[0].logp_levels = (levels[0], levels[1] - 1e-3, levels[2])
    assert differences(policy, told, catalogue).max() == pytest.approx(1e-3, abs=1e-5)


def test_exposures_of_an_earlier_release_are_read_and_audited() -> None:
    """They do not say what was skipped: an item deleted before the answer was left out without a word."""
    catalogue = random_catalogue(CODES, 60, seed=5)
    rng = np.random.default_rng(6)
    users = known_users(catalogue, 20, rng)

    def delete() -> None:
        for number in range(0, 60, 3):
            catalogue.take(catalogue.version + 1, f"i{number}".encode(), None)

    policy, batch = served(seed=7), [(f"u{n}", 6) for n in range(20)]
    old = []
    for exposure in serve(policy, catalogue, users, batch, 1.0, rng, delete):
        value: dict[str, Any] = msgspec.msgpack.decode(encode(exposure))
        del value["skipped"], value["author_cap"], value["draw"]["spare"]
        read = exposure_decoder.decode(msgspec.msgpack.encode(value))
        assert isinstance(read, Exposure)
        assert (read.skipped, read.author_cap) == (None, 0)
        old.append(read)
    assert sum(len(exposure.items) for exposure in old) < 120
    assert all(drawn_again(policy, old, catalogue))
    assert differences(policy, old, catalogue).max() < GOAL_NATS
    old[3].items.reverse()
    assert sum(drawn_again(policy, old, catalogue)) == 19


@contextmanager
def world_on(folder: Path) -> Iterator[World]:
    with EmbeddedBroker(folder) as running:
        kafka = KafkaSettings(bootstrap=running.bootstrap, partitions=2)
        ensure_topics(running.bootstrap, kafka)
        made = World(kafka)
        try:
            yield made
        finally:
            made.close()


async def test_capped_slates_over_http_pass_the_audit_to_the_last_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    items = random_catalogue(CODES, 80, seed=9, shared=10).items
    with world_on(tmp_path) as world:
        authors = {item: f"author {int(rng.integers(6))}" for item in items}
        world.write(
            *(
                (CATALOGUE, item.encode(), upsert(item, entry.sid, author=authors[item]))
                for item, entry in items.items()
            )
        )
        world.publish(1)
        async with acting(world, author_cap=1, explore_slots=1) as actor:
            for turn in range(3):
                users = [f"user {turn} {n}" for n in range(8)]
                answers = await asyncio.gather(*(actor.recommend(user, 5) for user in users))
                assert {answer.status for answer in answers} == {200}
                for answer in answers:
                    of = Counter(authors[item["item"]] for item in answer.json["items"])
                    assert max(of.values()) == 1
        exposures = world.exposures()
        assert len(exposures) == 24
        skipped = [one for exposure in exposures for one in exposure.skipped or ()]
        config = replace(Config(), kafka=world.kafka, policy=POLICY)
        config = replace(config, actor=replace(config.actor, explore_slots=1))
        found = await asyncio.to_thread(audit_propensity, config)
    assert found.skipped == sum(one.source == "policy" for one in skipped) > 20
    assert (found.exposures, found.wrong, found.not_at_hand) == (24, [], {})
    assert (found.drawn_again, found.bit_equal) == (24, 1.0)
    assert found.max_difference_nats < 1e-4  # these weights are random, with logits of 15
    assert checks(found)[0].ok
