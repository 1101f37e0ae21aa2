"""One clipped policy update: the training core, without I/O.

The user table has a row-wise optimiser (SparseAdam moves only the rows of the batch), so that a later delta is
the touched rows plus the dense part; everything else is AdamW. Loss = RL (`learn.objective`) + supervised + entropy,
with the weights of `LearnSettings`. The ratio is taken at the logged temperature, the supervised loss at temperature
1. The RL term is the mean over all targets with an advantage, also where an objective makes nothing of some of them.

Legend: B requests, k targets, L levels, K codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learner.batch import Batch
from learner.decoder import LazyDecoder
from learner.masking import masked_log_softmax
from learner.objectives import OBJECTIVES, divergence, entropy, mean_over, pull, supervised
from learner.policy import compile_blocks
from learner.ranks import Ranks, like
from learner.settings import LearnSettings
from streams.blocks import State


@dataclass(frozen=True)
class StepMetrics:
    """What one step saw, before it moved; docs/objectives.md says how to read it. Own: logged by this policy."""

    loss: float
    loss_rl: float
    loss_supervised: float
    entropy: float
    """Nats, mean over the levels of what was shown, at temperature 1."""
    divergence: float
    """KL(old || new), nats a level, estimated over own exposures; 0 of none."""
    positives: float
    """Share of shown items."""
    negatives: float
    """Share of shown items."""
    ratio: float
    """Mean pi / pi_old over the levels of own targets."""
    bounded: float
    """Share of own target levels where GBPO's bound exceeds pi_old, whatever the objective."""
    clipped: float
    """Share of target levels to which the objective gives no gradient."""
    pull_positive: float
    """Mean weight of the objective on d log pi over the levels of positives; the likelihood's is 1."""
    pull_negative: float
    """The same over negatives."""
    grad_norm: float
    """Norm of the dense gradient before it is clipped."""


class Trainer:
    """The policy with its optimisers; `step` changes both."""

    def __init__(
        self, model: LazyDecoder, settings: LearnSettings, lr: float, ranks: Ranks | None = None
    ) -> None:
        self.settings = settings
        self.ranks = ranks or Ranks()
        self.model = model.to(self.ranks.device)
        self.objective = OBJECTIVES[settings.objective]
        if settings.compile:
            compile_blocks(self.model)
        self.network = self.ranks.spread(model, settings.shard)
        self.table = model.context.users.weight
        self.dense: list[nn.Parameter] = [p for p in model.parameters() if p is not self.table]
        self._lr = lr
        self.forget()

    def forget(self) -> None:
        """Begin with fresh optimisers."""
        self.dense_optimiser = torch.optim.AdamW(self.dense, lr=self._lr, betas=(0.9, 0.98))
        self.row_optimiser = torch.optim.SparseAdam([self.table], lr=self._lr, betas=(0.9, 0.98))

    def go_back(self, state: State) -> None:
        """Take the weights of a version, whole, with fresh optimisers; each rank its shard where it has one."""
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(like(torch.from_numpy(state[name]), value))
        self.forget()

    def step(self, *shares: Batch) -> StepMetrics | None:
        """One update on a batch, or on the shares of several ranks where this process stands for all of them.

        None, and nothing changes, when the shares of all ranks hold no target. Terms of the loss are of all shares,
        the other metrics of the first.
        """
        shares = tuple(share.to(self.ranks.device) for share in shares)
        counts = self.ranks.total(torch.stack([_counts(share) for share in shares]).sum(0))
        if not bool(counts[:2].any()):
            return None
        self.dense_optimiser.zero_grad(set_to_none=True)
        self.row_optimiser.zero_grad(set_to_none=True)
        seen, rows = [], []
        for share in shares:
            seen.append(self._learn(share, counts.to(torch.float32)))
            rows.append(self.table.grad)
            self.table.grad = None
        self.table.grad = self.ranks.total_rows(rows)
        norm = self.ranks.norm(self.dense)
        nn.utils.clip_grads_with_norm_(self.dense, self.settings.clip, norm)
        self.dense_optimiser.step()
        self.row_optimiser.step()  # type: ignore[no-untyped-call]
        self.model.balance(self.ranks.total)
        terms = self.ranks.total(torch.stack([terms for _, terms in seen]).sum(0))
        return self._metrics(shares[0], seen[0][0], (*terms, norm))

    def _learn(self, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Add a share's gradient; its log-probabilities and its part of the terms of the loss."""
        targets = batch.targets
        logits_BkLK = self.network(batch.contexts, batch.sids_BkL)
        all_BkLK = masked_log_softmax(logits_BkLK, batch.mask_BkLK, 1.0)
        plain_BkL = _at(all_BkLK, batch.sids_BkL)
        if bool((batch.temperature_B == 1.0).all()):
            logp_BkL = plain_BkL
        else:
            scaled_BkLK = logits_BkLK / batch.temperature_B[:, None, None, None]
            logp_BkL = _at(masked_log_softmax(scaled_BkLK, batch.mask_BkLK, 1.0), batch.sids_BkL)
        surrogate_Bk = self.objective(logp_BkL, targets.logp_old_BkL, targets.advantage_Bk)
        rl = mean_over(surrogate_Bk, targets.advantage_Bk != 0, counts[0])
        likelihood = mean_over(supervised(plain_BkL), targets.supervised_Bk, counts[1])
        spread = mean_over(entropy(all_BkLK).mean(-1), targets.shown_Bk, counts[2])
        loss = rl + self.settings.supervised * likelihood - self.settings.entropy * spread
        (loss * self.ranks.world).backward()  # type: ignore[no-untyped-call]
        return logp_BkL.detach(), torch.stack([loss, rl, likelihood, spread]).detach()

    def _metrics(self, batch: Batch, logp_BkL: Tensor, terms: tuple[Tensor, ...]) -> StepMetrics:
        targets = batch.targets
        old_BkL, advantage_Bk1 = targets.logp_old_BkL, targets.advantage_Bk.unsqueeze(-1)
        shown = max(1, int(targets.shown_Bk.sum()))
        target_BkL = (advantage_Bk1 != 0).expand_as(old_BkL)
        logged_BkL = ~old_BkL.isnan()
        owned_BkL = logged_BkL & target_BkL
        pi_BkL = logp_BkL.exp()
        floor_BkL = torch.where(advantage_Bk1 >= 0, pi_BkL, 1.0 - pi_BkL)
        pull_BkL = pull(self.objective, logp_BkL, old_BkL, targets.advantage_Bk)
        own_shown_BkL = logged_BkL & targets.shown_Bk.unsqueeze(-1)
        loss, rl, likelihood, spread, norm = (float(term.detach()) for term in terms)
        return StepMetrics(
            loss=loss,
            loss_rl=rl,
            loss_supervised=likelihood,
            entropy=spread,
            divergence=float(mean_over(divergence(logp_BkL, old_BkL), own_shown_BkL)),
            positives=int((targets.advantage_Bk > 0).sum()) / shown,
            negatives=int((targets.advantage_Bk < 0).sum()) / shown,
            ratio=float(mean_over((logp_BkL - old_BkL).exp(), owned_BkL)),
            bounded=float(mean_over((floor_BkL > old_BkL.exp()).float(), owned_BkL)),
            clipped=float(mean_over((pull_BkL == 0.0).float(), target_BkL)),
            pull_positive=float(mean_over(pull_BkL, target_BkL & (advantage_Bk1 > 0))),
            pull_negative=float(mean_over(pull_BkL, target_BkL & (advantage_Bk1 < 0))),
            grad_norm=norm,
        )


def _counts(batch: Batch) -> Tensor:
    """Targets of the objective, supervised ones, and all that was shown."""
    targets = batch.targets
    chosen = (targets.advantage_Bk != 0, targets.supervised_Bk, targets.shown_Bk)
    return torch.stack([each.sum() for each in chosen])


def _at(logp_BkLK: Tensor, sids_BkL: Tensor) -> Tensor:
    return logp_BkLK.gather(-1, sids_BkL.unsqueeze(-1)).squeeze(-1)
