"""Collectives with the right gradient.

Every function takes `group`; None means this process only. Backward passes sum over ranks, so that if the *mean over
ranks* of a loss is the one-process loss, gradients averaged by DDP equal the one-process gradient.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ssd_addon._autocast import Context, backward_without_autocast


def world_size(group: ProcessGroup | None) -> int:
    """Ranks in the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def rank(group: ProcessGroup | None) -> int:
    """The rank of this process in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def default_group() -> ProcessGroup | None:
    """The world group if there is more than one process, else None."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


@dataclass(frozen=True)
class Shards:
    """The distribution of a batch over ranks: sizes of all shards, and this rank's index."""

    group: ProcessGroup | None
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

    def times(self, n: int) -> "Shards":
        """Shards that have n rows for each of these rows."""
        return Shards(self.group, tuple(n * size for size in self.sizes), self.rank)

    def mean(self, local_sum: Tensor, count: int | Tensor) -> Tensor:
        """local_sum * W / count: its mean over ranks is the mean over all `count` rows (count 0 gives 0)."""
        if isinstance(count, Tensor):
            return local_sum * self.world / count.clamp(min=1)
        return local_sum * (self.world / max(count, 1))


def exchange(header: Tensor, group: ProcessGroup | None) -> list[list[int]]:
    """The headers of all ranks, on the host of every rank; uses one collective and one device read.

    header is [H] int64, with the same H on all ranks. Other dtypes can be sent exactly as `to_bits`.
    """
    if group is None:
        return [header.tolist()]
    every = [torch.empty_like(header) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, header, group=group)
    table: list[list[int]] = torch.stack(every).tolist()
    return table


def to_bits(floats: Tensor) -> Tensor:
    """Floating-point numbers [F] as integers with the same bits (int32, or int64 for float64), which `from_bits`
    converts back exactly; `torch.cat` combines them with int64."""
    if floats.dtype == torch.float64:
        return floats.view(torch.int64)
    return floats.float().view(torch.int32)


def from_bits(bits: Sequence[int], dtype: torch.dtype) -> list[float]:
    """The inverse of `to_bits`, for a tensor of this dtype."""
    n = len(bits)
    if dtype == torch.float64:
        return list(struct.unpack(f"{n}d", struct.pack(f"{n}q", *bits)))
    return list(struct.unpack(f"{n}f", struct.pack(f"{n}i", *bits)))


def shards(
    rows: int, header: Sequence[int] | Tensor, device: torch.device, group: ProcessGroup | None
) -> tuple[Shards, list[list[int]]]:
    """Exchange the number of rows of every rank, and further numbers, with one collective.

    Args:
        header: [H] int64 on the device, or host integers, which are not read back without a group.

    Returns:
        The shards, and the headers of all ranks.
    """
    if group is None:
        return Shards(None, (rows,), 0), exchange(header, None) if isinstance(header, Tensor) else [list(header)]
    count = torch.full((1,), rows, dtype=torch.int64, device=device)
    mine = header if isinstance(header, Tensor) else torch.tensor(header, dtype=torch.int64, device=device)
    table = exchange(torch.cat([count, mine]), group)
    return Shards(group, tuple(row[0] for row in table), rank(group)), [row[1:] for row in table]


def all_sum(t: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks, with gradient."""
    if group is None:
        return t
    total: Tensor = _AllSum.apply(t, group)
    return total


def maximum(t: Tensor, group: ProcessGroup | None) -> Tensor:
    """The elementwise maximum over ranks, without gradient. NaN on one rank is NaN on every rank."""
    if group is None:
        return t
    nan = t.isnan()
    both = torch.stack([t.detach().masked_fill(nan, -math.inf), nan.to(t.dtype)])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return torch.where(both[1] > 0, math.nan, both[0])


def gather(t: Tensor, s: Shards) -> Tensor:
    """Concatenate the rows [n_r, ...] of all ranks to [N, ...], with gradient. Shards may be uneven or empty."""
    if s.group is None:
        return t
    every: Tensor = _Gather.apply(t, s)
    return every


class _SumContext(Context):
    group: ProcessGroup


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _SumContext, t: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        t = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(t, group=group)
        return t

    @staticmethod
    @backward_without_autocast
    def backward(ctx: _SumContext, grad: Tensor) -> tuple[Tensor, None]:
        # The input of a rank affects the losses of all ranks, which are summed here and then averaged by DDP.
        return all_sum(grad, ctx.group), None


class _GatherContext(Context):
    shards: Shards


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _GatherContext, t: Tensor, s: Shards) -> Tensor:
        ctx.shards = s
        widest = max(s.sizes)
        mine = t.new_zeros((widest, *t.shape[1:]))
        mine[: t.shape[0]] = t
        every = [torch.empty_like(mine) for _ in s.sizes]
        dist.all_gather(every, mine, group=s.group)
        return torch.cat([e[:n] for e, n in zip(every, s.sizes, strict=True)])

    @staticmethod
    @backward_without_autocast
    def backward(ctx: _GatherContext, grad: Tensor) -> tuple[Tensor, None]:
        s = ctx.shards
        return all_sum(grad, s.group)[s.offset : s.offset + s.size], None
