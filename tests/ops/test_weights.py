"""Versions on a real log: what is told of them, what is found wrong, and what an arm is made to serve."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from ops.config import Config
from ops.errors import UserError
from ops.weights import kept, say, show_all, show_one, verify
from streams.blocks import digest_of
from streams.clients import records
from streams.events import command_decoder, decode, encode
from streams.settings import KafkaSettings
from streams.topics import CONTROL, WEIGHTS_ACKS
from streams.weights import Ack, Chunk, Manifest, pack
from tests.actor.world import World

Parts = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Versions 1 to 3 whole, 4 without a chunk's bytes, 5 not finite."""
    from ops.admin import ensure_topics  # not before the filters of ../conftest.py hold
    from ops.broker import EmbeddedBroker

    with EmbeddedBroker(tmp_path_factory.mktemp("weights")) as running:
        kafka = KafkaSettings(bootstrap=running.bootstrap, partitions=2)
        ensure_topics(running.bootstrap, kafka)
        world = World(kafka)
        for version in (1, 2, 3):
            world.publish(version)

        def damaged(_: Manifest, parts: Parts) -> Parts:
            return [
                (key, encode(Chunk(version=4, index=0, data=b"x" * 10)) if key == "4/0" else value)
                for key, value in parts
            ]

        def endless(manifest: Manifest, _: Parts) -> Parts:
            state = world.states[5]
            state["bos"][0] = np.inf
            manifest.digest = digest_of(state)
            return pack(manifest, state)

        world.publish(4, damage=damaged)
        world.publish(5, damage=endless)
        ack = Ack(actor="a:1", version=3, applied=True, created_ms=1_000, applied_ms=1_250)
        refused = Ack(
            actor="a:1", version=4, applied=False, reason="torn", created_ms=1, applied_ms=2
        )
        world.write((WEIGHTS_ACKS, None, encode(ack)), (WEIGHTS_ACKS, None, encode(refused)))
        yield world
        world.close()


@pytest.fixture
def config(world: World) -> Config:
    return replace(Config(), kafka=world.kafka)


def test_versions_are_listed_with_who_took_them(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert show_all(config, 3) == 0
    told = capsys.readouterr().out
    assert "5 versions, the last 3 shown" in told
    rows = [line.split("│")[1:-1] for line in told.splitlines() if "│" in line]
    assert [cell.strip() for cell in rows[0]][::5] == ["3", "1"]
    assert rows[1][6].strip() == "1"
    assert rows[2][7].strip() == "control, learning"


def test_a_version_is_shown_with_its_tensors_and_acknowledgements(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert show_one(config, 3) == 0
    told = capsys.readouterr().out
    assert "a:1 applied 0.250 s after it was made" in told
    assert "tensor" in told
    assert kept(config.kafka.bootstrap).manifests[3].digest in told
    assert show_one(config, 4) == 0
    assert "refused: torn" in capsys.readouterr().out


def test_what_is_damaged_or_not_finite_is_found(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(config, None) == 1
    told = capsys.readouterr().out
    assert "version 4" in told
    assert "version 5: not finite: bos" in told
    assert "3 of 5 versions are what they say" in told
    assert verify(config, 2) == 0
    assert "1 of 1 versions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arm", "version", "says"),
    [
        ("nobody", 1, "there is no arm 'nobody'; there are: control, learning"),
        ("learning", 9, "version 9 is not in the log; there are 1 to 5"),
        ("learning", 4, "version 4"),
        ("learning", 5, "version 5: not finite"),
    ],
)
def test_an_arm_is_not_pinned_to_what_it_could_not_serve(
    config: Config, arm: str, version: int, says: str
) -> None:
    before = len(list(records(config.kafka.bootstrap, CONTROL)))
    with pytest.raises(UserError) as caught:
        say(config, "pin", arm, version, "a try")
    assert says in str(caught.value)
    assert len(list(records(config.kafka.bootstrap, CONTROL))) == before


def test_a_rollback_names_what_it_condemns(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(UserError, match="newest version is 5, and there is no rolling back to 5"):
        say(config, "rollback", "learning", 5, "a try")
    assert say(config, "rollback", "learning", 2, "3 is worse") == 0
    assert "the learner goes back to it; 3 to 5 are condemned" in capsys.readouterr().out
    *_, last = records(config.kafka.bootstrap, CONTROL)
    said = decode(command_decoder, last.value)
    assert (said.action, said.version, said.upto) == ("rollback", 2, 5)
    assert kept(config.kafka.bootstrap).arms_of(2) == ["learning"]
    assert say(config, "follow", "learning", 0, "it was not") == 0
    assert kept(config.kafka.bootstrap).control.rollbacks == {}


def test_a_pin_and_its_end_stand_on_control_with_who_and_why(config: Config) -> None:
    assert say(config, "pin", "learning", 2, "3 looks strange") == 0
    assert kept(config.kafka.bootstrap).arms_of(2) == ["learning"]
    assert say(config, "follow", "learning", 0, "it was nothing") == 0
    here = kept(config.kafka.bootstrap)
    assert (here.arms_of(2), here.arms_of(5)) == ([], ["control", "learning"])
    pin, follow = (
        decode(command_decoder, record.value)
        for record in list(records(config.kafka.bootstrap, CONTROL))[-2:]
    )
    assert (pin.action, pin.arm, pin.version, pin.why) == (
        "pin",
        "learning",
        2,
        "3 looks strange",
    )
    assert (follow.action, follow.why) == ("follow", "it was nothing")
    assert pin.who
    assert pin.id != follow.id
