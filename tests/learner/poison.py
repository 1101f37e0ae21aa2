"""Ways to spoil a policy."""

import torch
from torch import Tensor

from learner.context import contexts
from learner.decoder import LazyDecoder
from learner.masking import masked_log_softmax
from learner.valid_tree import Tree, sid_of


@torch.no_grad()
def not_a_number(model: LazyDecoder, _: Tree) -> None:
    """One weight in thousands."""
    model.places[0, 3] = torch.nan


@torch.no_grad()
def exploded(model: LazyDecoder, _: Tree) -> None:
    """All weights a hundred times as large."""
    for value in model.parameters():
        value.mul_(100.0)


def one_item(model: LazyDecoder, tree: Tree) -> None:
    """Taught to show one leaf to everybody."""
    users = [f"u{number}" for number in range(32)]
    of = contexts(users, [b""] * len(users), model.preset.context, model.user_rows, tree.codes)
    sids_BkL = torch.tensor(sid_of(tree.key_at(len(tree) // 2), tree.codes)).expand(32, 1, 3)
    mask_BkLK = torch.from_numpy(tree.path_masks(sids_BkL.numpy()))
    table = model.context.users.weight
    moved: list[Tensor] = [each for each in model.parameters() if each is not table]
    optimiser = torch.optim.Adam(moved, lr=0.01)
    for _ in range(30):
        optimiser.zero_grad()
        logp_BkLK = masked_log_softmax(model(model.process(of), sids_BkL), mask_BkLK)
        (-logp_BkLK.gather(-1, sids_BkL.unsqueeze(-1)).sum(-1).mean()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    model.zero_grad()


POISONS = [not_a_number, exploded, one_item]
