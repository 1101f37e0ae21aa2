"""What an actor knows of its users."""

import pytest

from actor.settings import ActorSettings
from actor.users import Users
from streams.events import ACTION_BITS, Behaviour, Feedback, FeedbackKind, History, encode


def fed(
    request: str,
    position: int,
    kind: FeedbackKind = "heartbeat",
    play_ms: int = 0,
    time_ms: int = 1000,
    withdrawn: bool = False,
    item: str | None = None,
    user: str = "u",
) -> Feedback:
    return Feedback(
        event=f"{request}-{position}-{kind}-{time_ms}",
        user=user,
        request=request,
        position=position,
        item=f"i{position}" if item is None else item,
        time_ms=time_ms,
        kind=kind,
        play_ms=play_ms,
        withdrawn=withdrawn,
    )


def played(request: str, position: int, end_ms: int, play_ms: int = 500) -> Behaviour:
    return Behaviour(
        request=request,
        position=position,
        item=f"i{position}",
        end_ms=end_ms,
        play_ms=play_ms,
        duration_ms=9000,
    )


def history(behaviours: list[Behaviour], shown: list[str] | None = None) -> bytes:
    return encode(History(user="u", behaviours=behaviours, shown=shown or []))


@pytest.fixture
def users() -> Users:
    return Users(ActorSettings())


def plays(users: Users, most: int = 32) -> list[tuple[str, int, int, int]]:
    return [
        (one.request, one.position, one.play_ms, one.end_ms) for one in users.behaviours("u", most)
    ]


def test_own_feedback_is_a_behaviour_at_once_and_grows(users: Users) -> None:
    users.feedback(fed("r", 0, "begin", 0, 1000), 9000)
    assert plays(users) == []  # nothing was watched yet
    users.feedback(fed("r", 0, "heartbeat", 700, 2000), 9000)
    users.feedback(fed("r", 0, "heartbeat", 400, 1500), 9000)  # late: cumulative, the largest wins
    assert plays(users) == [("r", 0, 700, 2000)]
    users.feedback(fed("r", 0, "end", 900, 2500), 9000)
    (found,) = users.behaviours("u", 32)
    assert (found.play_ms, found.end_ms, found.duration_ms, found.item) == (900, 2500, 9000, "i0")


def test_actions_hold_until_they_are_withdrawn(users: Users) -> None:
    users.feedback(fed("r", 0, "like"), 9000)
    users.feedback(fed("r", 0, "dislike"), 9000)
    users.feedback(fed("r", 0, "like", withdrawn=True), 9000)
    (found,) = users.behaviours("u", 32)
    assert found.actions == ACTION_BITS["dislike"]


def test_leaving_a_slate_is_no_play(users: Users) -> None:
    users.feedback(fed("r", -1, "left"), 0)
    assert plays(users) == []


def test_a_history_replaces_the_plays_it_contains_and_leaves_the_others(users: Users) -> None:
    users.feedback(fed("r1", 0, play_ms=700, time_ms=2000), 9000)
    users.feedback(fed("r2", 0, play_ms=100, time_ms=4000), 9000)
    users.take_history("u", history([played("r0", 0, 500), played("r1", 0, 2100, 900)]))
    assert plays(users) == [("r0", 0, 500, 500), ("r1", 0, 900, 2100), ("r2", 0, 100, 4000)]
    users.feedback(fed("r1", 0, play_ms=800, time_ms=5000), 9000)  # late: the join has decided
    assert plays(users) == [("r0", 0, 500, 500), ("r1", 0, 900, 2100), ("r2", 0, 100, 4000)]
    users.take_history("u", history([played("r1", 0, 2100, 900), played("r2", 0, 4000, 150)]))
    assert plays(users) == [("r1", 0, 900, 2100), ("r2", 0, 150, 4000)]


def test_the_latest_behaviours_come_last(users: Users) -> None:
    users.take_history("u", history([played("h", number, 1000 * number) for number in range(5)]))
    users.feedback(fed("r", 0, play_ms=5, time_ms=2500), 9000)
    assert [end for *_, end in plays(users)] == [0, 1000, 2000, 2500, 3000, 4000]
    assert [end for *_, end in plays(users, most=3)] == [2500, 3000, 4000]


def test_what_is_known_of_one_user_says_nothing_of_another(users: Users) -> None:
    users.feedback(fed("r", 0, play_ms=5, user="v"), 9000)
    users.exposed("v", ["a"])
    assert plays(users) == []
    assert users.shown("u") == set()


def test_plays_that_no_history_confirms_take_bounded_memory(users: Users) -> None:
    for number in range(1000):
        users.feedback(fed(f"r{number}", 0, play_ms=5, time_ms=number), 9000)
    assert len(plays(users, 2000)) == 64
    assert plays(users, 2000)[-1] == ("r999", 0, 5, 999)


def test_feedback_without_an_item_is_about_what_was_shown_there(users: Users) -> None:
    users.exposed("u", ["a", "b"], "r")
    users.feedback(fed("r", 1, play_ms=5, item=""), 9000)
    assert [one.item for one in users.behaviours("u", 32)] == ["b"]
    assert users.item_of(fed("r", 1, item="x")) == "x"
    assert users.item_of(fed("r", 2, item="")) == ""
    assert users.item_of(fed("r", -1, "left", item="")) == ""
    assert users.item_of(fed("other", 0, item="")) == ""
    assert users.item_of(fed("r", 0, item="", user="v")) == ""
    for number in range(100):
        users.exposed("u", ["c"], f"s{number}")
    assert users.item_of(fed("r", 1, item="")) == ""
    assert users.item_of(fed("s99", 0, item="")) == "c"


def test_the_last_128_shown_items_are_known_from_here_and_from_histories(users: Users) -> None:
    users.take_history("u", history([], [f"h{number}" for number in range(128)]))
    assert users.shown("u") == {f"h{number}" for number in range(128)}
    users.exposed("u", ["a", "b", "h127"])
    shown = users.shown("u")
    assert len(shown) == 128
    assert {"a", "b", "h127"} <= shown
    assert shown - {"a", "b"} == {f"h{number}" for number in range(2, 128)}
    users.exposed("u", [f"n{number}" for number in range(200)])
    assert users.shown("u") == {f"n{number}" for number in range(72, 200)}


def test_an_operator_may_allow_repetition() -> None:
    users = Users(ActorSettings(exclude_shown=0))
    users.exposed("u", ["a"])
    users.take_history("u", history([], ["b"]))
    assert users.shown("u") == set()


@pytest.mark.parametrize("overlaid", [False, True])
def test_a_history_that_cannot_be_read_leaves_the_one_before(users: Users, overlaid: bool) -> None:
    users.take_history("u", history([played("r0", 0, 500)], ["a"]))
    if overlaid:
        users.feedback(fed("r1", 0, play_ms=5, time_ms=900), 9000)
    before = plays(users)
    for value in (b"rubbish", history([played("r9", 0, 1)]).replace(b"1.0", b"9.0")):
        with pytest.raises(ValueError, match=r"malformed|unknown_major"):
            users.take_history("u", value)
        assert plays(users) == before
        assert users.shown("u") == {"a"}


def test_a_deleted_history_is_forgotten(users: Users) -> None:
    users.take_history("u", history([played("r0", 0, 500)], ["a"]))
    users.take_history("u", None)
    assert plays(users) == []
    assert users.shown("u") == set()
