"""Read a backbone at several layers: an earlier layer may still encode what the last one has lost."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BEFORE = (0, 1, 2, 4, 5)
"""How many tokens may stand before those of the image: a class token, one of distillation, registers."""


class Layers(nn.Module):
    """Images to the outputs of several layers, each averaged in grid x grid cells, side by side: [N, F].

    Args:
        net: the backbone.
        layers: names of modules inside it that return maps [N, C, H, W] or [N, H, W, C], or tokens [N, T, C]. Tokens
            are averaged in cells if the image is a square and they are too, apart from class and register tokens;
            otherwise over all of them.
        grid: 1 averages over all places; 2 keeps in which quarter of the image something was.
    """

    def __init__(self, net: nn.Module, layers: list[str], grid: int = 1) -> None:
        super().__init__()
        self.net, self.layers, self.grid = net, layers, grid

    def forward(self, x: Tensor) -> Tensor:
        met: list[Tensor] = []

        def note(module: nn.Module, inputs: tuple, y: Tensor) -> None:
            y = as_map(y, x.shape[-2] / x.shape[-1], getattr(self.net, "num_prefix_tokens", None))
            met.append(F.adaptive_avg_pool2d(y, self.grid).flatten(1))

        handles = [self.net.get_submodule(name).register_forward_hook(note) for name in self.layers]
        try:
            self.net(x)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(met, dim=1)


def as_map(y: Tensor, ratio: float, before: int | None) -> Tensor:
    """The output of a layer as a map [N, C, H, W].

    Args:
        ratio: height / width of the image, by which the dimensions of a map that are its height and width are found.
        before: number of tokens before those of the image; None finds one of `BEFORE` that leaves a square.
    """
    if not isinstance(y, Tensor) or y.ndim not in (3, 4):
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"layers: expected layers that return maps [N, C, H, W] or tokens [N, T, C]: got {got}")
    if y.ndim == 4:
        first, last = (abs(math.log(y.shape[k] / y.shape[k + 1] / ratio)) for k in (2, 1))
        return y if first <= last else y.permute(0, 3, 1, 2)
    sides = {k: math.isqrt(max(y.shape[1] - k, 0)) for k in (BEFORE if before is None else (before, 0))}
    square = next((k for k, side in sides.items() if side and side**2 == y.shape[1] - k and ratio == 1), None)
    if square is None:
        return y[:, before or 0 :].mean(1)[..., None, None]
    return y[:, square:].unflatten(1, (sides[square], sides[square])).permute(0, 3, 1, 2)
