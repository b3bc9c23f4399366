"""A stage holds the operations of one group or of `then`, in order, for the query and, if they differ, for the keys."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from kornia.augmentation import Denormalize, Normalize, RandomResizedCrop
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon.augment.crop import is_crop
from ssd_addon.augment.samples import Samples
from ssd_addon.operations.choice import wrapped
from ssd_addon.operations.draws import Parameters, Refused, Seed, Watch, generator, pick
from ssd_addon.operations.trial import (
    ERRORS,
    SHAPES,
    Traits,
    draws_beside,
    draws_late,
    from_outside,
    no_batch,
    same,
    tried,
)
from ssd_addon.operations.wrap import GATE, KorniaOperation, WrappedOperation

THEN = "then"
EXONERATIONS = 3


class Step:
    """One operation at its place in a stage, such as "0.ColorJitter".

    Attributes:
        key: the name of its parameters.
        place: its index in the stage.
        operation: the wrapped operation.
        traits: result of the trial; None until images come that suit the operation.
        watched, draws_watched: how many more times a use of a global generator while applying or drawing is followed up
            by repeating the call. An unchanged result means that another thread drew.
    """

    def __init__(self, stage: str, place: int, operation: Any, where: str, samples: Samples) -> None:
        name, self.operation = wrapped(operation, where)
        self.samples = samples
        self.stage, self.place, self.key = stage, place, f"{place}.{name}"
        self.shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        shapes = SHAPES if samples.ndim == 3 else ()
        self.traits: Traits | None = tried(f"{where}: {self.key}", self.operation, shapes, samples.value_range)
        self.watched = EXONERATIONS
        self.draws_watched = 0 if _known_to_draw_rightly(self.operation) else EXONERATIONS

    @property
    def module(self) -> nn.Module | None:
        """The wrapped library's module, or the operation itself if it is a module."""
        if isinstance(self.operation, WrappedOperation):
            op: nn.Module = self.operation.op
            return op
        return self.operation if isinstance(self.operation, nn.Module) else None

    def draw(self, shape: tuple[int, ...], seed: Seed) -> Parameters:
        if self.traits is None:
            where = f"{self.stage}: {self.key}"
            self.traits = tried(where, self.operation, [shape[1:]], self.samples.value_range)
        try:
            return self._drawn(shape, seed)
        except Refused as error:
            raise ValueError(f"{self.stage}: {self.key} {error}") from error
        except ERRORS as error:
            if from_outside(error):
                raise
            raise ValueError(
                f"{self.stage}: {self.key} could not be drawn for images {list(shape)}: {error}"
            ) from error

    def _drawn(self, shape: tuple[int, ...], seed: Seed) -> Parameters:
        if self.draws_watched == 0:
            return self.operation.draw(shape, generator(*seed))
        watch = Watch(torch.device("cpu"))
        drawn = self.operation.draw(shape, generator(*seed))
        if moved := watch.moved():
            if not same(drawn, self.operation.draw(shape, generator(*seed))):
                watch.restore()
                raise Refused(draws_beside(moved))
            self.draws_watched -= 1
        return drawn

    def shape_after(self, shape: tuple[int, ...], parameters: Parameters) -> tuple[int, ...]:
        """The output shape for images of shape [B, ...]; found by applying the operation once to an empty image."""
        if shape[1:] not in self.shapes:
            one = {k: torch.ones_like(t[:1]) if k == GATE else t[:1] for k, t in parameters.items()}
            self.shapes[shape[1:]] = tuple(self.apply(torch.zeros(1, *shape[1:]), one).shape[1:])
        return (shape[0], *self.shapes[shape[1:]])

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        for k, t in parameters.items():
            if len(t) != len(x):
                raise ValueError(
                    f"{self.stage}: {self.key}: expected parameters for {len(x)} images: got {len(t)} for {k!r}"
                )
        watch = Watch(x.device) if self.watched else None
        y = self._applied(x, parameters)
        if watch is not None and (moved := watch.moved()):
            if not torch.equal(y, self._applied(x, parameters)):
                watch.restore()
                raise ValueError(f"{self.stage}: {self.key} {draws_late(moved)}")
            self.watched -= 1  # another thread drew, such as a prefetcher or a logger
        return y

    def _applied(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        try:
            y = self.operation.apply(x, parameters)
        except ERRORS as error:
            if from_outside(error):
                raise
            rgb = isinstance(self.operation, WrappedOperation) and x.ndim == 4 and x.shape[1] != 3
            hint = f" (most operations need 3 channels, RGB: the images have {x.shape[1]})" if rgb else ""
            raise ValueError(
                f"{self.stage}: {self.key} could not be applied to images {_checks.shape(x)}{hint}: {error}"
            ) from error
        if wrong := no_batch(y, len(x)):
            raise ValueError(f"{self.stage}: {self.key} {wrong}")
        return y.float()


def _known_to_draw_rightly(operation: Any) -> bool:
    """Whether the class is Kornia's or this library's, which draw from the given generator, as the trial verified."""
    inside = operation.op if isinstance(operation, KorniaOperation) else operation
    return type(inside).__module__.startswith(("kornia.", "ssd_addon.operations."))


class Stage:
    """The operations of a group.

    Args:
        name: name of the group, or "then".
        query: operations for the query and for every key that shares the group.
        key: operations for the keys that do not share the group; None uses the query's.
    """

    def __init__(
        self, name: str, query: Sequence[Any], key: Sequence[Any] | None, samples: Samples | None = None
    ) -> None:
        self.name, samples = name, samples or Samples()
        here, there = ("then", "key_then") if name == THEN else (f"group {name!r}", f"key_groups[{name!r}]")
        self.query = _steps(name, query, here, samples)
        self.key = None if key is None else _steps(name, key, there, samples)
        self.check_varies()

    def check_varies(self) -> None:
        """Refuse a group that changes no pixel between draws, once all its operations have been tried."""
        if self.name != THEN and self.query and all(s.traits is not None and not s.traits.varies for s in self.query):
            operations = _checks.names(s.key for s in self.query)
            raise ValueError(
                f"group {self.name!r}: expected an operation that draws something for every image: got {operations}, "
                "which do the same to all views, or nothing, so there is no style to keep; put operations that always "
                "do the same into `then`"
            )

    def steps(self, from_key: bool) -> list[Step]:
        return self.key if from_key and self.key is not None else self.query

    @property
    def crops(self) -> bool:
        """Do the query's operations contain a crop?"""
        return any(is_crop(s.module) for s in self.query)

    @property
    def resizes_a_crop(self) -> bool:
        return any(isinstance(s.module, RandomResizedCrop) for s in self.query)

    def modules(self) -> list[nn.Module]:
        return [s.module for s in (*self.query, *(self.key or ())) if s.module is not None]

    def apply(self, x: Tensor, parameters: Mapping[str, Parameters], from_key: Tensor | None) -> Tensor:
        """Apply the stage; the samples in the mask `from_key` [B] run the key's operations."""
        if from_key is None or self.key is None or not bool(from_key.any()):
            return self._run(self.query, x, parameters)
        if bool(from_key.all()):
            return self._run(self.key, x, parameters)
        parts = []
        for steps, rows in ((self.query, torch.nonzero(~from_key)), (self.key, torch.nonzero(from_key))):
            some = rows.flatten().to(x.device)
            drawn = {key: pick(p, rows.flatten()) for key, p in parameters.items()}
            parts.append((some, self._run(steps, x[some], drawn)))
        (i, a), (j, c) = parts
        if a.shape[1:] != c.shape[1:]:
            raise ValueError(
                f"{self.name}: expected query and key of one size: got {_checks.shape(a)}, {_checks.shape(c)}"
            )
        out = a.new_empty((x.shape[0], *a.shape[1:]))
        out[i], out[j] = a, c
        return out

    def _run(self, steps: Sequence[Step], x: Tensor, parameters: Mapping[str, Parameters]) -> Tensor:
        for step in steps:
            if step.key not in parameters:
                raise ValueError(
                    f"parameters: expected those of {step.key} for {self.name}: got {_checks.names(parameters)}"
                )
            x = step.apply(x, parameters[step.key])
        return x


def _steps(name: str, operations: Sequence[Any], where: str, samples: Samples) -> list[Step]:
    if isinstance(operations, nn.Module) or not isinstance(operations, Sequence):
        made = isinstance(operations, nn.Sequential | nn.ModuleList)
        hint = "; use list(...) of it" if made else f"; use [{type(operations).__name__}(...)]"
        raise TypeError(f"{where}: expected a sequence of operations: got {type(operations).__name__}{hint}")
    if not operations and name != THEN:
        raise ValueError(f"{where}: expected at least one operation: got none, so there is no style to keep")
    return [Step(name, i, op, where, samples) for i, op in enumerate(operations)]


def check_order(stages: Sequence[Stage]) -> None:
    """Refuse an operation that clamps to [0, 1] after one that takes pixels out of that range, such as Normalize."""
    outside: tuple[str, Step] | None = None
    for stage in stages:
        found = outside
        for from_key in (False, True):
            before = outside
            for step in stage.steps(from_key):
                if step.traits is None:
                    continue
                if before and step.traits.clamps:
                    raise ValueError(
                        f"{stage.name}: {step.key} expects {_pixels(step)} and clamps values outside: got it after "
                        f"{before[0]}, which takes them out of that range; put that operation last, into `then`"
                    )
                if before and _undoes(step, before[1]):
                    before = None
                elif step.traits.leaves_range:
                    before = (f"{stage.name}: {step.key}", step)
            found = before or found
        outside = found


def _pixels(step: Step) -> str:
    low, high = step.samples.value_range or (0.0, 1.0)
    return f"pixels in [{low:g}, {high:g}]" if step.samples.ndim == 3 else f"values in [{low:g}, {high:g}]"


def _undoes(step: Step, earlier: Step) -> bool:
    a, b = earlier.module, step.module
    if not isinstance(a, Normalize) or not isinstance(b, Denormalize):
        return False
    return all(torch.equal(torch.as_tensor(a.flags[k]), torch.as_tensor(b.flags[k])) for k in ("mean", "std"))
