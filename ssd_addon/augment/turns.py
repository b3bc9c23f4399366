"""Seeds for the draws of each sample in a data loader, which differ between samples and between epochs."""

import functools
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Turns:
    """Seeds for the draws of one sample, or of the samples of a batch.

    In the workers of a `DataLoader` they depend only on the loader's generator and on the samples, so that an epoch can
    be repeated exactly from the same generator, with any number of workers, and resumed in the middle. Persistent
    workers, and a loader without workers, draw the seeds from torch's global generator of their process.

    Attributes:
        epoch: a number to use instead of the loader's generator, in any process; None for the behavior above.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self._epoch: int | None = None
        self._met: Counter[int] = Counter()

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
        digest = _digest(samples)
        if epoch != self._epoch:
            self._epoch, self._met = epoch, Counter()
        self._met[digest] += 1  # a sampler may draw the same sample twice in an epoch
        return epoch, digest, self._met[digest]


def _digest(samples: Sequence[Tensor]) -> int:
    """A hash of the samples' values; of every fourth value along long dimensions, which distinguishes them."""
    digest = hashlib.blake2b(digest_size=8)
    for x in samples:
        for axis, n in enumerate(x.shape):
            if n >= 64:
                x = x.index_select(axis, torch.arange(0, n, 4))
        digest.update(x.contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


@functools.cache
def _persistent() -> bool:
    """Does this DataLoader worker live for several epochs? Read from its loop; True if that cannot be found."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_worker_loop":
            return bool(frame.f_locals.get("persistent_workers", True))
        frame = frame.f_back  # type: ignore[assignment]
    return True
