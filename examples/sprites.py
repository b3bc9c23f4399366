"""Colored sprites, drawn in vectorized torch, with known factors.

A sprite is a filled shape on black, antialiased by its signed distance in pixels. Factors: shape (square, ellipse,
heart, triangle), scale, rotation with the shape's own symmetry, position x and y, hue and brightness. The ground is
black because a change of brightness scales it too: on gray, the ratio of sprite to ground would reveal the sprite's own
brightness whatever the augmentation does, and content could keep it.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssd_addon.metrics import Circular

SHAPES = ("square", "ellipse", "heart", "triangle")
FOLD = (4, 2, 1, 3)


def draw_factors(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """n independent draws: shape, scale (0.22-0.36 of the edge), rotation (radians), x, y (-0.5 to 0.5 of the half
    edge), hue (0-1), brightness (0.5-1)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    return {
        "shape": torch.randint(len(SHAPES), (n,), generator=generator),
        "scale": uniform(0.22, 0.36),
        "rotation": uniform(0, 2 * math.pi),
        "x": uniform(-0.5, 0.5),
        "y": uniform(-0.5, 0.5),
        "hue": uniform(0, 1),
        "brightness": uniform(0.5, 1.0),
    }


def render(factors: dict[str, Tensor], size: int = 48) -> Tensor:
    """Images [n, 3, size, size] in [0, 1] on the device of the factors."""
    f = {k: v if k == "shape" else v.float() for k, v in factors.items()}
    device = f["x"].device
    line = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    dx = line[None, None, :] - f["x"][:, None, None]
    dy = line[None, :, None] - f["y"][:, None, None]
    c, s = torch.cos(f["rotation"])[:, None, None], torch.sin(f["rotation"])[:, None, None]
    r = f["scale"][:, None, None]
    u, v = (c * dx + s * dy) / r, (-s * dx + c * dy) / r  # coordinates of the sprite, radius about 1
    square = torch.maximum(u.abs(), v.abs()) - 0.85
    ellipse = (torch.sqrt((u / 1.15) ** 2 + (v / 0.62) ** 2) - 1) * 0.7
    h, w = -v * 1.1 + 0.15, u.abs() * 1.05
    heart = (torch.sqrt(w**2 + (h - 0.72 * w.clamp(min=1e-4).sqrt()) ** 2) - 0.92) * 0.6
    k = math.sqrt(3)
    triangle = torch.maximum(torch.maximum(k * u + v, -k * u + v) / 2, -v) - 0.6
    distance = torch.stack([square, ellipse, heart, triangle], dim=1)
    shape = f["shape"].view(-1, 1, 1, 1).expand(-1, 1, size, size)
    pixels = distance.gather(1, shape) * r[:, None] * size / 2  # signed distance in pixels
    alpha = (0.5 - pixels).clamp(0, 1)
    return alpha * _rgb(f["hue"], f["brightness"])[:, :, None, None]


def _rgb(hue: Tensor, value: Tensor, saturation: float = 0.85) -> Tensor:
    """[n, 3] from hue (0-1) and brightness."""
    k = (torch.tensor([5.0, 3.0, 1.0], device=hue.device) + hue[:, None] * 6) % 6
    return value[:, None] * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))


def scored(factors: dict[str, Tensor]) -> dict[str, Tensor | Circular]:
    """The factors as a probe predicts them: angles as (cos, sin), the rotation of each shape separately."""
    shape = factors["shape"]
    out: dict[str, Tensor | Circular] = {
        "shape": shape,
        "scale": factors["scale"],
        "x": factors["x"],
        "y": factors["y"],
        "hue": Circular(factors["hue"] * 2 * math.pi),
        "brightness": factors["brightness"],
    }
    for k, name in enumerate(SHAPES):
        if bool((shape == k).any()):
            out[f"rotation {name}"] = Circular(factors["rotation"], torch.where(shape == k, FOLD[k], 0))
    return out


def load_dsprites(path: str | Path, n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """n images of the original dSprites file (npz with imgs and latents_values), colored by a random hue.

    Returns images [n, 3, 64, 64] in [0, 1] and the factors; dSprites has square, ellipse, heart.
    """
    with np.load(path, allow_pickle=False) as file:
        if not {"imgs", "latents_values"} <= set(file.files):
            raise ValueError(f"{path}: expected the dSprites arrays imgs and latents_values: got {file.files}")
        latents = file["latents_values"]
        pick = torch.randint(len(latents), (n,), generator=generator).numpy()
        order = np.sort(pick)
        masks, values = file["imgs"][order], torch.from_numpy(latents[order]).float()
    hue, brightness = torch.rand(n, generator=generator), 0.5 + 0.5 * torch.rand(n, generator=generator)
    images = torch.from_numpy(masks).float()[:, None] * _rgb(hue, brightness)[:, :, None, None]
    factors = {
        "shape": values[:, 1].long() - 1,
        "scale": values[:, 2],
        "rotation": values[:, 3],
        "x": values[:, 4] - 0.5,
        "y": values[:, 5] - 0.5,
        "hue": hue,
        "brightness": brightness,
    }
    return images, factors
