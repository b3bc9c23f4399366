"""jaxtyping's shape checks for the package: every function whose annotations name shapes (ssd_addon/_shapes.py).

`check()` wraps them all, in the modules and classes where they stand. A call whose arguments have other shapes must be
refused by the function itself, in its own words; a result must have the shape that is annotated.
"""

import functools
import importlib
import inspect
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jaxtyping
import torch
from jaxtyping import Shaped
from torch import Tensor

CHECKED: dict[str, int] = {}
"""Name of a wrapped function -> calls that were checked."""
Check = Callable[[Any], bool]


def check() -> None:
    """Wrap every annotated function of the package, once."""
    import ssd_addon

    if CHECKED:
        return
    for found in pkgutil.walk_packages(ssd_addon.__path__, "ssd_addon."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "ssd_addon"]
    wrapped: dict[int, Callable[..., Any]] = {}
    for module in modules:
        for value in list(vars(module).values()):
            home = getattr(value, "__module__", "")
            if inspect.isclass(value) and home == module.__name__:
                for name, member in list(vars(value).items()):
                    if isinstance(member, types.FunctionType) and (new := _wrapped(member)) is not None:
                        setattr(value, name, new)
            elif isinstance(value, types.FunctionType) and home == module.__name__ and (new := _wrapped(value)):
                wrapped[id(value)] = new
    for module in modules:  # wherever it was imported to
        for name, value in list(vars(module).items()):
            if id(value) in wrapped:
                setattr(module, name, wrapped[id(value)])


def _wrapped(f: Callable[..., Any]) -> Callable[..., Any] | None:
    hints = f.__annotations__
    checks = {name: made for name, hint in hints.items() if (made := _check_of(hint)) is not None}
    if not checks:
        return None
    result = checks.pop("return", None)
    signature, name = inspect.signature(f), f"{f.__module__}.{f.__qualname__}"
    CHECKED[name] = 0

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return f(*args, **kwargs)
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return f(*args, **kwargs)  # which says so
        with jaxtyping.jaxtyped("context"):  # one meaning of every letter
            wrong = [n for n, fits in checks.items() if n in given and not fits(given[n])]
            out = f(*args, **kwargs)
            assert not wrong, f"{name} took {wrong} of another shape than annotated, without a word"
            if result is not None:
                assert result(out), f"{name}: its result has another shape than annotated, {hints['return']}"
        CHECKED[name] += 1
        return out

    return call


def _check_of(hint: Any) -> Check | None:
    """Whether a value has the shapes of an annotation; None if that names no shape."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and arguments[0] is Tensor and isinstance(arguments[1], str):
        shaped = Shaped[Tensor, arguments[1]]
        return lambda value: not isinstance(value, Tensor) or isinstance(value, shaped)
    parts = [_check_of(a) for a in arguments if not isinstance(a, list)]
    if not any(parts):
        return None
    if origin is tuple:
        return lambda value: (
            len(value) == len(parts) and all(p is None or p(v) for p, v in zip(parts, value, strict=True))
        )
    if isinstance(origin, type) and issubclass(origin, Mapping):
        (of_value,) = (p for p in parts if p is not None)
        return lambda value: not isinstance(value, Mapping) or all(_alone(of_value, v) for v in value.values())
    some = [p for p in parts if p is not None]  # a union: what is no tensor is none of ours
    return lambda value: any(p(value) for p in some)


def _alone(fits: Check, value: Any) -> bool:
    """The values of a mapping have widths of their own: their letters mean nothing outside."""
    with jaxtyping.jaxtyped("context"):
        return fits(value)
