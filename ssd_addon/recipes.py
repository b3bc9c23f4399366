"""Recipes: groups of operations for photographs, and the settings that the library recommends for given groups.

    r = recipe("color_spatial", size=224)
    views = StructuredViews(**r.views)
    model = StyleHeads(backbone, r.spaces)
    criterion = JointEntropyLoss(**r.loss)
    equivariance = EquivarianceLoss(r.spaces, views, **r.equivariance) if r.equivariance else None

docs/choose-your-groups.md and docs/results.md explain every choice, with measurements and with what is still untested.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssd_addon import _checks, _limits
from ssd_addon._optional import needs
from ssd_addon.losses import FAMILIES, DualAscent, FamilyName
from ssd_addon.metrics.embed import Images

with needs("ssd_addon.recipes"):
    import kornia.augmentation as K

    from ssd_addon.keys import Overwrites as Overwrites
    from ssd_addon.keys import overwrites as overwrites

AUTO = "auto"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def presets(
    name: str, *, size: int = 224, normalize: bool | Mapping[str, Sequence[float]] | None = True
) -> dict[str, Any]:
    """Arguments of `StructuredViews` for photographs: `StructuredViews(**presets("color_spatial", size=224))`.

    The presets are alternative partitions of one recipe (crop 0.08-1 bicubic, flip 0.5, jitter 0.4/0.4/0.2/0.1 with
    p 0.8, grayscale 0.2, blur p 1.0 on the query and 0.1 on keys, solarize 0 and 0.2). The crop comes first, so that
    nothing is computed on pixels that it discards.

    Args:
        name: "color_spatial" (blur belongs to no group), "appearance_spatial" (blur is grouped with the colors), or
            "content_only" (ordinary two-view SSL).
        size: edge of the views in pixels.
        normalize: end with a normalization by the ImageNet mean and standard deviation, or by your own,
            {"mean": (...), "std": (...)}, as in lightly's transforms; with False or None views stay in [0, 1].

    Raises:
        ValueError: the name is unknown; the size is below 1 or above 16384; the mapping is not of mean and std.

    Source: the ImageNet recipe of Eastwood et al., arXiv 2311.08815 (groups) and BYOL/SimCLR (strengths).
    """
    _checks.choice(name, ("color_spatial", "appearance_spatial", "content_only"), "preset")
    size = _limits.edge(size, "size: expected an edge")
    _limits.crop(size, "size")
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
    end = _normalize(normalize)
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


def _normalize(given: bool | Mapping[str, Sequence[float]] | None) -> list[nn.Module]:
    if given is None or given is False:
        return []
    if given is True:
        given = {"mean": MEAN, "std": STD}
    if not isinstance(given, Mapping) or set(given) != {"mean", "std"}:
        got = f"the keys {_checks.names(given)}" if isinstance(given, Mapping) else repr(given)
        raise ValueError(f'normalize: expected True, False or {{"mean": (...), "std": (...)}}: got {got}')
    mean, std = (torch.tensor([float(x) for x in given[k]]) for k in ("mean", "std"))
    if mean.shape != std.shape or not bool((std > 0).all()):
        raise ValueError(
            f"normalize: expected a mean and a standard deviation above 0 for each channel: got {given['mean']} and "
            f"{given['std']}"
        )
    return [K.Normalize(mean, std)]


@dataclass(frozen=True, eq=False)
class Recipe:
    """Arguments for views, model and losses; print the recipe to read them.

    To change a value, override it: `r.loss | {"temperature": 0.1}`, and likewise in `r.equivariance`, which has to use
    the criterion's temperature.

    Attributes:
        views: arguments of `StructuredViews`.
        spaces: name -> width, for `StyleHeads`.
        fixed: arguments of `JointEntropyLoss`, without adaptive weights.
        equivariance: arguments of `EquivarianceLoss` other than spaces and views; None if it is not used.
        ascent: arguments of `DualAscent` other than the spaces; None if the weights are constant.
        tested: the result of `overwrites`, with sets="auto".
    """

    views: dict[str, Any]
    spaces: dict[str, int]
    fixed: dict[str, Any]
    equivariance: dict[str, Any] | None = None
    ascent: dict[str, Any] | None = None
    tested: Overwrites | None = None

    @property
    def loss(self) -> dict[str, Any]:
        """Arguments of `JointEntropyLoss`; the weights are a new `DualAscent` if the recipe has one."""
        if self.ascent is None:
            return dict(self.fixed)
        return self.fixed | {"weights": DualAscent(self.spaces, **self.ascent)}

    def __str__(self) -> str:
        def shown(value: Any) -> str:
            if isinstance(value, Mapping):
                return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
            if isinstance(value, list | tuple):
                return "[" + ", ".join(map(shown, value)) + "]"
            return type(value).__name__ if isinstance(value, nn.Module) else str(value)

        loss = self.fixed | ({"weights": "DualAscent"} if self.ascent else {})
        parts = {"StructuredViews": self.views, "StyleHeads": {"spaces": self.spaces}, "JointEntropyLoss": loss}
        parts |= {"DualAscent": self.ascent or {}, "EquivarianceLoss": self.equivariance or {}}
        return "\n".join(
            f"{part}\n" + "\n".join(f"  {k}: {shown(v)}" for k, v in arguments.items())
            for part, arguments in parts.items()
            if arguments
        ) + (f"\noverwrites\n{self.tested}" if self.tested else "")


def recipe(
    groups: str | Mapping[str, Sequence[nn.Module]] = "color_spatial",
    *,
    family: FamilyName = "simclr",
    sets: Iterable[str] = (),
    images: Images | None = None,
    size: int | None = None,
    normalize: bool | Mapping[str, Sequence[float]] | None = None,
    content: int | None = None,
    style: int = 32,
    tolerance: float | None = None,
    warmup_steps: int = 400,
) -> Recipe:
    """The library's recommended settings for groups of operations: views, widths, loss and additional terms.

    >>> r = recipe({"spatial": [K.RandomRotation(180.0, p=1.0)], "blur": [K.RandomGaussianBlur((7, 7), (0.1, 2.0))]},
    ...            sets=("blur",))
    >>> r.spaces
    {'content': 64, 'spatial': 32, 'blur': 32}
    >>> r.views["cross_image"], r.loss
    (('blur',), {'family': 'simclr', 'temperature': 0.15, 'content_entropy': True, 'content_keys': 'all'})
    >>> r.equivariance, r.ascent
    ({'family': 'simclr', 'temperature': 0.15, 'weight': 0.5}, None)

    Args:
        groups: name of a preset (see `presets`), or name -> Kornia operations.
        family: of the loss, see `JointEntropyLoss`. "simclr" was measured most and is the one to start with. Of the
            others, "mmcr" keeps styles out of content best; with "sigreg" and "frossl" content hardly encodes anything
            (docs/results/families.md).
        sets: names of the groups that overwrite their attribute (such as a blur of sharp photographs) instead of
            changing it relative to the image; their keys are made from another image. "auto" tests your images with
            `overwrites` and takes the groups for which the result is certain; the result is in `.tested`. For SimCLR,
            such keys and the equivariance term have been measured each by itself and not together.
        images: for sets="auto", [n, C, H, W] or batches of them, as for `overwrites`.
        size, normalize: arguments of a preset (default 224, True); custom groups include them in their operations.
        content: width of the content space. None: 64, and with style groups 8 for families other than "simclr", whose
            wider content spaces encode the styles.
        style: width of each style space.
        tolerance: tolerance of a dual ascent on the weights (simclr only): the allowed misalignment of content and
            style pairs, 1 - mean cosine. The weight of content then starts at 2, and the equivariance term is left
            out. Meant for images whose content is visible in every view (sprites: 0.01), not for photographs under
            random crops. None uses fixed weights.
        warmup_steps: warm-up steps of the dual ascent.

    Raises:
        ValueError: a preset, family or group is unknown; a tolerance is given for another family or without groups;
            sets="auto" is given without images, or images without it.
        TypeError: groups is neither a name nor a mapping.

    Source: docs/choose-your-groups.md, with the measurements.
    """
    _checks.choice(family, FAMILIES, "family")
    given: dict[str, Any] = {k: v for k, v in (("size", size), ("normalize", normalize)) if v is not None}
    if isinstance(groups, str):
        views = presets(groups, **given)
    elif isinstance(groups, Mapping):
        if given:
            raise ValueError(
                f"{_checks.names(given)}: expected only with a preset, as custom groups include it in their "
                f"operations: got groups {_checks.names(groups)}"
            )
        if not groups:
            raise ValueError(
                "groups: expected at least one group, as without any the views would be copies of one another: got "
                "none; for ordinary two-view SSL use the preset 'content_only'"
            )
        if "content" in groups:
            raise ValueError("groups: expected names other than 'content', such as 'color': got 'content'")
        views = {"groups": dict(groups)}
    else:
        raise TypeError(
            f"groups: expected a preset's name or a mapping name -> operations: got {type(groups).__name__}"
        )
    names = tuple(views["groups"])
    tested = None
    if sets == AUTO:
        if images is None:
            raise ValueError(
                'sets="auto": expected images=, your own, as whether a group overwrites its attribute depends on them: '
                "got none"
            )
        if not names:
            raise ValueError("sets=\"auto\": expected groups to test: got none, as with the preset 'content_only'")
        tested = overwrites(views["groups"], images)
        sets = tested.sets
    elif images is not None:
        raise ValueError('images: expected only with sets="auto": got images and names of groups')
    if isinstance(sets, str) or not isinstance(sets, Iterable):
        raise TypeError(f'sets: expected a sequence of names of groups, or "auto": got {sets!r}')
    crossed = tuple(sets)
    if unknown := [n for n in crossed if n not in names]:
        raise ValueError(f"sets: expected names of groups ({_checks.names(names)}): got {_checks.names(unknown)}")
    if crossed:
        views["cross_image"] = crossed
    if content is None:
        content = 64 if family == "simclr" or not names else 8
    spaces = {"content": _checks.width(content, "content"), **dict.fromkeys(names, _checks.width(style, "style"))}
    _checks.count(warmup_steps, "warmup_steps")
    if tolerance is not None:
        tolerance = _checks.not_negative(tolerance, "tolerance", "how far pairs may disagree, 1 - mean cosine")
    if tolerance is not None and (family != "simclr" or not names):
        where = f"the {family!r} family" if names else "content alone"
        raise ValueError(f"tolerance: expected None, as it was measured for simclr with groups: got one for {where}")
    if family != "simclr":
        return Recipe(views, spaces, {"family": family}, tested=tested)
    loss: dict[str, Any] = {"family": family, "temperature": 0.15}
    if not names:
        return Recipe(views, spaces, loss)
    equivariance = loss | {"weight": 0.5}
    loss["content_entropy"] = True
    if tolerance is None:
        loss["content_keys"] = "all"  # with the first key only, the equivariance term removes shape from content
        return Recipe(views, spaces, loss, equivariance, tested=tested)
    ascent: dict[str, Any] = {"tolerance": tolerance, "step_size": 0.05, "warmup_steps": warmup_steps}
    ascent["start"] = {"content": 2.0, **dict.fromkeys(names, 1.0)}
    return Recipe(
        views, spaces, loss, None, ascent, tested
    )  # both together: content collapsed in one of three runs on sprites
