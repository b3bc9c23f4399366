"""Collectives with the right gradient. One copy, one meaning.

Every function takes `group`: None means "this process alone". Backward passes sum over ranks, so that after the
averaging of gradients that DDP does, a loss whose *mean over ranks* is the one-process loss has its gradient.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: Any) -> int:
    """Ranks in the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def default_group() -> Any:
    """The world group where there is more than one process, else None."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


@dataclass(frozen=True)
class Shards:
    """How the rows of a batch lie over ranks: sizes of all shards, and this rank's place."""

    group: Any
    sizes: tuple[int, ...]
    rank: int

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        return self.sizes[self.rank]

    def mean(self, local_sum: Tensor, count: int | Tensor) -> Tensor:
        """local_sum * W / count: its mean over ranks is the mean over all `count` rows (count 0 gives 0)."""
        if isinstance(count, Tensor):
            return local_sum * self.world / count.clamp(min=1)
        return local_sum * self.world / max(count, 1)


def shards(rows: int, header: list[int], device: torch.device, group: Any) -> tuple[Shards, list[list[int]]]:
    """One small all-gather: the rows of every rank and any flags beside them.

    Returns the shards, and the headers of all ranks.
    """
    if group is None:
        return Shards(None, (rows,), 0), [header]
    mine = torch.tensor([rows, *header], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    table = torch.stack(every).tolist()
    return Shards(group, tuple(row[0] for row in table), dist.get_rank(group)), [row[1:] for row in table]


def all_sum(t: Tensor, group: Any) -> Tensor:
    """Sum over ranks, with gradient."""
    return t if group is None else _AllSum.apply(t, group)


def maximum(t: Tensor, group: Any) -> Tensor:
    """Largest over ranks, element by element, without gradient. NaN on one rank is NaN on every rank."""
    if group is None:
        return t
    nan = t.isnan()
    both = torch.stack([t.detach().masked_fill(nan, -math.inf), nan.to(t.dtype)])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return torch.where(both[1] > 0, math.nan, both[0])


def gather(t: Tensor, s: Shards) -> Tensor:
    """Concatenate the rows [n_r, ...] of all ranks to [N, ...], with gradient. Shards may be uneven or empty."""
    return t if s.group is None else _Gather.apply(t, s)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        t = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(t, group=group)
        return t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The ranks' losses are summed (then averaged by DDP): a rank's input reaches the loss of every rank.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, s: Shards) -> Tensor:
        ctx.shards = s
        widest = max(s.sizes)
        mine = t.new_zeros((widest, *t.shape[1:]))
        mine[: t.shape[0]] = t
        every = [torch.empty_like(mine) for _ in s.sizes]
        dist.all_gather(every, mine, group=s.group)
        return torch.cat([e[:n] for e, n in zip(every, s.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        s = ctx.shards
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=s.group)
        return grad[s.offset : s.offset + s.size], None
