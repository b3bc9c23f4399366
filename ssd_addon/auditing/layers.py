"""What a backbone computes on the way: one row per image of any layer's output.

Legend: B images, C channels, [H, W] map, T tokens, d numbers per image.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon._types import as_weights
from ssd_addon.auditing.stages import first_tensor, is_channels_last
from ssd_addon.metrics import ScoreTable
from ssd_addon.metrics.images import gray
from ssd_addon.pooling import Pooling, picked

GRID = 2
"""A map of features is averaged in a grid of GRID x GRID cells, so that something of where things are is kept."""
PIXELS = 8
"""Edge in pixels of the images that the row "pixels" is made of."""
UNTRAINED = "untrained"
PREFIX = 8
"""Tokens at most that stand before those of the image: class and register tokens."""


class Layers(nn.Module):
    """Images [B, C, H, W] in [0, 1] to name -> [B, d]: "pixels", the layers, "backbone" and "untrained 0", ...

    Args:
        backbone: returns features.
        pooling: of its features.
        layers: name -> the module inside the backbone whose output is a row.
        mean, std: of the images' channels; subtracted and divided by before the backbone. None: the images as they are.
        untrained: other backbones of the same form.
        is_gray: whether color images are made gray before the backbone, which takes one channel; the row "pixels" is
            that of the colors.

    Features are computed in the dtype of the backbone's weights, and pooled in float32 or float64.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pooling: Pooling,
        layers: Mapping[str, nn.Module],
        normalize: tuple[Sequence[float], Sequence[float]] | None,
        untrained: Sequence[nn.Module] = (),
        is_gray: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.pooling, self.untrained = backbone, pooling, nn.ModuleList(untrained)
        self._layers = dict(layers)  # parts of the backbone: not registered again
        self.normalize, self.is_gray = normalize, is_gray

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        images = self.normalized(x)
        met: dict[str, Tensor] = {}
        with _noted(self._layers, met, len(x), (x.shape[-2], x.shape[-1]) if x.ndim == 4 else (1, 1)):
            features = self._pooled(self.backbone, images)
        if silent := [name for name in self._layers if name not in met]:
            raise ValueError(
                f"layers: expected modules that run when the backbone does: got {_checks.names(silent)}, which do not"
            )
        out = {"pixels": pixels(precise(x)), **{name: met[name] for name in self._layers}, "backbone": features}
        for k, twin in enumerate(self.untrained):
            out[f"{UNTRAINED} {k}"] = self._pooled(twin, images)
        return out

    def _pooled(self, net: nn.Module, images: Tensor) -> Tensor:
        y = picked(net(images), self.pooling.output, self.pooling.name)
        return replace(self.pooling, output=None)(precise(y), len(images))

    def normalized(self, x: Tensor) -> Tensor:
        """Images as the backbone takes them."""
        x = gray(precise(x)) if self.is_gray and x.ndim == 4 and x.shape[1] == 3 else precise(x)
        if self.normalize is not None:
            mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in self.normalize)
            if len(mean) not in (1, x.shape[1]):
                mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
            x = (x - mean) / std
        return as_weights(x, self.backbone)


def precise(x: Tensor) -> Tensor:
    """In float32, or float64 where it is: means over many places lose too much in less."""
    return x if x.dtype == torch.float64 else x.float()


def over_copies(table: ScoreTable) -> ScoreTable:
    """The table with one row "untrained": the mean over the copies, and intervals that span those of all copies."""
    copies = [s for s in table.spaces if s.startswith(f"{UNTRAINED} ") and s.removeprefix(f"{UNTRAINED} ").isdigit()]
    scores = {cell: v for cell, v in table.scores.items() if cell[0] not in copies}
    intervals = {cell: v for cell, v in table.intervals.items() if cell[0] not in copies}
    notes = {cell: v for cell, v in table.notes.items() if cell[0] not in copies}
    for f in table.factors if copies else ():
        scores[UNTRAINED, f] = sum(table.scores[c, f] for c in copies) / len(copies)
        found = [table.intervals[c, f] for c in copies if (c, f) in table.intervals]
        if len(found) == len(copies):
            intervals[UNTRAINED, f] = min(low for low, _ in found), max(high for _, high in found)
        if note := next((table.notes[c, f] for c in copies if (c, f) in table.notes), None):
            notes[UNTRAINED, f] = note
    rows = (*(s for s in table.spaces if s not in copies), *((UNTRAINED,) if copies else ()))
    parts = None if table.parts is None else over_copies(table.parts)
    return replace(table, spaces=rows, scores=scores, intervals=intervals, notes=notes, parts=parts)


def pixels(x: Tensor) -> Tensor:
    """Images [B, C, H, W], averaged in a grid of PIXELS x PIXELS: [B, d]."""
    if x.ndim != 4:
        return x.flatten(1)
    return F.adaptive_avg_pool2d(x, (min(PIXELS, x.shape[2]), min(PIXELS, x.shape[3]))).flatten(1)


def row(y: Tensor, size: tuple[int, int] = (1, 1)) -> Tensor:
    """The output of a layer as [B, d]: maps and the tokens of an image averaged in a grid, anything else over its
    positions.

    Args:
        y: [B, C, H, W], [B, H, W, C], tokens [B, T, F], or any other [B, F, ...].
        size: height and width of the images, whose aspect ratio a map or a grid of tokens has.
    """
    if y.ndim == 3:
        grid = _grid(y.shape[1], size)
        if grid is None:
            return y.mean(1)
        y = y[:, y.shape[1] - math.prod(grid) :].unflatten(1, grid).permute(0, 3, 1, 2)
    elif y.ndim == 4 and is_channels_last(y.shape, size):
        y = y.permute(0, 3, 1, 2)
    if y.ndim == 4:
        return F.adaptive_avg_pool2d(y, (min(GRID, y.shape[2]), min(GRID, y.shape[3]))).flatten(1)
    return y.flatten(2).mean(2) if y.ndim > 2 else y


def _grid(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the tokens of an image, which PREFIX others at most stand before; None if they form none."""
    common = math.gcd(*size)
    h, w = size[0] // common, size[1] // common
    for inside in range(tokens, max(0, tokens - PREFIX - 1), -1):
        k = math.isqrt(inside // (h * w))
        if k * k * h * w == inside and min(k * h, k * w) >= GRID:
            return k * h, k * w
    return None


@contextmanager
def _noted(
    layers: Mapping[str, nn.Module], met: dict[str, Tensor], images: int, size: tuple[int, int]
) -> Iterator[None]:
    """Keep the output of every layer as a row while the block runs; of one that runs several times the last."""

    def keep(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            found = first_tensor(output, images)
            if found is None or found.ndim < 2 or not found.is_floating_point():
                raise TypeError(
                    f"layers: expected a layer that returns a tensor: got {type(output).__name__} from {name!r}"
                )
            if len(found) != images:
                raise ValueError(
                    "layers: expected a layer whose output has the images in its first dimension: got "
                    f"{_checks.shape(found)} from {name!r}"
                )
            met[name] = row(precise(found), size)  # at once: a later layer may work in place

        return note

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
