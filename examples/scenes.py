"""Pictures for domains.py, drawn in vectorized torch, and the operations that change them.

Every picture has its own content (a cover, a tissue, a region of the body), place or direction, and acquisition. The
operations draw from a wider range than the pictures, or content could keep the style of a picture. No noise is drawn
before a rotation or a shift: streaks at the border of a view would reveal where everything was.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import kornia.augmentation as K
import torch
from torch import Tensor

from ssd_addon.metrics import Circular, Factor

SIZE = 32
Drawn = tuple[Tensor, dict[str, Factor]]


@dataclass(frozen=True)
class Domain:
    """One kind of image.

    Attributes:
        channels: number of channels of an image.
        draw: (n, generator) -> n images [n, C, SIZE, SIZE] in [0, 1] and their factors.
        groups, then: make the operations of `StructuredViews`.
        noise: the largest standard deviation of the noise that views have.
        content: width of the content space: small if content has few factors, as a wider space keeps remains of styles.
        classes: factor -> names of its classes.
        bands: the channels that pictures show as red, green and blue; None for all.
    """

    channels: int
    draw: Callable[[int, torch.Generator], Drawn]
    groups: Callable[[], dict[str, list[Any]]]
    then: Callable[[], list[Any]]
    noise: float
    content: int
    classes: dict[str, list[str]]
    bands: tuple[int, int, int] | None = None


def uniform(shape: int | tuple[int, ...], low: float, high: float, g: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=g)


def ratio(shape: int | tuple[int, ...], most: float, g: torch.Generator) -> Tensor:
    """Factors from 1 / most to most, uniform in their logarithm."""
    return torch.exp(uniform(shape, -math.log(most), math.log(most), g))


def ellipses(x: Tensor, y: Tensor, a: Tensor, b: Tensor, angle: Tensor) -> Tensor:
    """Filled ellipses with soft edges: centers and half axes in half edges of the picture -> [..., SIZE, SIZE]."""
    line = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    dx, dy = line - x[..., None, None], line[:, None] - y[..., None, None]
    c, s = angle.cos()[..., None, None], angle.sin()[..., None, None]
    u, v = (c * dx + s * dy) / a[..., None, None], (c * dy - s * dx) / b[..., None, None]
    distance = ((u * u + v * v).sqrt() - 1) * torch.minimum(a, b)[..., None, None] * SIZE / 2  # in pixels, about
    return (0.5 - distance).clamp(0, 1)


# ---- multispectral

COVERS = ["crop", "dry grass", "water", "snow", "concrete"]
SPECTRA = torch.tensor(
    [
        [0.05, 0.06, 0.10, 0.06, 0.14, 0.32, 0.40, 0.43, 0.44, 0.42, 0.24, 0.13],
        [0.07, 0.09, 0.13, 0.17, 0.20, 0.23, 0.25, 0.27, 0.28, 0.28, 0.46, 0.30],
        [0.10, 0.09, 0.07, 0.04, 0.03, 0.03, 0.02, 0.02, 0.02, 0.02, 0.01, 0.01],
        [0.60, 0.60, 0.59, 0.58, 0.57, 0.55, 0.54, 0.52, 0.51, 0.46, 0.10, 0.08],
        [0.24, 0.27, 0.31, 0.34, 0.35, 0.36, 0.36, 0.37, 0.37, 0.36, 0.41, 0.40],
        [0.12, 0.14, 0.18, 0.23, 0.26, 0.28, 0.30, 0.32, 0.33, 0.33, 0.40, 0.36],
    ]
)
"""Reflectances in 12 bands from 440 to 2200 nm, rounded, of the covers and (the last row) of bare soil."""


class BandGain:
    """A sensor with a separate gain and offset for every band of an image."""

    def __init__(self, gain: float = 1.5, offset: float = 0.03) -> None:
        self.gain, self.offset = gain, offset

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        gain = ratio((shape[0], shape[1]), self.gain, generator)
        return {"log_gain": gain.log(), "offset": uniform((shape[0], shape[1]), -self.offset, self.offset, generator)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        gain, offset = (parameters[k][..., None, None] for k in ("log_gain", "offset"))
        return (gain.exp() * x + offset).clamp(0, 1)


def multispectral(n: int, g: torch.Generator) -> Drawn:
    """A field of one cover on bare soil, seen by a sensor with its own gain in every band."""
    cover = torch.randint(len(COVERS), (n,), generator=g)
    x, y = uniform(n, -0.3, 0.3, g), uniform(n, -0.3, 0.3, g)
    angle = uniform(n, 0, math.pi, g)
    size = uniform(n, 0.35, 0.6, g)
    field = ellipses(x, y, size, size / 2, angle)[:, None]
    soil = SPECTRA[-1].view(-1, 1, 1)
    scene = soil + field * (SPECTRA[cover][..., None, None] - soil)
    gain = ratio((n, 12), 1.15, g)
    images = (gain[..., None, None] * scene).clamp(0, 1)
    factors: dict[str, Factor] = {"cover": cover, "size": size, "x": x, "y": y, "direction": Circular(angle, 2)}
    return images, factors | {"gain": gain.log()}


# ---- histology

TISSUES = ["sparse", "dense", "large nuclei", "spindles", "gland"]
STAINS = torch.nn.functional.normalize(
    torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]), dim=1
)
"""Optical densities of hematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston 2001), L2-normalized."""
DARKEST = 1e-3


def concentrations(rgb: Tensor) -> Tensor:
    """Stains [n, 3, H, W] of an image: its optical densities -log10(rgb), in the coordinates of STAINS."""
    density = -rgb.clamp(min=DARKEST).log10()
    return torch.einsum("nchw,cs->nshw", density, torch.linalg.inv(STAINS))


def stained(stains: Tensor) -> Tensor:
    """The image of stains [n, 3, H, W], in [0, 1]."""
    return (10 ** -torch.einsum("nshw,sc->nchw", stains, STAINS)).clamp(0, 1)


class StainJitter:
    """Scales hematoxylin and eosin by separate factors, and adds a little of each, as another laboratory would."""

    def __init__(self, scale: float = 1.8, offset: float = 0.03) -> None:
        self.scale, self.offset = scale, offset

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        scale = ratio((shape[0], 2), self.scale, generator)
        return {"log_scale": scale.log(), "offset": uniform((shape[0], 2), -self.offset, self.offset, generator)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        scale, offset = (parameters[k][..., None, None] for k in ("log_scale", "offset"))
        stains = concentrations(x)
        return stained(torch.cat([scale.exp() * stains[:, :2] + offset, stains[:, 2:]], dim=1))


def histology(n: int, g: torch.Generator) -> Drawn:
    """Nuclei of one kind of tissue, which ends on one side of the picture; beyond it is clear glass."""
    tissue, side = torch.randint(len(TISSUES), (n,), generator=g), torch.randint(4, (n,), generator=g)
    most = 24
    kind = tissue[:, None]
    count = torch.tensor([6, 24, 5, 12, 12])[kind]
    ring = 2 * math.pi * torch.arange(most) / 12 + uniform((n, 1), 0, 6, g)
    x, y = (uniform((n, most), -1, 1, g) for _ in range(2))
    in_gland = kind == 4
    x, y = torch.where(in_gland, 0.55 * ring.cos(), x), torch.where(in_gland, 0.55 * ring.sin(), y)
    a = torch.tensor([0.10, 0.12, 0.30, 0.34, 0.13])[kind] * ratio((n, most), 1.15, g)
    b = a * torch.where(kind == 3, 0.3, 0.85)
    there = (torch.arange(most) < count)[..., None, None]
    nuclei = (there * ellipses(x, y, a, b, uniform((n, most), 0, math.pi, g))).amax(1)
    line = (torch.arange(SIZE) + 0.5) / SIZE
    wavy = uniform((n, 1), 0.62, 0.82, g) + 0.05 * torch.sin(9 * line + uniform((n, 1), 0, 6, g))
    inside = ((wavy[:, :, None] - line) * SIZE + 0.5).clamp(0, 1)  # tissue on the left: its edge is on the right
    inside = torch.stack([torch.rot90(inside, k, (1, 2)) for k in range(4)])[side, torch.arange(n)]
    fibers = 1 + 0.25 * torch.nn.functional.avg_pool2d(torch.randn(n, 1, SIZE + 2, SIZE + 2, generator=g), 3, stride=1)
    amounts = ratio((n, 2), 1.25, g)
    hematoxylin, eosin = (0.08 + 0.62 * nuclei) * inside, 0.25 * fibers[:, 0] * (1 - 0.5 * nuclei) * inside
    stains = torch.stack([amounts[:, :1, None] * hematoxylin, amounts[:, 1:, None] * eosin], dim=1)
    images = stained(torch.cat([stains, torch.zeros(n, 1, SIZE, SIZE)], dim=1))
    logs = amounts.log()
    return images, {"tissue": tissue, "edge": side, "hematoxylin": logs[:, 0], "eosin": logs[:, 1]}


# ---- gray

REGIONS = ["head", "chest", "abdomen", "pelvis", "limb"]


class Noise:
    """Adds Gaussian noise whose standard deviation is drawn for each image."""

    def __init__(self, most: float = 0.08) -> None:
        self.most = most

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        std = uniform(shape[0], 0, self.most, generator)
        return {"std": std, "field": torch.randn(shape, generator=generator)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return (x + parameters["std"].view(-1, 1, 1, 1) * parameters["field"]).clamp(0, 1)


def gray(n: int, g: torch.Generator) -> Drawn:
    """A slice of a body, tilted a little, with the organs of one region and a gamma of its own."""
    region = torch.randint(len(REGIONS), (n,), generator=g)
    tilt, x0, y0 = uniform(n, -0.3, 0.3, g), uniform(n, -0.15, 0.15, g), uniform(n, -0.15, 0.15, g)
    organs = uniform(n, 0.8, 1.2, g)

    def placed(x: float | Tensor, y: float | Tensor) -> tuple[Tensor, Tensor]:
        """Where a point of the body lies in the picture."""
        return x0 + tilt.cos() * x - tilt.sin() * y, y0 + tilt.sin() * x + tilt.cos() * y

    def part(x: float | Tensor, y: float | Tensor, a: float | Tensor, b: float | Tensor, turn: float = 0.0) -> Tensor:
        return ellipses(*placed(x, y), a * torch.ones(n), b * torch.ones(n), tilt + turn)

    body, spine = part(0, 0, 0.78, 0.6), part(0, 0.38, 0.12, 0.12)

    def pair(x: float, y: float, a: float | Tensor, b: float | Tensor) -> Tensor:
        return part(-x, y, a, b) + part(x, y, a, b)

    kinds = [
        0.8 * body - 0.35 * part(0, 0, 0.66, 0.48) - 0.2 * pair(0.15, 0, 0.09 * organs, 0.24 * organs),
        0.5 * body - 0.35 * pair(0.37, -0.05, 0.26 * organs, 0.4 * organs) + 0.4 * spine,
        0.4 * body + 0.2 * part(-0.3, -0.1, 0.34 * organs, 0.28 * organs) + 0.4 * spine,
        0.4 * body + 0.4 * pair(0.48, 0, 0.16 * organs, 0.16 * organs) + 0.4 * spine,
        0.4 * body + 0.5 * part(0, 0, 0.3 * organs, 0.3 * organs) - 0.35 * part(0, 0, 0.15, 0.15),
    ]
    image = torch.stack(kinds)[region, torch.arange(n)]
    gamma = ratio(n, 1.25, g)
    image = (0.05 + 0.9 * image.clamp(0, 1)) ** gamma.view(-1, 1, 1)
    factors = {"region": region, "organs": organs, "tilt": tilt, "x": x0, "y": y0, "gamma": gamma.log()}
    return image[:, None], factors


# ---- all of them


def _affine(degrees: float, scale: tuple[float, float] | None = None) -> K.RandomAffine:
    return K.RandomAffine(degrees, translate=(0.25, 0.25), scale=scale, padding_mode="border", p=1.0)


def _turns() -> Sequence[Any]:
    return [K.RandomRotation90((0, 3), p=1.0), K.RandomHorizontalFlip(p=0.5)]


DOMAINS = {
    "multispectral": Domain(
        12,
        multispectral,
        lambda: {"geometry": [_affine(180.0)], "sensor": [BandGain()]},
        lambda: [Noise(0.02)],
        0.02,
        4,
        {"cover": COVERS},
        (3, 2, 1),
    ),
    "histology": Domain(
        3,
        histology,
        lambda: {"spatial": [*_turns()], "stain": [StainJitter()]},
        lambda: [Noise(0.02)],
        0.02,
        16,
        {"tissue": TISSUES, "edge": ["right", "top", "left", "bottom"]},
    ),
    "gray": Domain(
        1,
        gray,
        lambda: {"spatial": [_affine(60.0, (0.8, 1.25))], "acquisition": [K.RandomGamma((0.5, 2.0), p=1.0), Noise()]},
        list,
        0.08,
        4,
        {"region": REGIONS},
    ),
}
