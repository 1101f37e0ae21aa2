"""A store that is rebuilt while the last whole one stays: generations of keys, of which one is current.

What is read back from elsewhere at each start cannot be written over what an earlier start has kept: keys that are
gone there would stay here. So a start writes a generation of its own, and what was kept before counts until that is
whole.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from storage.kv import RocksKv, StoreError

_NUMBER_BYTES: Final = 4
_CURRENT: Final = bytes(_NUMBER_BYTES) + b"current"


class Generations:
    """Pairs of the current generation, until `begin`; then of one that is current after `adopt`.

    For one thread at a time, and one process; everything raises `StoreError`.
    """

    def __init__(self, folder: Path) -> None:
        self._kv = RocksKv(folder)
        current = self._kv.get(_CURRENT)
        self._number = int.from_bytes(current or b"")
        self.whole = current is not None
        """Whether what is read and written here is current."""

    def begin(self) -> None:
        """From now on a new generation, empty."""
        self._number += 1
        self._kv.erase(
            _first(self._number), _first(self._number + 2)
        )  # what a start left that was cut short
        self.whole = False

    def adopt(self) -> None:
        """Let the generation that was begun be the current one, and forget the others."""
        self._kv.write({_CURRENT: _first(self._number)})
        self.whole = True
        self._kv.erase(_first(1), _first(self._number))

    def clear(self) -> None:
        """Forget everything."""
        self._kv.write({_CURRENT: None})
        self._kv.erase(_first(1), _first(self._number + 2))
        self._number, self.whole = 0, False

    def get(self, key: bytes) -> bytes | None:
        """The value, or None."""
        return self._kv.get(_first(self._number) + key)

    def write(self, batch: Mapping[bytes, bytes | None]) -> None:
        """Put all pairs, delete the keys whose value is None; whole or not at all."""
        place = _first(self._number)
        self._kv.write({place + key: value for key, value in batch.items()})

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """All pairs whose key starts with `prefix`, in key order."""
        place = _first(self._number)
        for key, value in self._kv.scan(place + prefix):
            yield key[_NUMBER_BYTES:], value

    def close(self) -> None:
        """Release the store."""
        self._kv.close()


def _first(number: int) -> bytes:
    if not 0 <= number < 1 << 8 * _NUMBER_BYTES:
        raise StoreError(f"there is no generation {number}")
    return number.to_bytes(_NUMBER_BYTES)
