"""A sampler and a data loader that a run can go on from in mid-epoch."""

import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset


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


class _Seeded(torch.Generator):
    """The generator of a `ResumableLoader`, by which it is known where Lightning makes the loader anew."""


class ResumableLoader(DataLoader[Any]):
    """torch's DataLoader, from which a Lightning checkpoint goes on exactly, in mid-epoch too.

    The order of an epoch and the seeds of its workers come from (seed, epoch) alone; the loader's state is the epoch
    and the number of batches that it has given. Lightning saves that state and gives it back. torch's own loader has
    none, so a resumed epoch begins with its first batch again. Batches that were given are skipped, not loaded.

    >>> loader = ResumableLoader(range(6), batch_size=2, shuffle=True, seed=1)
    >>> first = [b.tolist() for b in loader]
    >>> again = ResumableLoader(range(6), batch_size=2, shuffle=True, seed=1)
    >>> again.load_state_dict({"epoch": 0, "batches": 1})
    >>> [b.tolist() for b in again] == first[1:]
    True

    Args:
        args, options: of DataLoader.
        seed: of the order and of the workers.

    An epoch that `limit_train_batches` cuts short is not over for the loader: a checkpoint of its end goes on with the
    epoch's next batch.

    Raises:
        ValueError: a generator or persistent workers, whose draws go on from epoch to epoch; an iterable data set.
    """

    def __init__(self, *args: Any, seed: int = 0, **options: Any) -> None:
        generator = options.pop("generator", None)
        if generator is not None and not isinstance(generator, _Seeded):
            raise ValueError(f"ResumableLoader: expected a seed: got a generator, {generator!r}")
        super().__init__(*args, **options, generator=_Seeded())  # type: ignore[misc]
        if self.persistent_workers or isinstance(self.dataset, IterableDataset):
            got = "persistent workers" if self.persistent_workers else "an iterable data set"
            raise ValueError(f"ResumableLoader: expected samples that are drawn by (seed, epoch) alone: got {got}")
        self.seed, self.epoch, self.batches = seed, -1, 0
        self._start = 0  # batches of the next epoch that were given before the checkpoint
        self._skip = 0

    @property
    def _index_sampler(self) -> Any:
        sampler = super()._index_sampler  # type: ignore[misc]
        return islice(sampler, self._skip, None) if getattr(self, "_skip", 0) else sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._skip, self._start = self._start, 0
        if not self._skip:
            self.epoch += 1
        self.batches = self._skip
        # torch seeds its Mersenne twister with the lowest 32 bits alone.
        self.generator.manual_seed(zlib.crc32(f"{self.seed} {self.epoch}".encode()))
        made = super().__iter__()
        self._skip = 0
        for batch in made:
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were given."""
        return {"epoch": self.epoch, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after these batches."""
        self.epoch, self.batches = state["epoch"], state["batches"]
        self._start = self.batches if self.batches < len(self) else 0
