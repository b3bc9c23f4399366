"""A trial run of a backbone: which of its parts run, which comes last, and what comes out.

A copy is run, never the caller's module: first one without data, whose tensors are on torch's meta device, and where
that cannot run (operations that read numbers), one with the weights. Nothing that a run leaves behind (caches,
counters, statistics) reaches the caller.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

EDGES = (64, 224, 32, 28, 96, 128, 16, 256, 299)
"""Sizes of images that a backbone may want, the usual ones first."""
EDGES_WITH_DATA = (64, 224, 32, 28)


@dataclass
class Trial:
    """What a run showed.

    Attributes:
        ran: whether any of the inputs suited the module.
        calls: name of a part -> how often it ran.
        last: names of the parts that ran once, and whose output is the module's, unchanged.
        shape: of the output, if it is a tensor.
    """

    ran: bool = False
    calls: dict[str, int] = field(default_factory=dict)
    last: set[str] = field(default_factory=set)
    shape: tuple[int, ...] = ()

    def is_last(self, name: str) -> bool:
        """Does a part come last, or never run?"""
        return self.ran and (name in self.last or name not in self.calls)


def trial(net: nn.Module, sample_ndim: int, sizes: Iterable[tuple[int, ...]] = ()) -> Trial:
    """Run a copy of a module once, in eval mode, on the first input that suits it."""
    if patched(net):
        return Trial()
    sizes = tuple(sizes)
    for size in (*sizes, *_sizes(net, sample_ndim, EDGES)):
        twin = _twin(net, lambda t: torch.empty_like(t, device="meta"))
        if twin is None:
            break
        if (found := _run(twin, size)).ran:
            return found
    devices = {t.device for t in (*net.parameters(), *net.buffers())}
    twin = None if torch.device("meta") in devices else _twin(net, lambda t: t.detach().clone())
    with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
        for size in () if twin is None else (*sizes, *_sizes(net, sample_ndim, EDGES_WITH_DATA)):
            assert twin is not None
            if (found := _run(twin, size)).ran:
                return found
    return Trial()


def patched(net: nn.Module) -> bool:
    """Was a `forward` replaced on the instance by something that a copy would not have its own of?"""
    inside = {id(m) for m in net.modules()}
    patches = [m.__dict__["forward"] for m in net.modules() if "forward" in m.__dict__]
    return any(not isinstance(f, MethodType) or id(f.__self__) not in inside for f in patches)


def _twin(net: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> nn.Module | None:
    """A copy in eval mode, without hooks, with other tensors in the place of its own; None where that fails."""
    memo: dict[int, Any] = {}
    for m in net.modules():
        own = [*m._parameters.values(), *m._buffers.values(), *(t for t in vars(m).values() if isinstance(t, Tensor))]
        for t in own:
            if t is not None and id(t) not in memo:
                new = stand_in(t)
                memo[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
    try:
        twin = copy.deepcopy(net, memo)
    except Exception:  # locks, files, tensors of a graph
        return None
    for m in twin.modules():
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
    return twin.eval()


def _run(net: nn.Module, size: tuple[int, ...]) -> Trial:
    first = next((t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()), torch.empty(()))
    outputs: dict[str, list[tuple[Any, int]]] = {}
    handles = [part.register_forward_hook(_noting(names, outputs)) for part, names in _named(net) if "" not in names]
    try:
        with torch.no_grad():
            y = net(torch.zeros(2, *size, device=first.device, dtype=first.dtype))
    except Exception:  # an input that does not suit it, or operations that need data
        return Trial()
    finally:
        for handle in handles:
            handle.remove()
    last = {
        name for name, ((out, version), *more) in outputs.items() if out is y and not more and version == _version(y)
    }
    calls = {name: len(each) for name, each in outputs.items()}
    return Trial(True, calls, last, tuple(y.shape) if isinstance(y, Tensor) else ())


def _named(net: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Every module with all its names."""
    out: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, part in net.named_modules(remove_duplicate=False):
        out.setdefault(id(part), (part, []))[1].append(name)
    return list(out.values())


def _noting(names: list[str], outputs: dict[str, list[tuple[Any, int]]]) -> Callable[..., None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        for name in names:
            outputs.setdefault(name, []).append((output, _version(output)))

    return note


def _version(y: Any) -> int:
    """How often a tensor was changed in place."""
    return y._version if isinstance(y, Tensor) else 0


def _sizes(net: nn.Module, sample_ndim: int, edges: Iterable[int]) -> list[tuple[int, ...]]:
    """Sizes of samples that may suit a module, from what its layers take."""
    widths = dict.fromkeys(m.in_features for m in net.modules() if isinstance(m, nn.Linear))
    if sample_ndim == 1:
        return [(width,) for width in widths]
    convolutions = [m.in_channels for m in net.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    return [((convolutions or [3])[0], *[edge] * (sample_ndim - 1)) for edge in edges]
