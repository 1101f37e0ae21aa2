"""The program `dwell` as a user meets it: flags, files, exit statuses, what is said on stderr."""

import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from ops.cli import main
from ops.cli_base import app
from ops.config import Config, demo, parse
from ops.errors import UserError

Run = Callable[..., SimpleNamespace]
ROLES = (
    *("up", "broker", "actor", "streams", "insights", "learner"),
    *("simulate", "replay", "pretrain", "doctor"),
)
CONFIGURED = [(role, "logs") if role in ("replay", "pretrain") else (role,) for role in ROLES]


@pytest.fixture
def dwell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs the program in an empty folder, without our variables in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("DWELL_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str) -> SimpleNamespace:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr()
        return SimpleNamespace(status=ended.value.code or 0, out=said.out, err=said.err)

    return run


def test_every_role_is_a_command() -> None:
    assert {*ROLES, "init", "version"} == {
        one.name or getattr(one.callback, "__name__", "") for one in app.registered_commands
    }


@pytest.mark.parametrize("command", CONFIGURED, ids=lambda command: command[0])
def test_every_role_takes_the_common_flags_and_prints_what_it_would_run_with(
    dwell: Run, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "some.toml").write_text("[learn]\nbatch = 8\n")
    ran = dwell(
        *(*command, "--config", "some.toml", "--set", "join.window_s=20", "--set", "actor.port=0"),
        *("--data-dir", "D", "--bootstrap", "h:1", "--dry-run"),
    )
    assert (ran.status, ran.err) == (0, "")
    config = parse(ran.out)
    assert config.learn.batch == 8
    assert (config.join.window_s, config.actor.port) == (20.0, 0)
    assert (config.storage.data_dir, config.kafka.bootstrap) == ("D", "h:1")
    assert 'data_dir = "D"  # --data-dir' in ran.out
    assert "batch = 8  # some.toml" in ran.out


def test_a_flag_beats_the_environment_and_the_environment_beats_the_file(
    dwell: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def port(*flags: str) -> str:
        (line,) = [x for x in dwell("actor", "--dry-run", *flags).out.splitlines() if "port =" in x]
        return str(line)

    (tmp_path / "dwell.toml").write_text("[actor]\nport = 1\n")
    assert port() == "port = 1  # dwell.toml"
    monkeypatch.setenv("DWELL_ACTOR_PORT", "2")
    assert port() == "port = 2  # environment variable DWELL_ACTOR_PORT"
    assert port("--set", "actor.port=3") == "port = 3  # --set"
    assert port("--set", "actor.port=3", "--port", "4") == "port = 4  # --port"


def test_demo_is_a_profile_below_the_users_own_values(dwell: Run) -> None:
    assert parse(dwell("up", "--dry-run").out) == Config()
    assert parse(dwell("up", "--demo", "--dry-run").out) == demo(Config())
    ran = dwell("up", "--demo", "--set", "join.window_s=12", "--dry-run")
    assert (parse(ran.out).join.window_s, parse(ran.out).join.cap_s) == (12.0, 30.0)


def test_one_seed_flag_sets_the_seeds_of_the_policy_and_of_the_world(dwell: Run) -> None:
    config = parse(dwell("up", "--seed", "11", "--dry-run").out)
    assert (config.learn.seed, config.simulate.seed) == (11, 11)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("up", "--set", "join.windw_s=3"), "did you mean join.window_s?"),
        (("up", "--config", "gone.toml"), "gone.toml: there is no such file"),
        (("up", "--seed", "-1"), "--seed: learn.seed = -1 is out of range"),
        (("actor", "--port", "70000"), "--port: actor.port = 70000 is out of range"),
        (("actor",), "kafka.bootstrap is empty"),
        (("streams",), "kafka.bootstrap is empty"),
        (("insights",), "kafka.bootstrap is empty"),
        (("learner",), "kafka.bootstrap is empty"),
        (("broker", "--bootstrap", "h:1"), "names an existing cluster"),
        (("up", "--bootstrap", "h"), "--bootstrap: kafka.bootstrap"),
        (("up", "--json", "gone/results.json"), "there is no folder gone"),
        (("catalogue", "list"), "nothing has run on the data directory"),
        (("catalogue", "upsert", "items.jsonl", "--wait"), "nothing has run on the data directory"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(
    dwell: Run, arguments: tuple[str, ...], told: str
) -> None:
    ran = dwell(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("dwell: ") and ran.err.count("\n") == 1
    assert told in ran.err


def test_an_unknown_flag_is_status_2_without_a_trace(dwell: Run) -> None:
    ran = dwell("up", "--dmeo")
    assert ran.status == 2
    assert "No such option" in ran.err and "Traceback" not in ran.err


def test_init_writes_a_file_that_changes_nothing(dwell: Run, tmp_path: Path) -> None:
    ran = dwell("init")
    assert (ran.status, ran.out) == (0, "wrote dwell.toml\n")
    text = (tmp_path / "dwell.toml").read_text()
    assert parse(text) == Config()
    assert not any(tomllib.loads(text).values())


def test_init_does_not_overwrite(dwell: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[learn]\nbatch = 8\n")
    ran = dwell("init", "mine.toml")
    assert ran.status == 2 and "mine.toml exists already" in ran.err
    assert (tmp_path / "mine.toml").read_text() == "[learn]\nbatch = 8\n"


def test_init_into_a_folder_that_is_not_there_is_told(dwell: Run) -> None:
    ran = dwell("init", "gone/dwell.toml")
    assert ran.status == 2 and "gone/dwell.toml cannot be written" in ran.err


class FakeBroker:
    """Stands in for the embedded broker; the test's own process gets the signal it waits for."""

    calls: ClassVar[list[str]]
    signal_at_start: ClassVar[int | None] = None

    def __init__(self, data_dir: Path) -> None:
        self.log_file = data_dir / "broker.log"
        type(self).calls = [f"data below {data_dir}"]

    def start(self, _: Callable[[str], None]) -> str:
        self.calls.append("start")
        return "127.0.0.1:19092"

    @property
    def alive(self) -> bool:
        if self.signal_at_start is None:
            return False
        os.kill(os.getpid(), self.signal_at_start)
        return True

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.fixture
def fake_broker(monkeypatch: pytest.MonkeyPatch) -> type[FakeBroker]:
    module = SimpleNamespace(EmbeddedBroker=FakeBroker)
    monkeypatch.setitem(sys.modules, "ops.broker", module)
    monkeypatch.setattr(FakeBroker, "signal_at_start", None)
    return FakeBroker


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_broker_prints_its_address_and_stops_in_order_at_a_signal(
    dwell: Run,
    fake_broker: type[FakeBroker],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(fake_broker, "signal_at_start", number)
    try:
        ran = dwell("broker", "--data-dir", "D")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ran.status, ran.out) == (0, "127.0.0.1:19092\n")
    assert fake_broker.calls == ["data below D", "start", "stop"]


def test_a_broker_that_ends_by_itself_is_told(dwell: Run, fake_broker: type[FakeBroker]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        ran = dwell("broker", "--data-dir", "D")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ran.status == 2 and "ended by itself; D/broker.log says why" in ran.err
    assert fake_broker.calls[-1] == "stop"


@pytest.mark.parametrize(
    ("raised", "status", "err"),
    [
        (UserError("the port\nis taken"), 2, "dwell: the port is taken\n"),
        (OSError("the disk is full"), 2, "dwell: the disk is full\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_role_raises_becomes_an_exit_status(
    dwell: Run,
    fake_broker: type[FakeBroker],
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    status: int,
    err: str,
) -> None:
    def fail(*_: object) -> str:
        raise raised

    monkeypatch.setattr(fake_broker, "__init__", fail)
    ran = dwell("broker")
    assert (ran.status, ran.err) == (status, err)


def test_help_loads_neither_torch_nor_kafka_nor_the_service() -> None:
    program = (
        "import sys, contextlib, ops.cli\n"
        "with contextlib.suppress(SystemExit):\n"
        "    ops.cli.main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'scipy', 'kafka', 'aiokafka', 'faust', 'fastapi', 'aiohttp'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "loaded: []" in ran.stdout


def test_version_is_that_of_the_distribution(dwell: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.results.version", lambda _: "1.2.3")
    assert dwell("version").out == "dwell 1.2.3\n"
