"""A trial of every operation, when views are built: can its draws be shared exactly, and what does it do to pixels?

It is drawn and applied a few times on small images. What cannot be shared exactly is refused by name, before any
training: parameters whose size changes from draw to draw, rows that depend on other images of the batch, randomness
while it is applied. An operation that no trial image fits (a crop larger than all of them, an unusual number of
channels) is tried on the first images that come.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kornia.augmentation import Denormalize, GeometricAugmentationBase2D
from torch import Tensor

from ssd_addon.operations.draws import Parameters, Watch, generator, pick
from ssd_addon.operations.wrap import GATE, KorniaOperation, Operation, changes_size

SHAPES = ((3, 32, 32), (3, 256, 256), (1, 32, 32), (4, 32, 32))
"""Sizes of trial images, [C, H, W], in this order."""
SLACK = 1e-5
"""How far outside [0, 1] rounding may take a pixel."""
ROWS = 3
UNSHARED = ("forward_input_shape", "input_size", "output_size", "padding_size")
"""What Kornia adds to the parameters that is not drawn."""
ERRORS = (RuntimeError, TypeError, ValueError, AssertionError, IndexError, KeyError, NotImplementedError)
"""What operations raise where images do not suit them."""


class Refused(ValueError):
    """An operation that views cannot share exactly."""


@dataclass(frozen=True)
class Traits:
    """What a trial found.

    Attributes:
        varies: anything it draws differs from image to image.
        leaves_range: it takes pixels of [0, 1] to values outside.
        clamps: it forces values outside [0, 1] back, or cannot take them.
        restores_range: it undoes a Normalize.
    """

    varies: bool
    leaves_range: bool = False
    clamps: bool = False
    restores_range: bool = False


def tried(where: str, operation: Operation, shapes: Iterable[tuple[int, ...]] = SHAPES) -> Traits | None:
    """The traits of an operation, or None where no trial image suits it. Global generators are left as they were.

    Raises:
        Refused: it cannot be shared exactly; says why.
    """
    watch = Watch(torch.device("cpu"))
    try:
        for shape in shapes:
            try:
                return _examined(operation, shape)
            except Refused as error:
                raise Refused(f"{where} {error}") from None
            except ERRORS:
                continue
        return None
    finally:
        watch.restore()


def _examined(operation: Operation, shape: tuple[int, ...]) -> Traits:
    drawn = _sharable_draws(operation, shape)
    x = torch.rand(ROWS, *shape, generator=generator(0))
    fired = _firing(drawn[0])
    y = _settled(operation, x, fired)
    if isinstance(operation, KorniaOperation) and y.shape[1:] != x.shape[1:] and not operation.always:
        raise Refused(changes_size(x, y))
    if not _by_rows(operation, x, fired, y):
        if not isinstance(operation, KorniaOperation) or operation.one_by_one:
            raise Refused("gives an image another result when other images are beside it, so no view can be shared")
        operation.one_by_one = True  # its parameters name places in the batch: image by image there is one place
        return _examined(operation, shape)
    return Traits(_varies(operation, drawn), *_range_traits(operation, shape, fired))


def _sharable_draws(operation: Operation, shape: tuple[int, ...]) -> list[Parameters]:
    """Draws of `ROWS` images, every value a row of an image."""
    drawn = [operation.draw((ROWS, *shape), generator(1, k)) for k in range(8)]
    other = operation.draw((ROWS + 2, *shape), generator(2))
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


def _settled(operation: Operation, x: Tensor, parameters: Parameters) -> Tensor:
    """What it makes of the images, three times the same."""
    watch = Watch(x.device)
    given = [x.clone() for _ in range(3)]
    results = [operation.apply(each, parameters) for each in given]
    if moved := watch.moved():
        raise Refused(draws_late(moved))
    if not all(torch.equal(each, x) for each in given):
        raise Refused("changes the images that it is given; expected a new tensor, as other views start from the same")
    if not all(torch.equal(results[0], y) for y in results[1:]):
        raise Refused(draws_late("its own"))
    if len(results[0]) != len(x):
        raise Refused(f"makes {len(results[0])} images of {len(x)}; expected one for each")
    return results[0]


def draws_late(whose: str) -> str:
    return (
        f"draws random numbers while it is applied, beside its parameters (from {whose} generator), so no two views "
        "can share them; leave it out, or put another operation in its place"
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
    return {k: torch.ones_like(t) if k == GATE else t for k, t in parameters.items()}


def _varies(operation: Operation, drawn: Sequence[Parameters]) -> bool:
    if isinstance(operation, KorniaOperation):
        if operation.never:
            return False
        if not operation.always:
            return True
    every = {k: torch.cat([d[k] for d in drawn]) for k in drawn[0] if k not in (*UNSHARED, GATE)}
    return any(bool((t != t[:1]).any()) for t in every.values())


def _range_traits(operation: Operation, shape: tuple[int, ...], parameters: Parameters) -> tuple[bool, bool, bool]:
    """(leaves_range, clamps, restores_range). Geometry interpolates: it neither leaves the range much nor cares."""
    op: Any = operation.op if isinstance(operation, KorniaOperation) else None
    if isinstance(op, GeometricAugmentationBase2D | Denormalize):
        return False, False, isinstance(op, Denormalize)

    def outside(value: float) -> float:
        """Share of the pixels outside [0, 1] that a constant image comes out with."""
        y = operation.apply(torch.full((ROWS, *shape), value), parameters)
        return float(((y < -SLACK) | (y > 1 + SLACK)).float().mean())

    leaves = any(outside(v) > 0.05 for v in (0.0, 0.5, 1.0))
    try:
        clamps = any(outside(v) < 0.05 for v in (1.7, -0.6))
    except ERRORS:
        clamps = True
    return leaves, clamps, False


def _rows_of(parameters: Mapping[str, Any], b: int) -> bool:
    return all(isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == b for t in parameters.values())


def _sizes(parameters: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{k} {list(t.shape) if isinstance(t, Tensor) else type(t).__name__}" for k, t in parameters.items()
    )
