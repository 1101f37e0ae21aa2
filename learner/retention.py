"""Which versions are in the log, and which of their records have had their time. Pure.

Anchors expire by the publisher's tombstones, the chain by its topic's retention. An anchor is needed as long as a
version may be asked for that is reached from it: until the next anchor is past the horizon too.
"""

from dataclasses import dataclass, field
from itertools import pairwise

from streams.weights import Manifest, record_keys


@dataclass(frozen=True)
class _Anchor:
    created_ms: int
    keys: list[str]


@dataclass
class Retention:
    """Folded over the records of both topics, and over what is published since."""

    anchors: dict[int, _Anchor] = field(default_factory=dict)
    made: dict[int, int] = field(default_factory=dict)
    """When each version was made, of the chain."""

    def anchor(self, manifest: Manifest) -> None:
        """A full version is in the log."""
        self.anchors[manifest.version] = _Anchor(manifest.created_ms, record_keys(manifest))

    def forget(self, version: int) -> None:
        """An anchor was deleted."""
        self.anchors.pop(version, None)

    def expired(self, before_ms: int, named: set[int], most: int) -> dict[int, list[str]]:
        """The keys of anchors that nobody needs who asks for versions since `before_ms`; `named` are kept."""
        ordered = sorted(self.anchors)
        past = [
            version
            for version, following in pairwise(ordered)
            if self.anchors[following].created_ms < before_ms and version not in named
        ]
        return {version: self.anchors[version].keys for version in past[:most]}

    def trim(self, before_ms: int, named: set[int]) -> None:
        """Forget when versions were made that are past the horizon."""
        for version in [one for one, at in self.made.items() if at < before_ms]:
            if version not in named:
                del self.made[version]

    def first_of_each(self, span_ms: int) -> set[int]:
        """Of the versions within the horizon, the first of each span of time."""
        first: dict[int, int] = {}
        for version, at in sorted(self.made.items()):
            first.setdefault(at // span_ms, version)
        return set(first.values())
