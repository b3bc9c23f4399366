"""Checks on what is augmented: images, or samples of any shape and value range."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.operations.trial import Range

RANGE_SLACK = _checks.SLACK
"""How far outside the range a value may lie, as rounding in a resize causes; as a share of the range."""


@dataclass(frozen=True)
class Samples:
    """The kind of sample that is augmented.

    Attributes:
        ndim: number of dimensions of a sample: 3 for images [C, H, W].
        value_range: (lowest, highest) value, or None for any.
    """

    ndim: int = 3
    value_range: Range | None = (0.0, 1.0)

    @property
    def name(self) -> str:
        return "images" if self.ndim == 3 else "samples"

    @property
    def shape(self) -> str:
        return "[B, C, H, W]" if self.ndim == 3 else f"[B, ...] of {self.ndim + 1} dimensions"


def checked_range(value_range: Any) -> tuple[float, float] | None:
    if value_range is None:
        return None
    try:
        low, high = (float(v) for v in value_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"value_range: expected (lowest, highest), or None for any values: got {value_range!r}")
    return low, high


def checked(images: Any, samples: Samples) -> Tensor:
    """Check a batch of samples: uint8 (images only) or floating point, with values in the range."""
    what, value_range = samples.name, samples.value_range
    if not isinstance(images, Tensor):
        hint = "; StructuredViews takes whole batches, StructuredTransform one sample, as a data set's transform"
        raise TypeError(f"{what}: expected a tensor {samples.shape}: got {type(images).__name__}{hint}")
    if images.ndim != samples.ndim + 1:
        raise ValueError(f"{what}: expected {samples.shape}: got {images.ndim} dimensions {_checks.shape(images)}")
    if 0 in images.shape:
        one = "image with pixels" if samples.ndim == 3 else "sample with values"
        raise ValueError(f"{what}: expected at least one {one}: got {_checks.shape(images)}")
    if images.dtype == torch.uint8 and value_range == (0.0, 1.0):
        return images
    if not images.is_floating_point():
        also = "uint8, or floating point in [0, 1]" if value_range == (0.0, 1.0) else "floating point"
        raise TypeError(f"{what}: expected {also}: got {images.dtype}")
    if value_range is None:
        return images
    (bottom, top), (low, high) = value_range, (float(v) for v in torch.aminmax(images.detach()))
    slack = RANGE_SLACK * (top - bottom)
    if not (low >= bottom - slack and high <= top + slack):
        found = "NaN among them" if math.isnan(low) else f"values from {low:.9g} to {high:.9g}"
        hint = "scale them (uint8 images are scaled for you) and put Normalize into `then`"
        if samples != Samples():
            hint = "give the range of your data, value_range=(lowest, highest), or None for no check"
        raise ValueError(
            f"{what}: expected values in [{bottom:g}, {top:g}], as the operations clamp to that range: got {found}; "
            f"{hint}"
        )
    return images


def floats(x: Tensor) -> Tensor:
    """Convert to float32; uint8 is scaled to [0, 1]."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()
