"""Which catalogue version was the last one so long ago: behind it the index of valid IDs is pruned. Pure.

Notable choices
- By the records' timestamps, for the log's compaction goes by them, too: the catalogue's records stay whole for
  `kafka.retention_s`, and exposures and samples are kept as long. An older sample may come all the same (from a
  spool, or when join and learner were both away for long): its tree is not kept, nor could a learner that starts
  make it again from the log, so it becomes a dead letter.
- Marks stand a 256th of the span apart, each at the last version before it: what is asked for is never too new.
"""

from collections import deque
from typing import Final

MARKS: Final = 256


class Horizon:
    """When versions were written, as far back as `span_ms`."""

    def __init__(self, span_ms: int) -> None:
        self._span_ms = span_ms
        self._step_ms = max(1, span_ms // MARKS)
        self._marks: deque[tuple[int, int]] = deque()
        """(written, version), both ascending."""
        self._passed = -1

    def see(self, version: int, written_ms: int) -> None:
        """A record, in the order of the log; clocks of writers that go back do not count."""
        if self._marks:
            last_ms, _ = self._marks[-1]
            written_ms = max(written_ms, last_ms)
            if written_ms // self._step_ms == last_ms // self._step_ms:
                self._marks.pop()
        self._marks.append((written_ms, version))

    def passed(self, now_ms: int) -> int:
        """The newest marked version that was there `span_ms` ago; -1 where there was none."""
        while self._marks and self._marks[0][0] <= now_ms - self._span_ms:
            _, self._passed = self._marks.popleft()
        return self._passed
