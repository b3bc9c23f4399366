"""Attributes of images against hand-worked pictures and slow loops; image statistics that see what they should."""

import colorsys
import math

import pytest
import torch
from sprites import draw_factors, render

from ssd_addon.metrics import (
    Circular,
    brightness,
    colorfulness,
    dominant_hue,
    image_attributes,
    r2_matrix,
    saturation,
    sharpness,
    spectral_slope,
)
from ssd_addon.metrics.statistics import image_statistics


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def plain(*rgb, size=8):
    return torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, size, size)


def noise(n=4, size=16, seed=0):
    return torch.rand(n, 3, size, size, generator=generator(seed))


def away(a, b):
    return abs((a - b + math.pi) % (2 * math.pi) - math.pi)


@pytest.mark.parametrize("rgb", [(0.9, 0.1, 0.2), (0.2, 0.9, 0.1), (0.1, 0.3, 0.9), (0.9, 0.9, 0.1), (0.9, 0.1, 0.12)])
def test_the_hue_of_one_color_is_that_of_hsv(rgb):
    hue = dominant_hue(plain(*rgb))
    assert away(float(hue.angle), 2 * math.pi * colorsys.rgb_to_hsv(*rgb)[0]) < 1e-5 and hue.fold.tolist() == [1]


def test_the_hue_of_sprites_is_the_one_that_they_were_drawn_in():
    factors = draw_factors(50, generator())
    hue = dominant_hue(render(factors), least=0.0)
    off = [away(a, 2 * math.pi * h) for a, h in zip(hue.angle.tolist(), factors["hue"].tolist(), strict=True)]
    assert max(off) < math.radians(1)


def test_of_two_colors_the_hue_is_the_stronger_one_and_not_what_lies_between():
    image = plain(0.0, 0.9, 0.0).clone()
    image[..., :3] = plain(0.9, 0.0, 0.0)[..., :3]  # three columns of eight are red
    assert away(float(dominant_hue(image).angle), 2 * math.pi / 3) < 1e-5
    image[..., :5] = plain(0.9, 0.0, 0.0)[..., :5]
    assert away(float(dominant_hue(image).angle), 0) < 1e-5
    image[..., :5] *= 0.2  # larger, but with less color
    assert away(float(dominant_hue(image).angle), 2 * math.pi / 3) < 1e-5


def test_a_color_between_two_bins_counts_as_one():
    counts = {(0.9, 0.03, 0.0): 20, (0.9, 0.0, 0.03): 18, (0.03, 0.0, 0.9): 26}  # on either side of red, and blue
    pixels = torch.tensor([rgb for rgb, count in counts.items() for _ in range(count)])
    assert away(float(dominant_hue(pixels.T.reshape(1, 3, 8, 8)).angle), 0) < math.radians(3)


def test_hues_on_either_side_of_red_have_their_mean_at_red():
    image = plain(0.9, 0.0, 0.1).clone()
    image[..., :4] = plain(0.9, 0.1, 0.0)[..., :4]
    angle = float(dominant_hue(image).angle)
    assert away(angle, 0) < math.radians(8) and 0 <= angle < 2 * math.pi


def test_a_gray_image_has_no_hue():
    image = torch.cat([plain(0.5, 0.5, 0.5), plain(0.5, 0.52, 0.5), plain(0.5, 0.53, 0.5)])
    assert dominant_hue(image, least=0.025).fold.tolist() == [0, 0, 1]
    assert dominant_hue(image, least=0.0).fold.tolist() == [1, 1, 1]


def test_a_small_object_has_a_hue_and_a_colored_pixel_has_not():
    image = plain(0.5, 0.5, 0.5, size=30).repeat(2, 1, 1, 1)
    image[0, 0, :3, :3] = 0.9  # nine pixels of 900
    image[1, 0, 0, 0] = 0.9
    hue = dominant_hue(image)
    assert hue.fold.tolist() == [1, 0] and away(float(hue.angle[0]), 0) < 1e-5


def test_saturation_and_brightness_against_colorsys():
    x = noise(2, 4)
    for image, s in zip(x, saturation(x).tolist(), strict=True):
        wanted = [colorsys.rgb_to_hsv(*p)[1] for p in image.flatten(1).T.tolist()]
        assert s == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
    assert saturation(plain(0.0, 0.0, 0.0)).tolist() == [0.0]
    assert brightness(plain(0.2, 0.4, 0.6)).tolist() == pytest.approx([0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6])
    assert brightness(torch.full((1, 2, 4, 4), 0.3)).tolist() == pytest.approx([0.3])


def test_colorfulness_against_a_loop_over_pixels():
    image = noise(1, 5)
    rg, yb = [], []
    for r, g, b in (image[0].flatten(1).T * 255).tolist():
        rg.append(r - g)
        yb.append(0.5 * (r + g) - b)

    def mean(v):
        return sum(v) / len(v)

    def var(v):
        return sum((x - mean(v)) ** 2 for x in v) / len(v)

    wanted = math.sqrt(var(rg) + var(yb)) + 0.3 * math.sqrt(mean(rg) ** 2 + mean(yb) ** 2)
    assert colorfulness(image).tolist() == pytest.approx([wanted], rel=1e-5)
    assert colorfulness(plain(0.4, 0.4, 0.4)).tolist() == [0.0]


def test_sharpness_against_a_loop_over_pixels():
    y = torch.rand(6, 7, generator=generator()).double()
    values = []
    for i in range(6):
        for j in range(7):
            near = [(max(i - 1, 0), j), (min(i + 1, 5), j), (i, max(j - 1, 0)), (i, min(j + 1, 6))]
            values.append(sum(float(y[a, b]) for a, b in near) - 4 * float(y[i, j]))
    mean = sum(values) / 42
    got = sharpness(y.float()[None, None])
    assert got.tolist() == pytest.approx([sum((v - mean) ** 2 for v in values) / 42], rel=1e-5)


def test_the_slope_of_noise_with_a_known_spectrum():
    f = (torch.fft.fftfreq(64)[:, None] ** 2 + torch.fft.rfftfreq(64) ** 2).sqrt().clamp(min=1 / 64)
    for wanted in (0.0, -2.0, -3.0):
        white = torch.fft.rfft2(torch.randn(16, 64, 64, generator=generator()))
        x = torch.fft.irfft2(white * f ** (wanted / 2), s=(64, 64))
        x = (x / x.abs().amax((1, 2), keepdim=True) * 0.5 + 0.5)[:, None]
        slope = spectral_slope(x)
        assert float(slope.mean()) == pytest.approx(wanted, abs=0.15)
        torch.testing.assert_close(spectral_slope(0.5 * x + 0.2), slope, rtol=1e-3, atol=1e-3)  # contrast is no slope


def test_blur_lowers_sharpness_and_slope():
    x = noise(4, 32)
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert bool((sharpness(blurred) < 0.2 * sharpness(x)).all())
    assert bool((spectral_slope(blurred) < spectral_slope(x) - 0.5).all())


def test_an_even_image_has_no_slope():
    assert spectral_slope(plain(0.3, 0.3, 0.3)).isnan().all()


def test_all_attributes_are_the_single_ones_in_any_form():
    x = noise(7)
    whole = (x * 255).round().to(torch.uint8)
    for given in (x, x.double(), [x[:3], (x[3:], torch.zeros(4))]):
        found = image_attributes(given, batch_size=2)
        for name, function in (("saturation", saturation), ("brightness", brightness), ("colorfulness", colorfulness)):
            torch.testing.assert_close(found[name], function(x))
        torch.testing.assert_close(found["sharpness"], (sharpness(x) + 1e-6).log10())
        torch.testing.assert_close(found["spectral slope"], spectral_slope(x))
        assert isinstance(found["hue"], Circular)
        torch.testing.assert_close(found["hue"].angle, dominant_hue(x).angle)
    torch.testing.assert_close(image_attributes(whole)["brightness"], brightness(whole.float() / 255))


def test_attributes_are_factors_of_a_matrix():
    x = render(draw_factors(60, generator()), 24)
    found = image_attributes(x)
    table = r2_matrix({"mean color": x.mean((2, 3))}, found, bootstrap=0)
    assert table["mean color", "brightness"] > 0.99 and table["mean color", "hue"] > 0.5


@pytest.mark.parametrize("function", [dominant_hue, saturation, colorfulness])
def test_colors_are_asked_of_rgb_images_alone(function):
    with pytest.raises(ValueError, match=r"expected RGB \[n, 3, H, W\].*: got \[2, 1, 4, 4\]"):
        function(torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize("function", [dominant_hue, saturation, colorfulness, brightness, sharpness, spectral_slope])
def test_what_is_no_batch_of_images_in_their_range_is_refused(function):
    with pytest.raises(ValueError, match=r"expected \[n, C, H, W\]"):
        function(torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        function(noise() * 255)


def test_the_slope_needs_rings():
    with pytest.raises(ValueError, match="8 x 8 pixels or more: got 8 x 7"):
        spectral_slope(torch.rand(1, 3, 8, 7))
    with pytest.raises(ValueError, match="at least one batch"):
        image_attributes([])


@pytest.mark.parametrize(("channels", "size"), [(1, 4), (3, 5), (4, 20), (3, 150)])
def test_statistics_of_images_of_any_kind_are_finite(channels, size):
    for x in (torch.rand(2, channels, size, size), torch.zeros(2, channels, size, size)):
        found = image_statistics(x)
        assert list(found) == ["color", "texture", "layout"]
        assert all(t.shape[0] == 2 and t.isfinite().all() for t in found.values())


def test_statistics_turn_with_the_image():
    """A bright spot to the right: its center is in the layout, and moves to the left in the mirror."""
    x = torch.zeros(1, 3, 9, 9)
    x[..., 4, 7] = 1.0
    at, mirrored = (image_statistics(v)["layout"][0, 3 * 16 : 3 * 16 + 2] for v in (x, x.flip(3)))
    torch.testing.assert_close(at, torch.tensor([0.75, 0.0]))
    torch.testing.assert_close(mirrored, torch.tensor([-0.75, 0.0]))
