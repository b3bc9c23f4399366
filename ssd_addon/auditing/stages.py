"""Which layers of a backbone are shown: those that the caller names, or its own stages.

Legend: B images, C channels, [H, W] map, T tokens, F width.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon.backbones import TimmFeatures

STAGES = 4
"""Layers that are shown where the caller names none."""
ROWS = ("pixels", "backbone", "untrained")
"""Names of the rows that are no layers."""
WRAPS = 0.9
"""A module that holds this share of the weights around it merely wraps others, as does one whose container holds it."""
LISTS = (nn.ModuleList, nn.ModuleDict)
CONTAINERS = (nn.Sequential, *LISTS)
POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def named_layers(backbone: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The layers that the caller names, as they are called in the library that the backbone came from.

    Raises:
        ValueError: a name that is no module's, twice the same, or that of a row.
    """
    if isinstance(names, str):
        raise TypeError(f"layers: expected a sequence of names, such as ('layer3',): got {names!r}")
    there = {_own_name(n, backbone): m for n, m in backbone.named_modules(remove_duplicate=False) if n}
    if unknown := [n for n in names if n not in there]:
        top = dict.fromkeys(n.split(".")[0] for n in there)
        known = f"names of modules inside the backbone, such as {_checks.names(list(top)[:8])}"
        raise ValueError(f"layers: expected {known}: got {_checks.names(unknown)}")
    if len(set(names)) < len(names):
        raise ValueError(f"layers: expected every layer once: got {_checks.names(names)}")
    if taken := [n for n in names if n in ROWS]:
        raise ValueError(f"layers: expected other names than those of the rows: got {_checks.names(taken)}")
    return {n: there[n] for n in names}


def stages(backbone: nn.Module, images: Tensor, run: Callable[[Tensor], Any]) -> dict[str, nn.Module]:
    """A backbone's own stages: up to STAGES layers, in the order in which they run.

    timm's models say what their stages are (`feature_info`). Otherwise only modules on the main path are candidates,
    no branch inside a block: the children of the network; and while these have fewer than three resolutions, the
    children of those among them that are plain containers (nn.Sequential and lists) or merely wrap others: that hold
    nine tenths of the network's weights, or a plain container with nine tenths of their own, as torchvision's `encoder`
    of a transformer. A stage is then the last candidate at each resolution, a block before a single operation; and
    where the resolution stays the same, as in a transformer, stages are spread over its blocks.

    Args:
        images: two of them, [2, C, H, W].
        run: what calls the backbone.
    """
    modules = {n: m for n, m in backbone.named_modules() if n}
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            found = first_tensor(output, len(images))
            shapes.setdefault(name, []).append(() if found is None else tuple(found.shape))

        return note

    handles = [m.register_forward_hook(keep(n)) for n, m in modules.items()]
    try:
        run(images)
    finally:
        for handle in handles:
            handle.remove()
    size = (images.shape[-2], images.shape[-1])
    once = {
        n: places
        for n, (shape, *more) in shapes.items()  # in the order in which they end
        if not more
        and shape[:1] == (len(images),)
        and (places := positions(shape, size)) > 1
        and _own_name(n, backbone) not in ROWS
        and not isinstance(modules[n], POOLS)
    }
    chosen = _said_by_timm(backbone, once) or _on_the_main_path(backbone, once)
    return {_own_name(n, backbone): modules[n] for n in chosen}


def positions(shape: Sequence[int], size: tuple[int, int] = (1, 1)) -> int:
    """How many places a map or a sequence of tokens has; 0 for anything else.

    Args:
        shape: [B, T, F], [B, C, H, W] or [B, H, W, C].
        size: height and width of the images.
    """
    if len(shape) == 3:
        return shape[1]
    if len(shape) != 4:
        return 0
    return shape[1] * shape[2] if is_channels_last(shape, size) else shape[2] * shape[3]


def is_channels_last(shape: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether a map has the images' aspect ratio in the middle, [B, H, W, C], rather than at the end, [B, C, H, W]."""
    _, a, b, c = shape
    if not a * b * c:
        return False
    ratio = math.log(size[0] / size[1])
    return abs(math.log(a / b) - ratio) < abs(math.log(b / c) - ratio)


def first_tensor(output: Any, images: int) -> Tensor | None:
    """The first tensor in what a layer returns that has the images in its first dimension, else the first."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    tensors = [p for p in parts if isinstance(p, Tensor)]
    return next((t for t in tensors if t.shape[:1] == (images,)), next(iter(tensors), None))


def _said_by_timm(backbone: nn.Module, once: Mapping[str, int]) -> list[str]:
    info = getattr(getattr(backbone, "model", None), "feature_info", None)
    entries = getattr(info, "info", info) or ()
    names = [f"model.{entry.get('module')}" for entry in entries if isinstance(entry, dict)]
    return _spread([n for n in dict.fromkeys(names) if n in once])


def _on_the_main_path(backbone: nn.Module, once: Mapping[str, int]) -> list[str]:
    best: list[str] = []
    longest: list[str] = []
    for level in _levels(backbone):
        here = [n for n in once if n in level]
        last: dict[int, str] = {}
        for name in here:
            if last.get(once[name]) is None or _is_block(level[name]) or not _is_block(level[last[once[name]]]):
                last.pop(once[name], None)
                last[once[name]] = name
        if len(last) >= 3:
            return list(last.values())[-STAGES:]
        blocks: dict[tuple[str, int, type], list[str]] = {}
        for name in here:
            blocks.setdefault((name.rpartition(".")[0], once[name], type(level[name])), []).append(name)
        longest = max(blocks.values(), key=len, default=[])
        if len(longest) >= 3 and _is_block(level[longest[0]]):
            return _spread(longest)
        best = list(last.values()) if len(last) > len(best) else best
    return _spread(longest) if len(longest) >= 3 else best


def _is_block(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _levels(backbone: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """The network's children; then, again and again, with the children of those that are containers in their place."""
    level: dict[str, nn.Module] = {"": backbone}
    opened = True
    while opened:
        whole = sum(_weights(m) for m in level.values())
        inner: dict[str, nn.Module] = {}
        opened = False
        for name, module in level.items():
            if _is_block(module) and (not name or _merely_wraps(module, whole)):
                opened = True
                inner |= _children(name, module)
            else:
                inner[name] = module
        level = inner
        if opened:
            yield level


def _merely_wraps(module: nn.Module, whole: int) -> bool:
    own = _weights(module)
    inside = [c for c in module.children() if isinstance(c, CONTAINERS)]
    return isinstance(module, nn.Sequential) or own >= WRAPS * whole or any(_weights(c) >= WRAPS * own for c in inside)


def _children(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """A module's children by their full names, with those of a list, which does not run itself, in its place."""
    out: dict[str, nn.Module] = {}
    for key, child in module.named_children():
        full = f"{name}.{key}" if name else key
        is_list = type(child) in LISTS  # torchvision's _DenseBlock is one that runs
        out |= _children(full, child) if is_list else {full: child}
    return out


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _spread(names: list[str]) -> list[str]:
    """Up to STAGES of them: the last ones of a few, evenly spaced ones of many, with the last."""
    if len(names) <= 2 * STAGES - 2:
        return names[-STAGES:]
    return [names[math.ceil((k + 1) * len(names) / STAGES) - 1] for k in range(STAGES)]


def _own_name(name: str, backbone: nn.Module) -> str:
    return name.removeprefix("model.") if isinstance(backbone, TimmFeatures) else name
