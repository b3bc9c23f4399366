"""A model whose spaces are known and images to show it: for the tests of the report, in Python and in a browser."""

import kornia.augmentation as K
import torch

from ssd_addon import StructuredViews
from ssd_addon.report import Data

CARD = {
    "groups": {
        "color": [["ColorJitter", {"brightness": [0.5, 1.5], "p": 1.0}]],
        "spatial": [["RandomAffine", {"degrees": 0.0, "translate": [0.3, 0.3], "p": 1.0}]],
    }
}


def squares(n: int = 40, size: int = 16, seed: int = 0) -> Data:
    """Bright squares on black: their place and brightness are known."""
    g = torch.Generator().manual_seed(seed)
    place = torch.randint(4, size - 6, (n, 2), generator=g)
    light = 0.2 + 0.4 * torch.rand(n, generator=g)
    images = torch.zeros(n, 3, size, size)
    for i, (y, x) in enumerate(place.tolist()):
        images[i, :, y : y + 3, x : x + 3] = light[i]
    factors = {"x": place[:, 1].float(), "light": light, "kind": torch.arange(n) % 2}
    return Data(images, factors, [f"square {i}" for i in range(n)], {"kind": ["even", "odd"]})


def views() -> StructuredViews:
    color = [K.ColorJitter(brightness=(0.5, 1.5), p=1.0)]
    spatial = [K.RandomAffine(0.0, translate=(0.3, 0.3), p=1.0)]
    return StructuredViews({"color": color, "spatial": spatial}, seed=0)


def model(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """content: noise of the image's own; color: how bright the brightest pixel is; spatial: where it is."""
    grey = x.mean(1)
    h, w = grey.shape[1:]
    weight = grey / grey.sum((1, 2), keepdim=True).clamp(min=1e-6)
    line = torch.linspace(-1, 1, w)
    across, down = (weight.sum(1) * line).sum(1), (weight.sum(2) * torch.linspace(-1, 1, h)).sum(1)
    light = grey.amax((1, 2))
    noise = (torch.stack([light, across, down], 1).add(3).sin() * 43758.5453).remainder(1) + 0.01
    return {
        "content": noise,
        "color": torch.stack([light, torch.ones_like(light)], 1),
        "spatial": torch.stack([across, down, torch.ones_like(across)], 1),
    }
