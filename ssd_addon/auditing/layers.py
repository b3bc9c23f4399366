"""What a backbone computes on the way: its stages, and one row per image of any layer's output.

Legend: B images, C channels, [H, W] map, T tokens, d numbers per image.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon.backbones import TimmFeatures
from ssd_addon.metrics import ScoreTable
from ssd_addon.pooling import Pooling

STAGES = 4
"""Layers that are shown where the caller names none."""
GRID = 2
"""A map of features is averaged in a grid of GRID x GRID cells, so that something of where things are is kept."""
PIXELS = 8
"""Edge in pixels of the images that the row "pixels" is made of."""
UNTRAINED = "untrained"
PREFIX = 8
"""Tokens at most that stand before those of the image: class and register tokens."""


class Layers(nn.Module):
    """Images [B, C, H, W] in [0, 1] to name -> [B, d]: "pixels", the layers, "backbone" and "untrained 0", ...

    Args:
        backbone: returns features.
        pooling: of its features.
        layers: name -> the module inside the backbone whose output is a row.
        mean, std: of the images' channels; subtracted and divided by before the backbone. None: the images as they are.
        untrained: other backbones of the same form.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pooling: Pooling,
        layers: Mapping[str, nn.Module],
        normalize: tuple[Sequence[float], Sequence[float]] | None,
        untrained: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.backbone, self.pooling, self.untrained = backbone, pooling, nn.ModuleList(untrained)
        self._layers = dict(layers)  # parts of the backbone: not registered again
        self.normalize = normalize

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        images = self.normalized(x)
        met: dict[str, Tensor] = {}
        with _noted(self._layers, met):
            features = self.pooling(self.backbone(images), len(x))
        if silent := [name for name in self._layers if name not in met]:
            raise ValueError(
                f"layers: expected modules that run when the backbone does: got {_checks.names(silent)}, which do not"
            )
        out = {"pixels": pixels(x), **{name: met[name] for name in self._layers}, "backbone": features}
        for k, twin in enumerate(self.untrained):
            out[f"{UNTRAINED} {k}"] = self.pooling(twin(images), len(x))
        return out

    def normalized(self, x: Tensor) -> Tensor:
        """Images as the backbone takes them."""
        if self.normalize is None:
            return x
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in self.normalize)
        if len(mean) not in (1, x.shape[1]):
            mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
        return (x - mean) / std


def over_copies(table: ScoreTable) -> ScoreTable:
    """The table with one row "untrained": the mean over the copies, and intervals that span those of all copies."""
    copies = [s for s in table.spaces if s.startswith(f"{UNTRAINED} ") and s.removeprefix(f"{UNTRAINED} ").isdigit()]
    scores = {cell: v for cell, v in table.scores.items() if cell[0] not in copies}
    intervals = {cell: v for cell, v in table.intervals.items() if cell[0] not in copies}
    notes = {cell: v for cell, v in table.notes.items() if cell[0] not in copies}
    for f in table.factors if copies else ():
        scores[UNTRAINED, f] = sum(table.scores[c, f] for c in copies) / len(copies)
        found = [table.intervals[c, f] for c in copies if (c, f) in table.intervals]
        if len(found) == len(copies):
            intervals[UNTRAINED, f] = min(low for low, _ in found), max(high for _, high in found)
        if note := next((table.notes[c, f] for c in copies if (c, f) in table.notes), None):
            notes[UNTRAINED, f] = note
    rows = (*(s for s in table.spaces if s not in copies), *((UNTRAINED,) if copies else ()))
    parts = None if table.parts is None else over_copies(table.parts)
    return replace(table, spaces=rows, scores=scores, intervals=intervals, notes=notes, parts=parts)


def pixels(x: Tensor) -> Tensor:
    """Images [B, C, H, W], averaged in a grid of PIXELS x PIXELS: [B, d]."""
    if x.ndim != 4:
        return x.flatten(1)
    return F.adaptive_avg_pool2d(x, (min(PIXELS, x.shape[2]), min(PIXELS, x.shape[3]))).flatten(1)


def row(y: Tensor) -> Tensor:
    """The output of a layer as [B, d]: maps and the tokens of an image averaged in a grid, anything else over its
    positions."""
    if y.ndim == 3:
        side = math.isqrt(y.shape[1])
        if side < GRID or y.shape[1] - side**2 > PREFIX:
            return y.mean(1)
        y = y[:, y.shape[1] - side**2 :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    elif y.ndim == 4 and y.shape[1] == y.shape[2] != y.shape[3]:  # channels last
        y = y.permute(0, 3, 1, 2)
    if y.ndim == 4:
        return F.adaptive_avg_pool2d(y, (min(GRID, y.shape[2]), min(GRID, y.shape[3]))).flatten(1)
    return y.flatten(2).mean(2) if y.ndim > 2 else y


@contextmanager
def _noted(layers: Mapping[str, nn.Module], met: dict[str, Tensor]) -> Iterator[None]:
    """Keep the output of every layer as a row while the block runs; of one that runs several times the last."""

    def keep(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            found = first_tensor(output)
            if found is None or found.ndim < 2 or not found.is_floating_point():
                raise TypeError(
                    f"layers: expected a layer that returns a tensor: got {type(output).__name__} from {name!r}"
                )
            met[name] = row(found)  # at once: a later layer may work in place

        return note

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor in what a layer returns."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((p for p in parts if isinstance(p, Tensor)), None)


# ---- which layers


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
    if taken := [n for n in names if n in ("pixels", "backbone", "untrained")]:
        raise ValueError(f"layers: expected other names than those of the rows: got {_checks.names(taken)}")
    return {n: there[n] for n in names}


def stages(backbone: nn.Module, images: Tensor, run: Callable[[Tensor], Any]) -> dict[str, nn.Module]:
    """A backbone's own stages: up to STAGES layers, in the order in which they run.

    timm's models say what their stages are (`feature_info`). Otherwise a stage is the last module at each resolution,
    and where the resolution stays the same, as in a transformer, stages are spread over its blocks.

    Args:
        images: two of them.
        run: what calls the backbone.
    """
    modules = {n: m for n, m in backbone.named_modules() if n}
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            found = first_tensor(output)
            shapes.setdefault(name, []).append(() if found is None else tuple(found.shape))

        return note

    handles = [m.register_forward_hook(keep(n)) for n, m in modules.items()]
    try:
        run(images)
    finally:
        for handle in handles:
            handle.remove()
    once = {n: s[0] for n, s in shapes.items() if len(s) == 1 and positions(s[0]) > 1}
    chosen = _said_by_timm(backbone, once) or _by_resolution(once)
    taken = ("pixels", "backbone", "untrained")
    return {own: modules[n] for n in chosen if (own := _own_name(n, backbone)) not in taken}


def positions(shape: Sequence[int]) -> int:
    """How many places a map or a sequence of tokens has; 0 for anything else."""
    if len(shape) == 3:
        return shape[1]
    if len(shape) != 4:
        return 0
    last = shape[1] == shape[2] != shape[3]
    return shape[1] * shape[2] if last else shape[2] * shape[3]


def _said_by_timm(backbone: nn.Module, once: Mapping[str, Sequence[int]]) -> list[str]:
    info = getattr(getattr(backbone, "model", None), "feature_info", None)
    entries = getattr(info, "info", info) or ()
    names = [f"model.{entry.get('module')}" for entry in entries if isinstance(entry, dict)]
    return _spread([n for n in names if n in once])


def _by_resolution(once: Mapping[str, Sequence[int]]) -> list[str]:
    last: dict[int, str] = {}
    for name, shape in once.items():  # in the order in which they end: what holds others ends after them
        last.pop(positions(shape), None)
        last[positions(shape)] = name
    if len(last) >= 3:
        return list(last.values())[-STAGES:]
    blocks: dict[tuple[str, int], list[str]] = {}
    for name, shape in once.items():
        blocks.setdefault((name.rpartition(".")[0], positions(shape)), []).append(name)
    longest = max(blocks.values(), key=len, default=[])
    return _spread(longest) if len(longest) >= 3 else list(last.values())[-STAGES:]


def _spread(names: list[str]) -> list[str]:
    """Up to STAGES of them: the last ones of a few, evenly spaced ones of many, with the last."""
    if len(names) <= 2 * STAGES - 2:
        return names[-STAGES:]
    return [names[math.ceil((k + 1) * len(names) / STAGES) - 1] for k in range(STAGES)]


def _own_name(name: str, backbone: nn.Module) -> str:
    return name.removeprefix("model.") if isinstance(backbone, TimmFeatures) else name
