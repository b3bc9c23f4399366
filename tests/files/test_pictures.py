"""Pictures of every orientation, mode and depth, from files and given to StructuredCollate."""

import functools
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from ssd_addon import StructuredCollate, pictures
from ssd_addon.collate import ImageFiles

SCENE = np.kron(
    np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[250, 250, 250], [0, 0, 0], [120, 120, 0]]], dtype=np.uint8),
    np.ones((16, 16, 1), dtype=np.uint8),
)
UPRIGHT = {  # what a viewer shows of a picture that is stored as x
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


def from_file(tmp_path, data):
    """The pixels that ImageFiles gives of a file with that content, and the picture itself."""
    (tmp_path / "x.png").write_bytes(data)
    image, _, _ = ImageFiles(tmp_path)[0]
    assert image.mode == "RGB" and type(image) is Image.Image
    return np.asarray(image), image


def collated(image, height, width):
    return StructuredCollate((height, width))([(image, 0)])[0][0].permute(1, 2, 0).numpy()


def same(a, b):
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).mean() < 6  # what JPEG and WebP lose


# Orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honored_once_in_every_format(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(SCENE), kind, exif=exif)
    right = UPRIGHT[orientation](SCENE)
    pixels, image = from_file(tmp_path, data)
    assert same(pixels, right)
    for given in (opened(data), image, ImageOps.exif_transpose(opened(data)), opened(data).convert("RGB").copy()):
        assert same(collated(given, *right.shape[:2]), right)
    loaded = opened(data)
    loaded.load()
    assert same(collated(loaded, *right.shape[:2]), right) and same(np.asarray(pictures.rgb(image)), right)


def test_orientation_in_xmp_and_of_gray_and_deep_pictures(tmp_path):
    note = PngInfo()
    note.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    pixels, image = from_file(tmp_path, encoded(Image.fromarray(SCENE), "PNG", pnginfo=note))
    assert same(pixels, UPRIGHT[6](SCENE)) and same(collated(image, 48, 32), UPRIGHT[6](SCENE))
    exif = Image.Exif()
    exif[0x0112] = 8
    for gray in (SCENE[..., 0], SCENE[..., 0].astype(np.uint16) * 257):
        pixels, _ = from_file(tmp_path, encoded(Image.fromarray(gray), "PNG", exif=exif))
        assert np.array_equal(pixels, UPRIGHT[8](SCENE[..., [0, 0, 0]]))


BROKEN_EXIF = [
    b"garbage",
    b"Exif\0\0",
    b"Exif\0\0MM",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x05",  # ends within the first entry
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",  # an orientation that is text
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x2a\0\0\0\0\0\0",  # 42
]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.parametrize("exif", BROKEN_EXIF)
def test_broken_metadata_leave_a_picture_as_it_is_stored(tmp_path, kind, exif):
    data = encoded(Image.fromarray(SCENE), kind, exif=exif)
    pixels, image = from_file(tmp_path, data)
    assert same(pixels, SCENE) and same(collated(image, 32, 48), SCENE)
    if kind in ("PNG", "WEBP"):  # with JPEG, Pillow itself warns when the caller opens it
        assert same(collated(opened(data), 32, 48), SCENE)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_found_behind_a_broken_entry(tmp_path, kind):
    entries = b"\x01\x0f\0\x02\0\0\0\x40\0\0\xff\0" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"  # a maker beyond the end
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + b"\0\0\0\0"
    data = encoded(Image.fromarray(SCENE), kind, exif=exif)
    assert same(from_file(tmp_path, data)[0], UPRIGHT[6](SCENE))  # though warnings are errors here
    if kind != "JPEG":
        assert same(collated(opened(data), 48, 32), UPRIGHT[6](SCENE))


# Modes


def color(mode):
    """A picture of one orange pixel color in that mode."""
    rgb = Image.new("RGB", (6, 5), (240, 120, 40))
    return {
        "RGBA": lambda: rgb.convert("RGBA"),
        "RGBX": lambda: rgb.convert("RGBX"),
        "RGBa": lambda: rgb.convert("RGBA").convert("RGBa"),
        "CMYK": lambda: rgb.convert("CMYK"),
        "YCbCr": lambda: rgb.convert("YCbCr"),
        "HSV": lambda: rgb.convert("HSV"),
        "LAB": lambda: rgb.convert("LAB"),
        "P": lambda: rgb.quantize(4),
    }[mode]()


@pytest.mark.parametrize("mode", ["RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "P"])
def test_color_modes_become_rgb(mode):
    image = color(mode)
    assert image.mode == mode
    pixel = collated(image, 5, 6)[2, 3].astype(int)
    assert np.abs(pixel - [240, 120, 40]).max() <= 4


@pytest.mark.parametrize("mode,value,level", [("1", 1, 255), ("L", 77, 77), ("LA", (77, 255), 77)])
def test_gray_modes_become_rgb(mode, value, level):
    assert (collated(Image.new(mode, (6, 5), value), 5, 6) == level).all()


def transparent():
    """Pictures of which the left half is transparent, and the right half 200 in red or in gray."""
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    rgba[..., 0], rgba[:, 4:, 3] = 200, 255
    image = Image.fromarray(rgba)
    gray = Image.merge("LA", image.split()[::3])
    yield "RGBA", image
    yield "RGBa", image.convert("RGBa")
    yield "LA", gray
    yield "La", gray.convert("La")
    yield "PA", image.convert("PA")
    palette = Image.fromarray((np.arange(8)[None].repeat(8, 0) >= 4).astype(np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 200, 0, 0])
    for key in (0, b"\0\xff"):
        indexed = palette.copy()
        indexed.info["transparency"] = key
        yield f"P, transparency {key!r}", indexed
    yield "P, palette RGBA", image.quantize(4)
    keyed = Image.new("RGB", (8, 8), (1, 2, 3))
    keyed.paste((200, 0, 0), (4, 0, 8, 8))
    yield "RGB, a transparent color", opened(encoded(keyed, "PNG", transparency=(1, 2, 3)))
    level = Image.new("L", (8, 8), 50)
    level.paste(200, (4, 0, 8, 8))
    yield "L, a transparent level", opened(encoded(level, "PNG", transparency=50))


@pytest.mark.parametrize("image", [pytest.param(image, id=name) for name, image in transparent()])
def test_transparency_is_put_over_black(image):
    pixels = collated(image, 8, 8).astype(int)
    assert not pixels[:, :4].any() and np.abs(pixels[:, 4:, 0] - 200).max() <= 1


def test_half_transparency_darkens():
    for image in (
        Image.new("RGBA", (4, 4), (200, 100, 0, 128)),
        Image.new("RGBA", (4, 4), (200, 100, 0, 128)).convert("RGBa"),
    ):
        assert np.abs(collated(image, 4, 4)[0, 0].astype(int) - [100, 50, 0]).max() <= 1


def test_a_palette_that_a_loader_has_converted_keeps_its_colors():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 200, 30])
    palette.info["transparency"] = 0
    converted = palette.convert("RGB")  # as torchvision's loader does; the color stays in info
    assert (collated(converted, 4, 4) == [10, 200, 30]).all()


# Depths

RAMP = np.linspace(0, 1, 64)[None].repeat(8, 0)


def tiff(tmp_path, values):
    return from_file(tmp_path, encoded(Image.fromarray(values), "TIFF"))[0][..., 0]


@pytest.mark.parametrize("top", [255, 1023, 4095, 65535, 60000, 5000])
@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_16_bits_are_scaled_by_the_bits_that_are_used(tmp_path, top, kind):
    values = (top * RAMP).astype(kind)
    used = next(bits for bits in (8, 10, 12, 16) if top < 2**bits)
    expected = [[int(v) * 255 // (2**used - 1) for v in row] for row in values]
    assert np.array_equal(tiff(tmp_path, values), expected)
    image = Image.fromarray(values)
    assert np.array_equal(collated(image, 8, 64)[..., 1], expected)
    if kind == "<u2":
        assert np.array_equal(from_file(tmp_path, encoded(image, "PNG"))[0][..., 2], expected)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_every_16_bit_mode_is_taken(mode):
    assert (collated(Image.new(mode, (5, 4), 30000), 4, 5) == 30000 // 257).all()
    assert (collated(Image.new(mode, (5, 4), 0), 4, 5) == 0).all()


def test_a_16_bit_pgm_is_scaled_by_its_own_maximum(tmp_path):
    for top in (4095, 65535):
        values = (top / 2 * RAMP).astype(">u2")  # half as bright as the file says is possible
        pixels, _ = from_file(tmp_path, b"P5\n64 8\n%d\n" % top + values.tobytes())
        assert np.abs(pixels[..., 0] - 127.5 * RAMP).max() < 2


@pytest.mark.parametrize(
    "low,high", [(0, 1), (-1, 1), (0, 10000), (-5, -3), (0, 255), (1e30, 3e38), (-3e38, 3e38), (0, 1.5)]
)
def test_floating_point_pictures_are_scaled_by_their_range(tmp_path, low, high):
    values = (low + (float(high) - low) * RAMP).astype(np.float32)
    assert np.array_equal(tiff(tmp_path, values), (255 * RAMP).round())
    assert np.array_equal(collated(Image.fromarray(values), 8, 64)[..., 0], (255 * RAMP).round())


def test_floating_point_pictures_within_0_and_1_are_not_stretched(tmp_path):
    assert np.array_equal(tiff(tmp_path, (0.25 + RAMP / 2).astype(np.float32)), (255 * (0.25 + RAMP / 2)).round())
    for value in (0, 0.5, 1):
        assert (tiff(tmp_path, np.full((4, 4), value, dtype=np.float32)) == round(255 * value)).all()


@pytest.mark.parametrize("low,high", [(0, 255), (0, 3), (-100, 100000), (-(2**31), 2**31 - 1), (100, 200)])
def test_32_bit_pictures_are_scaled_by_their_range(tmp_path, low, high):
    values = (low + (high - low) * RAMP).astype(np.int64).astype(np.int32)
    pixels = tiff(tmp_path, values)
    assert np.array_equal(pixels, [[(int(v) - low) * 255 // (high - low) for v in row] for row in values])
    assert np.array_equal(collated(Image.fromarray(values), 8, 64)[..., 0], pixels)


@pytest.mark.parametrize(
    "value,level", [(np.float32(5000), 128), (np.float32(-1), 128), (np.int32(7), 128), (np.int32(0), 0)]
)
def test_a_constant_picture_without_a_range_is_mid_gray(tmp_path, value, level):
    assert (tiff(tmp_path, np.full((4, 4), value)) == level).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_make_a_file_broken(tmp_path, value):
    values = RAMP.astype(np.float32)
    values[2, 3] = value
    with pytest.raises(OSError, match=r"x\.png: .* finite levels: got NaN or infinity in 1 of 512 pixels"):
        tiff(tmp_path, values)
    with pytest.raises(ValueError, match="finite levels"):
        collated(Image.fromarray(values), 8, 64)


# Arrays


def test_gray_rgb_and_rgba_arrays_are_pictures():
    g = np.random.default_rng(0)
    for shape, kind in (((9, 7), "L"), ((9, 7, 3), "RGB"), ((9, 7, 4), "RGBA")):
        array = g.integers(0, 255, shape, dtype=np.uint8)
        image = Image.fromarray(array)
        assert image.mode == kind and np.array_equal(collated(array, 5, 6), collated(image, 5, 6))
    array = g.integers(0, 255, (9, 7, 1), dtype=np.uint8)
    assert np.array_equal(collated(array, 5, 6), collated(array[..., 0], 5, 6))


@pytest.mark.parametrize("fit", ["cover", "pad"])
@pytest.mark.parametrize("channels", [2, 5, 12])
def test_other_channels_are_kept_and_resized_as_those_of_a_picture(fit, channels):
    g = np.random.default_rng(0)
    array = g.integers(0, 255, (40, 30, channels), dtype=np.uint8)
    collate = StructuredCollate((16, 17), fit=fit)
    images, _, _ = collate([(array, 0), (array[:, ::-1], 0)])
    assert images.shape == (2, channels, 16, 17) and images.dtype == torch.uint8
    for c in range(channels):
        gray, _, _ = collate([(array[..., c], 0)])
        assert torch.equal(images[0, c], gray[0, 1])


def test_floating_point_arrays_stay_and_are_resized_as_tensors():
    g = np.random.default_rng(0)
    collate = StructuredCollate(6)
    for kind in (np.float32, np.float64, np.float16):
        array = g.random((9, 8, 5)).astype(kind)
        images, _, _ = collate([(array, 0)])
        tensor, _, _ = collate([(torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1), 0)])
        assert images.dtype == torch.float32 and torch.equal(images, tensor)
    gray, rgba = g.random((6, 6, 1)), g.random((6, 6, 4))
    assert np.allclose(collated(gray, 6, 6), gray.repeat(3, 2)) and np.allclose(collated(gray[..., 0], 6, 6), gray)
    assert np.allclose(collated(rgba, 6, 6), rgba[..., :3] * rgba[..., 3:])


@pytest.mark.parametrize("shape", [(3, 20, 20), (1, 20, 20), (4, 20, 30), (12, 64, 64)])
def test_an_array_with_channels_first_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"expected an image \[H, W, C\]: got .* looks like \[C, H, W\]; give array.tran"
    ):
        StructuredCollate(16)([(np.zeros(shape, dtype=np.uint8), 0)])


def test_spectral_patches_and_flat_pictures_are_taken():
    images, _, _ = StructuredCollate(9)([(np.zeros((9, 9, 103), dtype=np.uint8), 0)])
    assert images.shape == (1, 103, 9, 9)
    for shape in ((2, 9, 3), (1, 9, 4), (1, 9, 1)):
        assert collated(np.full(shape, 255, dtype=np.uint8), 4, 4).shape == (4, 4, 3)


@pytest.mark.parametrize(
    "array,message",
    [
        (np.zeros((20, 20), np.uint16), r"expected uint8, or floats in \[0, 1\]: got uint16 \[20, 20\]; divide"),
        (np.zeros((20, 20, 3), np.int64), "got int64"),
        (np.zeros((20, 20), bool), "got bool"),
        (np.zeros(20, np.uint8), r"expected an image \[H, W\] or \[H, W, C\]: got uint8 \[20\]"),
        (np.zeros((1, 20, 20, 3), np.uint8), r"got uint8 \[1, 20, 20, 3\]"),
        (np.full((20, 20), 1.5), r"expected floats in \[0, 1\]: got float64 \[20, 20\] from 1.5 to 1.5"),
        (np.full((20, 20), -0.1), "from -0.1 to"),
        (np.full((20, 20), np.nan), "from nan"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises((TypeError, ValueError), match=message):
        StructuredCollate(16)([(array, 0)])


@pytest.mark.parametrize(
    "image",
    [
        *(
            Image.new(mode, size)
            for mode in ("RGB", "L", "RGBA", "P", "I;16", "F")
            for size in ((0, 5), (5, 0), (0, 0))
        ),
        *(np.zeros(shape, np.uint8) for shape in ((0, 5), (5, 0, 3), (0, 5, 12), (5, 5, 0))),
        *(torch.zeros(shape) for shape in ((3, 0, 5), (3, 5, 0), (0, 5, 5))),
    ],
)
@pytest.mark.parametrize("fit", ["cover", "pad"])
def test_an_image_without_pixels_is_refused(image, fit):
    with pytest.raises(ValueError, match=r"at least one pixel: got"):
        StructuredCollate(8, fit=fit)([(image, 0)])


# Files that Pillow reads differently, written here as it writes none of them


def tiff_file(a, white, kind=1, order="<", planes=False, packed=False):
    """A TIFF of levels [H, W, C]. white: tag 262, 0 where 0 is white; kind: of samples, tag 339; packed: compressed."""
    height, width, channels = a.shape
    parts = [a[..., c] for c in range(channels)] if planes else [a]
    data = [p.astype(a.dtype.newbyteorder(order)).tobytes() for p in parts]
    data = [zlib.compress(d) for d in data] if packed else data
    tags = {256: [width], 257: [height], 258: [8 * a.itemsize] * channels, 259: [8 if packed else 1], 262: [white]}
    tags |= {273: [0] * len(data), 277: [channels], 278: [height], 279: [len(d) for d in data], 284: [1 + planes]}
    tags |= {338: [2]} if channels == 4 else {}
    tags |= {339: [kind] * channels}
    after = 14 + 12 * len(tags)
    start = after + sum(4 * len(v) for v in tags.values() if len(v) > 1)
    tags[273] = [start + k * len(data[0]) for k in range(len(data))]
    head, values = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags)), b""
    for tag, v in tags.items():
        head += struct.pack(order + "HHI", tag, 4, len(v))
        head += struct.pack(order + "I", v[0] if len(v) == 1 else after + len(values))
        values += struct.pack(f"{order}{len(v)}I", *v) if len(v) > 1 else b""
    return head + bytes(4) + values + b"".join(data)


def png16(a):
    """A 16-bit PNG of levels [H, W, C], each row stored as its difference to the pixel on the left."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = a.shape
    rows = a.astype(">u2").view(np.uint8).reshape(height, width, 2 * channels)
    rows = np.concatenate([rows[:, :1], rows[:, 1:] - rows[:, :-1]], 1).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = zlib.compress(b"".join(b"\1" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def levels(*values, dtype):
    return np.array(values, dtype)[None, :, None]


WIDE = levels(0, 2**29, 2**30, 2**31, 3 * 2**30, 2**32 - 1, dtype=np.uint32)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (tiff_file(WIDE, 1), [0, 31, 63, 127, 191, 255]),
        (tiff_file(WIDE.astype(np.int32), 1, kind=2), [170, 212, 255, 0, 85, 169]),
        (tiff_file(levels(0, 16384, 65535, dtype=np.uint16), 0), [255, 192, 0]),
        (tiff_file(levels(0, 16384, 65535, dtype=np.uint16), 1), [0, 63, 255]),
        (tiff_file(levels(0, 64, 255, dtype=np.uint8), 0), [255, 191, 0]),
        (tiff_file(levels(0, 0.25, 1, dtype=np.float32), 0, kind=3), [255, 191, 0]),
    ],
    ids=["unsigned 32", "signed 32", "0 is white, 16", "0 is black, 16", "0 is white, 8", "0 is white, float"],
)
def test_tiff_levels_as_their_tags_say(tmp_path, file, expected):
    for pixels in (from_file(tmp_path, file)[0], collated(opened(file), 1, len(expected))):
        assert pixels[0].tolist() == [[v] * 3 for v in expected]


@pytest.mark.parametrize("top", [65535, 4095, 1023, 255])
@pytest.mark.parametrize(
    ("channels", "encode"),
    [(c, png16) for c in (2, 3, 4)]
    + [
        (c, functools.partial(tiff_file, white=2, order=order, packed=packed))
        for c in (3, 4)
        for order in "<>"
        for packed in (False, True)
    ],
)
def test_16_bits_of_color_are_scaled_by_the_bits_that_are_used(tmp_path, channels, encode, top):
    a = np.random.default_rng(0).integers(0, top + 1, (4, 5, channels)).astype(np.uint16)
    a[0, 0] = top
    if channels != 3:
        a[..., -1] = 65535
    data = encode(a)
    color = a[..., :3] if channels > 2 else a[..., [0, 0, 0]]
    expected = color.astype(int) * 255 // top
    (tmp_path / "y.png").write_bytes(data)
    for pixels in (from_file(tmp_path, data)[0], collated(opened(data), 4, 5), np.asarray(pictures.rgb(opened(data)))):
        assert np.abs(pixels.astype(int) - expected).max() <= (top == 65535)  # where Pillow cuts the lower bits off


def test_dark_16_bit_files_stay_what_they_are(tmp_path):
    black = np.zeros((4, 5, 3), np.uint16)
    assert not from_file(tmp_path, png16(black))[0].any()
    transparent = np.full((4, 5, 4), 1000, np.uint16) * np.array([1, 1, 1, 0], np.uint16)
    assert not from_file(tmp_path, png16(transparent))[0].any()
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    opened(png16(black + np.arange(5, dtype=np.uint16)[None, :, None] * 1000)).save(stream, "PNG", exif=exif)
    assert from_file(tmp_path, stream.getvalue())[0].shape == (5, 4, 3)


def test_16_bit_planes_are_refused(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff_file(np.zeros((4, 5, 3), np.uint16), 2, planes=True))
    with pytest.raises(OSError, match="expected interleaved channels: got 16-bit planes"):
        ImageFiles(tmp_path)[0]
    ramp = np.repeat(np.arange(20, dtype=np.uint16).reshape(4, 5, 1), 3, 2)  # planes of one size when compressed
    for levels in (0 * ramp, 3000 * ramp):
        pixels, _ = from_file(tmp_path, tiff_file(levels, 2, planes=True, packed=True))
        assert np.array_equal(pixels, levels >> 8)
    with pytest.raises(ValueError, match="got 16-bit planes of 12 bits, of which Pillow reads 4"):
        pictures.rgb(opened(tiff_file(200 * ramp, 2, planes=True, packed=True)))
    planes = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    assert np.array_equal(from_file(tmp_path, tiff_file(planes, 2, planes=True))[0], planes)
