"""`dwell eval faithfulness`: its verdicts, its files, and that a model that is not the report's is told."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from learner.presets import PRESETS
from ops import faithfulness
from ops.cli import main
from ops.eval_faithfulness import checks, document, results
from ops.faithfulness import Cell, tables

ROOT = Path(__file__).parents[2]


def status(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "faithfulness", *arguments])
    return ended.value.code


def test_a_cell_is_met_within_a_hundredth_or_as_printed() -> None:
    assert Cell("", 100.0, 2, 100.9).meets
    assert not Cell("", 100.0, 2, 101.1).meets
    assert Cell("", 7.0, 0, 6.51).meets
    assert not Cell("", 7.0, 0, 6.49).meets
    assert Cell("", 0.5, 1, 0.54).meets
    assert Cell("", 2.0, 2, 3.0, "other").difference == 0.5


def test_every_claimed_cell_is_met_and_every_other_says_why() -> None:
    found = tables()
    cells = [cell for table in found for cell in table.cells]
    assert all(cell.meets for cell in cells if cell.claimed)
    assert sum(cell.claimed for cell in cells) == 32
    assert all(check.ok for check in checks(found))
    names = {table.key: {cell.name for cell in table.cells} for table in found}
    assert names["compute"] == names["as_built"]
    assert {f"{name}B" for name in ("0.1", "0.2", "0.5", "1", "2", "4", "8")} < names["sizes"]


def test_the_command_writes_its_cells_and_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert status("--json", str(path)) == 0
    found = json.loads(path.read_text())
    assert found["command"] == "dwell eval faithfulness"
    cell = found["results"]["compute"]["lazy decoder-only, 1B"]
    assert (cell["report"], cell["meets"], cell["claimed"], cell["reason"]) == (
        18.89,
        True,
        True,
        "",
    )
    assert abs(cell["difference"]) < 1e-3
    assert all(check["ok"] for check in found["checks"])
    assert {check["name"] for check in found["checks"]} >= {"compute", "parameters_as_built"}


def test_a_model_of_another_size_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wider = replace(PRESETS["1B"], d_embed=2 * PRESETS["1B"].d_embed)
    monkeypatch.setattr(faithfulness, "PRESETS", {**PRESETS, "1B": wider})
    path = tmp_path / "results.json"
    assert status("--json", str(path)) == 1
    failed = {check["name"] for check in json.loads(path.read_text())["checks"] if not check["ok"]}
    assert failed == {"compute", "sharing"}


def test_the_document_is_what_the_command_writes(tmp_path: Path) -> None:
    path = tmp_path / "faithfulness.md"
    assert status("--markdown", str(path)) == 0
    assert path.read_text() == document(tables())
    told = "run `dwell eval faithfulness --markdown docs/faithfulness.md`"
    assert (ROOT / "docs/faithfulness.md").read_text() == path.read_text(), told


def test_a_document_in_no_folder_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("--markdown", str(tmp_path / "no" / "file.md")) == 2
    assert "name a file in a folder that exists" in capsys.readouterr().err


def test_results_hold_every_cell() -> None:
    found = tables()
    assert {key: len(cells) for key, cells in results(found).items()} == {  # type: ignore[arg-type]
        table.key: len(table.cells) for table in found
    }
