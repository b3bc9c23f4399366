"""A crop near another one: the constrained crop of METHOD, and what counts as a crop."""

from typing import Any

import kornia.augmentation as K
import torch
from torch import Tensor, nn


def is_crop(op: nn.Module | None) -> bool:
    return isinstance(op, K.RandomResizedCrop | K.RandomCrop)


def near(box: Tensor, a: float, op: Any, image: tuple[int, int], g: torch.Generator) -> Tensor:
    """Corners [B, 4, 2] (x, y) of crops near the query's: area, aspect and center as in docs/method.md.

    The area is a factor of 1 - a to 1 + a of the query's, the aspect is drawn anew from the operation's range, the
    center lies in the query's box, and the box is moved until it lies in the image.

    Args:
        box: the query's corners [B, 4, 2], inclusive.
        a: as above.
        op: the RandomResizedCrop whose aspect range is used.
        image: height and width.
        g: what to draw from.
    """
    b, (h, w) = len(box), image
    low, high = box[:, 0].double(), box[:, 2].double() + 1  # (x, y), exclusive
    ratio = torch.as_tensor(op._param_generator.ratio, dtype=torch.float64).log()
    u = torch.rand(b, 4, dtype=torch.float64, generator=g)
    extent = high - low
    area = extent.prod(dim=1) * (1 - a + 2 * a * u[:, 0])
    aspect = (ratio[0] + (ratio[1] - ratio[0]) * u[:, 1]).exp()
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1)
    limit = torch.tensor([w, h], dtype=torch.float64)
    size = torch.minimum(size, limit)  # where one edge meets the image, the other one keeps the area
    size = torch.minimum(torch.maximum(size, area[:, None] / size.flip(1).clamp(min=1)), limit).round()
    size = torch.minimum(size.clamp(min=1), limit)
    start = low + extent * u[:, 2:] - size / 2
    start = torch.minimum(start.round().clamp(min=0), limit - size)
    stop = start + size - 1
    x0, y0, x1, y1 = start[:, 0], start[:, 1], stop[:, 0], stop[:, 1]
    corners = [torch.stack(c, dim=1) for c in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))]
    return torch.stack(corners, dim=1)
