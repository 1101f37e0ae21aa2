"""One update from samples, the first time and again: what live, serial, recovery and audit share.

An update is a function of weights, optimisers, the step's samples in the order of the log, and the catalogue's
versions. So a journal entry and the log give the same update again, to the last bit on the same machine with the
same number of threads (contract of the policy, "Versions").
"""

from collections.abc import Container, Sequence

from learner.batch import Batch, assemble
from learner.catalogue import Catalogue
from learner.journal import Polled, sort_out, undo
from learner.step import StepMetrics, Trainer
from streams.events import Sample
from streams.weights import StepEntry


class JournalError(ValueError):
    """A journal that cannot be followed again; the message says where and why."""


def train(trainer: Trainer, samples: list[Sample], catalogue: Catalogue) -> StepMetrics | None:
    """One update on `samples`; raises `ValueError` or `LookupError`, and changes nothing, if one is of no use.

    With several ranks these are the samples of this one, none perhaps, and all must ask.
    """
    return trainer.step(_batch(trainer, samples, catalogue))


def train_again(
    trainer: Trainer,
    entry: StepEntry,
    taken: Sequence[Polled],
    buried: Container[tuple[int, int]],
    catalogue: Catalogue,
    condemned: Sequence[tuple[int, int]] = (),
    undone: bool = False,
) -> None:
    """A journalled step once more: `taken` are the records of its ranges.

    `buried` has the (partition, offset) of samples that became dead letters, `condemned` the versions (first, last)
    whose samples are dropped. A step that was `undone` is accounted for and not made. Raises `JournalError` where
    the log does not hold what the journal says.
    """
    chosen, found = sort_out(taken, condemned)
    usable = [one for one in chosen if (one.partition, one.offset) not in buried]
    unusable = len(chosen) - len(usable)
    found.trained -= unusable
    found.without_target += unusable
    if undone:
        undo([found])
    there, noted = (
        (each.trained, each.control, each.without_target, each.condemned) for each in (found, entry)
    )
    if there != noted:
        raise JournalError(
            f"the step over {entry.ranges} trained on, set aside as control, found without target, and dropped as "
            f"condemned {noted} samples, the log has {there}"
        )
    if undone or not usable:
        return
    of_rank: list[list[Sample]] = [[] for _ in range(entry.ranks)]
    for one in usable:
        if one.sample is not None:
            of_rank[one.partition % entry.ranks].append(one.sample)
    try:
        trainer.step(*(_batch(trainer, samples, catalogue) for samples in of_rank))
    except (ValueError, LookupError) as error:
        raise JournalError(f"the step over {entry.ranges}: {error}") from None


def _batch(trainer: Trainer, samples: list[Sample], catalogue: Catalogue) -> Batch:
    preset = trainer.model.preset
    return assemble(samples, catalogue.valid, preset.context, trainer.model.user_rows)
