"""Structured views: what each key shares with its query, and what it redraws.

    view 0        the query, parameters theta
    view 1        the content key: every group redrawn
    view 1 + m    the key of style m: group m's parameters are the query's, every other group is redrawn

Operations are Kornia's; drawing and applying are kept apart, so that sharing is exact and a view can be replayed.
Legend: V views, B images, M groups. Source: Eastwood et al., arXiv 2311.08815, structured augmentations; cross-image
keys are this project's own (docs/method.md).
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import kornia.augmentation as K
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from ssd_addon import _checks
from ssd_addon._draws import Draws, Parameters, clone, merged, take
from ssd_addon._operations import PREFIX, apply_operation, prefixed, run, stage_of, unprefixed
from ssd_addon.batch import ViewBatch, ViewParameters, ViewPlan

Groups = Mapping[str, Sequence[nn.Module]]
THEN = "then"
INDEPENDENT = -1  # in the place of a rank: no draw of the training is repeated
RANGE_SLACK = 1e-6
"""How far outside [0, 1] the rounding of a resize may take a pixel."""


class StructuredViews(nn.Module):
    """Images -> structured views, on the images' device.

    >>> views = StructuredViews({"color": [K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8)],
    ...                          "spatial": [K.RandomHorizontalFlip()]}, seed=0)
    >>> batch = views(torch.rand(4, 3, 16, 16))
    >>> batch.views.shape, batch.plan.spaces
    (torch.Size([4, 4, 3, 16, 16]), ('content', 'color', 'spatial'))
    >>> hue = [p["color"]["0.ColorJitter"]["hue_factor"] for p in batch.parameters]
    >>> torch.equal(hue[2], hue[0]), torch.equal(hue[1], hue[0])  # the color key shares them, the content key does not
    (True, False)

    Args:
        groups: name -> Kornia operations, applied in the order given. Every group gets a style space of its name.
            `{}` is ordinary two-view SSL.
        then: operations that are redrawn for every view and image and belong to no group (a final blur, Normalize).
        plan: "shared_query" (V = M + 2) or "interleaved" (V = 2).
        key_groups, key_then: other operations for the keys, by group. A key that shares a group runs the query's.
        cross_image: groups whose key is made from another image of the batch (m rows away).
        constrained_crop: a: the key of a style whose group holds no crop is cropped near the query's box, its area
            a factor of 1 - a to 1 + a of the query's, its centre inside it.
        seed: of the draws; None takes one from torch's global generator, as layers do. Every rank, data-loader worker
            and call draws anew.
        rank: of this process; None asks torch.distributed, then the environment variable RANK, then 0.

    Every draw is per image. Draws made for a whole batch are made per image (the order of ColorJitter and ColorJiggle,
    on/off gates of whole batches, any other by drawing and applying image by image). The global generator is left as
    it was. Views are augmented in float32, outside autocast; on the CPU view by view, on other devices in one pass.

    Raises:
        TypeError, ValueError: no Kornia 2-D operation; one that is shared by the batch (same_on_batch=True), mixes
            images, or draws while it is applied; images that are not [B, C, H, W] in [0, 1] or uint8.
    """

    def __init__(
        self,
        groups: Groups,
        *,
        then: Sequence[nn.Module] = (),
        plan: str = "shared_query",
        key_groups: Groups | None = None,
        key_then: Sequence[nn.Module] | None = None,
        cross_image: Sequence[str] = (),
        constrained_crop: float | None = None,
        seed: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(groups, Mapping):
            raise TypeError(f"groups: expected a mapping name -> operations: got {type(groups).__name__}")
        for name in groups:
            if name in ("content", THEN):
                raise ValueError(f"groups: {name!r} is taken; name the group after what it changes, such as 'color'")
        _checks.choice(plan, ("shared_query", "interleaved"), "plan")
        spaces = ("content", *groups)
        self.plan = ViewPlan(plan, spaces)
        for name in key_groups or {}:
            if name not in groups:
                raise ValueError(f"key_groups: expected names of groups ({_checks.names(groups)}): got {name!r}")
        query = {name: stage_of(ops, f"group {name!r}") for name, ops in groups.items()}
        query[THEN] = stage_of(then, "then", empty=True)
        key = {name: stage_of(ops, f"key_groups[{name!r}]") for name, ops in (key_groups or {}).items()}
        if key_then is not None:
            key[THEN] = stage_of(key_then, "key_then", empty=True)
        self.query, self.key = nn.ModuleDict(prefixed(query)), nn.ModuleDict(prefixed(key))
        self.stages = (*groups, THEN)
        if isinstance(cross_image, str) or not isinstance(cross_image, Iterable):
            raise TypeError(f"cross_image: expected a sequence of group names: got {cross_image!r}")
        cross_image = tuple(cross_image)  # an iterator is read once
        for name in cross_image:
            if name not in groups:
                raise ValueError(f"cross_image: expected names of groups ({_checks.names(groups)}): got {name!r}")
        self.cross_image = cross_image
        self.constrained_crop = constrained_crop
        if constrained_crop is not None:
            if not 0 <= constrained_crop < 1:
                raise ValueError(f"constrained_crop: expected a from 0 to below 1: got {constrained_crop!r}")
            if not any(_crops(stage) for name, stage in query.items() if name != THEN):
                raise ValueError("constrained_crop: expected a RandomResizedCrop in some group: got none to constrain")
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        self.seed, self._rank, self.call = int(seed), rank, 0

    # ------------------------------------------------------------------------------------------------ calling

    @torch.no_grad()
    def forward(self, images: Tensor) -> ViewBatch:
        """Views of a batch of images [B, C, H, W], uint8 or floating point in [0, 1]."""
        x = _unit_images(images)
        b = x.shape[0]
        index = self.plan.default_space_index(b) if self.plan.kind == "interleaved" else None
        sources, ids = self._sources(b, index)
        draw = Draws((self.seed, self.rank, _worker_seed(), self.call))
        self.call += 1
        v = self.plan.num_views
        with torch.autocast(x.device.type, enabled=False):
            inputs = [x if s is None else x[s.to(x.device)] for s in sources]
            if x.device.type == "cpu" or self.key:
                out, parameters = self._view_by_view(inputs, draw, index)
            else:
                out, parameters = self._one_pass(inputs, draw, index)
        if len({tuple(o.shape) for o in out}) > 1:
            raise ValueError(f"all views must have one size: got {_checks.names(_checks.shape(o) for o in out)}")
        assert len(out) == v
        return ViewBatch(
            torch.stack(out),
            self.plan,
            image_ids=None if ids is None else ids.to(x.device),
            space_index=None if index is None else index.to(x.device),
            parameters=parameters,
        )

    @torch.no_grad()
    def apply(self, images: Tensor, parameters: ViewParameters | Mapping[str, Any]) -> Tensor:  # type: ignore[override]
        """The pixels of one view again: `views.apply(images, batch.parameters[v])` equals `batch[v]`.

        Args:
            images: [B, C, H, W], those that the view was made from (for a cross-image key, images[batch.image_ids[v]]).
            parameters: one entry of `ViewBatch.parameters`.
        """
        if callable(images):  # nn.Module.apply(fn), which initialisers use
            return super().apply(images)  # type: ignore[return-value]
        x = _unit_images(images)
        from_key = getattr(parameters, "from_key", {})
        _checks.same_names(parameters, self.stages, "parameters", "views")
        with torch.autocast(x.device.type, enabled=False):
            for name in self.stages:
                queried = self._operations(name, False)
                mask = from_key.get(name)
                x = self._apply_stage(name, queried, x, parameters[name], mask)
        return x

    @torch.no_grad()
    def independent(self, images: Tensor, *, seed: int | tuple[int, ...] = 0) -> ViewBatch:
        """Two views of each image that share nothing, both by the query's operations; for probes of the parameters.

        The draws come from `seed` alone (and this module's): the same views at every call, on every rank, and the
        draws of training go on as if nothing had happened. `.parameters` holds both views', as ever.

        Args:
            images: [B, C, H, W], uint8 or floating point in [0, 1].
            seed: a number, or several.
        """
        x = _unit_images(images)
        draw = Draws((self.seed, INDEPENDENT, *(seed if isinstance(seed, tuple) else (seed,))))
        out, drawn = [], []
        with torch.autocast(x.device.type, enabled=False):
            for view in range(2):
                y, mine = x, ViewParameters()
                for i, stage in enumerate(self.stages):
                    mine[stage] = {}
                    for name, op in self._operations(stage, False).items():
                        key = unprefixed(name)
                        mine[stage][key] = draw(op, tuple(y.shape), (view, i, int(key.split(".")[0])))
                        y = apply_operation(stage, key, op, y, mine[stage][key])
                out.append(y)
                drawn.append(mine)
        return ViewBatch(torch.stack(out), ViewPlan.shared_query(("content",)), parameters=drawn)

    @torch.no_grad()
    def plain(self, images: Tensor) -> Tensor:
        """Whole images as the model knows them: scaled to [0, 1], with the Normalize of `then` and nothing drawn."""
        x = _unit_images(images)
        for op in self._operations(THEN, False).values():
            if isinstance(op, K.Normalize):
                x = op(x)
        return x

    @property
    def rank(self) -> int:
        """The rank that the draws are made for."""
        if self._rank is not None:
            return self._rank
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank()
        return int(os.environ.get("RANK", 0))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """(seed, call): rank 0's restores every rank, as the rank enters each draw by itself."""
        return {"seed": self.seed, "call": self.call}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        if set(state) != {"seed", "call"}:
            raise ValueError(f"StructuredViews state: expected seed and call: got {_checks.names(state)}")
        self.seed, self.call = int(state["seed"]), int(state["call"])

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_rank"] = self.rank  # a spawned data-loader worker knows no process group
        return state

    def extra_repr(self) -> str:
        return (
            f"{self.plan}, cross_image={self.cross_image}, constrained_crop={self.constrained_crop}, seed={self.seed}"
        )

    # ------------------------------------------------------------------------------------------------ plan

    def _sources(self, b: int, index: Tensor | None) -> tuple[list[Tensor | None], Tensor | None]:
        """Which image each row of each view is made from: [B] per view or None for its own; ids [V, B] or None."""
        v = self.plan.num_views
        if not self.cross_image:
            return [None] * v, None
        own = torch.arange(b)
        ids = own.repeat(v, 1)
        for name in self.cross_image:
            m = self.plan.spaces.index(name)
            rows = own if index is None else torch.nonzero(index == m).flatten()
            if len(rows) == 0:
                continue
            if len(rows) == 1:
                raise ValueError(
                    f"cross_image: the key of {name!r} is made from another image: got a single image that serves it "
                    f"in a batch of {b}"
                )
            shift = m
            while shift % len(rows) == 0:
                shift += 1
            ids[1 if index is not None else 1 + m, rows] = rows.roll(shift)
        sources = [None if torch.equal(row, own) else row for row in ids]
        return sources, ids

    def _shared_rows(self, view: int, stage: str, b: int, index: Tensor | None) -> bool | Tensor:
        """Which rows of a view take this group's parameters from the query: all, none, or a mask [B]."""
        if view == 0 or stage == THEN:
            return False
        m = self.plan.spaces.index(stage)
        if index is not None:
            return index == m
        return view == 1 + m

    def _operations(self, stage: str, from_key: bool) -> nn.ModuleDict:
        name = PREFIX + stage
        return self.key[name] if from_key and name in self.key else self.query[name]  # type: ignore[return-value]

    # ------------------------------------------------------------------------------------------------ drawing

    def _view_by_view(
        self, inputs: list[Tensor], draw: Draws, index: Tensor | None
    ) -> tuple[list[Tensor], list[ViewParameters]]:
        out: list[Tensor] = []
        drawn: list[ViewParameters] = []
        for view, x in enumerate(inputs):
            mine = ViewParameters()
            for stage in self.stages:
                b = x.shape[0]
                shared = self._shared_rows(view, stage, b, index)
                keyed = view > 0 and (PREFIX + stage) in self.key
                query_ops = self._operations(stage, False)
                if shared is True:
                    parameters = {op: clone(p) for op, p in drawn[0][stage].items()}
                    x = run(stage, query_ops, x, parameters)
                elif not keyed:
                    x, parameters = self._draw_and_run(stage, query_ops, x, draw, view, drawn, shared)
                elif shared is False:
                    x, parameters = self._draw_and_run(
                        stage, self._operations(stage, True), x, draw, view, drawn, False
                    )
                    mine.from_key[stage] = torch.ones(b, dtype=torch.bool)
                else:
                    # Interleaved with operations of the key's own: the rows of this group run the query's.
                    key_ops = self._operations(stage, True)
                    _, parameters = self._draw_and_run(stage, key_ops, x, draw, view, drawn, False)
                    parameters = merged(stage, parameters, drawn[0][stage], shared)
                    mine.from_key[stage] = ~shared  # type: ignore[operator]
                    x = self._apply_stage(stage, query_ops, x, parameters, mine.from_key[stage])
                mine[stage] = parameters
            out.append(x)
            drawn.append(mine)
        return out, drawn

    def _one_pass(
        self, inputs: list[Tensor], draw: Draws, index: Tensor | None
    ) -> tuple[list[Tensor], list[ViewParameters]]:
        """All views as one batch of V*B images; the same draws as view by view."""
        v, b = len(inputs), inputs[0].shape[0]
        x = torch.cat(inputs)
        drawn = [ViewParameters({stage: {} for stage in self.stages}) for _ in range(v)]
        for stage in self.stages:
            for name, op in self._operations(stage, False).items():
                key = unprefixed(name)
                for view in range(v):
                    parameters = self._draw(stage, key, op, (b, *x.shape[1:]), draw, view, drawn)
                    shared = self._shared_rows(view, stage, b, index)
                    if shared is not False:
                        parameters = take(parameters, drawn[0][stage][key], shared, f"{stage}: {key}")
                    drawn[view][stage][key] = parameters
                together = {p: torch.cat([d[stage][key][p] for d in drawn]) for p in drawn[0][stage][key]}
                x = apply_operation(stage, key, op, x, together)
        return list(x.split(b)), drawn

    def _draw_and_run(
        self,
        stage: str,
        operations: nn.ModuleDict,
        x: Tensor,
        draw: Draws,
        view: int,
        drawn: list[ViewParameters],
        shared: bool | Tensor,
    ) -> tuple[Tensor, dict[str, Parameters]]:
        parameters: dict[str, Parameters] = {}
        for name, op in operations.items():
            key = unprefixed(name)
            p = self._draw(stage, key, op, tuple(x.shape), draw, view, drawn)
            if shared is not False:
                p = take(p, drawn[0][stage][key], shared, f"{stage}: {key}")
            parameters[key] = p
            x = apply_operation(stage, key, op, x, p)
        return x, parameters

    def _draw(
        self,
        stage: str,
        key: str,
        op: nn.Module,
        shape: tuple[int, ...],
        draw: Draws,
        view: int,
        drawn: list[ViewParameters],
    ) -> Parameters:
        place = (view, self.stages.index(stage), int(key.split(".")[0]))
        parameters = draw(op, shape, place)
        if self.constrained_crop is not None and stage != THEN and isinstance(op, K.RandomResizedCrop):
            parameters = self._constrain(stage, key, op, parameters, shape, draw, place, view, drawn)
        return parameters

    def _constrain(
        self,
        stage: str,
        key: str,
        op: Any,
        parameters: Parameters,
        shape: tuple[int, ...],
        draw: Draws,
        place: tuple[int, ...],
        view: int,
        drawn: list[ViewParameters],
    ) -> Parameters:
        """Near the query's box, for the keys of styles whose group holds no crop."""
        b = shape[0]
        spaces = self.plan.spaces
        free = torch.tensor(
            [s == 0 or any(_is_crop(o) for o in self._operations(n, False).values()) for s, n in _numbered(spaces)]
        )
        if view == 0:
            return parameters
        if self.plan.kind == "interleaved":
            rows = ~free[self.plan.default_space_index(b)]
        else:
            rows = torch.full((b,), view >= 1 and not bool(free[view - 1]))
        if not rows.any() or key not in drawn[0].get(stage, {}):
            return parameters
        near = draw.near(drawn[0][stage][key]["src"], self.constrained_crop or 0.0, op, shape, place)
        src = parameters["src"]
        return parameters | {"src": torch.where(rows[:, None, None], near.to(src.dtype), src)}

    def _apply_stage(
        self, stage: str, query_ops: nn.ModuleDict, x: Tensor, parameters: dict[str, Parameters], mask: Tensor | None
    ) -> Tensor:
        """Apply a group; the rows of `mask` run the key's operations."""
        if mask is None or not bool(mask.any()):
            return run(stage, query_ops, x, parameters)
        key_ops = self._operations(stage, True)
        if bool(mask.all()):
            return run(stage, key_ops, x, parameters)
        parts = {}
        for ops, rows in ((query_ops, torch.nonzero(~mask).flatten()), (key_ops, torch.nonzero(mask).flatten())):
            some = {op: {k: t[rows.to(t.device)] for k, t in p.items()} for op, p in parameters.items()}
            parts[ops] = (rows.to(x.device), run(stage, ops, x[rows.to(x.device)], some))
        (i, a), (j, c) = parts.values()
        if a.shape[1:] != c.shape[1:]:
            raise ValueError(
                f"{stage}: query and key must come out at one size: got {_checks.shape(a)}, {_checks.shape(c)}"
            )
        out = a.new_empty((x.shape[0], *a.shape[1:]))
        out[i], out[j] = a, c
        return out


def _is_crop(op: nn.Module) -> bool:
    return isinstance(op, K.RandomResizedCrop | K.RandomCrop)


def _crops(stage: nn.ModuleDict) -> bool:
    return any(isinstance(op, K.RandomResizedCrop) for op in stage.values())


def _numbered(spaces: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(0, any group) for content, whose entry is not looked at, then (m, group m)."""
    return ((s, n if s else (spaces[1] if len(spaces) > 1 else THEN)) for s, n in enumerate(spaces))


def _worker_seed() -> int:
    info = get_worker_info()
    return 0 if info is None else int(info.seed)


def _unit_images(images: Tensor) -> Tensor:
    """[B, C, H, W] float32 in [0, 1]."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor [B, C, H, W]: got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"images: expected [B, C, H, W]: got {images.ndim} dimensions {_checks.shape(images)}")
    if 0 in images.shape:
        raise ValueError(f"images: expected at least one image with pixels: got {_checks.shape(images)}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise TypeError(f"images: expected uint8, or floating point in [0, 1]: got {images.dtype}")
    low, high = (float(v) for v in torch.aminmax(images.detach()))
    if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
        what = "NaN among them" if math.isnan(low) else f"values from {low:.4g} to {high:.4g}"
        raise ValueError(
            f"images: expected values in [0, 1], as the operations clamp to that range: got {what}; scale them "
            "(uint8 images are scaled for you) and put Normalize into `then`"
        )
    return images.float()
