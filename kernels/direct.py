"""Calls a `torch.library` operator directly if nothing traces, which saves a tenth of a millisecond of host time.

Operators are needed for torch.compile, fake tensors and dispatch modes, to which they are opaque. If none of these is
active, the same functions run as a plain autograd function.
"""

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


def traced() -> bool:
    """Whether a compiler, a dispatch mode or a transform of torch.func must see operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def direct(f: Function, save: Function, differentiate: Function) -> Function:
    """An autograd function equivalent to `f` registered as an operator with this derivative.

    Args:
        f: (*inputs) -> outputs.
        save: (ctx, inputs, outputs), the operator's `setup_context`.
        differentiate: (ctx, *gradients) -> a gradient for every input.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = f(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        backward = staticmethod(differentiate)

    Direct.__qualname__ = Direct.__name__ = f.__name__
    applied: Function = Direct.apply
    return applied


def chosen(operator: Function, plain: Function) -> Function:
    """The operator if something traces or a second derivative must be refused; else the plain function."""
    return operator if torch.is_grad_enabled() or traced() else plain
