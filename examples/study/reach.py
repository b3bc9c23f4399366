"""What the two views of a pair share of every factor of a sprite: the most that a space is rewarded for encoding.

An augmentation changes a factor only within its range, and the rest of the factor is the same in both views. Each
factor of one view, as the augmentations leave it, is predicted from the same factor of the other view, by its mean
within narrow bins. R² is 1 for a factor that the views share and 0 for one that the augmentation randomizes
completely. The factors are computed from the formulas of the operations in examples/synthetic.py, without images.
"""

import math

import torch
from sprites import draw_factors
from synthetic import GROUPS
from torch import Tensor

PAIRS = {
    "content": (),
    "color": ("color",),
    "spatial": ("spatial",),
}  # space: the groups whose parameters a pair shares
Drawn = dict[str, Tensor]


def draw(n: int, g: torch.Generator) -> dict[str, Drawn]:
    """The parameters of both groups for n views."""
    color, affine = GROUPS["color"][0][1], GROUPS["spatial"][0][1]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=g)

    shift = [2 * t for t in affine["translate"]]  # of the edge; places are in halves of the edge
    return {
        "color": {"gain": uniform(*color["brightness"]), "hue": uniform(*color["hue"])},
        "spatial": {
            "angle": uniform(-1, 1) * math.radians(affine["degrees"]),
            "scale": uniform(*affine["scale"]),
            "x": uniform(-shift[0], shift[0]),
            "y": uniform(-shift[1], shift[1]),
        },
    }


def seen(f: Drawn, p: dict[str, Drawn]) -> Drawn:
    """The factors of a view: rotated and scaled about the center of the image, then shifted; brightness multiplied."""
    a = p["spatial"]
    c, s = torch.cos(a["angle"]), torch.sin(a["angle"])
    return {
        "shape": f["shape"],
        "scale": f["scale"] * a["scale"],
        "x": a["scale"] * (c * f["x"] + s * f["y"]) + a["x"],
        "y": a["scale"] * (-s * f["x"] + c * f["y"]) + a["y"],
        "hue": (f["hue"] + p["color"]["hue"]) % 1,
        "brightness": (f["brightness"] * p["color"]["gain"]).clamp(max=1),
    }


BINS = 40  # equally full, of each coordinate of a place; of other factors the square


def explained(target: Tensor, other: list[Tensor]) -> float:
    """Correlation ratio: the part of the target's variance [n, k] that means within bins of the other view explain."""
    index, bins = torch.zeros(len(target), dtype=torch.long), BINS ** (2 // len(other))
    for t in other:
        index = index * bins + (t.argsort().argsort() * bins) // len(t)
    counts = torch.bincount(index).clamp(min=1)[:, None]
    means = torch.zeros(len(counts), target.shape[1]).index_add_(0, index, target) / counts
    centered = target - target.mean(0)
    return float(1 - (target - means[index]).square().sum() / centered.square().sum())


def shared(n: int = 200_000, seed: int = 0) -> dict[str, dict[str, float]]:
    """Space -> factor -> R² of one view's factor from the same factor of the pair's other view."""
    out = {}
    for space, groups in PAIRS.items():
        g = torch.Generator().manual_seed(seed)
        factors, first, second = draw_factors(n, g), draw(n, g), draw(n, g)
        a = seen(factors, first)
        b = seen(factors, {name: first[name] if name in groups else second[name] for name in second})
        angle = 2 * math.pi * a["hue"]
        one_hot = torch.nn.functional.one_hot(a["shape"]).float()
        out[space] = {
            "shape": float(explained(one_hot, [b["shape"]])),
            "scale": explained(a["scale"][:, None], [b["scale"]]),
            "x": explained(a["x"][:, None], [b["x"], b["y"]]),
            "y": explained(a["y"][:, None], [b["x"], b["y"]]),
            "hue": explained(torch.stack([torch.cos(angle), torch.sin(angle)], 1), [b["hue"]]),
            "brightness": explained(a["brightness"][:, None], [b["brightness"]]),
        }
    return out
