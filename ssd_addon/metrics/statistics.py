"""Image statistics that need no training, as inputs of probes that use no network.

Legend: b images of C channels and H x W pixels, y their luma.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_addon.metrics.images import LUMA

LEVELS = (0.0, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 1.0)
"""Quantiles that summarize a distribution of pixels."""
PIXELS = 4096
"""Approximate number of pixels per image for color distributions, taken from every k-th row and column."""
HUES, SCALES, GRID = 12, 4, 4
"""Number of hue bins; number of scales, each half the previous; cells along an edge of the layout."""


def luma(x: Tensor) -> Tensor:
    """Gray levels [b, H, W]: ITU-R BT.601 of red, green and blue, the mean of any other channels."""
    if x.shape[1] != 3:
        return x.mean(1)
    return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1)


def image_statistics(x: Tensor) -> dict[str, Tensor]:
    """Three kinds of statistics of images [b, C, H, W] in [0, 1], each [b, d] float32.

    *color*: mean, standard deviation and the shares of black and of white pixels of each channel; quantiles of luma
    and, with several channels, of the largest and the smallest channel, chroma and saturation; for RGB images also a
    histogram of hues, weighted by chroma.
    *texture*: at up to four scales the logarithms of the energies of the Laplacian and of the gradient, and the second
    and fourth moments of the gradient's angle.
    *layout*: the image in 4 x 4 cells, and centers and second moments of luma, gradient and chroma.
    """
    x = x.float()
    y = luma(x)
    return {"color": _color(x, y), "texture": _texture(y), "layout": _layout(x, y)}


def _quantiles(v: Tensor, levels: tuple[float, ...] = LEVELS) -> Tensor:
    """[b, pixels] -> [b, levels]."""
    return torch.quantile(v, v.new_tensor(levels), dim=1).T


def _color(x: Tensor, y: Tensor) -> Tensor:
    step = max(1, int(math.sqrt(y[0].numel() / PIXELS)))
    flat, gray = x[..., ::step, ::step].flatten(2), y[..., ::step, ::step].flatten(1)
    parts = [flat.mean(2), flat.std(2, correction=0)]
    parts += [(flat < 1e-3).float().mean(2), (flat > 1 - 1e-3).float().mean(2), _quantiles(gray)]
    if x.shape[1] > 1:
        high, low = flat.amax(1), flat.amin(1)
        saturation = (high - low) / high.clamp(min=1e-3)
        parts += [_quantiles(v) for v in (high, low, high - low, saturation)]
        parts.append(saturation.mean(1, keepdim=True))
    if x.shape[1] == 3:
        a, b = opponents(flat)
        at = torch.arange(HUES, device=x.device) * (2 * math.pi / HUES)
        near = torch.cos(torch.atan2(b, a)[:, None] - at[None, :, None]).relu() ** 4
        found = (near * (high - low)[:, None]).mean(2)
        parts.append(found / (found.sum(1, keepdim=True) + 1e-3))
    return torch.cat(parts, 1)


def opponents(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """(R - (G + B) / 2, sqrt(3) / 2 (G - B)) for [b, 3, ...]: coordinates of the plane in which hue is the angle."""
    r, g, b = rgb.unbind(1)
    return r - (g + b) / 2, (g - b) * (math.sqrt(3) / 2)


def derivatives(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Central differences along x and y, and the four-neighbor Laplacian, of [b, H, W]; edges are repeated."""
    p = F.pad(y[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    left, right, up, down = p[:, 1:-1, :-2], p[:, 1:-1, 2:], p[:, :-2, 1:-1], p[:, 2:, 1:-1]
    return (right - left) / 2, (down - up) / 2, left + right + up + down - 4 * y


def _texture(y: Tensor) -> Tensor:
    parts: list[Tensor] = []
    for _ in range(SCALES):
        dx, dy, laplacian = (t.flatten(1) for t in derivatives(y))
        energy = dx**2 + dy**2
        parts += [((laplacian**2).mean(1, keepdim=True) + 1e-8).log(), (energy.mean(1, keepdim=True) + 1e-8).log()]
        parts += [(laplacian.abs().amax(1, keepdim=True) + 1e-4).log()]
        parts.append((_quantiles(energy[:, :: max(1, energy.shape[1] // PIXELS)], (0.5, 0.9, 0.99)) + 1e-8).log())
        angle, total = torch.atan2(dy, dx), energy.sum(1, keepdim=True) + 1e-6
        for fold in (2, 4):
            parts += [(energy * f(fold * angle)).sum(1, keepdim=True) / total for f in (torch.cos, torch.sin)]
        if min(y.shape[1:]) < 8:
            break
        y = F.avg_pool2d(y[:, None], 2)[:, 0]
    return torch.cat(parts, 1)


def _layout(x: Tensor, y: Tensor) -> Tensor:
    dx, dy, _ = derivatives(y)
    masses = [y, (dx**2 + dy**2).sqrt()] + ([x.amax(1) - x.amin(1)] if x.shape[1] > 1 else [])
    return torch.cat([F.adaptive_avg_pool2d(x, GRID).flatten(1), *map(_moments, masses)], 1)


def _moments(m: Tensor) -> Tensor:
    """Center and second moments [b, 5] of a mass [b, H, W], in half edges of the image."""
    v, u = (torch.linspace(-1, 1, n, device=m.device) for n in m.shape[1:])
    total = m.sum((1, 2)).clamp(min=1e-6)

    def mean(f: Tensor) -> Tensor:
        return (m * f).sum((1, 2)) / total

    at = mean(u.expand_as(m)), mean(v[:, None].expand_as(m))
    du, dv = u - at[0][:, None, None], v[:, None] - at[1][:, None, None]
    return torch.stack([*at, mean(du * du), mean(dv * dv), mean(du * dv)], 1)
