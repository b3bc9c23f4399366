"""By what the draws of a sample in a data loader differ from those of others, and of the same sample later."""

import functools
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Turns:
    """Numbers for the draws of one sample, or of the samples of a batch.

    In the workers of a `DataLoader` they depend on the loader's generator and on the samples alone, so that an epoch is
    repeated exactly from the same generator, with any number of workers, and continued in the middle. Persistent
    workers, and a loader without workers, draw from torch's global generator of their process.

    Attributes:
        epoch: a number to go by in place of the loader's generator, everywhere; None: as above.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self._epoch: int | None = None
        self._met: Counter[int] = Counter()

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
        self._met[digest] += 1  # samples that a sampler draws twice in an epoch
        return epoch, digest, self._met[digest]


def _digest(samples: Sequence[Tensor]) -> int:
    """A number for the values of samples; of every fourth along long dimensions, enough to tell samples apart."""
    digest = hashlib.blake2b(digest_size=8)
    for x in samples:
        for axis, n in enumerate(x.shape):
            if n >= 64:
                x = x.index_select(axis, torch.arange(0, n, 4))
        digest.update(x.contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


@functools.cache
def _persistent() -> bool:
    """Does this worker of a DataLoader live for several epochs? Its loop knows; where it cannot be asked, yes."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_worker_loop":
            return bool(frame.f_locals.get("persistent_workers", True))
        frame = frame.f_back  # type: ignore[assignment]
    return True
