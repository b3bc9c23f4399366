"""Irregular objects on textured grounds: a second generator with known factors, beside sprites.py.

One object lies on a ground, and the light falls on both. Factors: shape (ten closed curves of equal area), texture of
the object (plain, stripes, checks, rings), ground (six gray patterns), position x and y, scale, rotation, hue of the
object, and brightness of the light. The groups of synthetic.py change hue and brightness (color), position, scale and
rotation (spatial). Nothing changes shape, texture and ground, so they are content. The grounds are gray, so that a
change of hue cannot be decoded by comparing the object with its ground, and the light scales all pixels, as the change
of brightness does. Every ground is one pattern, the same in all images, so that it does not identify a single image.

The curves are very different and the grounds darker than any object, because a small network trained for a thousand
steps learns no other shapes, with labels or without: docs/results/objects.md.
"""

import math
from functools import cache

import torch
from sprites import _rgb
from torch import Tensor

from ssd_addon.metrics import Circular, Factor

SHAPES, TEXTURES, GROUNDS = (
    10,
    ("plain", "stripes", "checks", "rings"),
    ("plain", "ramp", "stripes", "waves", "blotches", "net"),
)
HARMONICS = 6
MARK, GRAY, WAVE = 0.15, 0.1, 0.05  # contrast of textures; gray level of grounds and its amplitude
RANGES = {
    "x": (-0.25, 0.25),
    "y": (-0.25, 0.25),
    "scale": (0.42, 0.54),
    "rotation": (0.0, 2 * math.pi),
    "hue": (0.0, 1.0),
    "brightness": (0.55, 1.0),
}
"""Of the factors that are numbers. Position: of the half edge from the middle; scale: the radius of the circle of equal
area, of the half edge; hue: of the circle."""


@cache
def _curves() -> tuple[Tensor, Tensor]:
    """Amplitudes and phases [SHAPES, HARMONICS] of radius(angle) = 1 + sum a_k cos((k + 1) angle + phase_k).

    They are the most different ones among 400 random curves of equal area: each next curve is the one whose distance to
    the nearest chosen curve, after the best rotation, is largest.
    """
    g, n, angles = torch.Generator().manual_seed(7), 400, 180
    share = torch.rand(n, HARMONICS - 1, generator=g) ** 3  # mostly one or two harmonics
    total = 0.35 + 0.25 * torch.rand(n, 1, generator=g)
    # No first harmonic, which would only move the object.
    amplitudes = torch.cat([torch.zeros(n, 1), total * share / share.sum(1, keepdim=True)], 1)
    phases = 2 * math.pi * torch.rand(n, HARMONICS, generator=g)
    k = torch.arange(1, HARMONICS + 1)[:, None] * 2 * math.pi * torch.arange(angles) / angles
    radius = 1 + (amplitudes[:, :, None] * torch.cos(k + phases[:, :, None])).sum(1)
    f = torch.fft.fft(radius / radius.square().mean(1, keepdim=True).sqrt())
    # Curves of equal power: the squared distance after the best rotation follows from the largest correlation.
    distance = 2 - 2 * torch.fft.ifft(f[:, None] * f.conj()).real.amax(-1) / angles
    chosen = [int(distance.mean(1).argmax())]
    while len(chosen) < SHAPES:
        chosen.append(int(distance[:, chosen].amin(1).argmax()))
    return amplitudes[chosen], phases[chosen]


def draw_objects(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """n independent draws of shape, texture and ground (integers) and of the factors of `RANGES`, each uniform."""
    counts = {"shape": SHAPES, "texture": len(TEXTURES), "ground": len(GROUNDS)}
    kinds = {name: torch.randint(count, (n,), generator=generator) for name, count in counts.items()}
    return kinds | {
        name: low + (high - low) * torch.rand(n, generator=generator) for name, (low, high) in RANGES.items()
    }


def render_objects(factors: dict[str, Tensor], size: int = 48, *, textured: bool = True) -> Tensor:
    """Images [n, 3, size, size] in [0, 1] on the device of the factors; if untextured, plain objects on black."""
    f = {k: v if v.dtype == torch.long else v.float() for k, v in factors.items()}
    device, one = f["x"].device, (slice(None), None, None)
    line = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    dx, dy = line[None, None, :] - f["x"][one], line[None, :, None] - f["y"][one]
    c, s, r = f["rotation"].cos()[one], f["rotation"].sin()[one], f["scale"][one]
    u, v = (c * dx + s * dy) / r, (-s * dx + c * dy) / r  # the object's own frame, radius about 1
    radius, angle = (u * u + v * v).sqrt(), torch.atan2(v, u)
    edge = torch.ones_like(radius)
    amplitudes, phases = (t.to(device)[f["shape"]] for t in _curves())
    for k in range(HARMONICS):
        edge = edge + amplitudes[:, k, None, None] * torch.cos((k + 1) * angle + phases[:, k, None, None])
    edge = (
        edge / (1 + amplitudes.square().sum(1) / 2).sqrt()[one]
    )  # of equal area, so that the shape cannot be decoded from the size
    alpha = (0.5 - (radius - edge) * r * size / 2 * 0.8).clamp(0, 1)
    color = _rgb(f["hue"], torch.ones_like(f["hue"]))[:, :, None, None]
    if not textured:
        return alpha[:, None] * color * f["brightness"][:, None, None, None]
    marks = torch.stack(
        [
            torch.zeros_like(u),
            torch.sin(9 * u),
            2 * torch.sin(7 * u) * torch.sin(7 * v),
            torch.sin(11 * radius),
        ]
    )
    mark = (marks.gather(0, f["texture"].view(1, -1, 1, 1).expand(1, *u.shape))[0] * 2).clamp(-1, 1)
    surface = color * (1 - MARK + MARK * mark)[:, None]
    x, y = line[None, None, :].expand_as(u), line[None, :, None].expand_as(u)
    grounds = torch.stack(
        [
            torch.zeros_like(x),
            0.8 * x + 0.4 * y,
            torch.sin(9 * (x + 0.5 * y)),
            torch.sin(5 * y + 2 * torch.sin(3 * x)),
            torch.sin(3 * x + 1) * torch.sin(4 * y) + torch.sin(6 * x) * torch.sin(5 * y + 2),
            2 * torch.maximum(torch.cos(8 * x), torch.cos(8 * y)) - 1,
        ]
    )
    ground = GRAY + WAVE * grounds.gather(0, f["ground"].view(1, -1, 1, 1).expand(1, *x.shape))[0].clamp(-1, 1)
    scene = alpha[:, None] * surface + (1 - alpha[:, None]) * ground[:, None]
    return f["brightness"][:, None, None, None] * scene


def scored_objects(factors: dict[str, Tensor]) -> dict[str, Factor]:
    """The factors as a probe predicts them."""
    names = ("shape", "texture", "ground", "scale", "x", "y", "brightness")
    out: dict[str, Factor] = {k: factors[k] for k in names}
    return out | {"hue": Circular(factors["hue"] * 2 * math.pi), "rotation": Circular(factors["rotation"])}
