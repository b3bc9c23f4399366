"""Attributes of images that need no labels: hue, saturation, brightness, colorfulness, sharpness.

Each is a value per image (an angle for the hue), computed from its pixels. Used as factors in `r2_matrix` they show
which space encodes them; used as attributes in `retrieval`, whether a search in a space finds images that share them.
Legend: n images of H x W pixels.
"""

import math

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon._shapes import Vector
from ssd_addon.metrics.embed import Images, batches
from ssd_addon.metrics.images import scaled
from ssd_addon.metrics.labelled import Circular, Factor
from ssd_addon.metrics.statistics import derivatives, luma

BINS, NEAR = 72, math.pi / 6
"""Number of hue bins, and the largest distance from the peak at which a pixel's hue counts."""
GRAY, SHARE = 0.1, 0.01
"""An image has no hue if the mean chroma of its most colorful pixels, this share of all, is below GRAY."""


def image_attributes(images: Images, *, batch_size: int = 256) -> dict[str, Factor]:
    """All attributes of this module, as factors: hue, saturation, brightness, colorfulness, sharpness, spectral slope.

    "sharpness" is log10(`sharpness` + 1e-6), as the variance of a Laplacian spans orders of magnitude.

    >>> found = image_attributes(torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    >>> list(found)
    ['hue', 'saturation', 'brightness', 'colorfulness', 'sharpness', 'spectral slope']
    >>> found["sharpness"].shape
    torch.Size([3])

    Args:
        images: RGB [n, 3, H, W], uint8 or in [0, 1], not normalized, or batches of them; at least 8 x 8 pixels.
        batch_size: number of images at a time, if `images` is one tensor.

    Raises:
        ValueError, TypeError: there are no images, or they are not of this form.
    """
    parts: list[dict[str, Tensor]] = []
    for x in batches(images, batch_size):
        hue = dominant_hue(x)
        part = {"hue": hue.angle, "fold": torch.as_tensor(hue.fold), "saturation": saturation(x)}
        part |= {"brightness": brightness(x), "colorfulness": colorfulness(x)}
        part |= {"sharpness": (sharpness(x) + 1e-6).log10(), "spectral slope": spectral_slope(x)}
        parts.append(part)
    if not parts:
        raise ValueError("images: expected at least one batch: got none")
    out: dict[str, Factor] = {name: torch.cat([p[name] for p in parts]) for name in parts[0] if name != "fold"}
    out["hue"] = Circular(torch.cat([p["hue"] for p in parts]), torch.cat([p["fold"] for p in parts]))
    return out


def dominant_hue(images: Tensor, *, least: float = GRAY) -> Circular:
    """The dominant hue of each image, an angle in [0, 2 pi): 0 is red, 2 pi / 3 green, 4 pi / 3 blue.

    Hue is that of HSV, chroma is max(R, G, B) - min(R, G, B). The hue histogram has 72 bins, is weighted by chroma and
    smoothed by (1/4, 1/2, 1/4) around the circle. The result is the circular mean, again weighted by chroma, of the
    hues within 30 degrees of the histogram's peak. So a red object on green ground gets red or green, whichever has
    more color, and not the yellow between them. An image counts as gray, without a hue, if the mean chroma of the most
    colorful hundredth of its pixels is below `least`: its fold is 0, which leaves it out of scores.

    >>> red, gray = torch.zeros(2, 3, 4, 4).unbind()
    >>> red[0], gray[:] = 0.8, 0.5
    >>> hue = dominant_hue(torch.stack([red, gray]))
    >>> round(float(hue.angle[0]), 4), hue.fold
    (0.0, tensor([1, 0]))

    Args:
        images: RGB [n, 3, H, W], uint8 or in [0, 1].
        least: smallest chroma of the most colorful pixels, in [0, 1]; a small colored object is enough.

    Source: HSV hue, Smith, Color gamut transform pairs, SIGGRAPH 1978; circular mean, Mardia and Jupp, Directional
    Statistics, 2000, section 2.2.
    """
    r, g, b = _rgb(images).double().flatten(2).unbind(1)
    _checks.not_negative(least, "least", "chroma below which an image is gray")
    rgb = torch.stack([r, g, b])
    high, low = rgb.amax(0), rgb.amin(0)
    chroma = high - low
    safe = chroma.clamp(min=1e-12)
    sixth = torch.where(high == r, (g - b) / safe, torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = torch.remainder(sixth, 6) * (math.pi / 3)
    bins = (hue * (BINS / (2 * math.pi))).long().clamp(max=BINS - 1)
    found = torch.zeros(len(hue), BINS, dtype=chroma.dtype, device=chroma.device).scatter_add_(1, bins, chroma)
    smooth = found / 2 + (found.roll(1, 1) + found.roll(-1, 1)) / 4
    peak = (smooth.argmax(1, keepdim=True) + 0.5) * (2 * math.pi / BINS)
    away = torch.remainder(hue - peak + math.pi, 2 * math.pi) - math.pi
    weight = chroma * (away.abs() <= NEAR)
    mean = torch.atan2((weight * away.sin()).sum(1), (weight * away.cos()).sum(1))
    angle = torch.remainder(peak[:, 0] + mean, 2 * math.pi)
    angle = torch.where(angle >= 2 * math.pi - 1e-6, 0.0, angle)  # rounding just below red
    most = chroma.topk(max(1, round(SHARE * chroma.shape[1])), dim=1).values.mean(1)
    return Circular(angle.float(), (most >= least).long())


def saturation(images: Tensor) -> Vector:
    """Mean over pixels of HSV's saturation, (max - min) / max of R, G, B, and 0 for black: [n] in [0, 1].

    >>> saturation(torch.tensor([1.0, 0.5, 0.5]).view(1, 3, 1, 1))
    tensor([0.5000])

    Source: Smith, Color gamut transform pairs, SIGGRAPH 1978.
    """
    x = _rgb(images).flatten(2)
    high = x.amax(1)
    return torch.where(high > 0, (high - x.amin(1)) / high.clamp(min=1e-12), 0.0).mean(1).float()


def brightness(images: Tensor) -> Vector:
    """Mean over pixels of luma, 0.299 R + 0.587 G + 0.114 B: [n] in [0, 1].

    Images whose number of channels is not 3 are averaged over the channels.

    >>> brightness(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1))
    tensor([0.2990])

    Source: ITU-R BT.601.
    """
    return luma(_images(images)).flatten(1).mean(1).float()


def colorfulness(images: Tensor) -> Vector:
    """sqrt(std(rg)^2 + std(yb)^2) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2), rg = R - G, yb = (R + G) / 2 - B: [n].

    In levels of 0 to 255, as in the paper, in which 15 is slightly colorful and 59 quite colorful.

    >>> colorfulness(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)).round()
    tensor([86.])

    Source: Hasler and Suesstrunk, Measuring colourfulness in natural images, Human Vision and Electronic Imaging 2003.
    """
    r, g, b = (_rgb(images).double() * 255).flatten(2).unbind(1)
    rg, yb = r - g, (r + g) / 2 - b
    spread = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
    return (spread + 0.3 * (rg.mean(1) ** 2 + yb.mean(1) ** 2).sqrt()).float()


def sharpness(images: Tensor) -> Vector:
    """Variance over pixels of the Laplacian (four neighbors) of luma, edges repeated: [n], 0 for a uniform image.

    It grows with contrast as well as with sharpness; `spectral_slope` does not depend on contrast. It spans orders of
    magnitude: use its logarithm as a factor.

    >>> dot = torch.zeros(1, 1, 5, 5)
    >>> dot[..., 2, 2] = 1.0  # Laplacian: -4 and four times 1
    >>> sharpness(dot)
    tensor([0.8000])

    Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy: a comparative study, ICPR 2000.
    """
    _, _, laplacian = derivatives(luma(_images(images)).double())
    return laplacian.flatten(1).var(1, correction=0).float()


def spectral_slope(images: Tensor) -> Vector:
    """Slope of log power against log frequency of luma: [n], about -2 for sharp photographs, lower for blurred ones.

    Deviations from the mean are multiplied by a Hann window. Power is averaged over rings of frequencies of width one
    cycle per image (its shorter edge), from 2 cycles to half of the sampling rate, and a line is fitted to the
    logarithms by least squares. Contrast shifts the line but does not change its slope. NaN for a uniform image.

    Source: Field, Relations between the statistics of natural images and the response properties of cortical cells,
    JOSA A 1987 (the slope of photographs); Vu and Chandler, A fast wavelet-based algorithm for global and local image
    sharpness estimation, IEEE SPL 2012, and Vu et al., S3, IEEE TIP 2012 (the slope as a measure of sharpness).
    """
    y = luma(_images(images)).double()
    h, w = y.shape[1:]
    edge = min(h, w)
    if edge < 8:
        raise ValueError(f"spectral_slope: expected images of 8 x 8 pixels or more: got {h} x {w}")
    window = torch.outer(*(torch.hann_window(n, periodic=True, dtype=y.dtype, device=y.device) for n in (h, w)))
    mean = (y * window).sum((1, 2), keepdim=True) / window.sum()
    power = torch.fft.rfft2((y - mean) * window).abs() ** 2
    f = torch.sqrt(
        torch.fft.fftfreq(h, device=y.device)[:, None].double() ** 2
        + torch.fft.rfftfreq(w, device=y.device).double() ** 2
    )
    ring = (f * edge).round().long()
    rings = torch.arange(2, edge // 2 + 1, device=y.device)
    inside = [(ring == k) for k in rings.tolist()]
    each = torch.stack([power[:, m].mean(1) for m in inside], 1)
    at = torch.stack([f[m].mean().log() for m in inside])
    at = at - at.mean()
    even = each.amax(1) <= 1e-18 * h * w
    slope = (each.clamp(min=1e-300).log() * at).sum(1) / (at**2).sum()
    return torch.where(even, math.nan, slope).float()


def _images(images: Tensor) -> Tensor:
    """[n, C, H, W] in [0, 1], float32."""
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape:
        got = _checks.shape(images) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: expected [n, C, H, W] with at least one image: got {got}")
    return scaled(images)


def _rgb(images: Tensor) -> Tensor:
    x = _images(images)
    if x.shape[1] != 3:
        raise ValueError(f"images: expected RGB [n, 3, H, W], as color is measured: got {_checks.shape(x)}")
    return x
