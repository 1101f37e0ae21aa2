"""One learner as several processes: each rank owns some partitions of `samples`, and all make the same step.

Notable choices
- A rank divides its sums by the counts of all ranks, so its gradient is its share of what one process would have on
  the whole batch; the shares are added. Two ranks agree to the last bit with one process that adds two shares; more
  ranks add in an order of the backend's own, and agree within rounding.
- The dense part is torch's: DistributedDataParallel where a copy of all fits on a rank, FSDP2 (`fully_shard`, by
  block) beyond. Both average where we add, so the loss is scaled by the number of ranks.
- The user table stays whole on every rank and its gradient sparse: rows are added up, and only the batch's move.
- Ranks come from torchrun's environment, over gloo on CPUs and NCCL on GPUs.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from learner.context import Contexts
from learner.decoder import LazyDecoder
from learner.policy import arrays_of
from streams.blocks import State

PATIENCE_S: Final = 600.0
"""A rank that is not heard of for so long hangs. One that dies is missed at once."""


class RanksError(RuntimeError):
    """The ranks have lost each other; the message says what would help."""


class Network(nn.Module):
    """The policy's training pass as one call, which is what torch wraps."""

    def __init__(self, model: LazyDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, contexts: Contexts, sids_BkL: Tensor) -> Tensor:
        """Teacher-forced logits `[B, k, L, K]`."""
        logits_BkLK: Tensor = self.model(self.model.process(contexts), sids_BkL)
        return logits_BkLK


class Ranks:
    """This process among the processes of a learner."""

    def __init__(self, rank: int = 0, world: int = 1, device: str = "cpu") -> None:
        self.rank = rank
        self.world = world
        self.device = torch.device(device)

    @classmethod
    def join(cls, device: str = "cpu") -> "Ranks":
        """Meet the ranks that torchrun started; alone without it.

        `device` is that of `learn.device`. Raises `RanksError` where there is no such.
        """
        on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if on_gpu and not torch.cuda.is_available():
            raise RanksError(
                "learn.device is cuda, but torch finds no GPU here: install a driver and torch's CUDA build, or set "
                "learn.device to auto or cpu"
            )
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"
        if not dist.is_torchelastic_launched() and "WORLD_SIZE" not in os.environ:
            return cls(device=device)
        if on_gpu:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = "nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=PATIENCE_S))
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def alone(self) -> "Ranks":
        """This process by itself, where it is."""
        return Ranks(device=str(self.device))

    def leave(self) -> None:
        """Part from the others."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def owns(self, partition: int) -> bool:
        """Whether this rank learns from a partition of `samples`."""
        return partition % self.world == self.rank

    def everyone(self, mine: Any) -> list[Any]:
        """What each rank brings, by rank; all must ask."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(found, mine)
        except RuntimeError as error:
            raise (self.alone_again() if self.lost(error) else error) from None
        return found

    def lost(self, error: BaseException) -> bool:
        """Whether this is what torch says when another rank has gone."""
        gloos = type(error) is RuntimeError and "gloo/transport" in str(error)
        return self.world > 1 and (gloos or isinstance(error, dist.DistError))

    def alone_again(self) -> RanksError:
        """What to tell a user then."""
        return RanksError(
            f"rank {self.rank}: another of the {self.world} ranks of this learner has ended; its own log says why. "
            "Start all of them again, as torchrun does with --max-restarts"
        )

    def total(self, counts: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(counts)
        return counts

    def spread(self, model: LazyDecoder, shard: bool) -> nn.Module:
        """The model's training pass over all ranks; what it holds of the dense part becomes a shard if asked."""
        network = Network(model)
        if self.world == 1:
            return network
        if not shard:
            network._ddp_params_and_buffers_to_ignore = ["model.context.users.weight"]  # type: ignore[assignment]
            return DistributedDataParallel(network, forward_sync_buffers=False)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        table = model.context.users.weight
        fully_shard(network, mesh=mesh, ignored_params={table})  # type: ignore[arg-type]
        return network

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm of all gradients, summed in float64: so it is the same float32 however they are sharded."""
        gradients = [each.grad for each in parameters if each.grad is not None]
        sharded = [each.to_local() for each in gradients if isinstance(each, DTensor)]
        mine = sharded or gradients
        squares = torch.stack([each.double().square().sum() for each in mine]).sum()
        if sharded:
            dist.all_reduce(squares)
        return squares.sqrt().float()

    def total_rows(self, shares: Sequence[Tensor | None]) -> Tensor | None:
        """A table's sparse gradient: that of this process's shares and, averaged as torch does, of all ranks."""
        if self.world == 1 and len(shares) == 1:
            return shares[0]
        mine = [share.coalesce() for share in shares if share is not None]
        rows = sum(mine[1:], mine[0]).coalesce()
        if self.world > 1:
            dist.all_reduce(rows)
            rows = rows / self.world
        return rows


def whole(value: Tensor) -> Tensor:
    """All of a tensor, of which this rank may hold a shard; all ranks must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, sharded as another is."""
    if isinstance(other, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, other.device_mesh, other.placements)
    return value


def gathered(model: nn.Module) -> State:
    """The model's state by name, float32 on the CPU, whole; all ranks must ask."""
    return arrays_of({name: whole(value) for name, value in model.state_dict().items()})
