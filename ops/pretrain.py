"""`dwell pretrain`: a policy warmed up on the watch history that precedes a feed log, as a start for lineages.

Notable choices
- Item vectors (`ops.item_vectors`) become semantic IDs, the history becomes samples (`ops.watched`), and the policy
  learns the likelihood of what was watched next.
- 128 codes a level (the log's profile): of 32 / 64 / 128 / 256 recall@50 on 1,812 held-out plays of the history was
  .251 / .265 / .290 / .282 after 800 steps. At 128 there are 6,957 leaves for 7,583 videos, at 32 about 4,100.
- The learning rate falls to 0 over the second half of the steps: .290 instead of .275.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from learner.batch import assemble
from learner.catalogue import Catalogue
from learner.checkpoint import Progress as Standing
from learner.checkpoint import to_bytes
from learner.decoder import LazyDecoder
from learner.policy import build, state_of
from learner.pretrain import imitation
from learner.semantic_ids import Codebooks, fit
from learner.settings import LearnSettings
from learner.step import Trainer
from ops.config import Config
from ops.errors import UserError
from ops.feedlog import FeedLog, Videos, WatchHistory, open_log
from ops.item_vectors import item_vectors
from ops.log_start import catalogue_of, histories_of
from ops.popularity import Popularity, hits_at
from ops.results import print_results, write_results
from ops.scoring import Ranker
from ops.start import Start, write
from ops.watched import Watched
from streams.blocks import digest_of
from streams.events import Sample, encode

K: Final = 50
FADE: Final = 0.02
"""Weight of the newest step in the running loss."""

Tell = Callable[[int, int, float], None]
"""Steps done, steps in all, running loss in nats per level."""


@dataclass(frozen=True)
class Pretrained:
    """A start, and how it went."""

    start: Start
    results: dict[str, Any]


def run(config: Config, directory: Path, out: Path | None, json_path: Path | None) -> int:
    """Pretrain on the log in `directory` and write the start to `out`; returns the exit status.

    Default for `out` is `pretrained` below the data directory.
    """
    console = Console()
    folder = out or Path(config.storage.data_dir) / "pretrained"
    done = pretrained(config, open_log(directory), folder, console)
    print_results(done.results, [], console)
    console.print(
        f"start written to {folder}: `dwell replay` takes it with --start-from {folder}, "
        f"`dwell up` also needs --set policy.codes={config.policy.codes}"
    )
    if json_path is not None:
        write_results(json_path, "pretrain", config, [config.learn.seed], done.results, [])
    return 0


def pretrained(config: Config, log: FeedLog, folder: Path, console: Console) -> Pretrained:
    """Make a start from what precedes the log, with progress; raises `UserError` without a watch history."""
    began = time.monotonic()
    if not log.history_files:
        raise UserError(
            f"no watch_history_*.csv in {log.directory}: a policy is warmed up on what users "
            "watched before the log."
        )
    with console.status("making item vectors and semantic IDs"):
        videos, history = log.read_videos(), log.read_history()
        rows = log.read_log().rows
        before_ms = int(rows["time_ms"][0]) if len(rows) else int(time.time() * 1000)
        _, vectors_VD = item_vectors(history, videos, seed=config.learn.seed)
        codebooks = fit(vectors_VD, config.policy.codes, config.learn.seed)
        upserts = catalogue_of(videos, vectors_VD, codebooks)
        catalogue = Catalogue(config.policy.codes)
        for offset, upsert in enumerate(upserts):
            catalogue.take(offset, upsert.item.encode(), encode(upsert))
    with bar(console) as progress:
        task = progress.add_task("pre-training", total=config.pretrain.steps)

        def tell(done: int, _: int, loss: float) -> None:
            text = f"pre-training, loss {loss:.3f} nats per level"
            progress.update(task, completed=done, description=text)

        model, watched, loss = train(config, codebooks, catalogue, history, videos, before_ms, tell)
    with console.status("measuring on held-out plays, writing the start"):
        held = held_out(model, catalogue, watched.held_out(), videos, history)
        start = write(
            folder,
            _checkpoint(config, model, codebooks),
            upserts,
            list(histories_of(history, videos, before_ms)),
            [],
        )
    leaves = len(catalogue.valid.tree(catalogue.version))
    results = {
        "steps": config.pretrain.steps,
        "loss": loss,
        "held_out": held,
        "videos": len(videos.id),
        "users": len(history.user),
        "plays": len(history.video),
        "codes": config.policy.codes,
        "codes_used": [len({entry.sid[level] for entry in upserts}) for level in range(3)],
        "leaves": leaves,
        "wall_s": time.monotonic() - began,
    }
    return Pretrained(start, results)


def train(
    config: Config,
    codebooks: Codebooks,
    catalogue: Catalogue,
    history: WatchHistory,
    videos: Videos,
    before_ms: int,
    tell: Tell,
) -> tuple[LazyDecoder, Watched, float]:
    """A new policy trained on the history, what it was trained on, and the last running loss.

    The same for the same settings. Raises `UserError` when the history holds nothing to predict.
    """
    torch.set_num_threads(config.policy.threads)
    torch.manual_seed(config.learn.seed)
    rng = np.random.default_rng(config.learn.seed)
    policy, settings = config.policy, config.pretrain
    model = build(policy.shape, policy.codes, policy.user_rows)
    model.start_from_centroids(list(codebooks.centroids))
    watched = Watched(history, videos, catalogue, before_ms, model.preset.context)
    if not len(watched):
        raise UserError("no play of the watch history is a long view or liked: nothing to imitate.")
    trainer = Trainer(model, LearnSettings(supervised=1.0, entropy=0.0), settings.lr)
    loss = float("nan")
    for step in range(settings.steps):
        _set_lr(trainer, settings.lr * min(1.0, 2.0 * (settings.steps - step) / settings.steps))
        samples = watched.draw(rng, settings.batch)
        batch = assemble(samples, catalogue.valid, model.preset.context, model.user_rows)
        metrics = trainer.step(imitation(batch))
        if metrics is not None:
            now = metrics.loss_supervised
            loss = now if np.isnan(loss) else (1 - FADE) * loss + FADE * now
        tell(step + 1, settings.steps, loss)
    return model, watched, loss


@torch.inference_mode()
def held_out(
    model: LazyDecoder,
    catalogue: Catalogue,
    samples: list[Sample],
    videos: Videos,
    history: WatchHistory,
) -> dict[str, float | int]:
    """How well the policy predicts held-out plays, beside the popularity of long views in the history."""
    if not samples:
        return {"plays": 0}
    batch = assemble(samples, catalogue.valid, model.preset.context, model.user_rows)
    logits_BkLK = model(model.process(batch.contexts), batch.sids_BkL)
    logp_BkLK = logits_BkLK.masked_fill(~batch.mask_BkLK, -torch.inf).log_softmax(-1)
    logp_BkL = logp_BkLK.gather(-1, batch.sids_BkL.unsqueeze(-1))
    number = {str(video): at for at, video in enumerate(videos.id.tolist())}
    target_B = np.array([number[sample.items[0].item] for sample in samples])
    users, packed = [sample.user for sample in samples], [sample.context for sample in samples]
    ranked_BK = Ranker(catalogue, number).rank(model, users, packed, K)
    long = videos.positions(history.video[history.long])
    counts = np.bincount(long[long >= 0], minlength=len(videos.id))
    popular_BK = Popularity(len(videos.id), None, counts).rank(target_B, K)
    return {
        "plays": len(samples),
        "loss": float(-logp_BkL.mean()),
        "recall_50": float(hits_at(K, ranked_BK, target_B).mean()),
        "recall_50_popularity": float(hits_at(K, popular_BK, target_B).mean()),
    }


def _checkpoint(config: Config, model: LazyDecoder, codebooks: Codebooks) -> bytes:
    """The policy with fresh optimisers."""
    standing = Standing(
        version=0,
        lineage=digest_of(state_of(model))[:12],
        preset=config.policy.shape,
        codes=config.policy.codes,
        user_rows=config.policy.user_rows,
    )
    return to_bytes(Trainer(model, config.learn, config.learn.lr), standing, codebooks)


def _set_lr(trainer: Trainer, lr: float) -> None:
    for optimiser in (trainer.dense_optimiser, trainer.row_optimiser):
        for group in optimiser.param_groups:
            group["lr"] = lr


def bar(console: Console) -> Progress:
    """A progress bar of counted things, with what is left of the time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
