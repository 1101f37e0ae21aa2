"""One clipped policy update: the training core, without I/O.

The user table has a row-wise optimiser (SparseAdam moves only the rows of the batch), so that a later delta is
the touched rows plus the dense part; everything else is AdamW. Loss = RL + supervised + entropy, with the weights
of `LearnSettings`. The ratio is taken at the logged temperature, the supervised loss at temperature 1.

Legend: B requests, k targets, L levels, K codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learner.batch import Batch
from learner.decoder import LazyDecoder
from learner.masking import masked_log_softmax
from learner.objectives import entropy, gbpo_per_level, mean_over, supervised
from learner.settings import LearnSettings


@dataclass(frozen=True)
class StepMetrics:
    """What one step saw; rates are shares of shown items."""

    loss: float
    loss_rl: float
    loss_supervised: float
    entropy: float
    positives: float
    negatives: float
    ratio: float
    bounded: float
    """Share of target levels whose ratio is held below pi / pi_old by the bound."""
    grad_norm: float


class Trainer:
    """The policy with its optimisers; `step` changes both."""

    def __init__(self, model: LazyDecoder, settings: LearnSettings, lr: float) -> None:
        self.model = model
        self.settings = settings
        table = model.context.users.weight
        self.dense: list[nn.Parameter] = [p for p in model.parameters() if p is not table]
        self.dense_optimiser = torch.optim.AdamW(self.dense, lr=lr, betas=(0.9, 0.98))
        self.row_optimiser = torch.optim.SparseAdam([table], lr=lr, betas=(0.9, 0.98))

    def step(self, batch: Batch) -> StepMetrics | None:
        """One update; None, and nothing changes, when the batch holds no target."""
        targets = batch.targets
        rl_Bk = targets.advantage_Bk != 0
        if not bool((rl_Bk | targets.supervised_Bk).any()):
            return None
        logits_BkLK = self.model(self.model.process(batch.contexts), batch.sids_BkL)
        all_BkLK = masked_log_softmax(logits_BkLK, batch.mask_BkLK, 1.0)
        plain_BkL = _at(all_BkLK, batch.sids_BkL)
        if bool((batch.temperature_B == 1.0).all()):
            logp_BkL = plain_BkL
        else:
            scaled_BkLK = logits_BkLK / batch.temperature_B[:, None, None, None]
            logp_BkL = _at(masked_log_softmax(scaled_BkLK, batch.mask_BkLK, 1.0), batch.sids_BkL)
        rl = mean_over(gbpo_per_level(logp_BkL, targets.logp_old_BkL, targets.advantage_Bk), rl_Bk)
        likelihood = mean_over(supervised(plain_BkL), targets.supervised_Bk)
        spread = mean_over(entropy(all_BkLK).mean(-1), targets.shown_Bk)
        loss = rl + self.settings.supervised * likelihood - self.settings.entropy * spread
        self.dense_optimiser.zero_grad(set_to_none=True)
        self.row_optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.dense, self.settings.clip)
        self.dense_optimiser.step()
        self.row_optimiser.step()  # type: ignore[no-untyped-call]
        return self._metrics(batch, logp_BkL.detach(), (loss, rl, likelihood, spread, norm))

    def _metrics(self, batch: Batch, logp_BkL: Tensor, terms: tuple[Tensor, ...]) -> StepMetrics:
        targets = batch.targets
        shown = max(1, int(targets.shown_Bk.sum()))
        owned_BkL = ~targets.logp_old_BkL.isnan() & (targets.advantage_Bk != 0).unsqueeze(-1)
        ratio_BkL = (logp_BkL - targets.logp_old_BkL).exp()
        pi_BkL = logp_BkL.exp()
        floor_BkL = torch.where(targets.advantage_Bk.unsqueeze(-1) >= 0, pi_BkL, 1.0 - pi_BkL)
        bounded_BkL = floor_BkL > targets.logp_old_BkL.exp()
        loss, rl, likelihood, spread, norm = (float(term.detach()) for term in terms)
        return StepMetrics(
            loss=loss,
            loss_rl=rl,
            loss_supervised=likelihood,
            entropy=spread,
            positives=int((targets.advantage_Bk > 0).sum()) / shown,
            negatives=int((targets.advantage_Bk < 0).sum()) / shown,
            ratio=float(mean_over(ratio_BkL, owned_BkL)),
            bounded=float(mean_over(bounded_BkL.float(), owned_BkL)),
            grad_norm=norm,
        )


def _at(logp_BkLK: Tensor, sids_BkL: Tensor) -> Tensor:
    return logp_BkLK.gather(-1, sids_BkL.unsqueeze(-1)).squeeze(-1)
