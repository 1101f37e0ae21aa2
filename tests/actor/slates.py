"""Slates served in memory by the real prepare, decode and expose, as they come off the wire."""

from collections.abc import Callable

import numpy as np

from actor.explore import Exploration
from actor.policy import ServedPolicy
from actor.recommend import NO_EXPLORATION, SEEDS, decode, expose, prepare
from actor.settings import ActorSettings
from actor.users import Users
from learner.catalogue import Catalogue
from streams.events import (
    Behaviour,
    Exposure,
    History,
    Sample,
    SampleItem,
    encode,
    exposure_decoder,
)
from streams.weights import Manifest
from tests.learner.makers import NOW_MS, SMALL, random_model, upsert

CODES, ROWS, ITEMS = 5, 64, 80


def served(seed: int) -> ServedPolicy:
    """A small policy with random weights."""
    manifest = Manifest(
        version=3,
        lineage="l",
        codebook="c0debook",
        preset="small",
        codes=CODES,
        user_rows=ROWS,
        schema=[],
        digest="",
        size_bytes=0,
        chunks=0,
        journal=[],
        watermark_ms=0,
        created_ms=0,
    )
    model = random_model(SMALL, CODES, ROWS, seed).eval().requires_grad_(False)
    model.prepare()
    return ServedPolicy(3, manifest, model)


def authored(catalogue: Catalogue, author_of: Callable[[int], str]) -> Catalogue:
    """The same items, each of an author by its number."""
    made = Catalogue(catalogue.valid.codes)
    for number, (item, entry) in enumerate(catalogue.items.items()):
        made.take(number, item.encode(), upsert(item, entry.sid, author=author_of(number)))
    return made


def some_authors(authors: int, seed: int) -> Callable[[int], str]:
    """An item is of one of so many authors, the first of whom is nobody."""
    rng = np.random.default_rng(seed)
    return lambda _: f"author {number}" if (number := int(rng.integers(authors))) else ""


def known_users(catalogue: Catalogue, count: int, rng: np.random.Generator) -> Users:
    """Users with histories of every length, some of them of items that are gone."""
    users = Users(ActorSettings())
    names = [*catalogue.items, "gone"]
    for number in range(count):
        behaviours = [
            Behaviour(
                request=f"h{number}-{place}",
                position=0,
                item=str(rng.choice(names)),
                end_ms=NOW_MS - 1000 * (20 - place),
                play_ms=int(rng.integers(0, 60_000)),
                duration_ms=int(rng.integers(1000, 60_000)),
                actions=int(rng.integers(0, 32)),
            )
            for place in range(int(rng.integers(0, 12)))
        ]
        shown = [str(item) for item in rng.choice(names, int(rng.integers(0, 40)), replace=False)]
        history = History(user=f"u{number}", behaviours=behaviours, shown=shown)
        users.take_history(f"u{number}", encode(history))
        users.exposed(f"u{number}", [str(item) for item in rng.choice(names, 5)])
    return users


def serve(
    policy: ServedPolicy,
    catalogue: Catalogue,
    users: Users,
    batch: list[tuple[str, int]],
    temperature: float,
    rng: np.random.Generator,
    between: Callable[[], None] = lambda: None,
    explore: Exploration = NO_EXPLORATION,
    author_cap: int = 0,
    beam: int = 0,
) -> list[Exposure]:
    """The exposures of requests (user, count) decoded together, as they come off the wire."""
    rules = (SMALL.context, NOW_MS, explore, author_cap, beam)
    prepared = [
        prepare(f"r-{user}", user, "learning", count, users, catalogue, *rules)
        for user, count in batch
    ]
    slates = decode(policy, prepared, temperature, int(rng.integers(SEEDS)))
    between()
    made = [
        expose(policy, one, row, slates, catalogue, temperature, rng, NOW_MS)
        for row, one in enumerate(prepared)
    ]
    read = [exposure_decoder.decode(encode(exposure)) for exposure in made]
    assert all(isinstance(exposure, Exposure) for exposure in read)
    return read  # type: ignore[return-value]


def sampled(exposure: Exposure) -> Sample:
    """What the join makes of an exposure."""
    return Sample(
        request=exposure.request,
        user=exposure.user,
        time_ms=exposure.time_ms,
        arm=exposure.arm,
        policy_version=exposure.policy_version,
        catalogue_version=exposure.catalogue_version,
        decode_mode=exposure.decode_mode,
        temperature=exposure.temperature,
        context=exposure.context,
        excluded=exposure.excluded,
        items=[
            SampleItem(
                item=item.item,
                sid=item.sid,
                position=item.position,
                duration_ms=item.duration_ms,
                source=item.source,
                logp_levels=item.logp_levels,
                outcome="ended",
                play_ms=1,
                actions=0,
                advantage=1,
            )
            for item in exposure.items
        ],
        threshold=0.75,
        median=0.5,
        start_ms=0,
        decided_ms=0,
        closed_by="decided",
        watermark_ms=0,
        closable_ms=0,
        exposure_offset=0,
        feedback_upto=0,
    )
