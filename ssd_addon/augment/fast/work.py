"""Computes all views of a batch on the fast path.

Samples with the same steps form a lane: one lane for all views, or two if keys have their own operations, one for the
query's operations and one for the keys'. A lane is a list of segments, each of which runs several steps at once;
unsupported operations run by themselves. Samples go through the segments in parts small enough for the cache.
Legend: V views, B images, N samples of a lane.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.augment.fast import blur, geometry
from ssd_addon.augment.fast.geometry import Placement
from ssd_addon.augment.fast.segments import Blur, Colors, Geometry, fires, segments
from ssd_addon.augment.stages import Stage, Step
from ssd_addon.batch import ViewParameters
from ssd_addon.kernels import colors as chain
from ssd_addon.kernels.colors import Chain
from ssd_addon.operations.draws import Parameters, pick

PART = 2**20
"""Pixel values in a part, for each thread that torch uses inside an operation."""


class Lane:
    """Samples with the same steps.

    Args:
        stages: name -> steps for these samples, in order.
        channels: number of channels of the images.
    """

    def __init__(self, stages: Mapping[str, Sequence[Step]], channels: int) -> None:
        self.steps = [(name, step) for name, steps in stages.items() for step in steps]
        self.segments = segments([step for _, step in self.steps], channels)

    def __str__(self) -> str:
        parts = []
        for s in self.segments:
            names = ", ".join(f"{self.steps[i][0]}/{self.steps[i][1].key}" for i in s.steps)
            parts.append(f"{type(s).__name__.lower() if s.fast else 'as it is'}: {names}")
        return "; ".join(parts) or "nothing"

    def run(
        self,
        source: Tensor,
        index: Tensor,
        parameters: Sequence[Parameters],
        out: "Views",
        rows: Tensor,
        views: list[int],
    ) -> None:
        """Compute the samples of this lane.

        Args:
            source: [S, C, H, W] uint8, or float32 in [0, 1].
            index: [N] source image of each sample.
            parameters: parameters of each step, for N samples.
            out: receives the pixels.
            rows: [N] positions of the samples in `out`.
            views: number of samples that belong to the first view, to the second, ...
        """
        n, begins = len(index), self.segments
        place, moved = Placement.whole(n, (source.shape[-2], source.shape[-1])), 0
        if begins and isinstance(begins[0], Geometry):
            place, moved = self._placed(begins[0], place, parameters), 1
        tables = {
            k: Chain.of([c for i, f in zip(s.steps, s.columns, strict=False) for c in f(parameters[i])])
            for k, s in enumerate(begins)
            if isinstance(s, Colors) and s.columns
        }
        threads = torch.get_num_threads() if source.device.type == "cpu" else 512
        most = max(1, PART * threads // (source.shape[1] * place.size[0] * place.size[1]))

        def make(part: Tensor) -> None:
            x = geometry.pixels(place.rows(part), source, index[part])
            for k in range(moved, len(begins)):
                x = self._through(k, x, part, parameters, tables.get(k))
            out.put(x, rows[part])

        if all(s.fast for s in begins):
            order = torch.arange(n) if not tables else next(iter(tables.values())).alike()
            for part in order.split(most):
                make(part)
        else:  # unsupported operations always get the samples of one view, so that a replay is bitwise equal
            for part in torch.arange(n).split(views):
                make(part)

    def _placed(
        self, segment: Geometry, place: Placement, parameters: Sequence[Parameters] | Mapping[int, Parameters]
    ) -> Placement:
        for i, move in zip(segment.steps, segment.moves, strict=True):
            try:
                place = move(place, parameters[i])
            except ValueError as error:
                raise self._named(i, error) from error
        return place

    def _through(
        self, k: int, x: Tensor, part: Tensor, parameters: Sequence[Parameters], table: Chain | None
    ) -> Tensor:
        segment = self.segments[k]
        if isinstance(segment, Geometry):
            drawn = {i: pick(parameters[i], part) for i in segment.steps}
            place = self._placed(segment, Placement.whole(len(part), (x.shape[-2], x.shape[-1])), drawn)
            return geometry.pixels(place, x, torch.arange(len(part)))
        if isinstance(segment, Colors):
            none = torch.zeros(len(part), 0, dtype=torch.int64)
            some = Chain(none, none[:, :, None].expand(-1, -1, 4).float()) if table is None else table.rows(part)
            if segment.clamped:
                changed = torch.nonzero(some.fires()).flatten().to(x.device)
                x[changed] = x[changed].clamp(0, 1)
            return chain.run(some, x, segment.ends)
        p = pick(parameters[segment.steps[0]], part)
        step = self.steps[segment.steps[0]][1]
        if isinstance(segment, Blur):
            rows = torch.nonzero(fires(p)).flatten()
            if len(rows):
                least = (segment.size[0] // 2, segment.size[1] // 2)
                if segment.border == "reflect" and not (x.shape[-2] > least[0] and x.shape[-1] > least[1]):
                    return step.apply(x, p)  # which raises the operation's own error
                blur.blur(x, rows, p["sigma"][rows], segment.size, segment.border)
            return x
        return step.apply(x, p).contiguous()

    def _named(self, i: int, error: Exception) -> ValueError:
        name, step = self.steps[i]
        return ValueError(f"{name}: {step.key} could not be applied: {error}")


class Views:
    """The pixels of all views, [V * B, ...], filled in any order."""

    def __init__(self, rows: int) -> None:
        self.rows, self.pixels = rows, None

    pixels: Tensor | None

    def put(self, x: Tensor, rows: Tensor) -> None:
        if self.pixels is None:
            self.pixels = x.new_empty((self.rows, *x.shape[1:]))
        if self.pixels.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"views: expected all of one size: got {_checks.shape(self.pixels[0])} and {_checks.shape(x[0])}"
            )
        chain.put(self.pixels, rows, x)


class Fast:
    """The fast path for a set of stages."""

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self.stages = stages
        self.lanes: dict[tuple[tuple[bool, ...], int], Lane] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"lanes": {}}

    def lane(self, from_key: tuple[bool, ...], channels: int) -> Lane:
        """The lane of samples that run the key's operations in the stages where `from_key` is true."""
        if (from_key, channels) not in self.lanes:
            steps = {s.name: s.steps(k) for s, k in zip(self.stages.values(), from_key, strict=True)}
            self.lanes[from_key, channels] = Lane(steps, channels)
        return self.lanes[from_key, channels]

    def plan(self, channels: int) -> list[str]:
        """One line per lane: which operations are combined, and which run by themselves."""
        none = (False,) * len(self.stages)
        keyed = tuple(s.key is not None for s in self.stages.values())
        lines = [f"query: {self.lane(none, channels)}"]
        return lines + ([f"keys: {self.lane(keyed, channels)}"] if any(keyed) else [])

    def make(self, images: Tensor, sources: Sequence[Tensor | None], parameters: Sequence[ViewParameters]) -> Tensor:
        """All views [V, B, C, H, W] of images [S, C, H, W], uint8 or float32 in [0, 1].

        Args:
            sources: for each view the source image of each sample [B], or None if each is its own.
            parameters: parameters of each view.
        """
        v, b = len(parameters), len(images if sources[0] is None else sources[0])
        if images.device.type == "cpu" and images.dtype == torch.uint8:
            images = images.contiguous(memory_format=torch.channels_last)
        own = torch.arange(b)
        out = Views(v * b)
        for from_key, views in self._rows(parameters, b).items():
            lane = self.lane(from_key, images.shape[1])
            index = torch.cat([own[r] if s is None else s[r] for r, s in zip(views, sources, strict=True)])
            used = [(p, r) for p, r in zip(parameters, views, strict=True) if len(r)]
            drawn = [_joined([(p[name][step.key], r) for p, r in used], b) for name, step in lane.steps]
            places = torch.cat([k * b + r for k, r in enumerate(views)])
            lane.run(images, index, drawn, out, places, [len(r) for r in views if len(r)])
        assert out.pixels is not None
        return out.pixels.view(v, b, *out.pixels.shape[1:])

    def _rows(self, parameters: Sequence[ViewParameters], b: int) -> dict[tuple[bool, ...], list[Tensor]]:
        """The samples of each view, grouped by the stages in which they run the key's operations."""
        out: dict[tuple[bool, ...], list[Tensor]] = {}
        for v, p in enumerate(parameters):
            flags = torch.zeros(b, len(self.stages), dtype=torch.bool)
            for k, stage in enumerate(self.stages.values()):
                if stage.key is not None and stage.name in p.from_key:
                    flags[:, k] = p.from_key[stage.name]
            for kind in flags.unique(dim=0):
                rows = torch.nonzero((flags == kind).all(dim=1)).flatten()
                empty = [torch.empty(0, dtype=torch.int64) for _ in parameters]
                out.setdefault(tuple(kind.tolist()), empty)[v] = rows
        return out


def _joined(values: Sequence[tuple[Parameters, Tensor]], b: int) -> Parameters:
    """The parameters of the selected samples of each view, concatenated."""
    first = values[0][0]
    return {k: torch.cat([p[k] if len(r) == b else p[k][r] for p, r in values]) for k in first}
