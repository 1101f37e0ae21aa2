"""The warm-up before the loop: likelihood of the top-quartile plays of an earlier log.

Imitating all of a mediocre policy's exposures teaches popularity; its top quartile teaches taste (reference
measurements, section 2).
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from learner.batch import Batch, assemble
from learner.catalogue import Catalogue
from learner.context import user_row
from learner.decoder import LazyDecoder
from learner.policy import build
from learner.semantic_ids import Codebooks
from learner.settings import LearnSettings, PolicySettings, PretrainSettings
from learner.step import Trainer
from streams.events import Sample

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps in all, and the running loss in nats per level."""


def pretrain(
    policy: PolicySettings,
    settings: PretrainSettings,
    seed: int,
    codebooks: Codebooks,
    samples: list[Sample],
    catalogue: Catalogue,
    progress: Progress,
) -> tuple[Trainer, float]:
    """A new policy trained on `samples`; returns it and its last running loss (nats per level).

    Raises `ValueError` when no sample holds a positive.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = build(policy.shape, policy.codes, policy.user_rows)
    model.start_from_centroids(codebooks.centroids)
    trainer = Trainer(model, LearnSettings(supervised=1.0, entropy=0.0), settings.lr)
    chosen = [sample for sample in samples if any(item.advantage == 1 for item in sample.items)]
    if not chosen:
        raise ValueError("the log holds no play above the top-quartile cut to imitate")
    loss = float("nan")
    order = np.empty(0, np.int64)
    for step in range(settings.steps):
        if len(order) < settings.batch:
            order = np.concatenate([order, rng.permutation(len(chosen))])
        rows, order = order[: settings.batch], order[settings.batch :]
        batch = assemble(
            [chosen[row] for row in rows], catalogue.valid, model.preset.context, model.user_rows
        )
        metrics = trainer.step(imitation(batch))
        if metrics is not None:
            now = metrics.loss_supervised
            loss = now if np.isnan(loss) else 0.95 * loss + 0.05 * now
        progress(step + 1, settings.steps, loss)
    return trainer, loss


def imitation(batch: Batch) -> Batch:
    """The batch with its positives as the only targets, supervised."""
    targets = batch.targets._replace(
        advantage_Bk=torch.zeros_like(batch.targets.advantage_Bk),
        supervised_Bk=batch.targets.advantage_Bk > 0,
    )
    return batch._replace(targets=targets)


def copy_user_rows(model: LazyDecoder, pairs: Iterable[tuple[str, str]]) -> None:
    """Give the second user of each pair the row of the first."""
    table = model.context.users.weight
    with torch.no_grad():
        for source, target in pairs:
            rows = (user_row(user, model.user_rows) for user in (source, target))
            from_row, to_row = rows
            table[to_row] = table[from_row]
