"""Logging of a role: our own words from INFO on, libraries from WARNING on and not sixty times a second.

While a broker is away aiokafka repeats itself without end; one line a minute says as much.
"""

import logging
from typing import Final

SAME_LINE_S: Final = 60.0


class Seldom(logging.Filter):
    """Lets a library's message pass once in `SAME_LINE_S`; our own always."""

    def __init__(self) -> None:
        super().__init__()
        self._spoke: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        message = (record.name, str(record.msg))
        if record.name.startswith("dwell."):
            return True
        if record.created - self._spoke.get(message, float("-inf")) < SAME_LINE_S:
            return False
        self._spoke[message] = record.created
        return True


def log_as_role() -> None:
    """Write to standard error, as a role of the loop does."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    handler.addFilter(Seldom())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("dwell").setLevel(logging.INFO)
