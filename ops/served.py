"""The simulator's output: one JSON line a request, with the truth that the service never sees.

Notable choices
- Lines are appended whole; a crash can leave at most one line cut short, which is cut off before
  going on.
"""

import os
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from ops.errors import UserError


class Served(msgspec.Struct, kw_only=True):
    """One request of a simulated viewer, and what it was worth."""

    person: str
    user: str
    arm: str
    visit: int
    time_ms: int
    """Wall clock when the request was sent."""
    request: str
    policy_version: int
    asked: int
    """Slots asked for."""
    items: list[str]
    satisfaction: float
    """True satisfaction, summed over the shown items."""
    permuted: float
    """The same under the fixed permutation of persons."""
    oracle: float
    """Mean true satisfaction of the person's 100 best items not shown to this user before."""
    dwell_s: float
    """World seconds watched, summed over the slate."""
    seen: int
    """Positions that began to play."""
    dislikes: int
    complete: bool
    """False: the run ended during the viewing; `dwell_s` is what was watched until then."""


_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(Served)


def encode_line(served: Served) -> bytes:
    """The line, with its newline."""
    return _encoder.encode(served) + b"\n"


def read_lines(path: Path, offset: int = 0) -> tuple[list[Served], int]:
    """The whole lines from byte `offset` on, oldest first, and the offset to go on from.

    A missing file has no lines; a last line cut short is left for later. Raises UserError for a
    file that is not the simulator's output.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content.rfind(b"\n") + 1
    lines = []
    for number, text in enumerate(content[:whole].splitlines(), start=1):
        try:
            lines.append(_decoder.decode(text))
        except msgspec.DecodeError as error:
            place = f"line {number}" + (f" after byte {offset}" if offset else "")
            raise UserError(
                f"{path}, {place}, is not a line of the simulator's output ({error}): "
                "move the file away or name another one"
            ) from None
    return lines, offset + whole


def append_lines(path: Path, whole: int) -> BinaryIO:
    """Open for appending after the first `whole` bytes, as `read_lines` counted them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    out = path.open("ab")
    if out.tell() > whole:
        os.truncate(path, whole)
    return out
