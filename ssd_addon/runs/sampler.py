"""A sampler that a run can go on from in mid-epoch."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DistributedSampler


class ResumableSampler(DistributedSampler[Any]):
    """torch's DistributedSampler, which can begin within an epoch: set `start` to the images already seen by the rank.

    >>> sampler = ResumableSampler(range(6), num_replicas=1, rank=0, shuffle=False)
    >>> sampler.start = 4
    >>> list(sampler)
    [4, 5]
    """

    start = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(list(super().__iter__())[self.start :])
