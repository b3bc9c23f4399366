"""Image files, PIL images and arrays of every mode as upright 8-bit RGB, before anything is resized."""

import io
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from ssd_addon import _checks
from ssd_addon._optional import needs

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
_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339  # tags of TIFF
# Of 16 bits per channel Pillow takes the upper 8; read in the other order of bytes, it takes the lower 8. What it reads
# as gray with alpha are four bytes, as in RGBA of 8 bits.
_LOWER = {f"{mode};16{a}": f"{mode};16{b}" for mode in ("RGB", "RGBX", "RGBA") for a, b in ("BL", "LB")}
_LOWER |= {f"{mode};16N": f"{mode};16{'B' if sys.byteorder == 'little' else 'L'}" for mode in ("RGB", "RGBX", "RGBA")}
_LOWER["LA;16B"] = "RGBA"


def read(path: str | Path | IO[bytes], short: int | None = None) -> Image.Image:
    """The image of a file, as `rgb` makes it, without the metadata that would rotate it a second time.

    Args:
        path: of the file, or the file itself.
        short: pixels that its short side is needed at, where that is less than it has: a JPEG is then decoded at 1/2,
            1/4 or 1/8 of its size, the smallest that has as many; other images are decoded, and each becomes the mean
            of its blocks of 2 x 2, 3 x 3, ... pixels.

    Raises:
        Exception: whatever Pillow's decoders raise for a broken file: OSError, SyntaxError, ValueError, struct.error,
            DecompressionBombError and others.
    """
    try:
        return _read(path, short)
    except Warning:  # where filters make warnings errors: Pillow warns of broken metadata, and the image may be fine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of which DecompressionBombWarning is none
            return _read(path, short)


def _read(path: str | Path | IO[bytes], short: int | None) -> Image.Image:
    with Image.open(path) as image:
        if short is not None and min(image.size) >= 2 * short:
            scale = short / min(image.size)
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))  # type: ignore[arg-type]
        picture = rgb(image)
        if short is not None and min(picture.size) >= 2 * short:
            picture = picture.reduce(min(picture.size) // short)
        elif picture is image:
            picture = image.copy()
    for key in _ORIENTED:
        picture.info.pop(key, None)
    return picture


def torchcodec_decoders() -> Any:
    with needs("decode='torchcodec'"):
        return import_module("torchcodec.decoders")


def read_by_torchcodec(path: str | Path | IO[bytes], short: int | None = None) -> Tensor:
    """The same as a tensor [3, H, W] uint8; JPEGs by torchcodec, everything that it does not do by Pillow.

    Torchcodec decodes no other size than that of the file and does not turn images upright, so files that are to be
    reduced, turned or converted from CMYK go to Pillow, as do other formats.
    """
    data = Path(path).read_bytes() if isinstance(path, str | Path) else path.read()
    with Image.open(io.BytesIO(data)) as image:
        jpeg = image.format == "JPEG" and image.mode in ("L", "RGB") and _orientation(image) == 1
        fits = short is None or min(image.size) < 2 * short
    if jpeg and fits:
        levels: Tensor = torchcodec_decoders().decode_jpeg(data, mode="RGB")
        return levels
    return tensor(read(io.BytesIO(data), short))


def rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, rotated as its EXIF orientation says; itself where there is nothing to do.

    Transparency is put over black. Levels of more than 8 bits are scaled to 0-255:

    - 16 bits are divided by 65535. Where no pixel exceeds 4095, 1023 or 255, they are taken as 12, 10 or 8 bits stored
      in 16: a file does not say how many of its bits are used, and the image would be nearly black. In color this holds
      for images that come straight from a file and are not loaded yet, as Pillow keeps the upper 8 bits alone.
    - Floating-point levels in [0, 1] are multiplied by 255. Other floating-point levels, and integers of 32 bits, are
      scaled from the minimum to the maximum of the image; where these are equal and not 0, the image is mid-gray.
    - TIFF files whose 0 is white are inverted.

    Raises:
        ValueError: no pixels; NaN or infinite levels; a TIFF file of 16-bit planes that Pillow misreads.
    """
    if not (image.width and image.height):
        raise ValueError(f"image: expected at least one pixel: got width {image.width} and height {image.height}")
    lower = _lower_bytes(image)
    image.load()
    turn = _TURNS.get(_orientation(image))
    dark = lower is not None and np.asarray(image)[..., :3].max() < 16  # no level above 4095 of 65535
    picture = _colored(_of_16_bits(image, lower()) if lower is not None and dark else image)
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


def _lower_bytes(image: Image.Image) -> Callable[[], Levels] | None:
    """What reads the lower bytes of color channels of 16 bits [H, W, C], for an image that is not loaded yet."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return None
    source, frame = image.filename or image.fp, image.tell()
    arguments = image.tile[0][3]
    rawmode = arguments[0] if isinstance(arguments, tuple) else arguments
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_PLANES) == 2:
        if rawmode in ("R", "G", "B", "A") and 16 in image.tag_v2[_BITS]:
            raise ValueError("image: expected interleaved channels: got 16-bit planes, whose bytes Pillow mixes up")
        return (lambda: _refused_planes(image)) if rawmode in _LOWER else None
    if source is None or rawmode not in _LOWER:
        return None

    def read() -> Levels:
        if not isinstance(source, str | bytes):
            source.seek(0)
        with Image.open(source) as again:
            again.seek(frame)
            for k, (codec, box, offset, given) in enumerate(again.tile):
                lower = (_LOWER[rawmode], *given[1:]) if isinstance(given, tuple) else _LOWER[rawmode]
                again.tile[k] = type(again.tile[k])(codec, box, offset, lower)
            again.load()
            levels = np.asarray(again)
        return levels[..., [1, 1, 1, 3]] if rawmode == "LA;16B" else levels

    return read


def _refused_planes(image: Image.Image) -> Levels:
    levels = np.asarray(image)
    if levels[..., :3].any():
        raise ValueError("image: expected interleaved channels: got 16-bit planes of 12 bits, of which Pillow reads 4")
    return np.zeros_like(levels)


def _of_16_bits(image: Image.Image, lower: Levels) -> Image.Image:
    """An image of the upper bytes of its channels, with their lower bytes, as 8 bits; see `rgb`."""
    values = np.asarray(image).astype(np.int64) * 256 + lower
    parts = [_scaled_16_bits(part) for part in np.split(values, [3], axis=2) if part.size]  # color, alpha
    return Image.fromarray(np.concatenate(parts, axis=2))


def _scaled_16_bits(values: npt.NDArray[Any]) -> Levels:
    high = int(values.max())
    return _integer_levels(values, 0, next(2**bits - 1 for bits in _DEPTHS if high < 2**bits))


def _colored(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        levels = _levels(image)
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:
            levels = 255 - levels  # which Pillow does for 8 bits and fewer alone
        return Image.fromarray(levels).convert("RGB")
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
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_SAMPLE_FORMAT, (1,))[0] == 1:
            values = values.view(np.uint32)  # unsigned, which Pillow does not have
        low, high = int(values.min()), int(values.max())
        return _integer_levels(values, low, high)
    return _scaled_16_bits(values)


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
        hint = "divide it by the largest value that its source can give, such as 4095 for 12 bits"
        if array.dtype == np.int64 and array.min() >= 0 and array.max() <= 255:
            hint = f"if its levels are 0 to 255, give array.astype(np.uint8), or {_UINT8}; if not, {hint}"
        raise TypeError(f"array: expected uint8, or floats in [0, 1]: got {array.dtype} {shape}; {hint}")
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"array: expected floats in [0, 1]: got {array.dtype} {shape} from {low:.4g} to {high:.4g}")
    pixels = torch.from_numpy(np.moveaxis(array, 2, 0).astype(np.float32))
    if channels == 4:
        return pixels[:3] * pixels[3:]
    return pixels.expand(3, -1, -1) if channels == 1 else pixels


# ---- samples of a data set

_UINT8 = 'of datasets, with_format("numpy", dtype=np.uint8)'  # whose "numpy" alone makes int64 of nested lists


def taken(image: object) -> list[Image.Image] | Tensor:
    """An image of a data set: PIL images, RGB or of one channel each, or a tensor [C, H, W], uint8 or in [0, 1].

    Raises:
        TypeError: what is no image, another number of dimensions or type.
        ValueError: no pixels, floats outside [0, 1] or NaN, and as `rgb` and `from_array`.
    """
    if isinstance(image, Image.Image):
        return [rgb(image)]
    if isinstance(image, np.ndarray):
        return from_array(image)
    if isinstance(image, Tensor):
        return _checked(image)
    if isinstance(image, list | tuple) and len(image) and all(isinstance(x, Tensor) for x in image):
        raise TypeError(
            f"collate: expected an image, of which views are made afterwards: got a list of {len(image)} views, as "
            "the data set's transform makes them; leave that transform out, or, where it is a StructuredTransform, "
            "this collate function"
        )
    hint = ""
    if isinstance(image, Mapping):
        hint = '; of datasets, cast_column("image", Image(decode=True)) gives one'
    elif isinstance(image, list) and not any(isinstance(x, Tensor) for x in image):
        hint = f"; if its levels are 0 to 255, {_UINT8} gives one"
    raise TypeError(f"collate: expected a PIL image, an array or a tensor: got {type(image).__name__}{hint}")


def tensor(image: object) -> Tensor:
    """The same as a tensor [C, H, W] at its own size: uint8, channels last in memory, or floats in [0, 1]."""
    found = taken(image)
    if isinstance(found, Tensor):
        return found
    planes = [torch.from_numpy(np.array(picture)) for picture in found]
    return planes[0].permute(2, 0, 1) if len(planes) == 1 else torch.stack(planes)


def _checked(image: Tensor) -> Tensor:
    if image.ndim != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        hint = f"; if its levels are 0 to 255, {_UINT8} gives arrays [H, W, C]" if image.dtype == torch.int64 else ""
        raise TypeError(
            f"collate: expected an image [C, H, W], uint8 or floating point: got {image.dtype} "
            f"{_checks.shape(image)}{hint}"
        )
    if not image.numel():
        raise ValueError(f"collate: expected an image [C, H, W] of at least one pixel: got {_checks.shape(image)}")
    if image.is_floating_point():
        expected = "collate: expected an image of uint8, or floating point in [0, 1]"
        _checks.in_unit_range(image, expected, "; Normalize belongs into the views' `then`")
    return image
