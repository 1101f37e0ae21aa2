"""Who is live, who is behind, and who fell silent."""

from ops.present import LIVE_S, Roll
from streams.events import CatalogueAck


def roll(*signs: tuple[str, int, float] | tuple[str, int, float, bool]) -> Roll:
    made = Roll()
    for name, version, at_s, *leaving in signs:
        actor, _, run = name.partition("/")
        ack = CatalogueAck(
            actor=actor, run=run, catalogue_version=version, leaving=bool(leaving and leaving[0])
        )
        made.take(ack, at_s)
    return made


def test_an_actor_is_live_until_it_has_been_silent_for_long() -> None:
    here = roll(("a/1", 5, 100.0), ("b/1", 7, 103.0))
    assert [one.actor for one in here.live(103.0)] == ["a", "b"]
    assert [one.actor for one in here.live(100.0 + LIVE_S)] == ["a", "b"]
    assert [one.actor for one in here.live(100.1 + LIVE_S)] == ["b"]
    assert here.live(200.0) == []


def test_an_actor_that_left_is_waited_for_no_more_and_one_that_starts_is() -> None:
    here = roll(("a/1", 5, 100.0), ("b/1", -1, 100.0), ("a/1", 5, 101.0, True))
    assert [one.actor for one in here.behind(5, 102.0)] == ["b"]
    assert here.silent(5, 150.0, 600.0)[0].actor == "b"
    here.take(CatalogueAck(actor="b", run="1", catalogue_version=5), 102.0)
    assert here.behind(5, 102.0) == []


def test_two_machines_with_one_address_are_two_actors() -> None:
    here = roll(("0.0.0.0:80/1", 9, 100.0), ("0.0.0.0:80/2", 3, 100.0))
    assert len(here.live(101.0)) == 2
    assert [one.version for one in here.behind(9, 101.0)] == [3]


def test_who_fell_silent_before_it_applied_a_version_is_named_while_it_may_serve() -> None:
    here = roll(("a/1", 5, 100.0), ("b/1", 6, 100.0))
    assert here.silent(6, 100.0, 600.0) == []
    assert [one.actor for one in here.silent(6, 300.0, 600.0)] == ["a"]
    assert here.silent(6, 701.0, 600.0) == []
