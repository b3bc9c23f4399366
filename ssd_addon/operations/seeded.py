"""Operations from functions that draw their own random numbers; views share the seed of each sample."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_addon.operations.draws import SEED, Parameters, Watch


class SeededOperation:
    """The operation that `seeded` returns: it draws one seed per sample, and the function draws the rest from it."""

    def __init__(self, fn: Callable[[Any], Any], name: str, reseed: Callable[[int], Any] | None) -> None:
        self.fn, self.name, self.reseed = fn, name, reseed

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Parameters:
        return {SEED: torch.randint(2**32 - 1, (shape[0],), generator=generator)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        watch, out = Watch(x.device), []
        try:
            for sample, seed in zip(x, parameters[SEED].tolist(), strict=True):
                torch.default_generator.manual_seed(seed)
                if x.device.type == "cuda":
                    torch.cuda.manual_seed(seed)
                np.random.seed(seed)
                random.seed(seed)
                if self.reseed is not None:
                    self.reseed(seed)
                y = self.fn(sample.clone())
                if not isinstance(y, Tensor):
                    raise TypeError(f"expected the function to return a tensor, like its input: got {type(y).__name__}")
                out.append(y)
        finally:
            watch.restore()
        if any(y.shape != out[0].shape for y in out):
            raise ValueError(
                f"expected the function to return samples of one shape: got {sorted({tuple(y.shape) for y in out})}; "
                "end it with a resize or crop to a fixed size"
            )
        return torch.stack(out)


def seeded(fn: Callable[[Any], Any], *, name: str | None = None, reseed: Callable[[int], Any] | None = None) -> Any:
    """Make an operation from any function that augments one sample.

    Use it as `StructuredViews({"color": [operations.seeded(fn)]})`. Views share the *seed* of each sample: before every
    call, torch's, numpy's and Python's global generators are seeded with it, and their states are restored afterwards.
    Sharing and replay are exact. The function's random values are not recorded, so they cannot serve as prediction
    targets: `parameter_matrix`, `EquivarianceLoss` and the label-free report leave such groups out.

    >>> from ssd_addon import StructuredViews, operations
    >>> views = StructuredViews({"gain": [operations.seeded(lambda x: x * torch.rand(1))]}, seed=0)
    >>> batch = views(torch.rand(4, 3, 8, 8))
    >>> torch.equal(batch[2], batch[0]), torch.equal(batch[1], batch[0])
    (True, False)

    Args:
        fn: maps one sample, a float32 tensor such as [C, H, W], to the augmented sample, a tensor whose shape is the
            same for all samples. An albumentations transform can be given directly: it is called with an array
            [H, W, C], and its result is converted back to a tensor [C, H, W].
        name: name of the operation in the parameters. None uses the name of the function or of its class.
        reseed: called with each seed, for a function that has its own generator.

    Raises:
        TypeError: fn is not callable; when applied: fn does not return a tensor.
        ValueError: when applied: fn returns samples of different shapes, or draws from its own generator.
    """
    if not callable(fn):
        raise TypeError(f"seeded: expected a function of one sample: got {type(fn).__name__}")
    made = str(name or getattr(fn, "__name__", type(fn).__name__)).strip("<>")
    if any(kind.__module__.partition(".")[0] == "albumentations" for kind in type(fn).__mro__):
        transform: Any = fn
        return SeededOperation(_of_arrays(transform), made, reseed or getattr(transform, "set_random_seed", None))
    return SeededOperation(fn, made, reseed)


def _of_arrays(transform: Any) -> Callable[[Tensor], Tensor]:
    """An albumentations transform as a function of a tensor [C, H, W]."""

    def fn(x: Tensor) -> Tensor:
        y = transform(image=np.ascontiguousarray(x.permute(1, 2, 0).cpu().numpy()))["image"]
        if isinstance(y, Tensor):  # it ends with ToTensorV2
            return y.to(x.device)
        y = y[:, :, None] if y.ndim == 2 else y
        return torch.from_numpy(np.ascontiguousarray(y)).permute(2, 0, 1).to(x.device)

    return fn
