"""Evaluation without side effects: modes, buffers and random generators are restored afterwards.

A model may be any callable, so its networks are searched in the objects that it refers to (`reachable`); a network that
was not found is handled when it is called.
"""

import functools
import random
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import CodeType, FunctionType, MappingProxyType, MemberDescriptorType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

OBJECTS = 100_000
"""Largest number of objects that are searched for networks."""
PLAIN = (Tensor, np.ndarray, str, bytes, int, float, complex, type(None), torch.dtype, torch.device, ModuleType)
"""Types that are not searched: they refer to no network, or to whole libraries."""


@contextmanager
def evaluation(model: Callable[..., object], *, leave: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Run every network of the model in evaluation mode; restore everything afterwards, also after an error.

    Applies to every module that `reachable` finds, and to every other module in training mode that this thread calls.
    Afterwards their modes and buffers, and torch's, numpy's and Python's global generators, are as before. Not
    protected are statistics in tensors that are not buffers, such as those of
    `torch.nn.functional.batch_norm(..., training=True)` in a function, and modules that compiled code calls and that
    are not found.

    Args:
        model: a module, or any callable.
        leave: modules that are left alone.
    """
    kept = _Kept(leave)
    with generators_kept():
        try:
            found = reachable(model)
            for module in found:
                kept.evaluate(module)
            quiet = _no_warning_of_hooks() if any(map(_is_compiled, found)) else nullcontext()
            with quiet, _on_calls(kept.evaluate):
                yield
        finally:
            kept.restore()


@contextmanager
def _on_calls(meet: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call `meet` with every module in training mode that this thread calls, before it runs.

    The hook is removed while a compiled module runs, because torch would recompile the module with the hook.
    """
    thread = threading.get_ident()
    hooks: dict[object, RemovableHandle] = {}

    def on_call(module: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != thread:
            return
        if getattr(module, "training", False):
            meet(module)
        if _is_compiled(module):
            hooks.pop(None).remove()
            if module not in hooks:
                hooks[module] = module.register_forward_hook(again, always_call=True)

    def again(*_: object) -> None:
        if None not in hooks:
            hooks[None] = register_module_forward_pre_hook(on_call)

    again()
    try:
        yield
    finally:
        for handle in hooks.values():
            handle.remove()


@contextmanager
def _no_warning_of_hooks() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
        yield


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in getattr(module, "_modules", ())


class _Kept:
    """Stores the modes and buffers of modules before they are changed."""

    def __init__(self, leave: Iterable[nn.Module]) -> None:
        self.left = {id(module): module for module in leave}
        self.modes: dict[int, tuple[nn.Module, bool]] = {}
        self.buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def evaluate(self, module: nn.Module) -> None:
        """Set evaluation mode through the flags only: a module's train() may do more, such as merge its weights."""
        parts = [
            m for m in module.modules() if id(m) not in self.left and hasattr(m, "training")
        ]  # frozen script modules have no mode
        for m in parts:  # before any is changed, as a compiled module reports the mode of the one inside it
            if id(m) not in self.modes:
                self.modes[id(m)] = m, m.training
                held = ((n, b) for n, b in m.named_buffers(recurse=False) if not (is_lazy(b) or b.is_meta))
                self.buffers += [(m, n, b, b.detach().clone()) for n, b in held]
        for m in parts:
            if m.training:
                m.training = False

    def restore(self) -> None:
        for m, mode in self.modes.values():
            if m.training != mode:
                m.training = mode
        with torch.no_grad():
            for m, name, buffer, before in self.buffers:
                if isinstance(m._buffers, dict) and m._buffers.get(name) is not buffer:
                    m._buffers[name] = buffer  # the buffer was replaced
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global generators of torch, numpy and Python afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    cuda = [generator.get_state() for generator in torch.cuda.default_generators]  # none before CUDA is in use
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        for generator, state in zip(torch.cuda.default_generators, cuda, strict=False):
            generator.set_state(state)


def reachable(start: object) -> list[nn.Module]:
    """The modules to which a callable refers.

    The search is breadth first, through closures, defaults, global names in the code, the object of a bound method, the
    contents of a partial, attributes and containers; it does not enter installed libraries.
    """
    found: list[nn.Module] = []
    queue, seen = deque([start]), {id(start): start}  # objects are kept alive, so that ids are unique
    while queue and len(seen) < OBJECTS:
        thing = queue.popleft()
        try:
            parts = list(_referred(thing))
            if isinstance(thing, nn.Module):
                found.append(thing)
        except ReferenceError:  # a weak proxy whose object is gone
            continue
        for part in parts:
            if not issubclass(type(part), PLAIN) and id(part) not in seen:
                seen[id(part)] = part
                queue.append(part)
    return found


def _referred(thing: object) -> Iterable[object]:
    """The objects to which one object refers."""
    if isinstance(thing, functools.partial):
        return thing.func, *thing.args, *thing.keywords.values()
    if isinstance(thing, MethodType):
        return thing.__self__, thing.__func__
    if isinstance(thing, FunctionType):
        return _of_function(thing)
    if isinstance(thing, weakref.ref):
        return (thing(),)
    if isinstance(thing, staticmethod | classmethod):
        return (thing.__func__,)
    if isinstance(thing, property):
        return (thing.fget,)
    if isinstance(thing, dict):
        return dict.values(thing)
    if isinstance(thing, MappingProxyType):
        return thing.values()
    if isinstance(thing, list | tuple | set | frozenset | deque):
        return thing
    if isinstance(thing, type):
        return () if _is_library(thing) else vars(thing).values()
    return _of_instance(thing)


def _of_function(function: FunctionType) -> list[object]:
    out: list[object] = [function.__defaults__, function.__kwdefaults__, function.__dict__]
    for cell in function.__closure__ or ():
        try:
            out.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    if not _is_library(function):
        names = _names(function.__code__)
        out += _named(function.__globals__, names)
    return out


def _named(scope: Mapping[str, object], names: set[str], depth: int = 0) -> list[object]:
    """The objects with these names, in a module's globals and in user modules that it imports."""
    out = []
    for name in names & scope.keys():
        value = scope[name]
        if not isinstance(value, ModuleType):
            out.append(value)
        elif depth < 3 and not _is_library(value):
            out += _named(vars(value), names, depth + 1)
    return out


def _names(code: CodeType) -> set[str]:
    """The global names and attributes that a code object uses, including nested functions."""
    inner = (_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*inner)


def _of_instance(thing: object) -> list[object]:
    kind = type(thing)
    out = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    for cls in kind.__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            member = cls.__dict__.get(name)
            if isinstance(member, MemberDescriptorType):
                try:
                    out.append(member.__get__(thing, kind))
                except AttributeError:  # not set
                    continue
    return [*out, *(cls for cls in kind.__mro__ if not _is_library(cls))]


def _is_library(thing: object) -> bool:
    """Whether a function, class or module belongs to Python or to an installed package."""
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    root = str(name).partition(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root in sys.stdlib_module_names or "site-packages" in file or "dist-packages" in file
