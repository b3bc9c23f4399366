"""A trial run of a backbone on tensors without data: which of its parts run, and which comes last.

Nothing is computed and nothing of the caller's is changed: for the run, tensors on torch's meta device stand in for
parameters and buffers, and modes and hooks are as they were afterwards.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Trial:
    """What a run showed.

    Attributes:
        ran: whether any of the inputs suited the module.
        called: names of the parts that ran.
        last: names of the parts whose output is the module's.
    """

    ran: bool = False
    called: set[str] = field(default_factory=set)
    last: set[str] = field(default_factory=set)

    def is_last(self, net: nn.Module, name: str) -> bool:
        """Does a part come last, or never run? Without a run: is it the last that was registered?"""
        if self.ran:
            return name in self.last or name not in self.called
        with_parameters = [n for n, m in net.named_children() if any(True for _ in m.parameters())]
        return bool(with_parameters) and with_parameters[-1] == name


def trial(net: nn.Module, sample_ndim: int, sizes: Iterable[tuple[int, ...]] = ()) -> Trial:
    """Run a module once on the first input that suits it; a module with hooks of its own is not run."""
    if any(m._forward_hooks or m._forward_pre_hooks for m in net.modules()):
        return Trial()
    modes = [(m, m.training) for m in net.modules()]
    try:
        for m in net.modules():
            m.training = False
        for size in (*sizes, *_sizes(net, sample_ndim)):
            found = _run(net, size)
            if found.ran:
                return found
        return Trial()
    finally:
        for m, mode in modes:
            m.training = mode


def _run(net: nn.Module, size: tuple[int, ...]) -> Trial:
    meta: dict[str, Tensor] = {
        n: torch.empty_like(t, device="meta") for n, t in (*net.named_parameters(), *net.named_buffers())
    }
    kinds = [t.dtype for t in meta.values() if t.is_floating_point()]
    outputs: dict[str, Any] = {}
    found = Trial()
    with ExitStack() as stack:
        for name, part in net.named_modules():
            if name:
                handle = part.register_forward_hook(_noting(name, outputs))
                stack.callback(handle.remove)
        try:
            with torch.no_grad():
                x = torch.empty(2, *size, device="meta", dtype=kinds[0] if kinds else torch.float32)
                y = torch.func.functional_call(net, meta, (x,))
        except Exception:  # an input that does not suit it, or operations that need data
            return found
    found.ran, found.called = True, set(outputs)
    found.last = {name for name, out in outputs.items() if out is y}
    return found


def _noting(name: str, outputs: dict[str, Any]) -> Callable[..., None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[name] = output

    return note


def _sizes(net: nn.Module, sample_ndim: int) -> list[tuple[int, ...]]:
    """Sizes of samples that may suit a module, from what its layers take."""
    widths = dict.fromkeys(m.in_features for m in net.modules() if isinstance(m, nn.Linear))
    if sample_ndim == 1:
        return [(width,) for width in widths]
    convolutions = [m.in_channels for m in net.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    return [((convolutions or [3])[0], *[edge] * (sample_ndim - 1)) for edge in (64, 224, 32)]
