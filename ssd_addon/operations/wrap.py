"""Operations draw parameters first and apply them second, so that views can share and replay them.

An operation is two functions; sharing, replay, per-image draws, interleaving and cross-image keys build on them:

    draw(shape [B, ...], generator) -> {name: Tensor [B, ...]}
    apply(x [B, ...], parameters)   -> Tensor [B, ...]

Kornia's 2-D operations are wrapped automatically.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from kornia.augmentation import AugmentationBase2D, ColorJiggle, ColorJitter
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon.operations.draws import Parameters, clone, in_place_of_the_global, pick

GATE = "batch_prob"
"""Kornia's name for the gate: whether the operation fires on each image."""


@runtime_checkable
class Operation(Protocol):
    """Anything that augments a batch: draw parameters first, then apply them.

    `draw` takes the shape of the batch [B, ...] and a CPU generator, and returns tensors [B, ...], always with the same
    names and trailing shapes. `apply` returns a batch of B samples; sample i depends only on sample i and its
    parameters. It draws nothing: the same input gives the same output.
    """

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]: ...

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor: ...


class WrappedOperation:
    """Base class of the wrappers around another library's operations.

    Attributes:
        op: the wrapped operation.
        name: name of its class.
        one_by_one: whether it is drawn and applied image by image.
    """

    op: Any
    name: str
    one_by_one: bool = False

    @property
    def always(self) -> bool:
        """Does it fire on every image?"""
        raise NotImplementedError

    @property
    def never(self) -> bool:
        """Does it fire on no image?"""
        raise NotImplementedError


class KorniaOperation(WrappedOperation):
    """A copy of one of Kornia's 2-D operations.

    Every draw is per image: the order of ColorJitter and ColorJiggle, and gates that Kornia draws for a whole batch,
    are drawn for each image. An operation that draws anything else for the batch, or whose parameters refer to places
    in the batch, is drawn and applied image by image (`one_by_one`). Images on which it does not fire stay bitwise
    unchanged.

    Raises:
        TypeError: not a Kornia 2-D operation on single images.
        ValueError: same_on_batch=True, or a gate that is drawn for the whole batch.
    """

    def __init__(self, op: nn.Module, where: str) -> None:
        name = type(op).__name__
        if not isinstance(op, AugmentationBase2D):
            raise TypeError(f"{where}: expected a 2-D operation of kornia.augmentation on single images: got {name}")
        self.name = name
        self.op: Any = _copied(op)
        self.one_by_one = False
        self.reorders = isinstance(op, ColorJitter | ColorJiggle)
        self.fixed_order: tuple[int, ...] | None = getattr(op, "_fixed_order", None) if self.reorders else None
        if op.same_on_batch and (self.random or not self.always):
            if "same_on_batch" in inspect.signature(type(op)).parameters:
                problem = "(same_on_batch=True) uses one draw for all images; expected a draw per image"
            else:  # Normalize, CenterCrop and Resize set it themselves: they draw only the gate
                problem = (
                    f"(p={min(op.p, op.p_batch)}) fires on all images of a batch or on none; expected p=1, as draws "
                    "are per image"
                )
            raise ValueError(f"{where}: {name}{problem}")

    @property
    def random(self) -> bool:
        """Does it draw anything but its gate?"""
        state = torch.default_generator.get_state()
        try:
            self.op.generate_parameters(torch.Size((2, 3, 64, 64)))
            return not torch.equal(state, torch.default_generator.get_state())
        except Exception:  # it needs another image size, which it checks before it draws
            return True
        finally:
            torch.default_generator.set_state(state)

    @property
    def always(self) -> bool:
        """Does it fire on every image?"""
        return bool(self.op.p == 1 and self.op.p_batch == 1)

    @property
    def never(self) -> bool:
        """Does it fire on no image?"""
        return bool(self.op.p == 0 or self.op.p_batch == 0)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Parameters:
        """Parameters for a batch of shape [B, ...], drawn for each image."""
        b = shape[0]
        with in_place_of_the_global(generator):
            if not self.one_by_one:
                out = _rows(self.op.forward_parameters(torch.Size(shape)))
            else:
                each = [_rows(self.op.forward_parameters(torch.Size((1, *shape[1:])))) for _ in range(b)]
                out = {k: torch.cat([e[k] for e in each]) for k in each[0]}
            if self.reorders:
                if self.fixed_order is None:
                    out["order"] = torch.rand(b, 4).argsort(dim=1)
                else:
                    out["order"] = torch.tensor(self.fixed_order).expand(b, -1).clone()
            if 0 < self.op.p_batch < 1:  # replace the gate for the whole batch by one per image
                out[GATE] = (torch.rand(b) < self.op.p * self.op.p_batch).to(out[GATE].dtype)
        return out

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Apply the operation to the images on which it fires; the others stay as they are."""
        b = x.shape[0]
        fires = parameters[GATE] > 0.5
        if not bool(fires.any()):
            return x
        everywhere = bool(fires.all())
        rows = torch.nonzero(fires.cpu()).flatten()
        if self.reorders and self.fixed_order is None:
            return self._in_order(x, parameters, rows)
        if everywhere and not self.one_by_one:
            return self._call(x, parameters)
        out: Tensor | None = None
        for some in rows.split(1) if self.one_by_one else [rows]:
            y = self._call(x[some.to(x.device)], pick(parameters, some))
            if out is None:
                if y.shape[1:] == x.shape[1:]:
                    out = x.clone()
                elif everywhere:
                    out = y.new_empty((b, *y.shape[1:]))
                else:
                    raise ValueError(f"it {changes_size(x, y)}")
            out[some.to(x.device)] = y
        assert out is not None
        return out

    def _in_order(self, x: Tensor, parameters: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """ColorJitter and ColorJiggle: each image has its own order of the sub-operations.

        Step t runs each sub-operation on the images that have it at place t: 16 calls on a quarter of the images each,
        instead of 24 calls, one per order.
        """
        out = x.clone()
        orders = parameters["order"].cpu()[rows]
        for step in orders.unbind(1):
            for sub in step.unique().tolist():
                some = rows[step == sub]
                picked = pick(parameters, some)
                picked["order"] = torch.tensor([[sub]])
                there = some.to(x.device)
                out[there] = self._call(out[there], picked)
        return out

    def _call(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        given: dict[str, Any] = clone(parameters)
        if "order" in given:
            given["order"] = given["order"][0]
        given["forward_input_shape"] = torch.tensor(x.shape)
        try:
            y: Tensor = self.op(x, params=given)
        finally:
            self.op._params = {}  # otherwise Kornia keeps the batch's parameters in memory
        return y


def changes_size(x: Tensor, y: Tensor) -> str:
    return (
        f"returns {_checks.shape(y[:1])} for {_checks.shape(x[:1])} where it fires and leaves the other images as they "
        "are; an operation that changes the size needs p=1"
    )


def _copied(op: AugmentationBase2D) -> AugmentationBase2D:
    op = copy.deepcopy(op)
    op.set_rng_device_and_dtype(torch.device("cpu"), torch.float32)
    for part in op.modules():  # keep Kornia's constants out of the state_dict of a surrounding module
        part._non_persistent_buffers_set.update(part._buffers)
    return op


def _rows(parameters: Mapping[str, Any]) -> Parameters:
    """Copies of the parameters that hold one value per image."""
    return {k: torch.as_tensor(t).clone() for k, t in parameters.items() if k not in ("forward_input_shape", "order")}
