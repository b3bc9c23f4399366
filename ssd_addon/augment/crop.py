"""Crop boxes: RandomResizedCrop on images of any size, and the constrained crop near the query's crop."""

from typing import Any

import kornia.augmentation as K
import torch
from torch import Tensor, nn

TRIES = 10


def is_crop(op: nn.Module | None) -> bool:
    return isinstance(op, K.RandomResizedCrop | K.RandomCrop)


def resized_crops(sizes: Tensor, op: Any, g: torch.Generator) -> Tensor:
    """Corners [B, 4, 2] (x, y), inclusive, of RandomResizedCrop boxes on images of any sizes.

    The area, as a share of the image, is uniform in the operation's scale; the logarithm of the aspect ratio is uniform
    in its ratio. The first of ten tries that fits into the image is taken, otherwise the largest central box whose
    aspect ratio is allowed.

    Args:
        sizes: [B, 2] height and width of the images, in pixels.
        op: Kornia's RandomResizedCrop.
        g: generator to draw from.

    Source: the rule of torchvision's and Kornia's RandomResizedCrop.
    """
    b, (h, w) = len(sizes), sizes.double().T
    scale, ratio = (
        torch.as_tensor(t, dtype=torch.float64) for t in (op._param_generator.scale, op._param_generator.ratio)
    )
    u = torch.rand(b, TRIES, 2, dtype=torch.float64, generator=g)
    area = (h * w)[:, None] * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    aspect = (ratio[0].log() + (ratio[1] / ratio[0]).log() * u[..., 1]).exp()
    tried = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=2).round()  # [B, TRIES, (height, width)]
    fits = ((tried >= 1) & (tried <= sizes[:, None])).all(dim=2)
    found = tried[torch.arange(b), fits.int().argmax(dim=1)]
    central = torch.stack([torch.minimum(h, (w / ratio[0]).round()), torch.minimum(w, (h * ratio[1]).round())], dim=1)
    some = fits.any(dim=1, keepdim=True)
    size = torch.where(some, found, central.clamp(min=1))
    room = sizes.double() - size
    anywhere = torch.rand(b, 2, dtype=torch.float64, generator=g) * (room + 1)
    start = torch.where(some, torch.minimum(anywhere, room), room / 2).floor()
    return corners(start.flip(1), size.flip(1))


def corners(start: Tensor, size: Tensor) -> Tensor:
    """Corners [B, 4, 2] (x, y), inclusive, clockwise from the upper left, of boxes of start and size [B, 2] (x, y)."""
    (x0, y0), (x1, y1) = start.unbind(1), (start + size - 1).unbind(1)
    return torch.stack([torch.stack(c, dim=1) for c in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], dim=1)


def near(box: Tensor, a: float, op: Any, image: tuple[int, int] | Tensor, g: torch.Generator) -> Tensor:
    """Corners [B, 4, 2] (x, y), inclusive, of crops near the query's crop: the constrained crop of docs/method.md.

    The area is 1 - a to 1 + a times the query's, the aspect ratio is redrawn from the operation's range, the center is
    uniform in the query's box, and the box is moved to lie inside the image.

    Args:
        box: the query's corners [B, 4, 2], inclusive.
        a: largest relative change of the area.
        op: the RandomResizedCrop whose range of aspect ratios is used.
        image: (height, width) of all images, or [B, 2], one per image.
        g: generator to draw from.
    """
    b = len(box)
    low, high = box[:, 0].double(), box[:, 2].double() + 1  # (x, y), exclusive
    ratio = torch.as_tensor(op._param_generator.ratio, dtype=torch.float64).log()
    u = torch.rand(b, 4, dtype=torch.float64, generator=g)
    extent = high - low
    area = extent.prod(dim=1) * (1 - a + 2 * a * u[:, 0])
    aspect = (ratio[0] + (ratio[1] - ratio[0]) * u[:, 1]).exp()
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1)
    limit = torch.as_tensor(image, dtype=torch.float64).expand(b, 2).flip(1)
    size = torch.minimum(size, limit)  # if one side is limited by the image, lengthen the other to keep the area
    size = torch.minimum(torch.maximum(size, area[:, None] / size.flip(1).clamp(min=1)), limit).round()
    size = torch.minimum(size.clamp(min=1), limit)
    start = low + extent * u[:, 2:] - size / 2
    start = torch.minimum(start.round().clamp(min=0), limit - size)
    return corners(start, size)
