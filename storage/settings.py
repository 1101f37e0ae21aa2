"""Where state is kept."""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

# The ranges of settings in all packages stand here, since every other package may import this one.
Name = Annotated[str, Meta(min_length=1, description="text that is not empty")]
PathOrNone = Annotated[str, Meta(description="a path, or empty")]
Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(gt=0, lt=1)]


@dataclass(frozen=True)
class StorageSettings:
    """Paths."""

    data_dir: Name = "dwell-data"
    """Everything that must outlive a process lies below this folder."""
