"""How a viewer goes through a slate: the order of events, pace, leaving, vanishing, the network."""

from collections import defaultdict

import numpy as np
import pytest

from ops.viewer import Event, Viewing, deliver, hazard, watch
from ops.world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World.easy(seed=7)


@pytest.fixture(scope="module")
def viewings(world: World) -> list[tuple[int, int, list[str], Viewing]]:
    """Random slates, and as many of items that suit."""
    rng = np.random.default_rng(0)
    slates = []
    for visit in range(1000):
        person = int(rng.integers(1500))
        best = np.argsort(-world.satisfaction(person))[:200]
        slates += [
            (person, visit, [world.item_ids[at] for at in places])
            for places in (rng.permutation(3000)[:6], rng.permutation(best)[:6])
        ]
    return [(p, visit, items, watch(world, p, visit, items, 20)) for p, visit, items in slates]


def by_position(viewing: Viewing) -> dict[int, list[Event]]:
    events: dict[int, list[Event]] = defaultdict(list)
    for event in viewing.events:
        events[event.position].append(event)
    return events


def test_events_come_in_the_order_of_time_with_numbers_of_their_own(
    viewings: list[tuple[int, int, list[str], Viewing]],
) -> None:
    for _, _, items, viewing in viewings:
        times = [event.at_s for event in viewing.events]
        assert times == sorted(times)
        assert [event.number for event in viewing.events] == list(range(len(times)))
        for event in viewing.events:
            assert event.item == ("" if event.kind == "left" else items[event.position])


def test_a_play_begins_beats_cumulatively_and_ends_with_its_dwell(
    world: World, viewings: list[tuple[int, int, list[str], Viewing]]
) -> None:
    for person, visit, items, viewing in viewings:
        if viewing.vanished:
            continue
        plays = world.plays(person, visit, items)
        for position, events in by_position(viewing).items():
            if position < 0:
                continue
            play = plays[position]
            course = [e for e in events if e.kind in ("begin", "heartbeat", "end")]
            assert [e.kind for e in course[:1]] == ["begin"]
            assert [e.kind for e in course if e.kind == "end"] == ["end"]
            assert course[-1].kind == "end"
            beats = [e.play_ms for e in course if e.kind == "heartbeat"]
            assert beats == list(range(5000, play.dwell_ms, 5000))
            assert course[-1].play_ms == play.dwell_ms == viewing.dwell_ms[position]
            for event in course:
                lasted = event.at_s - course[0].at_s
                assert lasted * 20 * 1000 == pytest.approx(event.play_ms, abs=1e-3)


def test_plays_do_not_overlap_and_the_slate_is_left_at_last(
    viewings: list[tuple[int, int, list[str], Viewing]],
) -> None:
    for _, _, _, viewing in viewings:
        if viewing.vanished:
            continue
        assert viewing.events[-1].kind == "left"
        assert sum(event.kind == "left" for event in viewing.events) == 1
        positions = [event.position for event in viewing.events[:-1]]
        assert positions == sorted(positions)
        assert sorted(set(positions)) == list(range(max(positions) + 1))


def test_actions_fall_between_the_begin_and_the_next_play(
    world: World, viewings: list[tuple[int, int, list[str], Viewing]]
) -> None:
    seen: dict[str, int] = defaultdict(int)
    after = undone = 0
    for person, visit, items, viewing in viewings:
        if viewing.vanished:
            continue
        plays = world.plays(person, visit, items)
        for position, events in by_position(viewing).items():
            kinds = [event.kind for event in events if not event.withdrawn]
            for action in ("like", "follow", "comment", "forward", "dislike"):
                happens = position >= 0 and getattr(plays[position], action)
                assert kinds.count(action) == int(happens)
                seen[action] += happens
            after += any(e.kind == "like" for e in events[kinds.index("end") :]) if kinds[1:] else 0
            undone += any(event.withdrawn for event in events)
            if "dislike" in kinds:
                assert kinds[-2:] == ["dislike", "end"]
    assert min(seen.values()) > 10
    assert 0.1 < after / seen["like"] < 0.35
    assert 0 < undone < 0.06 * seen["like"]


def test_pace_divides_the_waiting_and_nothing_else(world: World) -> None:
    items = world.item_ids[:6]
    for visit in range(50):
        slow, fast = (watch(world, 3, visit, items, pace) for pace in (1, 20))
        assert slow.dwell_ms == fast.dwell_ms
        assert [e._replace(at_s=0) for e in slow.events] == [
            e._replace(at_s=0) for e in fast.events
        ]
        assert [e.at_s for e in slow.events] == pytest.approx([20 * e.at_s for e in fast.events])


def test_twins_with_the_same_slate_have_the_same_viewing(world: World) -> None:
    items = world.item_ids[:6]
    assert watch(world, 3, 1, items, 20) == watch(world, 3, 1, items, 20)
    assert watch(world, 3, 1, items, 20) != watch(world, 3, 2, items, 20)


def test_most_of_a_slate_is_seen_and_more_of_one_that_satisfies(
    viewings: list[tuple[int, int, list[str], Viewing]],
) -> None:
    def seen(these: list[tuple[int, int, list[str], Viewing]]) -> float:
        return float(np.mean([[d > 0 for d in viewing.dwell_ms] for *_, viewing in these]))

    random, suiting = seen(viewings[::2]), seen(viewings[1::2])
    assert 0.7 < random < 0.85
    assert random + 0.05 < suiting < 0.95


def test_the_hazard_of_leaving_rises_with_dissatisfaction(world: World) -> None:
    plays = sorted(world.plays(0, 0, world.item_ids), key=lambda play: play.satisfaction)
    hazards = [hazard(play) for play in plays]
    assert hazards == sorted(hazards, reverse=True)
    assert 0.02 <= hazards[-1] < 0.05 < 0.11 < hazards[0] <= 0.12


def test_the_truth_counts_every_slot_and_dwell_only_what_was_seen(
    world: World, viewings: list[tuple[int, int, list[str], Viewing]]
) -> None:
    for person, visit, items, viewing in viewings:
        truth = [float(world.satisfaction(person)[world.index[item]]) for item in items]
        assert viewing.satisfaction == truth
        begun = {event.position for event in viewing.events if event.kind == "begin"}
        assert {at for at, dwell in enumerate(viewing.dwell_ms) if dwell} == begun
        dislikes = sum(event.kind == "dislike" for event in viewing.events)
        assert viewing.dislikes == dislikes
        assert len(world.plays(person, visit, items)) == len(viewing.dwell_ms)


def test_about_one_viewer_in_a_hundred_vanishes_without_a_word(
    viewings: list[tuple[int, int, list[str], Viewing]],
) -> None:
    vanished = [viewing for *_, viewing in viewings if viewing.vanished]
    assert 0.004 < len(vanished) / len(viewings) < 0.02
    assert not any(event.kind == "left" for viewing in vanished for event in viewing.events)
    cut = [
        viewing
        for viewing in vanished
        if viewing.events
        and not any(e.kind == "end" for e in by_position(viewing)[max(by_position(viewing))])
    ]
    assert cut
    for viewing in cut:
        last = max(by_position(viewing))
        told = max(event.play_ms for event in by_position(viewing)[last])
        assert told <= viewing.dwell_ms[last] <= told + 5000


def test_an_empty_slate_is_left_and_an_unknown_item_refused(world: World) -> None:
    viewing = watch(world, 0, 0, [], 20)
    assert [event.kind for event in viewing.events] == ["left"]
    assert viewing.dwell_ms == []
    with pytest.raises(KeyError, match="elsewhere"):
        watch(world, 0, 0, ["elsewhere"], 20)


def test_the_network_loses_nothing_delays_some_and_doubles_few() -> None:
    rng = np.random.default_rng(5)
    sent = [Event(0.01 * n, n, "heartbeat", 0, "i0001", 5000 * n, False) for n in range(20_000)]
    arrived = deliver(sent, rng)
    assert [event.at_s for event in arrived] == sorted(event.at_s for event in arrived)
    copies: dict[int, list[Event]] = defaultdict(list)
    for event in arrived:
        copies[event.number].append(event)
    assert set(copies) == set(range(20_000))
    delays = np.array([copies[n][0].at_s - sent[n].at_s for n in range(20_000)])
    assert ((delays >= 0) & (delays <= 0.3)).all()
    assert 0.04 < (delays > 0).mean() < 0.06
    assert 0.003 < sum(len(c) - 1 for c in copies.values()) / 20_000 < 0.007
    for n, same in copies.items():
        assert {event._replace(at_s=0) for event in same} == {sent[n]._replace(at_s=0)}
    assert [event.number for event in arrived] != sorted(event.number for event in arrived)


def test_the_same_accidents_follow_from_the_same_generator(world: World) -> None:
    events = watch(world, 0, 0, world.item_ids[:6], 20).events
    one, same = (deliver(events, np.random.default_rng(5)) for _ in range(2))
    assert one == same
