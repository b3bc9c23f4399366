"""Segments: which operations the fast path supports, and how it combines neighboring ones.

Legend: N samples, C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import kornia.augmentation as K
import torch
from kornia.constants import Resample
from torch import Tensor

from ssd_addon.augment.fast.geometry import Filter, Placement
from ssd_addon.augment.stages import Step
from ssd_addon.kernels.colors import BLEND, HUE, SATURATE, SOLARIZE, column
from ssd_addon.operations.draws import Parameters
from ssd_addon.operations.wrap import GATE, KorniaOperation

Columns = list[tuple[Tensor, Tensor]]


class Segment(Protocol):
    """Several steps that run together.

    Attributes:
        steps: indices of the steps in the lane.
        fast: False for a step that runs by itself, through its operation.
    """

    steps: list[int]
    fast: bool


@dataclass
class Geometry:
    """Crops and flips, as one resampling. The only segment that reads the source images."""

    steps: list[int]
    moves: list[Callable[[Placement, Parameters], Placement]]
    fast: bool = True


@dataclass
class Colors:
    """Color operations, as a table of instructions, optionally followed by a Normalize.

    Attributes:
        columns: functions that return the instructions of each step other than Normalize.
        ends: mean and standard deviation of the Normalize, or None.
        clamps: all steps clamp their input to [0, 1].
        clamped: the input may lie outside [0, 1] and is clamped first where a step fires.
    """

    steps: list[int]
    columns: list[Callable[[Parameters], Columns]]
    ends: tuple[Tensor, Tensor] | None = None
    clamps: bool = True
    clamped: bool = False
    fast: bool = True


@dataclass
class Blur:
    steps: list[int]
    size: tuple[int, int]
    border: str
    fast: bool = True


@dataclass
class Plain:
    """An operation that the fast path does not support."""

    steps: list[int]
    fast: bool = False


def segments(steps: Sequence[Step], channels: int) -> list[Segment]:
    """The segments of a lane, for images with this many channels."""
    out: list[Any] = []
    within = True  # are all pixels in [0, 1]?
    for i, step in enumerate(steps):
        known = _known(step, channels)
        if isinstance(known, Colors):
            known = known if within or known.clamps or known.ends is not None else None
        last = out[-1] if out else None
        if isinstance(known, Geometry) and isinstance(last, Geometry):
            if not (_resamples(step) and any(_resamples(steps[k]) for k in last.steps)):
                last.steps.append(i)
                last.moves += known.moves
                continue
        elif isinstance(known, Colors) and isinstance(last, Colors) and last.ends is None:
            last.steps.append(i)
            last.columns += known.columns
            last.ends = known.ends
            within &= known.ends is None
            continue
        made = Plain([]) if known is None else known
        made.steps = [i]
        if isinstance(made, Colors):
            made.clamped = not within
            within &= made.ends is None
        within &= not isinstance(made, Plain)
        out.append(made)
    return out


def _resamples(step: Step) -> bool:
    return isinstance(step.module, K.RandomResizedCrop | K.RandomCrop)


# ---- supported operations


def _known(step: Step, channels: int) -> Any:
    op: Any = step.module
    if not isinstance(step.operation, KorniaOperation) or step.operation.one_by_one:
        return None
    if type(op) not in _KNOWN:  # a subclass may do anything
        return None
    return _KNOWN[type(op)](op, channels)


def fires(p: Mapping[str, Tensor]) -> Tensor:
    return p[GATE] > 0.5


def _flip(axis: int) -> Callable[[Any, int], Any]:
    def known(op: Any, channels: int) -> Geometry:
        return Geometry([], [lambda place, p: place.flipped(fires(p), axis)])

    return known


def _crop(op: Any, channels: int) -> Any:
    """RandomResizedCrop and RandomCrop; the parameter "src" [N, 4, 2] holds corners (x, y), inclusive."""
    resized = isinstance(op, K.RandomResizedCrop)
    filters: dict[Any, Filter] = {Resample.BILINEAR: "bilinear", Resample.BICUBIC: "bicubic"}
    how = filters.get(op.flags["resample"]) if resized else None
    if (resized and how is None) or (not resized and (op.flags["padding"] is not None or op.flags["pad_if_needed"])):
        return None
    height, width = (int(n) for n in op.flags["size"])

    def move(place: Placement, p: Parameters) -> Placement:
        corners = p["src"].long()
        left, top = corners[:, 0].unbind(1)
        w, h = (corners[:, 2] - corners[:, 0] + 1).unbind(1)
        gate = fires(p)
        if not bool(gate.all()):
            if place.size != (height, width):
                raise ValueError(
                    f"it returns {height} x {width} pixels where it fires and leaves the other images as they are, "
                    f"{place.size[0]} x {place.size[1]}; an operation that changes the size needs p=1"
                )
            top, left = (torch.where(gate, t, 0) for t in (top, left))
            h, w = torch.where(gate, h, height), torch.where(gate, w, width)
        inside = (top >= 0) & (left >= 0) & (top + h <= place.size[0]) & (left + w <= place.size[1])
        if not bool(inside.all()):
            raise ValueError(
                f"expected boxes inside the images, {place.size[0]} x {place.size[1]} pixels: got one that reaches "
                f"outside, of {int(h.max())} x {int(w.max())}; give the images it was drawn for, or larger ones"
            )
        return place.cropped(top, left, h, w, (height, width), how)

    return Geometry([], [move])


def _jitter(op: Any, channels: int) -> Any:
    """ColorJitter, as torchvision's: brightness multiplies, contrast and saturation blend with gray."""
    if channels != 3:
        return None

    def columns(p: Parameters) -> Columns:
        f = _factors(p)
        zero = torch.zeros(len(f))
        blends = [(f[:, 0], zero, zero), (f[:, 1], zero, 1 - f[:, 1]), (f[:, 2], 1 - f[:, 2], zero)]
        numbers = [torch.stack([*blend, zero], dim=1) for blend in blends]
        return _in_order(p, (BLEND, BLEND, BLEND, HUE), f, numbers)

    return Colors([], [columns])


def _jiggle(op: Any, channels: int) -> Any:
    """ColorJiggle: brightness adds, contrast multiplies, saturation scales the S of HSV."""
    if channels != 3:
        return None

    def columns(p: Parameters) -> Columns:
        f = _factors(p)
        one, zero = torch.ones(len(f)), torch.zeros(len(f))
        each = [(one, zero, zero, f[:, 0] - 1), (f[:, 1], zero, zero, zero), (f[:, 2], zero, zero, zero)]
        return _in_order(p, (BLEND, BLEND, SATURATE, HUE), f, [torch.stack(numbers, dim=1) for numbers in each])

    return Colors([], [columns])


def _factors(p: Parameters) -> Tensor:
    """[N, 4] brightness, contrast, saturation, hue."""
    return torch.stack([p[f"{n}_factor"].float() for n in ("brightness", "contrast", "saturation", "hue")], dim=1)


def _in_order(p: Parameters, codes: tuple[int, ...], factors: Tensor, numbers: list[Tensor]) -> Columns:
    """A column for each place t of the order, with sub-operation order[:, t]; skips one that changes no image."""
    sixths = torch.zeros(len(factors), 4)
    sixths[:, 0] = 6 * factors[:, 3]
    used = (factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=0)
    kinds, table = torch.tensor(codes) * used, torch.stack([*numbers, sixths], dim=1)  # [4], [N, 4, 4]
    gate, rows = fires(p), torch.arange(len(factors))
    return [(torch.where(gate, kinds[sub], 0), table[rows, sub]) for sub in p["order"].long().unbind(1)]


def _blend(name: str, numbers: Callable[[Tensor], tuple[Tensor | float, ...]]) -> Callable[[Any, int], Any]:
    """RandomBrightness and RandomContrast: the coefficients a, b, c, d of a blend, from one parameter."""

    def known(op: Any, channels: int) -> Any:
        if not op.clip_output:
            return None
        return Colors([], [lambda p: [column(BLEND, fires(p), *numbers(p[name].float()))]])

    return known


def _grayscale(op: Any, channels: int) -> Any:
    if op.rgb_weights is not None or channels != 3:
        return None
    return Colors([], [lambda p: [column(BLEND, fires(p), 0.0, 1.0)]], clamps=False)


def _invert(op: Any, channels: int) -> Any:
    if not isinstance(op.flags["max_val"], int | float) or op.flags["max_val"] != 1:
        return None
    return Colors([], [lambda p: [column(BLEND, fires(p), -1.0, 0.0, 0.0, 1.0)]], clamps=False)


def _hue(op: Any, channels: int) -> Any:
    if channels != 3:
        return None
    return Colors([], [lambda p: [column(HUE, fires(p), 6 * p["hue_factor"].float())]])


def _saturation(op: Any, channels: int) -> Any:
    if channels != 3:
        return None
    return Colors([], [lambda p: [column(SATURATE, fires(p), p["saturation_factor"].float())]])


def _solarize(op: Any, channels: int) -> Any:
    return Colors([], [lambda p: [column(SOLARIZE, fires(p), p["thresholds"].float(), p["additions"].float())]])


def _normalize(op: Any, channels: int) -> Any:
    mean, std = (torch.as_tensor(op.flags[k], dtype=torch.float32).flatten() for k in ("mean", "std"))
    if not {len(mean), len(std)} <= {1, channels}:
        return None  # the operation itself raises an error
    return Colors([], [], ends=(mean.view(-1, 1, 1), std.view(-1, 1, 1)))


def _gaussian(op: Any, channels: int) -> Any:
    size = op.flags["kernel_size"]
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    border = op.flags["border_type"].name.lower()
    if height % 2 == 0 or width % 2 == 0 or border not in ("reflect", "replicate"):
        return None
    return Blur([], (height, width), border)


_KNOWN: dict[type, Callable[[Any, int], Any]] = {
    K.RandomHorizontalFlip: _flip(1),
    K.RandomVerticalFlip: _flip(0),
    K.RandomResizedCrop: _crop,
    K.RandomCrop: _crop,
    K.ColorJitter: _jitter,
    K.ColorJiggle: _jiggle,
    K.RandomBrightness: _blend("brightness_factor", lambda f: (1.0, 0.0, 0.0, f - 1)),
    K.RandomContrast: _blend("contrast_factor", lambda f: (f,)),
    K.RandomSaturation: _saturation,
    K.RandomHue: _hue,
    K.RandomGrayscale: _grayscale,
    K.RandomInvert: _invert,
    K.RandomSolarize: _solarize,
    K.Normalize: _normalize,
    K.RandomGaussianBlur: _gaussian,
}
