"""A trial of every operation, when views are built: can its draws be shared exactly, and what does it do to pixels?

It is drawn and applied a few times on small images. What cannot be shared exactly is refused by name, before any
training: parameters whose size changes from draw to draw, rows that depend on other images of the batch, randomness
that its parameters do not hold. Whether an operation makes images differ is read from pixels. An operation that no
trial image fits (a crop larger than all of them, an unusual number of channels) is tried on the first images that come.
"""

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kornia.augmentation import Denormalize, GeometricAugmentationBase2D
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.operations.draws import Parameters, Refused, Watch, generator, in_float32, pick
from ssd_addon.operations.wrap import GATE, KorniaOperation, Operation, WrappedOperation, changes_size

SHAPES = ((3, 32, 32), (3, 256, 256), (1, 32, 32), (4, 32, 32))
"""Sizes of trial images, [C, H, W], in this order."""
SLACK = 1e-5
"""How far outside [0, 1] rounding may take a pixel."""
ROWS = 3
MANY, PIXELS = 256, 2_000_000
"""Rows, and numbers in them at most, by which it is judged whether an operation changes any pixel."""
VISIBLE = 1e-4
"""A difference of pixels above the rounding of an interpolation."""
_CHECKS: Any = getattr(importlib.import_module("kornia.core"), "exceptions", None)  # since Kornia 0.8
ERRORS: tuple[type[Exception], ...] = (
    RuntimeError, TypeError, ValueError, AssertionError, IndexError, KeyError, NotImplementedError,
    StopIteration,
    *([_CHECKS.BaseError] if hasattr(_CHECKS, "BaseError") else []),
)  # fmt: skip
"""What operations raise where images do not suit them."""


def from_outside(error: Exception) -> bool:
    """Whether an error only happened to be raised while an operation ran: memory, or a data loader's dead worker, whose
    signal raises wherever the main process is."""
    return isinstance(error, torch.OutOfMemoryError) or str(error).startswith("DataLoader worker")


class ChangesSize(Refused):
    """It does so only where it fires, on images of the size that it was tried on."""


@dataclass(frozen=True)
class Traits:
    """What a trial found.

    Attributes:
        varies: two draws make different pixels of an image.
        leaves_range: it takes pixels of [0, 1] to values outside.
        clamps: it forces values outside [0, 1] back, or cannot take them.
    """

    varies: bool
    leaves_range: bool = False
    clamps: bool = False


Range = tuple[float, float]


def tried(
    where: str,
    operation: Operation,
    shapes: Iterable[tuple[int, ...]] = SHAPES,
    value_range: Range | None = (0.0, 1.0),
) -> Traits | None:
    """The traits of an operation, or None where no trial sample suits it. Global generators are left as they were.

    Args:
        where: group and name, for messages.
        shapes: of the samples that are tried, in this order.
        value_range: of the samples; None: any numbers, about 1 in size.

    Raises:
        Refused: it cannot be shared exactly; says why.
    """
    watch = Watch(torch.device("cpu"))
    found: Traits | None = None
    size: ChangesSize | None = None
    try:
        with in_float32():
            for shape in (*shapes, *own_size(operation)):
                try:
                    traits = _examined(operation, shape, value_range)
                except ChangesSize as error:
                    size = size or error  # a crop may keep the size of images as large as it makes them
                    continue
                except Refused as error:
                    raise Refused(f"{where} {error}") from None
                except ERRORS:
                    continue
                if traits.varies:
                    return traits
                found = found or traits  # a crop of 32 pixels changes nothing of an image of 32: another size
        if size is not None:
            raise Refused(f"{where} {size}")
        return found
    finally:
        watch.restore()


def own_size(operation: Operation) -> list[tuple[int, ...]]:
    """Images [C, H, W] of the size that a Kornia operation makes, if it has one."""
    op: Any = operation.op if isinstance(operation, KorniaOperation) else None
    size = getattr(op, "flags", {}).get("size")
    if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) for n in size):
        return [(3, *size), (1, *size), (4, *size)]
    return []


def _examined(operation: Operation, shape: tuple[int, ...], value_range: Range | None) -> Traits:
    drawn = _sharable_draws(operation, shape)
    x = _scaled(torch.rand(ROWS, *shape, generator=generator(0)), value_range)
    fired = _firing(drawn[0])
    y = _settled(operation, x, fired)
    if isinstance(operation, WrappedOperation) and y.shape[1:] != x.shape[1:] and not operation.always:
        raise ChangesSize(changes_size(x, y))
    if not _by_rows(operation, x, fired, y):
        if not isinstance(operation, KorniaOperation) or operation.one_by_one:
            raise Refused("gives an image another result when other images are beside it, so no view can be shared")
        operation.one_by_one = True  # its parameters name places in the batch: image by image there is one place
        return _examined(operation, shape, value_range)
    varies = _varies(operation, shape, value_range)
    return (
        Traits(varies) if value_range is None else Traits(varies, *_range_traits(operation, shape, fired, value_range))
    )


def _sharable_draws(operation: Operation, shape: tuple[int, ...]) -> list[Parameters]:
    """Draws of `ROWS` images, every value a row of an image."""
    drawn = [_drawn(operation, (ROWS, *shape), 1, k) for k in range(8)]
    other = _drawn(operation, (ROWS + 2, *shape), 2)
    if not _rows_of(drawn[0], ROWS) or not _rows_of(other, ROWS + 2):
        if not isinstance(operation, KorniaOperation) or operation.one_by_one:
            raise Refused(
                f"draws parameters without a row for every image: expected tensors [B, ...]: got {_sizes(drawn[0])} "
                f"for {ROWS} images"
            )
        operation.one_by_one = True
        return _sharable_draws(operation, shape)
    for d in (*drawn, other):
        if {k: t.shape[1:] for k, t in d.items()} != {k: t.shape[1:] for k, t in drawn[0].items()}:
            raise Refused(
                "draws parameters of another size every time, so the rows of two draws cannot be exchanged and no view "
                f"can be shared: got {_sizes(drawn[0])} and {_sizes(d)}"
            )
    return drawn


def _drawn(operation: Operation, shape: tuple[int, ...], *seed: int) -> Parameters:
    """Its draws for a seed, the same each time; no generator but the given one is drawn from."""
    watch = Watch(torch.device("cpu"))
    first, again = (operation.draw(shape, generator(*seed)) for _ in range(2))
    if moved := watch.moved():
        raise Refused(draws_beside(moved))
    for d in (first, again):
        if not isinstance(d, Mapping):
            raise Refused(f"draws no parameters: expected a dict name -> tensor [B, ...]: got {type(d).__name__}")
    if not same(first, again):
        raise Refused(draws_beside("its own"))
    return first


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Are two draws equal, NaN included?"""
    if a.keys() != b.keys():
        return False
    for k in a:
        if not isinstance(a[k], Tensor) or not isinstance(b[k], Tensor):
            return not isinstance(a[k], Tensor) and not isinstance(b[k], Tensor)  # what it is, is said elsewhere
        if a[k].shape != b[k].shape or not torch.allclose(a[k], b[k], rtol=0, atol=0, equal_nan=True):
            return False
    return True


def _settled(operation: Operation, x: Tensor, parameters: Parameters) -> Tensor:
    """What it makes of the images, three times the same."""
    watch = Watch(x.device)
    given = [x.clone() for _ in range(3)]
    results = [operation.apply(each, parameters) for each in given]
    if moved := watch.moved():
        raise Refused(draws_late(moved))
    if not all(torch.equal(each, x) for each in given):
        raise Refused("changes the images that it is given; expected a new tensor, as other views start from the same")
    if wrong := no_batch(results[0], len(x)):
        raise Refused(wrong)
    if not all(torch.equal(results[0], y) for y in results[1:]):
        raise Refused(draws_late("its own"))
    return results[0]


def no_batch(y: Any, b: int) -> str:
    """What is wrong with the result for B images; "" where it is a batch of as many, floating-point."""
    if not isinstance(y, Tensor):
        return f"makes no images: expected a tensor of {b}: got {type(y).__name__}"
    if y.ndim == 0 or len(y) != b:
        return f"makes {_checks.shape(y)} of {b} images; expected one for each"
    if not y.is_floating_point():
        return f"makes images of whole numbers: expected floating point, as it is given: got {y.dtype}"
    return ""


def draws_late(whose: str) -> str:
    return (
        f"draws random numbers while it is applied, beside its parameters (from {whose} generator), so no two views "
        "can share them; leave it out, or put another operation in its place"
    )


def draws_beside(whose: str) -> str:
    return (
        f"draws its parameters from {whose} generator instead of the one that it is given, so the same seed makes "
        "other views every time; expected every random number from `draw`'s generator"
    )


def _by_rows(operation: Operation, x: Tensor, parameters: Parameters, y: Tensor) -> bool:
    """Does every image get the same result whatever lies beside it?"""
    for rows in (torch.tensor([2, 0, 1]), torch.tensor([1, 2]), torch.tensor([2])):
        try:
            again = operation.apply(x[rows], pick(parameters, rows))
        except ERRORS:
            return False
        if again.shape != y[rows].shape or not torch.allclose(again, y[rows], atol=1e-4, equal_nan=True):
            return False
    return True


def _firing(parameters: Parameters) -> Parameters:
    """The same draws with every gate open."""
    return {k: torch.ones_like(t) if k.endswith(GATE) else t for k, t in parameters.items()}


def _varies(operation: Operation, shape: tuple[int, ...], value_range: Range | None) -> bool:
    """Do two draws make different pixels of one image?"""
    image = _scaled(0.2 + 0.5 * torch.rand(1, *shape, generator=generator(3)), value_range)
    visible = VISIBLE * (1.0 if value_range is None else value_range[1] - value_range[0])
    for k, most in enumerate((8, MANY, MANY, MANY)):  # more, where it does something to few images only
        rows = max(8, min(most, PIXELS // math.prod(shape)))
        parameters = _some_firing(operation, operation.draw((rows, *shape), generator(4, k)))
        if all(bool((t == t[:1]).all()) for t in parameters.values()):
            continue
        y = operation.apply(image.expand(rows, *shape).contiguous(), parameters)
        if bool((y - y[:1]).abs().amax() > visible):
            return True
    return False


def _scaled(x: Tensor, value_range: Range | None) -> Tensor:
    """Values in [0, 1] brought to the range; to [-2, 2] where there is none."""
    low, high = (-2.0, 2.0) if value_range is None else value_range
    return x * (high - low) + low


def _some_firing(operation: Operation, parameters: Parameters) -> Parameters:
    """The same draws, every other gate open, unless all are open or closed."""
    if not isinstance(operation, WrappedOperation) or operation.always or operation.never:
        return parameters
    return {k: torch.arange(len(t)).to(t) % 2 if k.endswith(GATE) else t for k, t in parameters.items()}


def _range_traits(
    operation: Operation, shape: tuple[int, ...], parameters: Parameters, value_range: Range
) -> tuple[bool, bool]:
    """(leaves_range, clamps). Geometry interpolates: it neither leaves the range much nor cares."""
    if isinstance(operation, KorniaOperation) and isinstance(operation.op, GeometricAugmentationBase2D):
        return False, False

    def outside(x: Tensor) -> float:
        """Share of the values that come out outside the range, of values given as shares of it."""
        y = operation.apply(_scaled(x, value_range), parameters)
        low, high = value_range
        slack = SLACK * (high - low)
        return float(((y < low - slack) | (y > high + slack)).float().mean())

    noise = torch.rand(ROWS, *shape, generator=generator(5))
    full = torch.ones_like(noise)
    leaves = any(outside(x) > 0.05 for x in (0.0 * full, 0.5 * full, full, noise, noise.round()))
    if isinstance(operation, KorniaOperation) and isinstance(operation.op, Denormalize):
        return leaves, False  # brings values outside back by its nature, and loses none
    try:
        clamps = any(outside(v * full) < 0.05 for v in (1.7, -0.6))
    except ERRORS:
        clamps = True
    return leaves, clamps


def _rows_of(parameters: Mapping[str, Any], b: int) -> bool:
    return all(isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == b for t in parameters.values())


def _sizes(parameters: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{k} {list(t.shape) if isinstance(t, Tensor) else type(t).__name__}" for k, t in parameters.items()
    )
