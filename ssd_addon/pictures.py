"""Image files, PIL images and arrays of every mode as upright 8-bit RGB, before anything is resized."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image
from torch import Tensor

Levels = npt.NDArray[np.uint8]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # entries of info that hold an orientation
_DEPTHS = (8, 10, 12, 16)  # bits that cameras store in 16


def read(path: str | Path) -> Image.Image:
    """The image of a file, as `rgb` makes it, without the metadata that would rotate it a second time.

    Raises:
        Exception: whatever Pillow's decoders raise for a broken file: OSError, SyntaxError, ValueError, struct.error,
            DecompressionBombError and others.
    """
    try:
        return _read(path)
    except Warning:  # where filters make warnings errors: Pillow warns of broken metadata, and the image may be fine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of which DecompressionBombWarning is none
            return _read(path)


def _read(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        picture = rgb(image)
        if picture is image:
            picture = image.copy()
    for key in _ORIENTED:
        picture.info.pop(key, None)
    return picture


def rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, rotated as its EXIF orientation says; itself where there is nothing to do.

    Transparency is put over black. Gray levels of more than 8 bits are scaled to 0-255:

    - 16 bits are divided by 65535. Where no pixel exceeds 4095, 1023 or 255, they are taken as 12, 10 or 8 bits stored
      in 16: a file does not say how many of its bits are used, and the image would be nearly black.
    - Floating-point levels in [0, 1] are multiplied by 255. Other floating-point levels, and integers of 32 bits, are
      scaled from the minimum to the maximum of the image; where these are equal and not 0, the image is mid-gray.

    Raises:
        ValueError: no pixels; NaN or infinite levels.
    """
    if not (image.width and image.height):
        raise ValueError(f"image: expected at least one pixel: got width {image.width} and height {image.height}")
    image.load()
    turn = _TURNS.get(_orientation(image))
    picture = _colored(image)
    return picture if turn is None else picture.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1-8; 1 (upright) where there is none or the metadata is broken."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Warning:  # as in `read`; a copy, because Pillow keeps what it has parsed before the warning
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _orientation(image.copy())
    except Exception:  # broken metadata makes Pillow raise SyntaxError, struct.error, KeyError, ...
        return 1
    return value if isinstance(value, int) else 1


def _colored(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_levels(image)).convert("RGB")
    if image.mode == "La":  # which Pillow converts to LA alone
        image = image.convert("LA")
    # A palette that a loader has converted to RGB keeps its transparent color in `info`, though the loader chose to
    # ignore it. Only an image that comes straight from a file has a format.
    key_only = image.mode in ("1", "L", "RGB")
    if image.has_transparency_data and not (key_only and image.format is None):
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _levels(image: Image.Image) -> Levels:
    """Gray levels of more than 8 bits, 0-255 (see `rgb`)."""
    values = np.asarray(image)
    if image.mode == "F":
        return _float_levels(values)
    if image.mode == "I" and image.format == "PPM":  # Pillow has scaled these to 16 bits by the file's own maximum
        return _integer_levels(values, 0, 65535)
    if image.mode == "I" and image.format != "PNG":  # PNG has 16 bits at most
        low, high = int(values.min()), int(values.max())
        return _integer_levels(values, low, high)
    high = int(values.max())
    return _integer_levels(values, 0, next(2**bits - 1 for bits in _DEPTHS if high < 2**bits))


def _integer_levels(values: npt.NDArray[Any], low: int, high: int) -> Levels:
    if low == high:
        return np.full(values.shape, 128 if low else 0, dtype=np.uint8)
    return ((values.astype(np.int64) - low) * 255 // (high - low)).astype(np.uint8)


def _float_levels(values: npt.NDArray[Any]) -> Levels:
    odd = int((~np.isfinite(values)).sum())
    if odd:
        raise ValueError(f"image: expected finite levels: got NaN or infinity in {odd} of {values.size} pixels")
    values = values.astype(np.float64)  # in which the difference of two float32 values does not overflow
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        values = (values - low) / (high - low) if high > low else np.full_like(values, 128 / 255)
    return (values * 255).round().astype(np.uint8)


def from_array(array: npt.NDArray[Any]) -> list[Image.Image] | Tensor:
    """An array [H, W] or [H, W, C]: one RGB image, or C images of one channel; floats as a tensor [C, H, W].

    One channel is gray, three are RGB, four are RGBA (over black): these become RGB. Any other C is kept.

    Raises:
        ValueError: no pixels, dimensions that look like [C, H, W], floats outside [0, 1] or NaN.
        TypeError: another number of dimensions, another type.
    """
    shape = list(array.shape)
    if array.ndim not in (2, 3):
        raise TypeError(f"array: expected an image [H, W] or [H, W, C]: got {array.dtype} {shape}")
    if not array.size:
        raise ValueError(f"array: expected an image [H, W, C] of at least one pixel: got {shape}")
    if array.ndim == 2:
        array = array[..., None]
    height, width, channels = array.shape
    # Images with more channels than rows are rare and mostly square (patches of hyperspectral images), while arrays
    # with channels first are common.
    if channels > max(4, height) and height != width:
        raise ValueError(
            f"array: expected an image [H, W, C]: got {shape}, which looks like [C, H, W]; "
            "give array.transpose(1, 2, 0), or a tensor [C, H, W]"
        )
    if array.dtype == np.uint8:
        if channels == 1:
            return [Image.fromarray(array[..., 0]).convert("RGB")]
        if channels in (3, 4):
            return [rgb(Image.fromarray(array))]
        return [Image.fromarray(array[..., c]) for c in range(channels)]
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(
            f"array: expected uint8, or floats in [0, 1]: got {array.dtype} {shape}; "
            "divide it by the largest value that its source can give, such as 4095 for 12 bits"
        )
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"array: expected floats in [0, 1]: got {array.dtype} {shape} from {low:.4g} to {high:.4g}")
    pixels = torch.from_numpy(np.moveaxis(array, 2, 0).astype(np.float32))
    if channels == 4:
        return pixels[:3] * pixels[3:]
    return pixels.expand(3, -1, -1) if channels == 1 else pixels
