"""Recipes: groups of operations that are known to work, and the settings that were measured to go with them.

    r = recipe("color_spatial", size=224)
    views = StructuredViews(**r.views)
    model = StyleHeads(backbone, r.spaces)
    criterion = JointEntropyLoss(**r.loss)
    ascent = DualAscent(criterion, **r.ascent) if r.ascent else None

Every choice and the figures behind it: docs/choose-your-groups.md and docs/results.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import kornia.augmentation as K
import torch
from torch import nn

from ssd_addon import _checks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def presets(name: str, *, size: int = 224, normalize: bool = True) -> dict[str, Any]:
    """Arguments of `StructuredViews` for photographs: `StructuredViews(**presets("color_spatial", size=224))`.

    Alternative partitions of one recipe (crop 0.08-1 bicubic, flip 0.5, jitter 0.4/0.4/0.2/0.1 with p 0.8, grey 0.2,
    blur p 1.0 on the query and 0.1 on keys, solarise 0 and 0.2). The crop comes first, so nothing is computed on
    pixels that it throws away.

    Args:
        name: "color_spatial" (blur belongs to no space), "appearance_spatial" (blur with the colours), or
            "content_only" (ordinary two-view SSL).
        size: edge of the views in pixels.
        normalize: end with the ImageNet mean and standard deviation.

    Source: the ImageNet recipe of Eastwood et al., arXiv 2311.08815 (groups) and BYOL/SimCLR (strengths).
    """
    _checks.choice(name, ("color_spatial", "appearance_spatial", "content_only"), "preset")
    blur = max(3, int(0.1 * size) // 2 * 2 + 1)

    def color(solarise: float) -> list[nn.Module]:
        ops: list[nn.Module] = [K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
        return [*ops, K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=solarise)]

    def gaussian(p: float) -> list[nn.Module]:
        return [K.RandomGaussianBlur((blur, blur), (0.1, 2.0), p=p)]

    spatial = [
        K.RandomResizedCrop((size, size), scale=(0.08, 1.0), resample="bicubic", cropping_mode="slice"),
        K.RandomHorizontalFlip(p=0.5),
    ]
    end = [K.Normalize(torch.tensor(MEAN), torch.tensor(STD))] if normalize else []
    if name == "color_spatial":
        return {
            "groups": {"spatial": spatial, "color": color(0.0)},
            "key_groups": {"color": color(0.2)},
            "then": [*gaussian(1.0), *end],
            "key_then": [*gaussian(0.1), *end],
        }
    if name == "appearance_spatial":
        return {
            "groups": {"spatial": spatial, "appearance": [*color(0.0), *gaussian(1.0)]},
            "key_groups": {"appearance": [*color(0.2), *gaussian(0.1)]},
            "then": end,
        }
    return {
        "groups": {},
        "then": [*spatial, *color(0.0), *gaussian(1.0), *end],
        "key_then": [*spatial, *color(0.2), *gaussian(0.1), *end],
    }


@dataclass(frozen=True)
class Recipe:
    """Arguments for every part; print it to read them, change what you like (`r.loss | {"temperature": 0.1}`).

    Attributes:
        views: of `StructuredViews`.
        spaces: name -> width, of `StyleHeads`.
        loss: of `JointEntropyLoss`.
        ascent: of `DualAscent`, or None: the weights stay as they are.
    """

    views: dict[str, Any]
    spaces: dict[str, int]
    loss: dict[str, Any]
    ascent: dict[str, Any] | None

    def __str__(self) -> str:
        def shown(value: Any) -> str:
            if isinstance(value, Mapping):
                return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
            if isinstance(value, list | tuple):
                return "[" + ", ".join(map(shown, value)) + "]"
            return type(value).__name__ if isinstance(value, nn.Module) else str(value)

        parts = {"StructuredViews": self.views, "StyleHeads": {"spaces": self.spaces}, "JointEntropyLoss": self.loss}
        if self.ascent is not None:
            parts["DualAscent"] = self.ascent
        return "\n".join(
            f"{part}\n" + "\n".join(f"  {k}: {shown(v)}" for k, v in arguments.items())
            for part, arguments in parts.items()
        )


def recipe(
    groups: str | Mapping[str, Sequence[nn.Module]] = "color_spatial",
    *,
    family: str = "simclr",
    sets: Sequence[str] = (),
    size: int = 224,
    normalize: bool = True,
    content: int = 64,
    style: int = 32,
    warmup_steps: int = 400,
) -> Recipe:
    """The settings that were measured to work, for groups of your own or those of a preset."""
    raise NotImplementedError
