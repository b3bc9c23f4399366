"""Checks of `ssd_addon.lightning`: parts sharded alike, overrides that call super(), tensors that were changed."""

import inspect
from collections.abc import Mapping
from types import CodeType
from typing import Any

from torch import nn

from ssd_addon import _checks


def check_shards(parts: Mapping[str, Any]) -> None:
    """Refuse a mixture of sharded and whole parameters: FSDP2 averages only the gradients of those that it sharded."""
    whole: dict[bool, list[str]] = {True: [], False: []}
    for name, part in parts.items():
        for key, p in part.named_parameters() if isinstance(part, nn.Module) else ():
            whole[not hasattr(p, "full_tensor")] += [f"{name}.{key}"] * p.requires_grad
    if whole[False] and whole[True]:
        raise ValueError(
            "configure_model: expected all trained parameters to be sharded, or none: got fully_shard without "
            f"{_checks.names(whole[True])}, whose gradients would not be averaged over ranks"
        )


def calls(override: Any, name: str) -> bool:
    """Whether the code of an override names the hook that it overrides, as super().name() does."""
    code = getattr(inspect.unwrap(override) if callable(override) else None, "__code__", None)
    return code is None or _names(code, name)


def _names(code: CodeType, name: str) -> bool:
    inside = (c for c in code.co_consts if isinstance(c, CodeType))  # functions and comprehensions in it
    return name in code.co_names or any(_names(c, name) for c in inside)


def versions(tensors: Any) -> int:
    """A number that grows whenever one of these tensors is changed in place."""
    return sum(t._version for t in tensors)
