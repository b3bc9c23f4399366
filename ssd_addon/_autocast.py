"""Arithmetic that runs outside autocast, forward and backward.

Autocast applies to everything that runs while it is on. `loss.backward()` inside `torch.autocast` therefore computes
the derivative of a matrix product in 16 bits, even if the product itself was computed outside autocast, and a custom
backward function can receive mixed dtypes. Every backward function of this package goes through this module.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")
Result = TypeVar("Result")
Function = Callable[..., Any]


class Context(FunctionCtx):
    """The context that autograd passes to a custom function; subclasses declare the attributes that they store."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off for this kind of device; it costs nothing if autocast is already off."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def backward_without_autocast(backward: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Decorator for the backward of a custom function or operator: it runs with autocast off for its device."""

    @functools.wraps(backward)
    def run(ctx: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
        for gradient in args:
            if isinstance(gradient, Tensor):
                with autocast_off(gradient.device):
                    return backward(ctx, *args, **kwargs)
        return backward(ctx, *args, **kwargs)

    return run


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product a b and its derivatives of all orders outside autocast, also when compiled; a [M, K], b [K, N]."""
    with autocast_off(a.device):
        product: Tensor = _Matmul.apply(a, b) if torch.compiler.is_compiling() or not is_plain((a, b)) else a @ b
        return product


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        compiling = torch.compiler.is_compiling()
        product = matmul if torch.is_grad_enabled() and not compiling else torch.matmul
        da: Tensor | None = None
        db: Tensor | None = None
        # A gradient has the memory layout of its tensor, so that it equals torch's own derivative bitwise.
        if ctx.needs_input_grad[0]:
            da = product(b, grad.T).T if not compiling and _by_columns(a) else product(grad, b.T)
        if ctx.needs_input_grad[1]:
            db = product(grad.T, a).T if not compiling and _by_columns(b) else product(a.T, grad)
        return da, db


def _by_columns(t: Tensor) -> bool:
    return t.stride(0) == 1 and t.stride(1) == t.shape[0]


def outside_autocast(f: Callable[..., Result], *tensors: Tensor, parameters: Sequence[Tensor] = ()) -> Result:
    """f(*tensors) with autocast off, also for its derivatives of all orders.

    If autocast is already off, values and gradients are bitwise those of f. The graph of f is freed together with the
    caller's graph. Under a compiler, backward may still run under autocast: see `matmul`.

    Args:
        f: a function of tensors that returns a tensor or a tuple of tensors. Second derivatives recompute it, so it
            must be deterministic.
        tensors: its arguments, at least one, on one device.
        parameters: further tensors that f uses and that get a gradient; all other tensors in its closure get none.
    """
    if torch.compiler.is_compiling() or is_plain((*tensors, *parameters)):
        with autocast_off(tensors[0].device):
            return f(*tensors)
    return cast(Result, _Outside.apply(f, len(tensors), *tensors, *parameters))


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether no backward pass is recorded, or torch.func or forward mode differentiate instead."""
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return True
    return torch._C._are_functorch_transforms_active() or any(_has_tangent(t) for t in tensors)


def _has_tangent(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


class _OutsideContext(Context):
    f: Function
    n: int
    differentiable: list[bool]  # by output


class _Outside(torch.autograd.Function):
    """Forward keeps the graph of f on detached arguments; backward differentiates that graph."""

    @staticmethod
    def forward(ctx: _OutsideContext, f: Function, n: int, *tensors: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors[:n], needed[:n], strict=True)]
        with torch.enable_grad(), autocast_off(tensors[0].device):
            result = f(*leaves)
            outputs = _as_tuple(result)
            ends = [_End.apply(o) for o in outputs if _has_graph(o)]
        detached = tuple(o.detach() if isinstance(o, Tensor) else o for o in outputs)
        ctx.f, ctx.n, ctx.differentiable = f, n, [_has_graph(o) for o in outputs]
        ctx.set_materialize_grads(False)
        constant = [d for d, o in zip(detached, outputs, strict=True) if isinstance(o, Tensor) and not o.requires_grad]
        ctx.mark_non_differentiable(*constant)
        # Saved, not stored as attributes, so that autograd frees the graph of f together with the surrounding one.
        ctx.save_for_backward(*tensors, *leaves, *ends)
        return detached if isinstance(result, tuple) else detached[0]

    @staticmethod
    @backward_without_autocast
    def backward(ctx: _OutsideContext, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed, n = ctx.needs_input_grad[2:], ctx.n
        given = [g is not None and d for g, d in zip(grads, ctx.differentiable, strict=True)]
        used = [g for g, d in zip(grads, ctx.differentiable, strict=True) if d and g is not None]
        if not used:
            return (None,) * (2 + len(needed))
        saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second read
        k = len(needed)
        tensors, parameters, leaves, ends = saved[:n], saved[n:k], saved[k : k + n], saved[k + n :]
        if torch.is_grad_enabled():  # create_graph=True
            gradient = functools.partial(_gradient, ctx.f, parameters, needed, given)
            found = outside_autocast(gradient, *tensors, *used, parameters=parameters)
        else:
            reached = [g for g, d in zip(given, ctx.differentiable, strict=True) if d]
            found = torch.autograd.grad(
                [e for e, g in zip(ends, reached, strict=True) if g],
                [t for t, need in zip((*leaves, *parameters), needed, strict=True) if need],
                used,
                retain_graph=True,  # the caller may differentiate again
                allow_unused=True,
            )
        each = iter(found)
        return None, None, *(next(each) if need else None for need in needed)


def _gradient(
    f: Function, parameters: Sequence[Tensor], needed: Sequence[bool], given: Sequence[bool], *both: Tensor
) -> tuple[Tensor, ...]:
    """The gradient of f as a differentiable function of its arguments and of the gradients of its outputs."""
    n = len(needed) - len(parameters)
    outputs = _as_tuple(f(*both[:n]))
    return torch.autograd.grad(
        [o for o, g in zip(outputs, given, strict=True) if g],
        [t for t, need in zip((*both[:n], *parameters), needed, strict=True) if need],
        both[n:],
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _has_graph(output: Any) -> bool:
    return isinstance(output, Tensor) and output.requires_grad


class _End(torch.autograd.Function):
    """The root of the differentiation of f: it has the shape of an output, but neither its memory nor its version, so
    that the output may be changed in place."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.new_zeros(()).expand(output.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
