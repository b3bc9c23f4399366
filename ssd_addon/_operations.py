"""Applying: Kornia operations made ready for structured views, and run with parameters that were drawn before.

A stage is one group's operations, nn.ModuleDict "0_ColorJitter" -> operation; its parameters go by "0.ColorJitter".
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from kornia.augmentation import AugmentationBase2D
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon._draws import GATE, Parameters, clone, has_order

PREFIX = "_"  # nn.ModuleDict refuses names of its own attributes ("type", "keys") and dots


def prefixed(stages: dict[str, nn.ModuleDict]) -> dict[str, nn.Module]:
    for name in stages:
        if "." in name:
            raise ValueError(f"a group's name is a word without dots: got {name!r}")
    return {PREFIX + name: stage for name, stage in stages.items()}


def unprefixed(name: str) -> str:
    """ "0_ColorJitter" -> "0.ColorJitter"."""
    return name.replace("_", ".", 1)


def stage_of(operations: Sequence[nn.Module], where: str, *, empty: bool = False) -> nn.ModuleDict:
    if isinstance(operations, nn.Module) or not isinstance(operations, Sequence):
        raise TypeError(f"{where}: expected a sequence of Kornia operations: got {type(operations).__name__}")
    if not operations and not empty:
        raise ValueError(f"{where}: expected at least one operation: got none, so there is no style to keep")
    out = nn.ModuleDict()
    for i, op in enumerate(operations):
        name = type(op).__name__
        if not isinstance(op, AugmentationBase2D):
            raise TypeError(
                f"{where}: expected Kornia 2-D operations on single images (kornia.augmentation, no container, no "
                f"mixing of images): got {name}"
            )
        if op.same_on_batch and _draws(op):  # Normalize, CenterCrop and Resize set it too, and draw nothing
            raise ValueError(f"{where}: {name}(same_on_batch=True) gives all images one draw; every draw is per image")
        op = copy.deepcopy(op)
        op.set_rng_device_and_dtype(torch.device("cpu"), torch.float32)
        for part in op.modules():  # Kornia's constants: no checkpoint of a surrounding module holds them
            part._non_persistent_buffers_set.update(part._buffers)
        if has_order(op):
            op.__dict__["_ssd_batch_wide"] = True
        out[f"{i}_{name}"] = op
    return out


def _draws(op: Any) -> bool:
    """Does it take random numbers at all?"""
    state = torch.default_generator.get_state()
    try:
        op.forward_parameters(torch.Size((2, 3, 64, 64)))
        return not torch.equal(state, torch.default_generator.get_state())
    finally:
        torch.default_generator.set_state(state)


def run(stage: str, operations: nn.ModuleDict, x: Tensor, parameters: dict[str, Parameters]) -> Tensor:
    for name, op in operations.items():
        key = unprefixed(name)
        if key not in parameters:
            raise ValueError(f"parameters: {stage} needs those of {key}: got {_checks.names(parameters)}")
        x = apply_operation(stage, key, op, x, parameters[key])
    return x


def apply_operation(stage: str, key: str, op: Any, x: Tensor, parameters: Parameters) -> Tensor:
    """Run an operation on the images it fires on; the others stay as they are, bit for bit."""
    b = x.shape[0]
    if parameters[GATE].shape[0] != b:
        raise ValueError(f"{stage}: {key}: expected parameters of {b} images: got {parameters[GATE].shape[0]}")
    fires = parameters[GATE] > 0.5
    if not bool(fires.any()):
        return x
    everywhere = bool(fires.all())
    rows = torch.arange(b) if everywhere else torch.nonzero(fires.cpu()).flatten()
    if has_order(op) and getattr(op, "_fixed_order", None) is None:
        return _in_order(stage, key, op, x, parameters, rows)
    out: Tensor | None = None
    for some in _batches(op, rows):
        whole = everywhere and len(some) == b
        picked = parameters if whole else {k: t[some.to(t.device)] for k, t in parameters.items()}
        y = _call(stage, key, op, x if whole else x[some.to(x.device)], picked)
        if whole:
            return y
        if out is None:
            if y.shape[1:] == x.shape[1:]:
                out = x.clone()
            elif everywhere:
                out = y.new_empty((b, *y.shape[1:]))
            else:
                raise ValueError(
                    f"{stage}: {key} makes {_checks.shape(x[:1])} into {_checks.shape(y[:1])} where it fires and "
                    "leaves the other images as they are; an operation that changes the size needs p=1"
                )
        out[some.to(x.device)] = y
    assert out is not None
    return out


def _in_order(stage: str, key: str, op: Any, x: Tensor, parameters: Parameters, rows: Tensor) -> Tensor:
    """ColorJitter and ColorJiggle: each image has an order of its own for the sub-operations.

    Step t runs each sub-operation on the images that have it at place t: 16 calls on a quarter of the images each,
    where one call per order would be 24.
    """
    out = x.clone()
    orders = parameters["order"].cpu()[rows]
    for step in orders.unbind(1):
        for sub in step.unique().tolist():
            some = rows[step == sub]
            picked = {k: t[some.to(t.device)] for k, t in parameters.items()}
            picked["order"] = torch.tensor([[sub]])
            some = some.to(x.device)
            out[some] = _call(stage, key, op, out[some], picked)
    return out


def _batches(op: Any, rows: Tensor) -> list[Tensor]:
    """Rows that one call may serve: all, or one at a time where the operation draws for whole batches."""
    if op.__dict__.get("_ssd_batch_wide", False) and not has_order(op):
        return list(rows.split(1))
    return [rows]


def _call(stage: str, key: str, op: Any, x: Tensor, parameters: Parameters) -> Tensor:
    given: dict[str, Any] = clone(parameters)
    if "order" in given:
        given["order"] = given["order"][0]
    given["forward_input_shape"] = torch.tensor(x.shape)
    audited = op.__dict__.get("_ssd_audited", False)
    state = None if audited else torch.default_generator.get_state()
    try:
        y = op(x, params=given)
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError, KeyError) as error:
        hint = "" if x.shape[1] == 3 else f" (most operations need RGB, 3 channels: the images have {x.shape[1]})"
        raise ValueError(f"{stage}: {key} could not be applied to images {_checks.shape(x)}{hint}: {error}") from error
    finally:
        op._params = {}  # Kornia would keep the batch's parameters alive
    if state is not None:
        if not torch.equal(state, torch.default_generator.get_state()):
            torch.default_generator.set_state(state)
            raise ValueError(
                f"{stage}: {key} draws random numbers while it is applied, beside its parameters, so no two views can "
                "share them; leave it out, or put another operation in its place"
            )
        op.__dict__["_ssd_audited"] = True
    return y
