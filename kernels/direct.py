"""An operator of `torch.library`, called directly where nobody traces: a tenth of a millisecond of host time less.

An operator is opaque to torch.compile, to fake tensors and to dispatch modes. Where none of these is at work, the same
functions run as a plain autograd function.
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
    """What `f` registered as an operator with this derivative does, without the operator.

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
    """The operator where something traces, or where a second derivative must be refused; else the function itself."""
    return operator if torch.is_grad_enabled() or traced() else plain
