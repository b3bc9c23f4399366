"""Seeds for the draws of each sample in a data loader, which differ between samples and between epochs."""

import functools
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Turns:
    """Seeds for the draws of one sample, or of the samples of a batch.

    In the workers of a `DataLoader` they depend only on the loader's generator, on the samples and, for single samples,
    on the list of data set indices that the worker is fetching. So an epoch can be repeated exactly from the same
    generator, with any number of workers, and resumed between two batches. Persistent workers, and a loader without
    workers, draw the seeds from torch's global generator of their process.

    A sample that comes several times in an epoch gets different seeds, in whichever workers it is met: the lists
    differ, and within a list the occurrences are counted. Only two equal lists (most likely with a batch size of 1)
    that go to different workers give equal seeds, because each worker counts for itself.

    Args:
        single: single samples are given, of which each worker sees only some, and not whole batches.

    Attributes:
        epoch: a number to use instead of the loader's generator, in any process; None for the behavior above.
    """

    def __init__(self, *, single: bool = False) -> None:
        self.single = single
        self.epoch: int | None = None
        self._epoch: int | None = None
        self._met: Counter[tuple[int, ...]] = Counter()
        self._fetched: tuple[Any, tuple[int, ...]] = (None, ())  # the last list of indices and its hash

    def begin(self, epoch: int) -> None:
        """Use this number from now on, as if no sample had been met."""
        self.epoch, self._epoch = epoch, None

    def __call__(self, samples: Sequence[Tensor]) -> tuple[int, ...]:
        epoch = self.epoch
        if epoch is None:
            worker = get_worker_info()
            if worker is None or _persistent():
                return (int(torch.randint(2**62, ())),)
            epoch = worker.seed - worker.id
        key = (_digest(samples), *(self._list() if self.single else ()))
        if epoch != self._epoch:
            self._epoch, self._met = epoch, Counter()
        self._met[key] += 1  # a sampler may draw the same sample twice in an epoch
        return epoch, *key, self._met[key]

    def _list(self) -> tuple[int, ...]:
        """A hash of the indices that this worker is fetching; () where there are none, as in an iterable data set."""
        frame = _loop()
        index: Any = None if frame is None else frame.f_locals.get("index")
        if index is not self._fetched[0]:
            plain = index.tolist() if hasattr(index, "tolist") else index
            each = plain if isinstance(plain, list | tuple) else [plain]
            known = any(i is not None for i in each)
            self._fetched = index, ((_number(hashlib.blake2b(repr(plain).encode(), digest_size=8)),) if known else ())
        return self._fetched[1]


def _digest(samples: Sequence[Tensor]) -> int:
    """A hash of the samples' values; of every fourth value along long dimensions, which distinguishes them."""
    digest = hashlib.blake2b(digest_size=8)
    for x in samples:
        for axis, n in enumerate(x.shape):
            if n >= 64:
                x = x.index_select(axis, torch.arange(0, n, 4))
        digest.update(x.contiguous().numpy().tobytes())
    return _number(digest)


def _number(digest: Any) -> int:
    return int.from_bytes(digest.digest(), "little")


@functools.cache
def _persistent() -> bool:
    """Does this DataLoader worker live for several epochs? Read from its loop; True if that cannot be found."""
    frame = _loop()
    return frame is None or bool(frame.f_locals.get("persistent_workers", True))


def _loop() -> FrameType | None:
    """The frame of the loop of this DataLoader worker (torch 2.5 to 2.14), which fetches one batch after the other."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_worker_loop":
        frame = frame.f_back
    return frame
