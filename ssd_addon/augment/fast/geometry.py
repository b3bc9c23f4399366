"""Crops, resizes and flips as one resampling of each image.

A `Placement` describes which part of its source image a view shows, at which size, and how it is mirrored; each step
updates these numbers only. Pixels are computed once, with antialiasing, as torchvision's `resized_crop(antialias=True)`
and PIL do. Legend: S source images, N views of them, C channels, [H, W] size of a view, [h, w] size of a source image.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Filter = Literal["bilinear", "bicubic"]
_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
}
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


@dataclass(frozen=True)
class Placement:
    """The part of its source image that each view shows.

    Attributes:
        box: [N, 4] int64: top, left, height, width in the source image, in pixels.
        mirrored: [N, 2] bool: flipped vertically; flipped horizontally.
        size: (H, W) of the views.
        filter: interpolation for boxes of another size; None if no box has another size.
    """

    box: Tensor
    mirrored: Tensor
    size: tuple[int, int]
    filter: Filter | None = None

    @classmethod
    def whole(cls, n: int, size: tuple[int, int]) -> "Placement":
        """N views that show their whole image unchanged."""
        box = torch.tensor([0, 0, *size]).repeat(n, 1)
        return cls(box, torch.zeros(n, 2, dtype=torch.bool), size)

    def shows_all_of(self, source: Tensor) -> bool:
        """Does every view show its whole image, pixel by pixel?"""
        size = tuple(source.shape[-2:])
        return self.size == size and bool((self.box == torch.tensor([0, 0, *size])).all())

    def rows(self, rows: Tensor) -> "Placement":
        return replace(self, box=self.box[rows], mirrored=self.mirrored[rows])

    def flipped(self, fires: Tensor, axis: int) -> "Placement":
        """Flipped where `fires` [N] is true; axis 0 flips vertically, axis 1 horizontally."""
        mirrored = self.mirrored.clone()
        mirrored[:, axis] ^= fires
        return replace(self, mirrored=mirrored)

    def cropped(
        self, top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: tuple[int, int], how: Filter | None
    ) -> "Placement":
        """Cropped to a box per view and resized; the view must not have been resampled before."""
        mine = self.box
        top = torch.where(self.mirrored[:, 0], mine[:, 2] - top - height, top) + mine[:, 0]
        left = torch.where(self.mirrored[:, 1], mine[:, 3] - left - width, left) + mine[:, 1]
        return Placement(torch.stack([top, left, height, width], dim=1), self.mirrored, size, how)


def pixels(place: Placement, source: Tensor, index: Tensor) -> Tensor:
    """[N, C, H, W] float32 in [0, 1], contiguous.

    Args:
        place: placement of N views.
        source: [S, C, h, w] uint8, or float32 in [0, 1]; channels-last uint8 is fastest on the CPU.
        index: [N], the source image of each view.
    """
    if source.device.type != "cpu":
        return _by_matrices(place, source, index)
    if source.dtype == torch.uint8:
        levels = cut(place, source, index)
        out = torch.empty(levels.shape, dtype=torch.float32)
        return out.copy_(levels).div_(255)
    out = cut(place, source, index)
    return out.clamp_(0, 1) if place.filter == "bicubic" else out


def cut(place: Placement, source: Tensor, index: Tensor) -> Tensor:
    """The views, in the dtype and memory format of the source."""
    n, channels, size = len(index), source.shape[1], place.size
    if place.shows_all_of(source) and not bool(place.mirrored.any()):
        return source.index_select(0, index)
    layout = torch.channels_last if source.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    out = torch.empty((n, channels, *size), dtype=source.dtype, memory_format=layout)
    resize = None if place.filter is None else _RESIZE[place.filter].out
    rows = zip(out.split(1), index.tolist(), place.box.tolist(), place.mirrored.tolist(), strict=True)
    for there, k, (top, left, height, width), mirrored in rows:
        box = source[k : k + 1, :, top : top + height, left : left + width]
        axes = [2 + axis for axis in (0, 1) if mirrored[axis]]
        if resize is None or (height, width) == size:
            there.copy_(box.flip(axes) if axes else box)
            continue
        resize(box, size, False, None, None, out=there)
        if axes:
            there.copy_(there.flip(axes))
    return out


# ---- other devices: all views at once


def matrices(start: Tensor, length: Tensor, extent: int, size: int, how: Filter | None) -> Tensor:
    """[N, size, extent] weights that resample the `length` pixels from `start` on to `size` pixels.

    The filter is widened by length / size where that exceeds 1 (antialiasing). Source: Pillow's resampling.
    """
    kind = torch.float32 if start.device.type == "mps" else torch.float64  # MPS has no float64
    start, length = start.to(kind), length.to(kind)
    scale = length[:, None] / size
    center = (torch.arange(size, dtype=kind, device=start.device) + 0.5) * scale
    if how is None:
        center, scale, how = center.floor() + 0.5, torch.ones_like(scale), "bilinear"
    wide = scale.clamp(min=1)
    support = _SUPPORT[how] * wide
    first = (center - support + 0.5).floor().clamp(min=0)
    last = torch.minimum((center + support + 0.5).floor(), length[:, None])
    at = torch.arange(extent, dtype=kind, device=start.device) - start[:, None]  # [N, extent]
    x = ((at[:, None, :] + 0.5 - center[:, :, None]) / wide[:, :, None]).abs()
    if how == "bilinear":
        weight = (1 - x).clamp(min=0)
    else:
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    inside = (at[:, None, :] >= first[:, :, None]) & (at[:, None, :] < last[:, :, None])
    weight = torch.where(inside, weight, 0.0)
    return (weight / weight.sum(dim=2, keepdim=True)).float()


def _by_matrices(place: Placement, source: Tensor, index: Tensor) -> Tensor:
    device = source.device
    image = source[index.to(device)]
    x = image.float() / 255 if source.dtype == torch.uint8 else image
    if not place.shows_all_of(source):
        top, left, height, width = place.box.to(device).unbind(1)
        rows = matrices(top, height, source.shape[-2], place.size[0], place.filter)
        columns = matrices(left, width, source.shape[-1], place.size[1], place.filter)
        with torch.autocast(device.type, enabled=False):
            x = rows[:, None] @ x @ columns[:, None].mT
        x = x.clamp_(0, 1)
    for axis in (0, 1):
        mirrored = place.mirrored[:, axis]
        if bool(mirrored.any()):
            x = torch.where(mirrored.to(device)[:, None, None, None], x.flip(2 + axis), x)
    return x.contiguous()
