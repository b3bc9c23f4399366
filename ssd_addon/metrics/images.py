"""Prepares images for a metric: scaled to [0, 1], with the number of channels that the model takes."""

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.metrics.embed import Model, embed

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a gray level (ITU-R BT.601, as in Pillow)."""


def scaled(images: Tensor) -> Tensor:
    """Scale images to [0, 1], float32.

    Raises:
        TypeError, ValueError: as `check_range`.
    """
    check_range(images)
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def check_range(images: Tensor) -> None:
    """Refuse anything but images in [0, 1].

    Raises:
        TypeError: integers other than uint8.
        ValueError: values outside [0, 1], or NaN.
    """
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise TypeError(f"images: expected uint8, or floating point in [0, 1]: got {images.dtype}")
    _checks.in_unit_range(images, "images: expected uint8, or floating point in [0, 1]")


def for_model(images: Tensor, model: Model) -> tuple[Tensor, str]:
    """Convert images to the channels that the model takes; also returns a description of the change, "" for none.

    If the model does not accept the first two images, gray ones [n, 1, H, W] are repeated to 3 channels and color ones
    [n, 3, H, W] are converted to gray, provided that the model then runs, or fails for another reason than channels.

    Raises:
        TypeError, ValueError: as `check_range`.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        return images, ""
    check_range(images)
    problem = _problem(model, images)
    if not problem:
        return images, ""
    if images.shape[1] == 1:
        other, done = images.expand(-1, 3, -1, -1), "gray images, repeated to the 3 channels that the model takes"
    else:
        other, done = gray(images), "color images, made gray, as the model takes one channel"
    left = _problem(model, other)
    return (other, done) if not left or ("channel" in problem and "channel" not in left) else (images, "")


def _problem(model: Model, images: Tensor) -> str:
    """The error that a model raises on the first two images; "" if there is none."""
    try:
        embed(model, scaled(images[:2]))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        return str(error) or type(error).__name__
    return ""


def gray(images: Tensor) -> Tensor:
    share = torch.tensor(LUMA, device=images.device).view(3, 1, 1)
    levels = (images.float() * share).sum(1, keepdim=True)
    return levels.round().to(torch.uint8) if images.dtype == torch.uint8 else levels.clamp(0, 1)
