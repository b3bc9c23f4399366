"""Color operations as a table of instructions, one row per image, run in place.

    BLEND      x <- clamp(a x + b gray(x) + c mean(gray(x)) + d)
    HUE        x <- x with the hue of HSV shifted by a sixths of a turn
    SATURATE   x <- x with the saturation of HSV multiplied by a
    SOLARIZE   x <- y where y < a, else 1 - y;  y = clamp(x + b)

Brightness, contrast, saturation by gray, grayscale and inversion are all blends, so images with different operations at
the same place of the table share its passes. gray = 0.299 R + 0.587 G + 0.114 B. The Triton kernel reads the same table
(`color_tiles`). Legend: N images, K columns, P pixels of an image.
"""

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NOTHING, BLEND, HUE, SATURATE, SOLARIZE = range(5)
GREYING = 4
"""Added to the code BLEND if gray is needed."""
RUNS = 4
"""Largest number of consecutive runs of one kind of instruction in a column that are processed in place, one by one."""
GREY = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights, as in torchvision, PIL and Kornia."""
_TINY = 1e-12
"""Smaller than any difference of two channels of a float32 image in [0, 1]."""


@dataclass(frozen=True)
class Chain:
    """Instructions of N images, run column by column.

    Attributes:
        codes: [N, K] int64.
        numbers: [N, K, 4] float32: a, b, c, d.
    """

    codes: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, columns: Sequence[tuple[Tensor, Tensor]]) -> "Chain":
        """Combine columns, each (codes [N], numbers [N, 4]), into a table."""
        return cls(torch.stack([c for c, _ in columns], dim=1), torch.stack([x for _, x in columns], dim=1))

    def rows(self, rows: Tensor) -> "Chain":
        return Chain(self.codes[rows], self.numbers[rows])

    def fires(self) -> Tensor:
        """[N] bool: whether any instruction changes the image."""
        return (self.codes != NOTHING).any(dim=1)

    def alike(self) -> Tensor:
        """[N] an order in which images with the same kinds of instructions are adjacent."""
        kinds = self.kinds()[:, :16]
        return (kinds * 8 ** torch.arange(kinds.shape[1]).flip(0)).sum(dim=1).argsort(stable=True)

    def kinds(self) -> Tensor:
        """[N, K] codes; blends that need gray have their own code."""
        return self.codes + GREYING * ((self.codes == BLEND) & (self.numbers[:, :, 1] != 0)).long()


def column(code: int, fires: Tensor, *numbers: Tensor | float) -> tuple[Tensor, Tensor]:
    """One instruction for the images on which it fires [N] bool; numbers a, b, c, d: [N] or the same for all."""
    values = torch.zeros(len(fires), 4)
    for k, value in enumerate(numbers):
        values[:, k] = value
    return torch.where(fires, code, NOTHING), values


def run(chain: Chain, x: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Run the table on images [N, C, H, W], float32 in [0, 1], contiguous; in place.

    Args:
        ends: mean and standard deviation by channel [C or 1, 1, 1] of a final Normalize.
    """
    if x.is_cuda and x.shape[1] == 3 and (kernel := _kernel(x.device)) is not None:
        out: Tensor = kernel(x, chain.codes, chain.numbers, ends)
        return out
    return run_in_torch(chain, x, ends)


def run_in_torch(chain: Chain, x: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Run the table in torch's own functions, on any device: the definition of the kernel."""
    flat, kinds, numbers = x.flatten(2), chain.kinds().numpy(), chain.numbers.to(x.device)
    for k in range(kinds.shape[1]):
        of = kinds[:, k]
        edges = [0, *(np.flatnonzero(of[1:] != of[:-1]) + 1).tolist(), len(of)]
        runs: dict[int, list[tuple[int, int]]] = {}
        for a, b in itertools.pairwise(edges):
            runs.setdefault(int(of[a]), []).append((a, b))
        for kind, found in runs.items():
            if kind == NOTHING:
                continue
            if len(found) <= RUNS:
                for a, b in found:
                    _RUN[kind](flat[a:b], numbers[a:b, k], _used(chain.numbers[a:b, k]))
            else:
                rows = torch.from_numpy(np.flatnonzero(of == kind))
                there = rows.to(x.device)
                part = flat.index_select(0, there)
                _RUN[kind](part, numbers[there, k], _used(chain.numbers[rows, k]))
                put(flat, rows, part)
    if ends is not None:
        mean, std = (t.to(x.device) for t in ends)
        x.sub_(mean).div_(std)
    return x


def _kernel(device: torch.device) -> Any:
    """The Triton kernel if it can run on this device, else None."""
    try:
        tiles = importlib.import_module("ssd_addon.kernels.color_tiles")
    except ImportError:  # no triton
        return None
    return tiles.colors if tiles.runs_on(device) else None


def _used(numbers: Tensor) -> list[bool]:
    """Which of a, b, c, d are not 0 for all images."""
    out: list[bool] = (numbers != 0).any(dim=0).tolist()
    return out


def put(out: Tensor, rows: Tensor, values: Tensor) -> None:
    """out[rows] = values; on the CPU row by row, which is faster than an indexed assignment."""
    if out.is_cuda:
        out.index_copy_(0, rows.to(out.device), values)
        return
    for k, value in zip(rows.tolist(), values, strict=True):
        out[k].copy_(value)


def grey(x: Tensor) -> Tensor:
    """Luma [N, P] of pixels [N, 3, P]."""
    red, green, blue = x.unbind(1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def _blend(x: Tensor, numbers: Tensor, used: list[bool]) -> None:
    a, _, c, d = numbers[:, :, None, None].unbind(1)  # [N, 1, 1]
    if used[2]:
        weights = torch.tensor(GREY, device=x.device)
        d = d + c * (x.mean(dim=2) @ weights)[:, None, None]
    x.mul_(a)
    if used[2] or used[3]:
        x.add_(d)
    x.clamp_(0, 1)


def _greying(x: Tensor, numbers: Tensor, used: list[bool]) -> None:
    a, b, c, d = numbers[:, :, None, None].unbind(1)
    shades = grey(x).unsqueeze(1)
    if used[2]:
        d = d + c * shades.mean(dim=2, keepdim=True)
    shades.mul_(b)
    if used[2] or used[3]:
        shades.add_(d)
    if used[0]:
        x.mul_(a).add_(shades)
    else:
        x.copy_(shades)
    x.clamp_(0, 1)


def _hue(x: Tensor, numbers: Tensor, used: list[bool]) -> None:
    """Shift the hue, measured as the distance to red on a circle of length 6: |h| = u_green + u_blue - u_red + 1, where
    u = (x - min) / (max - min); h is negative if blue exceeds green. Each channel is then
    min + (max - min) * clamp(2 - distance of the shifted hue to it, 0, 1).
    """
    red, green, blue = x.unbind(1)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    chroma = torch.maximum(red, green)
    torch.maximum(chroma, blue, out=chroma).sub_(low)
    hue = torch.add(green, blue).sub_(red).sub_(low)
    hue.div_(chroma.clamp(min=_TINY)).add_(1)
    turned = torch.sub(green, blue)
    torch.copysign(hue, turned, out=hue).add_(numbers[:, :1])
    hue.sub_(torch.mul(hue, 1 / 6, out=turned).round_().mul_(6))  # in [-3, 3]
    low.sub_(chroma)
    for channel, place in enumerate((0.0, 2.0, -2.0)):
        near = torch.sub(hue, place, out=turned).abs_().sub_(3).abs_().clamp_(1, 2)
        torch.addcmul(low, chroma, near, out=x[:, channel])


def _saturate(x: Tensor, numbers: Tensor, used: list[bool]) -> None:
    """Scale the saturation as Kornia's `adjust_saturation`, with saturation (max - min) / (max + 1e-8)."""
    top, low = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    chroma = top - low
    wanted = (chroma / (top + 1e-8)).mul_(numbers[:, :1, None]).clamp_(0, 1).mul_(top)
    x.sub_(low).mul_(wanted / chroma.clamp(min=_TINY)).add_(top - wanted).clamp_(0, 1)


def _solarize(x: Tensor, numbers: Tensor, used: list[bool]) -> None:
    threshold, addition = numbers[:, 0, None, None], numbers[:, 1, None, None]
    x.add_(addition).clamp_(0, 1)
    torch.where(x < threshold, x, 1 - x, out=x)


_RUN = {BLEND: _blend, BLEND + GREYING: _greying, HUE: _hue, SATURATE: _saturate, SOLARIZE: _solarize}
