"""Shows images with any number of channels as RGB; for display only, no metric uses it.

Legend: n images, C channels, k values per pixel that are shown (1 to 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PIXELS = 100_000
"""Approximate number of pixels from which directions and percentiles are computed."""
VISIBLE = 1e-6
"""Share of the variance below which a principal direction counts as rounding error."""
STRETCHED = (0.01, 0.99)
"""The quantiles that are mapped to black and to full brightness."""
COLORS = {1: "gray", 2: "magenta and green", 3: "red, green and blue"}


@dataclass(frozen=True, eq=False)
class Display:
    """A fixed map from the C channels of an image to RGB, the same for all images, so that colors are comparable.

    Attributes:
        weights: [k, C]; weights @ pixel is shown: one value as gray, two as magenta and green, three as RGB.
        low, high: [k] the values that are mapped to 0 and 1.
        text: a description of what is shown; "" for gray and RGB images that are shown unchanged.
    """

    weights: Tensor
    low: Tensor
    high: Tensor
    text: str = ""

    @property
    def channels(self) -> int:
        """C, the number of channels of the images."""
        return int(self.weights.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        """Convert images [..., C, H, W], uint8 or in [0, 1], to [..., 3, H, W] in [0, 1], float32 on the CPU."""
        pixels = _floats(x)
        shown = torch.einsum("kc,...chw->...khw", self.weights, pixels) - self.low.view(-1, 1, 1)
        shown = (shown / (self.high - self.low).view(-1, 1, 1)).nan_to_num(0.0).clamp(0, 1)
        return shown[..., [0, 1, 0], :, :] if len(self.weights) == 2 else shown.expand(*x.shape[:-3], 3, *x.shape[-2:])


def display(images: Tensor, bands: Sequence[int] | None = None) -> Display:
    """Choose how images are shown.

    Args:
        images: [..., C, H, W], uint8 or in [0, 1], from which directions and percentiles are computed.
        bands: one to three channels, counted from 0: one is shown as gray, two as magenta and green, three as red,
            green and blue. None shows one to three channels unchanged; for more channels it shows the first three
            principal directions of all pixels. With more than three channels, contrast is stretched from the 1st to
            the 99th percentile.

    Raises:
        TypeError, ValueError: bands are not one to three channels of the images.
    """
    c = images.shape[-3]
    if bands is not None:
        chosen = checked_bands(bands, c)
        weights = torch.eye(c)[list(chosen)]
        text = f"band{'s' if len(chosen) > 1 else ''} {', '.join(map(str, chosen))} of 0 to {c - 1}"
    elif c <= 3:
        weights = torch.eye(c)
        text = "bands 0, 1" if c == 2 else ""
    else:
        weights, text = _principal(_some_pixels(images), c)
    k = len(weights)
    text += f" as {COLORS[k]}" if text and k else ""
    if c <= 3:
        return Display(weights, torch.zeros(k), torch.ones(k), text)
    shown = _some_pixels(images) @ weights.T
    low, high = torch.quantile(shown, torch.tensor(STRETCHED), dim=0)
    least = torch.finfo(torch.float32).eps * shown.abs().amax(0).clamp(min=1)
    constant = high - low <= least
    low, high = torch.where(constant, 0.0, low), torch.where(constant, 1.0, high)
    return Display(weights, low, high, f"{text}, stretched from the 1st to the 99th percentile")


def checked_bands(bands: Any, channels: int | None = None) -> tuple[int, ...]:
    """Check bands and return them as a tuple; `channels` is the number of channels of the images, if given.

    Raises:
        TypeError, ValueError: bands are not one to three channels of the images.
    """
    expected = "bands: expected one to three channels, counted from 0"
    if isinstance(bands, str) or not isinstance(bands, Sequence):
        raise TypeError(f"{expected}, such as (3, 2, 1): got {bands!r}")
    chosen = tuple(bands)
    if not 1 <= len(chosen) <= 3 or any(isinstance(b, bool) or not isinstance(b, int) for b in chosen):
        raise ValueError(f"{expected}, such as (3, 2, 1): got {chosen}")
    if min(chosen) < 0 or (channels is not None and max(chosen) >= channels):
        known = "" if channels is None else f"; the images have {channels}, so 0 to {channels - 1}"
        raise ValueError(f"{expected}{known}: got {chosen}")
    return chosen


def _principal(pixels: Tensor, channels: int) -> tuple[Tensor, str]:
    """Up to three principal directions of the pixels [N, C], those with variance, and their description."""
    centered = (pixels - pixels.mean(0)).double()
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    total = float(values.clamp(min=0).sum())
    order = [i for i in range(channels - 1, max(-1, channels - 4), -1) if float(values[i]) > VISIBLE * total]
    if not order or total <= torch.finfo(torch.float32).eps * len(pixels):
        return torch.full((1, channels), 1 / channels), f"the mean of the {channels} bands, which do not vary,"
    directions = vectors[:, order].T
    directions = directions * torch.where(
        directions.sum(1, keepdim=True) < 0, -1.0, 1.0
    )  # orient directions so that more light is brighter
    share = " %, ".join(f"{100 * float(values[i]) / total:.3g}" for i in order)
    named = (
        "the first principal direction",
        "the first two principal directions",
        "the first three principal directions",
    )
    return directions.float(), f"{named[len(order) - 1]} of all pixels' {channels} bands ({share} % of their variance)"


def _some_pixels(images: Tensor) -> Tensor:
    """About PIXELS pixels [N, C], at the same random places in every image; all of them if there are fewer."""
    flat = images.reshape(-1, images.shape[-3], images.shape[-2] * images.shape[-1])
    some = max(16, -(-PIXELS // len(flat)))
    if some < flat.shape[-1]:
        flat = flat[..., torch.randperm(flat.shape[-1], generator=torch.Generator().manual_seed(0))[:some]]
    return _floats(flat.movedim(1, -1).reshape(-1, flat.shape[1]))


def _floats(x: Tensor) -> Tensor:
    x = x.detach().cpu()
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()
