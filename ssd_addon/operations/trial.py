"""A trial of every operation when views are built: can its draws be shared exactly, and how does it change pixels?

Each operation is drawn and applied a few times on small images. One that cannot be shared exactly is refused by name
before any training: its parameters change size from draw to draw, its result depends on other images of the batch, or
it uses randomness that its parameters do not record. Whether an operation varies between images is measured on pixels.
An operation that no trial image fits (a crop larger than all of them, an unusual number of channels) is tried on the
first images that it is given.
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
"""Largest number of images, and of values in them, used to decide whether an operation varies any pixel."""
VISIBLE = 1e-4
"""A pixel difference larger than the rounding error of an interpolation."""
_CHECKS: Any = getattr(importlib.import_module("kornia.core"), "exceptions", None)  # since Kornia 0.8
ERRORS: tuple[type[Exception], ...] = (
    RuntimeError, TypeError, ValueError, AssertionError, IndexError, KeyError, NotImplementedError,
    StopIteration,
    *([_CHECKS.BaseError] if hasattr(_CHECKS, "BaseError") else []),
)  # fmt: skip
"""What operations raise for images that they do not support."""


def from_outside(error: Exception) -> bool:
    """Whether an error has nothing to do with the operation that was running: out of memory, or a data-loader worker
    that died, whose signal raises wherever the main process happens to be."""
    return isinstance(error, torch.OutOfMemoryError) or str(error).startswith("DataLoader worker")


class ChangesSize(Refused):
    """Raised when an operation changes the image size only where it fires, on images of the trial's size."""


@dataclass(frozen=True)
class Traits:
    """The result of a trial.

    Attributes:
        varies: two draws give different pixels for the same image.
        leaves_range: it maps pixels in [0, 1] to values outside.
        clamps: it clamps values outside [0, 1], or does not accept them.
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
    """The traits of an operation, or None if no trial sample suits it. Global generators are left as they were.

    Args:
        where: group and name, for messages.
        shapes: shapes of the trial samples, tried in this order.
        value_range: (lowest, highest) value of the samples; None for any values, of magnitude about 1.

    Raises:
        Refused: the operation cannot be shared exactly; the message says why.
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
                    size = size or error  # a crop keeps the size of images that are as large as its output
                    continue
                except Refused as error:
                    raise Refused(f"{where} {error}") from None
                except ERRORS:
                    continue
                if traits.varies:
                    return traits
                found = found or traits  # a 32-pixel crop leaves a 32-pixel image unchanged: try another size
        if size is not None:
            raise Refused(f"{where} {size}")
        return found
    finally:
        watch.restore()


def own_size(operation: Operation) -> list[tuple[int, ...]]:
    """Image shapes [C, H, W] of a Kornia operation's output size, if it has one."""
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
            raise Refused(
                "gives an image a result that depends on the other images of the batch; views cannot share it"
            )
        operation.one_by_one = True  # its parameters refer to places in the batch; image by image there is only one
        return _examined(operation, shape, value_range)
    varies = _varies(operation, shape, value_range)
    return (
        Traits(varies) if value_range is None else Traits(varies, *_range_traits(operation, shape, fired, value_range))
    )


def _sharable_draws(operation: Operation, shape: tuple[int, ...]) -> list[Parameters]:
    """Draws for `ROWS` images; the first dimension of every parameter is the image."""
    drawn = [_drawn(operation, (ROWS, *shape), 1, k) for k in range(8)]
    other = _drawn(operation, (ROWS + 2, *shape), 2)
    if not _rows_of(drawn[0], ROWS) or not _rows_of(other, ROWS + 2):
        if not isinstance(operation, KorniaOperation) or operation.one_by_one:
            raise Refused(
                f"draws parameters that are not one per image: expected tensors [B, ...]: got {_sizes(drawn[0])} for "
                f"{ROWS} images"
            )
        operation.one_by_one = True
        return _sharable_draws(operation, shape)
    for d in (*drawn, other):
        if {k: t.shape[1:] for k, t in d.items()} != {k: t.shape[1:] for k, t in drawn[0].items()}:
            raise Refused(
                "draws parameters of another size every time, so views cannot share them: got "
                f"{_sizes(drawn[0])} and {_sizes(d)}"
            )
    return drawn


def _drawn(operation: Operation, shape: tuple[int, ...], *seed: int) -> Parameters:
    """The draws for a seed; refuses an operation whose draws differ the second time or use another generator."""
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
            return not isinstance(a[k], Tensor) and not isinstance(b[k], Tensor)  # reported by `no_batch` or `_drawn`
        if a[k].shape != b[k].shape or not torch.allclose(a[k], b[k], rtol=0, atol=0, equal_nan=True):
            return False
    return True


def _settled(operation: Operation, x: Tensor, parameters: Parameters) -> Tensor:
    """The result for these images; refuses an operation that gives another result the second or third time."""
    watch = Watch(x.device)
    given = [x.clone() for _ in range(3)]
    results = [operation.apply(each, parameters) for each in given]
    if moved := watch.moved():
        raise Refused(draws_late(moved))
    if not all(torch.equal(each, x) for each in given):
        raise Refused("changes its input in place; expected a new tensor, as other views start from the same images")
    if wrong := no_batch(results[0], len(x)):
        raise Refused(wrong)
    if not all(torch.equal(results[0], y) for y in results[1:]):
        raise Refused(draws_late("its own"))
    return results[0]


def no_batch(y: Any, b: int) -> str:
    """What is wrong with a result for B images; "" if it is a floating-point batch of B."""
    if not isinstance(y, Tensor):
        return f"returns no images: expected a tensor of {b} images: got {type(y).__name__}"
    if y.ndim == 0 or len(y) != b:
        return f"returns {_checks.shape(y)} for {b} images; expected one result per image"
    if not y.is_floating_point():
        return f"returns integer images: expected floating point, like its input: got {y.dtype}"
    return ""


def draws_late(whose: str) -> str:
    return (
        f"draws random numbers while it is applied that are not in its parameters (from {whose} generator), so views "
        "cannot share them; leave it out, or use another operation"
    )


def draws_beside(whose: str) -> str:
    return (
        f"draws its parameters from {whose} generator instead of the one passed to `draw`, so the same seed gives "
        "different views every time; expected every random number to come from the generator passed to `draw`"
    )


def _by_rows(operation: Operation, x: Tensor, parameters: Parameters, y: Tensor) -> bool:
    """Is the result for an image independent of the other images of the batch?"""
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
    for k, most in enumerate((8, MANY, MANY, MANY)):  # more draws, for an operation that changes few images
        rows = max(8, min(most, PIXELS // math.prod(shape)))
        parameters = _some_firing(operation, operation.draw((rows, *shape), generator(4, k)))
        if all(bool((t == t[:1]).all()) for t in parameters.values()):
            continue
        y = operation.apply(image.expand(rows, *shape).contiguous(), parameters)
        if bool((y - y[:1]).abs().amax() > visible):
            return True
    return False


def _scaled(x: Tensor, value_range: Range | None) -> Tensor:
    """Values in [0, 1] rescaled to the range, or to [-2, 2] if there is none."""
    low, high = (-2.0, 2.0) if value_range is None else value_range
    return x * (high - low) + low


def _some_firing(operation: Operation, parameters: Parameters) -> Parameters:
    """The same draws with every other gate open, for an operation that neither always nor never fires."""
    if not isinstance(operation, WrappedOperation) or operation.always or operation.never:
        return parameters
    return {k: torch.arange(len(t)).to(t) % 2 if k.endswith(GATE) else t for k, t in parameters.items()}


def _range_traits(
    operation: Operation, shape: tuple[int, ...], parameters: Parameters, value_range: Range
) -> tuple[bool, bool]:
    """(leaves_range, clamps); both false for geometric operations, which only interpolate."""
    if isinstance(operation, KorniaOperation) and isinstance(operation.op, GeometricAugmentationBase2D):
        return False, False

    def outside(x: Tensor) -> float:
        """The share of output values outside the range, for inputs that are given as fractions of it."""
        y = operation.apply(_scaled(x, value_range), parameters)
        low, high = value_range
        slack = SLACK * (high - low)
        return float(((y < low - slack) | (y > high + slack)).float().mean())

    noise = torch.rand(ROWS, *shape, generator=generator(5))
    full = torch.ones_like(noise)
    leaves = any(outside(x) > 0.05 for x in (0.0 * full, 0.5 * full, full, noise, noise.round()))
    if isinstance(operation, KorniaOperation) and isinstance(operation.op, Denormalize):
        return leaves, False  # it maps values outside the range back into it without loss
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
