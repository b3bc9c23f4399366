"""A trial run of a backbone: which of its parts run, which part comes last, and how wide the output is.

A copy is run, never the caller's module: first one without data, with tensors on torch's meta device, and if that fails
(operations that read values), one with the weights. Side effects of a run (caches, counters, statistics) do not reach
the caller's module.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssd_addon.backbone_changes import is_compiled, patched, replaced

EDGES = (64, 224, 32, 28, 96, 128, 16, 256, 299)
"""Image sizes that a backbone may require, the usual ones first."""
EDGES_WITH_DATA = (64, 224, 32, 28)


@dataclass
class Trial:
    """The result of a trial run.

    Attributes:
        ran: whether the module accepted any of the inputs.
        calls: name of a part -> how often it ran.
        last: names of the parts that ran once and whose output is the module's output, unchanged.
        output: the output for 2 samples; on the meta device if the module runs there.
        idle: names of the trained parameters on which the output does not depend, if the run kept a graph.
        channels: channels of the last layer with weights that ran; 0 if it does not say how many.
    """

    ran: bool = False
    calls: dict[str, int] = field(default_factory=dict)
    last: set[str] = field(default_factory=set)
    output: Any = None
    idle: set[str] = field(default_factory=set)
    channels: int = 0

    def is_last(self, name: str) -> bool:
        """Whether a part comes last or never runs."""
        return self.ran and (name in self.last or name not in self.calls)


def trial(net: nn.Module, sample_ndim: int, sizes: Iterable[tuple[int, ...]] = (), *, graph: bool = False) -> Trial:
    """Run a copy of a module once, in evaluation mode, on the first input that it accepts.

    Args:
        graph: find the idle parameters too, if the module runs without data.
    """
    return next(trials(net, sample_ndim, sizes, graph=graph), Trial())


def trials(
    net: nn.Module, sample_ndim: int, sizes: Iterable[tuple[int, ...]] = (), *, graph: bool = False
) -> Iterator[Trial]:
    """Run copies of a module, in evaluation mode, on each input that it accepts."""
    if patched(net):
        return
    net, sizes, met = _uncompiled(net), tuple(sizes), False
    for size in _sizes(net, sample_ndim, EDGES, sizes):
        twin = _twin(net, _without_data)
        if twin is None:
            break
        if (found := _run(twin, size, graph)).ran:
            met = True
            yield found
    if met:
        return
    devices = {t.device for t in (*net.parameters(), *net.buffers())}
    twin = None if torch.device("meta") in devices else _twin(net, lambda t: t.detach().clone())
    with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
        for size in () if twin is None else _sizes(net, sample_ndim, EDGES_WITH_DATA, sizes):
            assert twin is not None
            if (found := _run(twin, size)).ran:
                yield found


def width_and_axis(
    seen: Sequence[Trial], pool: str, pick: Callable[[Any], Tensor], given: int | None = None
) -> tuple[int, int | None] | None:
    """The number of features that a module returns and their dimension, from runs on inputs of two sizes.

    None if the runs do not determine the number. The dimension (1: channels first, -1: last) is one that does not
    change with the size of the input and has more than one entry. Where both are such and differ, it is the one that
    has as many entries as the last layer has channels, and the one beside two equal dimensions of a map, which are
    positions: either says it, unless the other contradicts. Where both have as many entries it is None.

    Args:
        seen: one run, or two with inputs of different sizes.
        pick: selects the tensor of features in the module's output; its errors are raised.
        given: the number of features, if it is known.
    """
    shapes = [tuple(pick(found.output).shape) for found in seen]
    if not shapes or len({len(shape) for shape in shapes}) > 1 or not 2 <= len(shapes[0]) <= 4:
        return None
    first, other = shapes[0], shapes[-1]
    if pool == "flatten":
        return (math.prod(first[1:]), None) if first == other else None
    if len(first) == 2:
        return first[1], None
    possible = (-1,) if pool == "cls" and len(first) == 3 else (1, -1)
    axes = [a for a in possible if first[a] == other[a] and (first[a] == given if given else first[a] > 1)]
    if len({first[a] for a in axes}) == 2:
        said = {a for a in axes if first[a] == seen[0].channels} | _beside_positions(first)
        axes = list(said) if len(said) == 1 else []
    if not axes:
        return None
    return first[axes[0]], axes[0] if len(axes) == 1 else None


def _beside_positions(shape: tuple[int, ...]) -> set[int]:
    """The dimension of the channels in maps that are as high as wide, with other than that many channels."""
    if len(shape) != 4:
        return set()
    return {1} if shape[2] == shape[3] else {-1} if shape[1] == shape[2] else set()


def runs_without_data(net: nn.Module, do: Callable[[Any], Any]) -> bool:
    """Whether `do` succeeds on a copy of the module with tensors on the meta device."""
    twin = None if patched(net) else _twin(_uncompiled(net), _without_data)
    try:
        return twin is not None and (do(twin), True)[1]
    except Exception:  # libraries may raise anything
        return False


def _uncompiled(net: nn.Module) -> nn.Module:
    """The module with its compiled parts (torch.compile) replaced by the originals, on copies of their parents."""
    for path, part in net.named_modules():
        if is_compiled(part):
            inner = part._modules["_orig_mod"]
            assert inner is not None
            return _uncompiled(replaced(net, path, inner) if path else inner)
    return net


def _twin(net: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> nn.Module | None:
    """A copy in evaluation mode, without hooks, with its tensors replaced; None if that fails."""
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


def _without_data(t: Tensor) -> Tensor:
    return torch.empty_like(t, device="meta")


def _run(net: nn.Module, size: tuple[int, ...], graph: bool = False) -> Trial:
    first = next((t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()), torch.empty(()))
    outputs: dict[str, list[tuple[Any, int]]] = {}
    ended: list[nn.Module] = []
    handles = [part.register_forward_hook(_noting(names, outputs, ended)) for part, names in _named(net)]
    try:
        with torch.set_grad_enabled(graph):
            y = net(torch.zeros(2, *size, device=first.device, dtype=first.dtype))
    except Exception:  # it does not accept the input, or needs data
        return Trial()
    finally:
        for handle in handles:
            handle.remove()
    outputs.pop("", None)
    last = {
        name for name, ((out, version), *more) in outputs.items() if out is y and not more and version == _version(y)
    }
    calls = {name: len(each) for name, each in outputs.items()}
    idle = {n for n, p in net.named_parameters() if p.requires_grad} if graph and isinstance(y, Tensor) else set()
    channels = next((n for n in map(_channels, reversed(ended)) if n is not None), 0)
    return Trial(True, calls, last, y, idle - _reached(net, y) if idle else idle, channels)


def _channels(layer: nn.Module) -> int | None:
    """How many channels a layer with weights puts out, 0 if it does not say; None of other modules."""
    own = any(p is not None for p in layer._parameters.values())
    if any(name != "parametrizations" for name in layer._modules) or not (own or layer._modules):
        return None
    for name in ("out_features", "out_channels", "num_features", "num_channels"):
        if isinstance(found := getattr(layer, name, None), int):
            return found
    shape: tuple[int, ...] = getattr(layer, "normalized_shape", ())
    return shape[0] if len(shape) == 1 else 0


def _reached(net: nn.Module, y: Tensor) -> set[str]:
    """The parameters that a tensor depends on."""
    leaves, seen, todo = set(), set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves.add(id(getattr(node, "variable", None)))
            todo += [before for before, _ in node.next_functions]
    return {n for n, p in net.named_parameters(remove_duplicate=False) if id(p) in leaves}


def _named(net: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Every module with all the names under which it occurs."""
    out: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, part in net.named_modules(remove_duplicate=False):
        out.setdefault(id(part), (part, []))[1].append(name)
    return list(out.values())


def _noting(names: list[str], outputs: dict[str, list[tuple[Any, int]]], ended: list[nn.Module]) -> Callable[..., None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        ended.append(module)
        for name in names:
            outputs.setdefault(name, []).append((output, _version(output)))

    return note


def _version(y: Any) -> int:
    """How often a tensor was changed in place."""
    return y._version if isinstance(y, Tensor) else 0


def _sizes(
    net: nn.Module, sample_ndim: int, edges: Iterable[int], first: Iterable[tuple[int, ...]] = ()
) -> list[tuple[int, ...]]:
    """Sample sizes that a module may accept, from the inputs of its layers, after the given ones; all differ."""
    if sample_ndim == 1:
        return list(dict.fromkeys([*first, *((m.in_features,) for m in net.modules() if isinstance(m, nn.Linear))]))
    convolutions = [m.in_channels for m in net.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    channels = (convolutions or [3])[0]
    return list(dict.fromkeys([*first, *((channels, *[edge] * (sample_ndim - 1)) for edge in edges)]))
