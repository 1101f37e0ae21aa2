"""The import rule: one way only, through public names, and each room without what it must never hold."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("storage", "streams", "learner", "actor", "ops")

MAY_IMPORT = {
    "storage": {"storage"},
    "streams": {"streams", "storage"},
    "learner": {"learner", "streams", "storage"},
    "actor": {"actor", "learner", "streams", "storage"},
    "ops": set(ROOMS),
}
POLICY_DEFINITION = {
    "catalogue",
    "context",
    "context_processor",
    "decoder",
    "masking",
    "policy",
    "presets",
    "semantic_ids",
    "settings",
    "sorted_keys",
    "valid_ids",
    "valid_tree",
}
HTTP = {"fastapi", "uvicorn", "starlette", "aiohttp", "httpx", "requests", "urllib.request", "http"}
NEVER = {
    "storage": {"kafka", "aiokafka", "faust", "torch", *HTTP},
    "streams": {"torch", *HTTP},
    "learner": HTTP,
    "actor": {"torch.optim"},
    "ops": set(),
}


class Import(NamedTuple):
    """`from module import name` in a file; name is empty for `import module`."""

    file: str
    module: str
    name: str


def imports(room: str) -> Iterator[Import]:
    for path in sorted((ROOT / room).rglob("*.py")):
        file = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (Import(file, alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                yield from (Import(file, node.module or "", alias.name) for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_read(room: str) -> None:
    assert list(imports(room)), "the rules below would hold of nothing"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    forbidden = set(ROOMS) - MAY_IMPORT[room]
    wrong = [one for one in imports(room) if one.module.partition(".")[0] in forbidden]
    assert wrong == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_holds_what_it_must_never(room: str) -> None:
    wrong = [
        one
        for one in imports(room)
        for package in NEVER[room]
        if within(one.module, package) or within(f"{one.module}.{one.name}", package)
    ]
    assert wrong == []


def test_actors_take_the_definition_of_the_policy_and_nothing_else_from_the_learner() -> None:
    taken = {
        f"{one.module}.{one.name}".split(".")[1]
        for one in imports("actor")
        if within(one.module, "learner")
    }
    assert taken
    assert taken <= POLICY_DEFINITION


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_takes_a_private_name_of_another(room: str) -> None:
    wrong = [
        one
        for one in imports(room)
        if one.module.partition(".")[0] in ROOMS
        and (
            one.name.startswith("_") or any(part.startswith("_") for part in one.module.split("."))
        )
    ]
    assert wrong == []
