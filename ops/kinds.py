"""What a configuration key allows, read from the annotation of its field.

A field is a `bool`, `int`, `float` or `str`, a `Literal` of texts, or one of these annotated with
`msgspec.Meta`. msgspec itself could check the values, but its messages name Python's types and
stop short of what would be allowed.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from msgspec import Meta

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a table",
}
_TOO_LARGE = 2.0**63  # TOML's integers, and those of Kafka's own configuration, have 64 bits


@dataclass(frozen=True)
class Kind:
    """The type of a key, its range and its choices, if it has them."""

    base: type
    meta: Meta
    choices: tuple[str, ...]

    def allowed(self) -> str:
        """The allowed values in words, to end the sentence 'allowed is ...'."""
        if self.choices:
            *most, last = (json.dumps(choice) for choice in self.choices)
            return f"{', '.join(most)} or {last}" if most else last
        bounds = [
            f"{word} {bound}"
            for word, bound in (
                ("above", self.meta.gt),
                ("at least", self.meta.ge),
                ("below", self.meta.lt),
                ("at most", self.meta.le),
            )
            if bound is not None
        ]
        return (
            self.meta.description
            or " ".join([_TYPE_NAMES[self.base], " and ".join(bounds)]).strip()
        )

    def fault(self, value: object) -> str | None:
        """What is wrong with a value, to follow it in a sentence; None for an allowed value.

        A whole number is allowed where a number is, but is not converted here.
        """
        if type(value) is not self.base and not (self.base is float and type(value) is int):
            return f"is {_TYPE_NAMES.get(type(value), 'a date or time')}"
        if isinstance(value, str):
            return self._fault_of_text(value)
        if isinstance(value, int | float):
            return self._fault_of_number(value)
        return None

    def _fault_of_text(self, value: str) -> str | None:
        if self.choices:
            return None if value in self.choices else "is none of the choices"
        if not value.isprintable():
            return "holds a character that cannot be printed"
        if len(value) < (self.meta.min_length or 0):
            return "is empty"
        if self.meta.pattern is not None and not re.fullmatch(self.meta.pattern, value):
            return "has another form"
        return None

    def _fault_of_number(self, value: float) -> str | None:
        if abs(value) >= _TOO_LARGE:
            return "is too large"
        if math.isnan(value):
            return "is not a number"
        meta = self.meta
        outside = (
            (meta.gt is not None and value <= meta.gt)
            or (meta.ge is not None and value < meta.ge)
            or (meta.lt is not None and value >= meta.lt)
            or (meta.le is not None and value > meta.le)
        )
        return "is out of range" if outside else None


def kinds(settings: type[Any]) -> dict[str, Kind]:
    """The keys of a settings class, in the order of their fields."""
    hints = get_type_hints(settings, include_extras=True)
    return {key: _kind(hint) for key, hint in hints.items()}


def _kind(hint: Any) -> Kind:
    meta = Meta()
    if get_origin(hint) is Annotated:
        hint, meta = get_args(hint)
    if get_origin(hint) is Literal:
        return Kind(str, meta, get_args(hint))
    return Kind(hint, meta, ())
