"""The figures of harmful versions, on logs made by hand; and how policies are spoilt."""

from typing import Any

import numpy as np
import pytest

from learner.catalogue import Catalogue
from learner.policy import build, state_of
from learner.settings import LearnSettings
from ops.bench_harm import checks_of
from ops.bench_harm_log import Answer, Earned, Harm, Seen, by_rewards, drop_between, outcome
from ops.bench_harm_loop import is_well
from ops.bench_harm_poison import Workshop, exploded, not_a_number
from streams.blocks import State, not_finite
from streams.events import Command, Sample, encode
from streams.topics import CONTROL, SAMPLES, WEIGHTS
from streams.weights import Ack, Commit, Manifest
from tests.learner.makers import Shown, learnable, random_catalogue, sample

CODES, ROWS, ITEMS = 5, 64, 60
HARM = Harm(7, 10_000)


def answers(*spans: tuple[int, int, int], arm: str = "learning") -> list[Answer]:
    """(version, from, upto) in ms, one each 20 ms."""
    return [
        Answer(at_ms, arm, version)
        for version, first, upto in spans
        for at_ms in range(first, upto, 20)
    ]


def ack(version: int, at_ms: int, reason: str = "", actor: str = "a") -> Ack:
    return Ack(
        actor=actor,
        version=version,
        applied=not reason,
        reason=reason,
        created_ms=0,
        applied_ms=at_ms,
    )


def command(action: Any, at_ms: int, **more: Any) -> Command:
    return Command(
        id="c", time_ms=at_ms, who="w", why="because", action=action, arm="learning", **more
    )


# --- harms without labels ----------------------------------------------------------------------------


def test_a_returned_harm_lasts_until_the_first_answer_by_another_version() -> None:
    seen = Seen(answers=answers((6, 9_000, 10_200), (7, 10_200, 10_800), (6, 10_800, 12_000)))
    seen.answers += answers((1, 9_000, 12_000), arm="control")
    seen.commands = [command("rollback", 10_600, version=6, upto=7)]
    assert outcome(seen, HARM) == {
        "outcome": "returned",
        "seconds": 0.8,
        "version": 7,
        "served": 30,
        "said_s": 0.6,
        "to": 6,
        "why": "because",
    }


def test_a_harm_that_is_served_stays_until_somebody_says_so() -> None:
    seen = Seen(answers=answers((7, 10_200, 10_800), (8, 10_800, 12_000)))
    assert (outcome(seen, HARM)["outcome"], outcome(seen, HARM)["seconds"]) == ("stayed", None)
    seen.commands = [command("rollback", 10_600, version=5, upto=6)]
    assert outcome(seen, HARM)["outcome"] == "stayed", "of a version before it"


def test_a_harm_that_comes_back_lasts_until_its_last_answer() -> None:
    seen = Seen(answers=answers((7, 10_000, 10_100), (6, 10_100, 11_000), (7, 11_000, 11_040)))
    seen.commands = [command("rollback", 10_050, version=6, upto=7)]
    assert outcome(seen, HARM)["outcome"] == "stayed"
    seen.answers += answers((6, 11_040, 11_100))
    assert outcome(seen, HARM)["seconds"] == pytest.approx(1.04)


def test_a_refusal_counts_when_all_actors_have_refused() -> None:
    seen = Seen(acks=[ack(7, 10_200, "wrongly signed"), ack(7, 9_000, "long ago", "b")])
    assert outcome(seen, HARM)["outcome"] == "refused"
    assert outcome(seen, HARM, actors=2)["outcome"] == "stayed"
    seen.acks.append(ack(7, 10_700, "wrongly signed", "b"))
    found = outcome(seen, HARM, actors=2)
    assert (found["seconds"], found["served"], found["why"]) == (0.7, 0, "wrongly signed")


def test_a_replay_is_passed_over_once_what_stands_behind_it_was_taken() -> None:
    replay = Harm(2, 10_000, behind=50)
    seen = Seen(commits=[(40, 8), (60, 9)], acks=[ack(8, 10_100)])
    assert outcome(seen, replay)["outcome"] == "stayed"
    seen.acks.append(ack(9, 10_400))
    assert outcome(seen, replay)["outcome"] == "passed over"
    assert outcome(seen, replay)["seconds"] == pytest.approx(0.4)
    seen.answers = answers((2, 9_000, 9_500), (2, 10_200, 10_240))
    assert outcome(seen, replay)["served"] == 2
    assert outcome(seen, replay)["outcome"] == "stayed", "it was served after all"


def test_what_is_seen_comes_from_the_log() -> None:
    seen = Seen()
    commit = encode(Commit(version=9))
    seen.take(WEIGHTS, 60, commit)
    seen.take(WEIGHTS, 61, None)
    seen.take(WEIGHTS, 62, b"none of ours")
    seen.take(CONTROL, 0, encode(command("pin", 1, version=3)))
    one = sample("r", [Shown((0, 0, 1))], 0, user="p1-3")
    one.items[0].play_ms, one.items[0].duration_ms = 5_000, 20_000
    seen.take(SAMPLES, 0, encode(one))
    assert seen.commits == [(60, 9)]
    assert seen.control.pinned == {"learning": 3}
    (earned,) = seen.earned
    assert (earned.person, earned.reward) == ("p1", 0.25)
    assert seen.watched == {(0, 0, 1): [1.0, 0.25]}
    assert len(seen.newest) == 1


def test_what_is_watched_least_is_told_of_leaves_played_often_enough() -> None:
    seen = Seen(watched={(0, 0, n): [3.0, float(n)] for n in range(4)} | {(1, 1, 1): [2.0, 0.0]})
    assert seen.watched_least(0.5) == [(0, 0, 0), (0, 0, 1)]


# --- a harm that only its rewards tell ----------------------------------------------------------------


def earned(learning: float, first_ms: int, upto_ms: int, version: int) -> list[Earned]:
    """Twins of 40 persons, one each 10 ms; control earns .5 in the mean."""
    rng = np.random.default_rng(first_ms)
    found = []
    for number, at_ms in enumerate(range(first_ms, upto_ms, 10)):
        person, chance = f"p{number % 40}", float(rng.uniform(-0.2, 0.2))
        found.append(Earned(at_ms, "control", 1, person, 0.5 + chance))
        found.append(Earned(at_ms, "learning", version, person, learning + chance))
    return found


def test_a_drop_is_measured_over_twins_with_an_interval() -> None:
    rewards = earned(0.4, 0, 20_000, 7)
    drop = drop_between(rewards, 7, 8, 0, 20_000, seed=1)
    assert drop is not None
    assert drop["mean"] == pytest.approx(0.2, abs=0.01)
    assert drop["low"] < drop["mean"] < drop["high"] < 0.21
    assert drop_between(rewards, 8, 9, 0, 20_000, seed=1) is None


def test_a_harm_by_rewards_lasts_from_its_first_answer_to_the_first_of_what_was_restored() -> None:
    seen = Seen(
        answers=answers(
            (6, 9_000, 10_500), (7, 10_500, 14_500), (8, 14_500, 20_500), (9, 20_500, 22_000)
        )
    )
    seen.earned = earned(0.4, 10_500, 15_500, 7) + earned(0.5, 15_500, 20_500, 8)
    seen.commands = [command("follow", 20_300, version=9, restored=5)]
    seen.commands[0].why = "less, over 321 of each: back"
    found = by_rewards(seen, HARM)
    assert (found["outcome"], found["seconds"]) == ("returned", 10.0)
    assert (found["served"], found["served_by_it_alone"]) == (500, 200)
    assert (found["versions_learned_from_it"], found["to"], found["comparisons"]) == (1, 5, 321)
    assert found["drop"]["mean"] == pytest.approx(0.1, abs=0.01)
    assert found["drop_first_half"]["mean"] == pytest.approx(0.2, abs=0.01)
    assert found["drop_second_half"]["mean"] == pytest.approx(0.0, abs=0.01)


def test_a_harm_by_rewards_that_is_not_found_has_no_time() -> None:
    seen = Seen(answers=answers((6, 9_000, 10_500), (7, 10_500, 14_500)))
    found = by_rewards(seen, HARM)
    assert (found["outcome"], found["seconds"], found["served"]) == ("stayed", None, 199)


# --- the loop, and the verdicts ------------------------------------------------------------------------


def test_the_loop_is_well_when_the_arm_follows_and_all_late_answers_are_new() -> None:
    seen = Seen(answers=answers((7, 10_000, 11_000), (9, 11_000, 14_000)))
    assert is_well(seen, 7, now_ms=14_100)
    assert not is_well(seen, 7, now_ms=13_500), "some were by it"
    assert not is_well(seen, 7, now_ms=20_000), "nobody answers"
    assert not is_well(seen, 9, now_ms=14_100)
    seen.control.pinned["learning"] = 9
    assert not is_well(seen, 7, now_ms=14_100)


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        ({}, set()),
        ({"seconds": None}, {"one.seconds"}),
        ({"seconds": 10.5}, {"one.seconds"}),
        ({"outcome": "refused", "served": 3}, {"one.served"}),
    ],
)
def test_a_harm_must_be_over_in_time_and_what_is_refused_is_never_served(
    change: dict[str, Any], fails: set[str]
) -> None:
    one = {"outcome": "returned", "seconds": 2.0, "served": 3} | change
    less = {"outcome": "returned", "seconds": 60.0, "served": 9, "drop": {"mean": 0.05}}
    results = {"harms": {"one": one, "earns_less": less}, "requests_failed": 0}
    checks = checks_of(results, 10.0)
    assert {check.name for check in checks if not check.ok} == fails | {"earns_less.drop"}
    assert not any(check.correctness for check in checks if check.name == "earns_less.drop")


# --- spoiling ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop() -> Workshop:
    catalogue: Catalogue = random_catalogue(CODES, ITEMS, seed=1)
    manifest = Manifest(
        version=1,
        lineage="l",
        codebook="c",
        preset="tiny",
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
    return Workshop(manifest, LearnSettings(), catalogue)


@pytest.fixture(scope="module")
def state() -> State:
    import torch

    torch.manual_seed(3)
    return state_of(build("tiny", CODES, ROWS))


@pytest.fixture(scope="module")
def samples(shop: Workshop) -> list[Sample]:
    return learnable(shop.catalogue, 40, seed=2)


def test_spoilt_states_are_what_they_are_called_and_the_good_one_stays(
    shop: Workshop, state: State, samples: list[Sample]
) -> None:
    before = {name: value.copy() for name, value in state.items()}
    assert not_finite(not_a_number(state)) == ["places"]
    assert not_finite(exploded(state)) == []
    assert shop.judged(state, exploded(state), samples)[1]
    collapse = shop.collapsed(state, samples)
    assert collapse.share >= 0.9
    assert shop.judged(state, collapse.state, samples)[1]
    assert all((state[name] == value).all() for name, value in before.items())


def test_what_is_taught_wrongly_passes_the_guard_and_shows_what_it_was_taught(
    shop: Workshop, state: State, samples: list[Sample]
) -> None:
    worst = sorted({item.sid for one in samples for item in one.items})[:8]
    wrong = shop.learned_wrongly(state, samples, worst, seed=1)
    figures, reason = shop.judged(state, wrong.state, samples)
    assert reason == ""
    assert figures == wrong.figures
    assert 0.02 < figures.divergence <= 0.5
    again = shop.learned_wrongly(state, samples, worst, seed=1)
    assert all((again.state[name] == value).all() for name, value in wrong.state.items())
