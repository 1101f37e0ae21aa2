"""Reads columns of large CSV files fast, and counts the lines that are not what they should be.

Notable choices
- Numbers are parsed in blocks of whole lines by numpy; only a block with an odd line (too few
  fields, no number, quotes) goes through the csv module line by line.
- Nothing in a file ends the reading: a bad line is counted, and the first one is kept with its
  place and reason. A record is one line, so an open quote cannot swallow the lines after it.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ops.errors import UserError

BLOCK_BYTES: Final = 8 << 20


@dataclass(frozen=True)
class Column:
    """A column of whole numbers from 0 to `most`: its name in the file, the field it becomes."""

    name: str
    field: str
    most: int


@dataclass
class Malformed:
    """Lines that could not be read: how many, and the first of them."""

    count: int = 0
    file: str = ""
    line: int = 0
    why: str = ""

    def note(self, path: Path, line: int, why: str) -> None:
        """Count one line; the first one noted is remembered."""
        if not self.count:
            self.file, self.line, self.why = path.name, line, why
        self.count += 1

    def __str__(self) -> str:
        if not self.count:
            return "no malformed lines"
        lines = "1 malformed line" if self.count == 1 else f"{self.count:,} malformed lines"
        return f"{lines}, the first: {self.file} line {self.line} {self.why}"


def check_columns(path: Path, names: Sequence[str]) -> None:
    """Raises `UserError` if the file cannot be read or its header lacks one of the names."""
    with _open(path) as file:
        _header(path, file, names)


def read_numbers(
    paths: Sequence[Path],
    columns: Sequence[Column],
    dtype: np.dtype[np.void],
    malformed: Malformed,
    block_bytes: int = BLOCK_BYTES,
) -> NDArray[np.void]:
    """The given columns of all files, one after the other, as records `[n]` of `dtype`."""
    most_C = np.array([column.most for column in columns], np.float64)
    records = [np.zeros(0, dtype)]
    for path in paths:
        with _open(path) as file:
            where, width = _header(path, file, [column.name for column in columns])
            for first_line, block in _blocks(file, block_bytes):
                values_NC, lines_N, bad = _parse(block, columns, where, width)
                right_NC = (values_NC >= 0) & (values_NC <= most_C)
                right_NC &= values_NC == np.floor(values_NC)
                right_N = right_NC.all(axis=1)
                for i in np.flatnonzero(~right_N):
                    c = int(np.flatnonzero(~right_NC[i])[0])
                    why = _not_whole(columns[c].name, f"{values_NC[i, c]:.15g}", columns[c].most)
                    bad.append((int(lines_N[i]), why))
                for line, why in sorted(bad):
                    malformed.note(path, first_line + line, why)
                record = np.zeros(int(right_N.sum()), dtype)
                for c, column in enumerate(columns):
                    record[column.field] = values_NC[right_N, c]
                records.append(record)
    return np.concatenate(records)


def read_texts(
    paths: Sequence[Path], names: Sequence[str], malformed: Malformed
) -> Iterator[tuple[Path, int, list[str]]]:
    """File, line number and the named fields of each line that has all its fields."""
    for path in paths:
        with _open(path) as file:
            where, width = _header(path, file, names)
            for number, line in enumerate(file, 2):
                try:
                    fields = _fields(line, width)
                except ValueError as error:
                    malformed.note(path, number, str(error))
                    continue
                if fields:
                    yield path, number, [fields[i] for i in where]


def whole(text: str, name: str, most: int) -> int:
    """A whole number from 0 to `most`, also one written 12.0; raises `ValueError` that says so."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 <= value <= most and value == int(value)):
        raise ValueError(_not_whole(name, repr(text), most))
    return int(value)


def _not_whole(name: str, value: str, most: int) -> str:
    return f"has {name} {value}, expected a whole number from 0 to {most}"


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _header(path: Path, file: BinaryIO, names: Sequence[str]) -> tuple[list[int], int]:
    """Read the first line: where the named columns stand, and how many there are in all."""
    header = file.readline().decode("utf-8-sig", errors="replace")
    there = [name.strip() for name in next(csv.reader([header]), [])]
    missing = [name for name in names if name not in there]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; "
            f"its first line must name {', '.join(names)}, other columns are ignored"
        )
    return [there.index(name) for name in names], len(there)


def _blocks(file: BinaryIO, block_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The rest of the file in blocks of whole lines, and the number of each block's first line."""
    line, rest = 2, b""
    while chunk := file.read(block_bytes):
        cut = chunk.rfind(b"\n") + 1
        if cut:
            block = rest + chunk[:cut]
            yield line, block
            line += block.count(b"\n")
        rest = chunk[cut:] if cut else rest + chunk
    if rest:
        yield line, rest


def _parse(
    block: bytes, columns: Sequence[Column], where: list[int], width: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], list[tuple[int, str]]]:
    """Numbers `[n, columns]`, their lines `[n]` (first of the block 0), (line, why) of the rest.

    Doubles hold every whole number in range exactly, and show a fraction or a nan for what it is.
    """
    characters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(block))
    commas = np.searchsorted(np.flatnonzero(characters == ord(",")), ends)
    if (np.diff(commas, prepend=0) == width - 1).all():
        try:
            values = np.loadtxt(
                io.BytesIO(block), np.float64, None, delimiter=",", usecols=where, ndmin=2
            )
            if len(values) == len(ends):
                return values, np.arange(len(values)), []
        except ValueError:
            pass
    return _parse_lines(block, columns, where, width)


def _parse_lines(
    block: bytes, columns: Sequence[Column], where: list[int], width: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], list[tuple[int, str]]]:
    """What `_parse` gives, one line at a time."""
    values: list[list[int]] = []
    lines: list[int] = []
    bad: list[tuple[int, str]] = []
    for number, line in enumerate(block.split(b"\n")):
        try:
            fields = _fields(line, width)
            if fields:
                values.append(
                    [
                        whole(fields[i], column.name, column.most)
                        for i, column in zip(where, columns, strict=True)
                    ]
                )
                lines.append(number)
        except ValueError as error:
            bad.append((number, str(error)))
    table = np.array(values, np.float64).reshape(len(values), len(where))
    return table, np.array(lines, np.int64), bad


def _fields(line: bytes, width: int) -> list[str]:
    """The fields of a line, none of a blank one; raises `ValueError` that says what is wrong."""
    text = line.decode("utf-8", errors="replace").rstrip("\r\n")
    if not text.strip():
        return []
    try:
        fields = next(csv.reader([text]))
    except csv.Error as error:
        raise ValueError(f"is not CSV: {error}") from None
    if len(fields) != width:
        raise ValueError(f"has {len(fields)} of {width} fields")
    return fields
