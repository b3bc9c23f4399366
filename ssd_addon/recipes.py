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
from ssd_addon.losses import FAMILIES

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
    """What the library recommends for groups of operations: views, widths, loss, weights.

    >>> r = recipe({"spatial": [K.RandomRotation(180.0, p=1.0)], "color": [K.RandomGrayscale(p=0.5)]},
    ...            sets=("spatial",))
    >>> r.spaces
    {'content': 64, 'spatial': 32, 'color': 32}
    >>> r.views["cross_image"], r.loss["temperature"]
    (('spatial',), 0.15)

    Args:
        groups: a preset's name (`presets`), or name -> Kornia operations.
        family: "simclr", "vicreg" or "barlow".
        sets: the groups that *set* their style instead of shifting the one that an image has (rotation of upright
            photographs, grey of coloured ones): their keys show another image.
        size, normalize: of a preset.
        content, style: widths of the spaces.
        warmup_steps: of the dual ascent (simclr): until pairs agree a little; about a tenth of the training.

    Raises:
        ValueError: an unknown preset, family or group.

    Source: docs/choose-your-groups.md, which has the measurements.
    """
    _checks.choice(family, FAMILIES, "family")
    if isinstance(groups, str):
        views = presets(groups, size=size, normalize=normalize)
    elif isinstance(groups, Mapping):
        views = {"groups": dict(groups)}
    else:
        raise TypeError(
            f"groups: expected a preset's name or a mapping name -> operations: got {type(groups).__name__}"
        )
    names = tuple(views["groups"])
    if isinstance(sets, str) or set(sets) - set(names):
        raise ValueError(f"sets: expected names of groups ({_checks.names(names)}): got {sets!r}")
    if sets:
        views["cross_image"] = tuple(sets)
    spaces = {"content": _checks.width(content, "content"), **dict.fromkeys(names, _checks.width(style, "style"))}
    if family != "simclr":
        return Recipe(views, spaces, {"family": family}, None)
    loss: dict[str, Any] = {"family": family, "temperature": 0.15}
    if not names:  # one space: more weight than the entropy has would collapse it
        return Recipe(views, spaces, loss, None)
    loss |= {"content_entropy": True, "weights": {"content": 2.0, **dict.fromkeys(names, 1.0)}}
    ascent = {"tolerance": 0.05, "step_size": 0.05, "warmup_steps": warmup_steps}
    return Recipe(views, spaces, loss, ascent)
