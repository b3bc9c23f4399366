"""Samplers and a data loader that can resume within an epoch."""

import functools
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset


class ResumableSampler(DistributedSampler[Any]):
    """A DistributedSampler that can start within an epoch: set `start` to the number of images this rank has seen.

    It holds for the next pass; after that, `start` is 0 again. `len` is that of a whole epoch.

    >>> sampler = ResumableSampler(range(6), num_replicas=1, rank=0, shuffle=False)
    >>> sampler.start = 4
    >>> list(sampler)
    [4, 5]
    """

    start = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rest(list(super().__iter__())))

    def _rest(self, order: list[Any]) -> list[Any]:
        begin, self.start = self.start, 0
        return order[begin:]


class ShardSampler(ResumableSampler):
    """Shuffles samples that are stored in shards, reading a few shards at a time; can start within an epoch.

    Each epoch permutes the shards and gives each rank a contiguous part of equal length, so that ranks share at most
    the shards at the boundaries. A rank shuffles the samples of `mixed` shards together. Samples of shards that are far
    apart in the order are thus never in the same batch of a rank: this equals a full shuffle only if each shard is a
    random subset of the data. The order depends only on (seed, epoch, ranks), not on workers.

    >>> sampler = ShardSampler([0, 0, 1, 1, 2, 2], mixed=1, num_replicas=1, rank=0)
    >>> order = list(sampler)
    >>> sorted(order), [i // 2 == j // 2 for i, j in zip(order[::2], order[1::2])]
    ([0, 1, 2, 3, 4, 5], [True, True, True])
    >>> sampler.start = 4
    >>> list(sampler) == order[4:]
    True

    Args:
        shards: index of the shard of every sample.
        mixed: number of shards whose samples are shuffled together.
        num_replicas, rank: number of processes and index of this one; None asks torch.distributed.
        seed: seed of the order; the same on all ranks.

    Raises:
        ValueError: there are no samples, or `mixed` is below 1.
    """

    def __init__(
        self,
        shards: Sequence[int] | Tensor,
        *,
        mixed: int,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        self.shards = torch.as_tensor(shards, dtype=torch.int64)
        if not len(self.shards) or mixed < 1:
            got = f"{len(self.shards)} samples, mixed={mixed}"
            raise ValueError(f"ShardSampler: expected samples, and at least one shard to mix: got {got}")
        self.mixed = mixed
        super().__init__(self.shards, num_replicas, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        drawn = torch.Generator().manual_seed(self.seed + self.epoch)
        place = torch.randperm(int(self.shards.max()) + 1, generator=drawn)[self.shards]
        draws = torch.rand(len(place), generator=drawn, dtype=torch.float64)
        order = place.argsort(stable=True)
        order = order.repeat(-(-self.total_size // len(order)))  # the same number for every rank
        order = order[self.rank * self.num_samples : (self.rank + 1) * self.num_samples]
        window = place[order].unique_consecutive(return_inverse=True)[1] // self.mixed
        mixed = draws[order].argsort()
        return iter(self._rest(order[mixed[window[mixed].argsort(stable=True)]].tolist()))


_END = object()


class _Seeded(torch.Generator):
    """The generator of a `ResumableLoader`; its type identifies the loader's own when Lightning rebuilds the loader."""


class ResumableLoader(DataLoader[Any]):
    """A DataLoader from which a Lightning checkpoint resumes exactly, also within an epoch.

    The order of an epoch and the seeds of its workers depend only on (seed, epoch), and without workers the draws of
    transforms from the global generators depend on these and on the batch. The loader's state is the epoch and the
    number of batches that it has returned. Lightning saves and restores this state. torch's own loader has none, so a
    resumed epoch would start again from its first batch. Batches that were already used are skipped without loading.

    >>> loader = ResumableLoader(range(6), batch_size=2, shuffle=True, seed=1)
    >>> first = [b.tolist() for b in loader]
    >>> again = ResumableLoader(range(6), batch_size=2, shuffle=True, seed=1)
    >>> again.load_state_dict({"epoch": 0, "batches": 1})
    >>> [b.tolist() for b in again] == first[1:]
    True

    Args:
        args, options: arguments of DataLoader.
        seed: seed of the order and of the workers.

    Every pass is a new epoch. `set_epoch`, which Lightning calls through the sampler, says which one: a loader that is
    made anew for each epoch (`reload_dataloaders_every_n_epochs`) then goes on, and an epoch that ends early
    (`limit_train_batches`) is over when the next one begins, also after resuming.

    Raises:
        ValueError: a generator, a sampler with a generator, or persistent workers are given, whose draws continue from
            epoch to epoch; the data set is iterable; an epoch is to be resumed in the middle with another seed, batch
            size or number of batches than it began with.

    A sampler of your own that draws from torch's global generator (`WeightedRandomSampler`) gets the loader's. One that
    draws in another way has to depend only on the epoch.
    """

    def __init__(self, *args: Any, seed: int = 0, **options: Any) -> None:
        generator = options.pop("generator", None)
        if generator is not None and not isinstance(generator, _Seeded):
            raise ValueError(f"ResumableLoader: expected a seed: got a generator, {generator!r}")
        super().__init__(*args, **options, generator=_Seeded())  # type: ignore[misc]
        if self.persistent_workers or isinstance(self.dataset, IterableDataset):
            got = "persistent workers" if self.persistent_workers else "an iterable data set"
            raise ValueError(f"ResumableLoader: expected draws that depend only on (seed, epoch): got {got}")
        samplers: list[Any] = [self.sampler, self.batch_sampler, getattr(self.batch_sampler, "sampler", None)]
        for sampler in (s for s in samplers if hasattr(s, "generator")):
            if sampler.generator is not None and not isinstance(sampler.generator, _Seeded):
                got = f"a {type(sampler).__name__} with a generator of its own"
                raise ValueError(f"ResumableLoader: expected a sampler that draws by the loader's seed: got {got}")
            sampler.generator = self.generator
        self.seed, self.epoch, self.batches = seed, -1, 0
        self._start = 0  # batches of the next epoch that were used before the checkpoint
        self._skip = 0
        self._trainer_epoch: int | None = None  # the last number given to `set_epoch`
        self._begun: dict[str, Any] = {}  # what the epoch in the checkpoint began with
        for sampler in {id(s): s for s in samplers if s is not None}.values():
            # Lightning sets the epoch of samplers, and not of the loader.
            own = getattr(sampler, "set_epoch", None)
            if isinstance(own, functools.partial) and own.func is _set_epochs:  # of a loader before
                own = own.args[1]
            with suppress(AttributeError):  # a list, or one with __slots__
                sampler.set_epoch = functools.partial(_set_epochs, self, own)

    @property
    def _index_sampler(self) -> Any:
        sampler = super()._index_sampler  # type: ignore[misc]
        return islice(sampler, self._skip, None) if getattr(self, "_skip", 0) else sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start, self._start = self._start, 0
        if start:
            self._check_begun(start)
        else:
            self.epoch += 1
        self.batches = self._skip = start
        # torch seeds its Mersenne Twister with the lowest 32 bits only.
        self.generator.manual_seed(zlib.crc32(f"{self.seed} {self.epoch}".encode()))
        made = super().__iter__()
        self._skip = 0
        while True:
            with _seeded(f"{self.seed} {self.epoch} {self.batches} {_rank()}", not self.num_workers):
                batch = next(made, _END)
            if batch is _END:
                return
            self.batches += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Say to which epoch of the training the next pass belongs; with a new number it is not a resumed one."""
        if self._trainer_epoch is not None and epoch > self._trainer_epoch:
            self._start = 0
        self._trainer_epoch = epoch if self._trainer_epoch is None else max(epoch, self._trainer_epoch)
        if not self._start:
            self.epoch = max(self.epoch, epoch - 1)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the number of its batches that were returned, and what decides which images these were."""
        return {"epoch": self.epoch, "batches": self.batches, "trainer_epoch": self._trainer_epoch, **self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after these batches."""
        self.epoch, self.batches = state["epoch"], state["batches"]
        self._trainer_epoch = state.get("trainer_epoch")
        self._begun = {k: state[k] for k in self._order() if k in state}
        length = self._begun.get("length", self._order()["length"])
        self._start = self.batches if length is None or self.batches < length else 0

    def _order(self) -> dict[str, Any]:
        try:
            length: int | None = len(self)
        except TypeError:  # a sampler without a length
            length = None
        return {"seed": self.seed, "batch_size": self.batch_size, "length": length}

    def _check_begun(self, start: int) -> None:
        """Refuse to continue an epoch in which the same batches would be others."""
        mine = self._order()
        if differ := [f"{k} {v}, here {mine[k]}" for k, v in self._begun.items() if v != mine[k]]:
            raise ValueError(
                f"ResumableLoader: expected the seed, batch size and length of the epoch that is resumed after "
                f"{start} batches, as other images would be left out or repeated: got {'; '.join(differ)}"
            )


def _set_epochs(loader: ResumableLoader, own: Callable[[int], None] | None, epoch: int) -> None:
    """`set_epoch` of a loader's sampler."""
    if own is not None:
        own(epoch)
    loader.set_epoch(epoch)


@contextmanager
def _seeded(key: str, active: bool) -> Iterator[None]:
    """Seed the global generators by a key while the block runs, as those of a worker are, and restore them."""
    if not active:
        yield
        return
    kept = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    seed = zlib.crc32(key.encode())
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
        np.random.set_state(kept[2])  # noqa: NPY002


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
