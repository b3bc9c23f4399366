"""Irregular objects on textured grounds: a second generator whose factors are all known, beside sprites.py.

One object lies on a ground; the light falls on both. Factors: shape (twelve closed curves), texture of the object
(plain, stripes, checks, rings), ground (six gray patterns), position x and y, scale, rotation, hue of the
object, and brightness of the light. The groups of synthetic.py change hue and brightness (color), position, scale and
rotation (spatial); nothing touches shape, texture and ground, so they are content. The grounds are gray, so that a
change of hue cannot be told by comparing the object with its ground, and the light scales all pixels, as the change of
brightness does. Every ground is one pattern, the same in all images: a ground that is random in each image would tell
images apart so well that SSL learns neither shape nor texture, with or without style spaces.
"""

import math

import torch
from sprites import _rgb
from torch import Tensor

from ssd_addon.metrics import Circular, Factor

SHAPES, TEXTURES, GROUNDS = (
    12,
    ("plain", "stripes", "checks", "rings"),
    ("plain", "ramp", "stripes", "waves", "blotches", "net"),
)
HARMONICS = 5


def _curves() -> tuple[Tensor, Tensor]:
    """Amplitudes and phases [SHAPES, HARMONICS] of radius(angle) = 1 + sum a_k cos((k + 1) angle + phase_k)."""
    g = torch.Generator().manual_seed(7)
    falling = torch.tensor([0.0, 0.34, 0.26, 0.2, 0.14])  # no first harmonic: it would only move the object
    amplitudes = falling * (0.15 + torch.rand(SHAPES, HARMONICS, generator=g) ** 0.5)
    return amplitudes, 2 * math.pi * torch.rand(SHAPES, HARMONICS, generator=g)


def draw_objects(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """n independent draws: shape, texture, ground, x, y (-0.4 to 0.4 of the half edge), scale (0.26-0.4 of the half
    edge), rotation (radians), hue (0-1), brightness (0.55-1)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    def kind(count: int) -> Tensor:
        return torch.randint(count, (n,), generator=generator)

    return {
        "shape": kind(SHAPES),
        "texture": kind(len(TEXTURES)),
        "ground": kind(len(GROUNDS)),
        "x": uniform(-0.4, 0.4),
        "y": uniform(-0.4, 0.4),
        "scale": uniform(0.26, 0.4),
        "rotation": uniform(0, 2 * math.pi),
        "hue": uniform(0, 1),
        "brightness": uniform(0.55, 1.0),
    }


def render_objects(factors: dict[str, Tensor], size: int = 48, *, textured: bool = True) -> Tensor:
    """Images [n, 3, size, size] in [0, 1] on the device of the factors; untextured: plain objects on black."""
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
    surface = color * (0.8 + 0.2 * mark)[:, None]
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
    ground = 0.3 + 0.2 * grounds.gather(0, f["ground"].view(1, -1, 1, 1).expand(1, *x.shape))[0].clamp(-1, 1)
    scene = alpha[:, None] * surface + (1 - alpha[:, None]) * ground[:, None]
    return f["brightness"][:, None, None, None] * scene


def scored_objects(factors: dict[str, Tensor]) -> dict[str, Factor]:
    """The factors as a probe predicts them."""
    names = ("shape", "texture", "ground", "scale", "x", "y", "brightness")
    out: dict[str, Factor] = {k: factors[k] for k in names}
    return out | {"hue": Circular(factors["hue"] * 2 * math.pi), "rotation": Circular(factors["rotation"])}
