"""Anything that draws its own random numbers, shared by the seed of each sample."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_addon.operations.draws import SEED, Parameters, Watch


class SeededOperation:
    """A function of one sample that draws while it is applied, as an operation: what is drawn is a seed per sample.

    Made by `seeded`.
    """

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
                    raise TypeError(f"expected the function to return a tensor, as it is given: got {type(y).__name__}")
                out.append(y)
        finally:
            watch.restore()
        if any(y.shape != out[0].shape for y in out):
            raise ValueError(
                f"expected samples of one shape from the function: got {sorted({tuple(y.shape) for y in out})}; end "
                "with a resize or a crop to one size"
            )
        return torch.stack(out)


def seeded(fn: Callable[[Any], Any], *, name: str | None = None, reseed: Callable[[int], Any] | None = None) -> Any:
    """An operation of any function that augments one sample: `StructuredViews({"color": [operations.seeded(fn)]})`.

    Views share the *seed* of each sample: before every call torch's, numpy's and Python's global generators are set to
    it, and put back afterwards. Sharing and replay are exact. What the function draws is not known by name, so nothing
    of it can be predicted: `parameter_matrix`, `EquivarianceLoss` and the label-free report leave such groups out.

    >>> from ssd_addon import StructuredViews, operations
    >>> views = StructuredViews({"gain": [operations.seeded(lambda x: x * torch.rand(1))]}, seed=0)
    >>> batch = views(torch.rand(4, 3, 8, 8))
    >>> torch.equal(batch[2], batch[0]), torch.equal(batch[1], batch[0])
    (True, False)

    Args:
        fn: one sample, a float32 tensor such as [C, H, W] -> the augmented sample, a tensor of one shape for all. A
            transform of albumentations is taken as it is: it is called with an array [H, W, C], and what it returns is
            made a tensor [C, H, W] again.
        name: what its parameters go by; None is the name of the function or of its class.
        reseed: called with each seed, for a function with a generator of its own.

    Raises:
        TypeError: no function; in use: one that returns no tensor.
        ValueError: in use: samples of different shapes; a function that draws from a generator of its own.
    """
    if not callable(fn):
        raise TypeError(f"seeded: expected a function of one sample: got {type(fn).__name__}")
    made = str(name or getattr(fn, "__name__", type(fn).__name__)).strip("<>")
    if any(kind.__module__.partition(".")[0] == "albumentations" for kind in type(fn).__mro__):
        transform: Any = fn
        return SeededOperation(_of_arrays(transform), made, reseed or getattr(transform, "set_random_seed", None))
    return SeededOperation(fn, made, reseed)


def _of_arrays(transform: Any) -> Callable[[Tensor], Tensor]:
    """A transform of albumentations as a function of a tensor [C, H, W]."""

    def fn(x: Tensor) -> Tensor:
        y = transform(image=np.ascontiguousarray(x.permute(1, 2, 0).cpu().numpy()))["image"]
        if isinstance(y, Tensor):  # it ends with ToTensorV2
            return y.to(x.device)
        y = y[:, :, None] if y.ndim == 2 else y
        return torch.from_numpy(np.ascontiguousarray(y)).permute(2, 0, 1).to(x.device)

    return fn
