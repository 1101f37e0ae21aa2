"""What an operator may set about serving."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from storage.settings import Count, Name, PathOrNone, Port, Positive, Share, Whole


@dataclass(frozen=True)
class ActorSettings:
    """The HTTP service and how it draws slates."""

    host: Name = "127.0.0.1"
    """Address the HTTP service listens on."""
    port: Port = 8080
    """Port of the HTTP service; 0 takes a free one."""
    slate: Count = 6
    """Items of a slate where a request does not say."""
    max_slate: Count = 50
    """Most items a request may ask for."""
    temperature: Positive = 1.0
    """Temperature of the draw; logged, and used again by learner and audit."""
    exclude_shown: Whole = 128
    """A user's last shown items that are not shown again."""
    decoding: Literal["sample", "beam"] = "sample"
    """How the policy chooses: drawn without replacement, or the most probable by deterministic beam search; learning
    takes what a beam has shown as it takes another system's."""
    beam: Annotated[int, Meta(ge=1, le=512)] = 32
    """Width of the beam; a request may ask for as many items."""
    author_cap: Whole = 0
    """Most items of one author in a slate; what is drawn beyond it is skipped and logged. 0: no cap."""
    explore_slots: Whole = 0
    """Last slots of a slate that are kept for exploration, with a law of their own."""
    explore_new: Share = 0.5
    """Probability that such a slot shows a new item, where there is one; else any item, all alike."""
    explore_span: Count = 1000
    """An item is new for this many changes of the catalogue."""
    patience_s: Positive = 1.0
    """A slate that is not drawn after this long is a fallback: any valid items, and logged as such."""
    max_catalogue_age_s: Positive = 600.0
    """An actor that has not heard from Kafka for this long serves no more: what it shows may be deleted."""
    max_waiting: Count = 512
    """Requests that may wait to be decoded; further ones are told to come again (429)."""
    trusted_key: PathOrNone = ""
    """Public key of the learner; versions that it did not sign are refused. Empty: no signature is asked for."""
    max_batch: Count = 64
    """Most requests decoded together."""
    kafka_patience_s: Positive = 1.0
    """Events not acknowledged by Kafka for this long go to the spool, and all later ones until it is back."""
    spool_mb: Count = 512
    """Bound of the spool, MiB; when it is full, requests are refused (503)."""
    spool_fsync: bool = False
    """Force the spool to the disk before answering: it then survives the machine, not the process alone."""
    copy_every_s: Positive = 10.0
    """The weights that are served are copied to the disk at most this often, for a start while Kafka is away."""
    member: Annotated[
        str, Meta(pattern=r"^[A-Za-z0-9._-]{1,200}$", description="letters, digits, . _ -")
    ] = "actor"
    """Name of this actor among those that share the data directory: spool and copy are its own."""

    @property
    def beam_width(self) -> int:
        """Width of the beam; 0 where slates are drawn."""
        return self.beam if self.decoding == "beam" else 0

    @property
    def most(self) -> int:
        """Items that a request may ask for."""
        return min(self.max_slate, self.beam_width or self.max_slate)
