"""`dwell eval faithfulness`: the report's tables beside what is counted here; it also writes docs/faithfulness.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from learner.counting import parameters
from learner.decoder import LazyDecoder
from learner.presets import PRESETS, REPORT_CODES
from ops.config import Config
from ops.errors import UserError
from ops.faithfulness import BATCH, LOAD, TOLERANCE, Cell, Table, tables
from ops.results import Check, exit_status, write_results

_HEAD: Final = f"""# Faithful to the report, cell by cell

Written by `dwell eval faithfulness --markdown docs/faithfulness.md`; its exit status is 1 where a cell that is
claimed here is not met. Every figure of the OneRec-V2 report (arXiv 2508.20900) that can be counted stands beside
ours: N = {LOAD.positions} context positions, k = {LOAD.targets} targets that share a context, batch {BATCH},
3 x {REPORT_CODES} codes. Met means within {100 * TOLERANCE:.0f} %, or equal as printed. Losses need the report's
data and are not here.

What the cells tell, besides that they are met:
- **The FFN is 4 d_model wide.** The report does not say so. The compute of its encoder-decoders, at the widths and
  depths of the lazy decoders, follows to the printed digit from 16 d² an encoder layer, 18 d² a decoder layer, and
  6:6 and 4:8, 7:7 and 5:9, 9:9 and 6:12 layers.
- **Lazy and naive decoders are counted by their names**: three positions, or N / k + 3, times exactly 0.1, 0.5 or
  1 x 10^9; attention and the context's map come on top. Built, "0.1B" has 0.104 x 10^9 parameters, "1B" 1.086.
- **Its encoder-decoders are counted without key and value maps** in cross attention, and with an encoder whose
  positions attend to N / k others. One that has both costs more (last table), so against it the lazy decoder saves
  more than the report says, not less.
- The context is one map of 3 embedding widths -> d_context, once a request: a further set of keys costs 1 / k of it.

How it is counted: `learner/counting.py`. Parameters are held against models built on torch's meta device, compute
against torch's own FLOP counter at small sizes (`tests/learner/test_counting.py`).
"""


def run(config: Config, json_path: Path | None, markdown: Path | None) -> int:
    """Count, print, and write what was asked for; returns the exit status."""
    console = Console()
    if markdown is not None and (markdown.is_dir() or not markdown.parent.is_dir()):
        raise UserError(f"--markdown {markdown}: name a file in a folder that exists.")
    found = tables()
    with console.status("building every preset without memory"):
        held_to = [*checks(found), built_check()]
    for table in found:
        _print(table, console)
    for check in held_to:
        console.print(f"{check.name}: {check.value}, {'ok' if check.ok else 'failed'}")
    if json_path is not None:
        write_results(json_path, "dwell eval faithfulness", config, [], results(found), held_to)
    if markdown is not None:
        try:
            markdown.write_text(document(found), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--markdown {markdown}: this cannot be written ({error.strerror})."
            ) from None
    return exit_status(held_to)


def checks(found: Sequence[Table]) -> list[Check]:
    """One check a table: all cells that are claimed are met."""
    made = []
    for table in found:
        claimed = [cell for cell in table.cells if cell.claimed]
        met = sum(cell.meets for cell in claimed)
        if claimed:
            goal = f"{len(claimed)} of {len(claimed)} within {100 * TOLERANCE:.0f} % or as printed"
            made.append(Check(table.key, f"{met} of {len(claimed)}", goal, met == len(claimed)))
    return made


def built_check() -> Check:
    """Every preset's counted parameters against those of the model itself."""
    equal = 0
    for preset in PRESETS.values():
        with torch.device("meta"):
            model = LazyDecoder(preset, REPORT_CODES, user_rows=1)
        built = sum(value.numel() for value in model.parameters())
        equal += built == sum(parameters(preset, REPORT_CODES, user_rows=1).values())
    goal = f"{len(PRESETS)} of {len(PRESETS)}"
    return Check("parameters_as_built", f"{equal} of {len(PRESETS)}", goal, equal == len(PRESETS))


def results(found: Sequence[Table]) -> dict[str, object]:
    """Cells by table and name."""
    return {
        table.key: {
            cell.name: {
                "report": cell.report,
                "counted": cell.found,
                "difference": cell.difference,
                "meets": cell.meets,
                "claimed": cell.claimed,
                "reason": cell.reason,
            }
            for cell in table.cells
        }
        for table in found
    }


def document(found: Sequence[Table]) -> str:
    """docs/faithfulness.md."""
    lines = [_HEAD]
    for table in found:
        lines += [
            f"## {table.title}",
            "",
            "| | report | counted | difference | |",
            "|---|---|---|---|---|",
        ]
        for cell in table.cells:
            lines.append("| " + " | ".join([cell.name, *_figures(cell)]) + " |")
        lines.append("")
    return "\n".join(lines)


def _print(table: Table, console: Console) -> None:
    shown = RichTable("", "report", "counted", "difference", "", title=table.title)
    for cell in table.cells:
        shown.add_row(cell.name, *(Text(figure) for figure in _figures(cell)))
    console.print(shown)


def _figures(cell: Cell) -> list[str]:
    digits = cell.digits + (2 if cell.digits < 2 else 0)
    verdict = "missed" if not cell.meets else "met" if cell.close else "met as printed"
    return [
        f"{cell.report:.{cell.digits}f}",
        f"{cell.found:.{digits}f}",
        f"{100 * cell.difference:+.2f} %".replace("-0.00", "+0.00"),
        verdict if cell.claimed else f"differs: {cell.reason}",
    ]
