"""`ViewBatch`: structured views of a batch of images, with the augmentation parameters of each view.

V views of B images; S = 1 + M spaces (content, then one style space per group of augmentations). A `ViewBatch` comes
from `StructuredViews` or from your own loader; `StyleHeads` and, together with the embeddings, the loss take it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon._pytree import Beside, register, restored
from ssd_addon.plan import ViewPlan, check_ids

Rows = Tensor | slice | Sequence[int]
_Map = Callable[[Tensor], Tensor]


FROM_KEY = "<from_key>"
"""Where a dictionary of parameters, as a transform returns it for one sample, holds `ViewParameters.from_key`."""


class ViewParameters(dict[str, dict[str, dict[str, Tensor]]]):
    """The augmentation parameters of one view: group -> "0.ColorJitter" -> parameter -> [B, ...].

    `from_key` records which images ran the key's own operations of a group (`key_groups`): group -> [B] bool; the group
    is absent if all images ran the query's. `StructuredViews.replay` needs it to recompute a view.
    """

    def __init__(
        self, items: Mapping[str, dict[str, dict[str, Tensor]]] | None = None, *, from_key: Mapping[str, Tensor] = {}
    ) -> None:
        super().__init__(items or {})
        there = self.pop(FROM_KEY, {}).get("", {})
        self.from_key: dict[str, Tensor] = {**there, **from_key}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_view_parameters, (dict(self), self.from_key))

    def map(self, f: _Map) -> "ViewParameters":
        """Apply f to every parameter tensor."""
        moved = {k: f(t) for k, t in self.from_key.items()}
        return ViewParameters(_mapped(dict(self), f), from_key=moved)


def stacked(views: Any) -> tuple[Any, tuple[int, int]]:
    """Views as one tensor [V, B, ...], or as a list of V tensors [B, ...] if their sizes differ; and (V, B)."""
    if isinstance(views, Tensor):
        if views.ndim < 3:
            raise ValueError(f"ViewBatch: expected views [V, B, ...]: got {_checks.shape(views)}")
        return views, (views.shape[0], views.shape[1])
    if not isinstance(views, Sequence) or not views or not all(isinstance(t, Tensor) and t.ndim > 1 for t in views):
        hint = ""
        if isinstance(views, list | tuple) and views and isinstance(views[0], Tensor | list | tuple | ViewBatch):
            hint = "; from a loader's batch (views, labels, names) pass the views, batch[0]"
        raise TypeError(
            f"views: expected a tensor [V, B, ...] or a list of V tensors [B, ...]: got {type(views).__name__}{hint}"
        )
    sizes = [len(t) for t in views]
    if len(set(sizes)) > 1:
        raise ValueError(f"views: expected the same number of images in every view: got {_checks.names(sizes)}")
    for t in views[1:]:
        if t.ndim != views[0].ndim or t.device != views[0].device:
            raise ValueError(
                f"views: expected the same number of dimensions and device: got {_checks.shape(views[0])} on "
                f"{views[0].device}, and {_checks.shape(t)} on {t.device}"
            )
    alike = all(t.shape == views[0].shape and t.dtype == views[0].dtype for t in views)
    return (torch.stack(list(views)) if alike else list(views)), (len(views), sizes[0])


def _each(views: Any, f: _Map) -> Any:
    return f(views) if isinstance(views, Tensor) else [f(t) for t in views]


def _view_parameters(items: dict[str, Any], from_key: dict[str, Tensor]) -> ViewParameters:
    return ViewParameters(items, from_key=from_key)


def _mapped(value: Any, f: _Map) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    return {k: _mapped(v, f) for k, v in value.items()} if isinstance(value, Mapping) else value


class ViewBatch:
    """Structured views of a batch of images.

    Attributes:
        views: [V, B, C, H, W] float (any sample shape: latents are [V, B, n]); a list of V tensors [B, ...] if views
            differ in size, as in multi-crop.
        plan: the `ViewPlan` that defines the positive pairs.
        image_ids: [V, B] int64, the source image of each view as a position in the local batch, or None if every view
            is of its own image. Over ranks the loss adds the sizes of the preceding shards.
        space_index: [B] int64, the space that each image serves in an interleaved plan, or None.
        parameters: V mappings group -> "0.ColorJitter" -> parameter -> [B, ...], and "then" likewise.

    Raises:
        ValueError: the number of views does not fit the plan; ids or index have the wrong shape.
        TypeError: ids or index are not integers.
    """

    views: Any

    def __init__(
        self,
        views: Tensor | Sequence[Tensor],
        plan: ViewPlan,
        *,
        image_ids: Tensor | None = None,
        space_index: Tensor | None = None,
        parameters: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.views, (v, b) = stacked(views)
        if v != plan.num_views:
            raise ValueError(f"{plan} need {plan.num_views} views: got {v} of {b} images")
        check_ids(plan, v, b, image_ids, space_index)
        self.plan = plan
        self.image_ids, self.space_index = image_ids, space_index
        self.parameters: tuple[Any, ...] = tuple(parameters)
        self.origin: tuple[int, ...] | None = None  # seed of the StructuredViews call that drew it
        self.local_ids = False  # True: the ids are positions in the local batch, to be offset by rank

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, view: int) -> Tensor:
        out: Tensor = self.views[view]
        return out

    @property
    def images(self) -> int:
        """B, the number of images in the batch."""
        return len(self.views[0])

    @property
    def device(self) -> torch.device:
        """The device of the views."""
        out: torch.device = self.views[0].device
        return out

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.views)

    @overload
    def to(self, device: str | torch.device | int, dtype: torch.dtype | None = None, *, non_blocking: bool = False) -> "ViewBatch": ...  # fmt: skip  # noqa: E501
    @overload
    def to(self, device: torch.dtype, *, non_blocking: bool = False) -> "ViewBatch": ...
    def to(
        self,
        device: str | torch.device | int | torch.dtype,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> "ViewBatch":
        """Move every tensor; a dtype applies to the views only, not to ids or parameters."""
        if isinstance(device, torch.dtype):
            views = _each(self.views, lambda t: t.to(device, non_blocking=non_blocking))
        else:
            views = _each(self.views, lambda t: t.to(device, dtype, non_blocking=non_blocking))
        there, mine = views[0].device, {id(t) for t in (self.views, *self.views)}
        moved = self.map(lambda t: t if id(t) in mine else t.to(there, non_blocking=non_blocking))
        moved.views = views
        return moved

    def pin_memory(self) -> "ViewBatch":
        """Copy the batch to page-locked memory, for a faster transfer to a GPU."""
        return self.map(lambda t: t.pin_memory())

    def map(self, f: _Map) -> "ViewBatch":
        """Apply f to every tensor: views, ids, index and parameters."""
        parameters = tuple(p.map(f) if isinstance(p, ViewParameters) else _mapped(p, f) for p in self.parameters)
        ids = None if self.image_ids is None else f(self.image_ids)
        index = None if self.space_index is None else f(self.space_index)
        return self._with(_each(self.views, f), ids, index, parameters)

    def rows(self, index: Rows) -> "ViewBatch":
        """Select images of the batch, with their views, ids, index and parameters; the plan stays the same.

        >>> batch = ViewBatch(torch.rand(3, 4, 2), ViewPlan.shared_query(("content", "color")))
        >>> batch.rows([2, 0]).views.shape
        torch.Size([3, 2, 2])

        Args:
            index: positions [n], a mask [B], or a slice. An image that is selected twice keeps one id.
        """
        b, device = self.images, self.device
        if isinstance(index, Tensor) and (index.ndim != 1 or (index.dtype == torch.bool and len(index) != b)):
            raise ValueError(f"rows: expected positions [n] or a mask [{b}]: got {_checks.shape(index)}")
        chosen = torch.arange(b)[index.cpu() if isinstance(index, Tensor) else index]

        def take(t: Tensor, axis: int = 0) -> Tensor:
            return t.index_select(axis, chosen.to(t.device))

        ids = self.image_ids
        if ids is None and len(chosen.unique()) < len(chosen):
            ids = torch.arange(b, device=device).expand(self.plan.num_views, b)
        parameters = tuple(p.map(take) if isinstance(p, ViewParameters) else _mapped(p, take) for p in self.parameters)
        return self._with(
            take(self.views, 1) if isinstance(self.views, Tensor) else _each(self.views, take),
            None if ids is None else take(ids, 1),
            None if self.space_index is None else take(self.space_index),
            parameters,
        )

    @classmethod
    def cat(cls, parts: Sequence["ViewBatch"]) -> "ViewBatch":
        """Concatenate batches along the image dimension; the inverse of splitting a batch with `rows`.

        Parts of the same `StructuredViews` call keep their ids; parts of different calls show different images, so
        their ids are renumbered consecutively.

        Raises:
            ValueError: no parts; parts with different plans; some parts have ids, an index or parameters and others
                have none.
        """
        if not parts:
            raise ValueError("ViewBatch.cat: expected at least one batch: got none")
        first = parts[0]
        for part in parts:
            if part.plan != first.plan:
                raise ValueError(f"ViewBatch.cat: expected batches of one plan: got {first.plan}, and {part.plan}")
            if (part.space_index is None) != (first.space_index is None) or bool(part.parameters) != bool(
                first.parameters
            ):
                raise ValueError(
                    "ViewBatch.cat: expected every batch to have an index and parameters, or none: got a mixture"
                )
        together = all(p.origin is not None and p.origin == first.origin for p in parts)
        out = first._with(
            _views_side_by_side(parts),
            _ids_side_by_side(parts, together),
            None
            if first.space_index is None
            else torch.cat([p.space_index for p in parts if p.space_index is not None]),
            tuple(_side_by_side(each) for each in zip(*(p.parameters for p in parts), strict=True)),
        )
        if not together:
            out.origin, out.local_ids = None, all(p.local_ids for p in parts)
        return out

    def _with(
        self, views: Any, image_ids: Tensor | None, space_index: Tensor | None, parameters: tuple[Any, ...]
    ) -> "ViewBatch":
        """A batch with the same plan and origin and other tensors, which are not checked again."""
        out = object.__new__(ViewBatch)
        out.plan, out.views, out.parameters = self.plan, views, parameters
        out.image_ids, out.space_index = image_ids, space_index
        out.origin, out.local_ids = self.origin, self.local_ids
        return out

    def __repr__(self) -> str:
        whole = isinstance(self.views, Tensor)
        shapes = _checks.shape(self.views) if whole else _checks.names(_checks.shape(t) for t in self.views)
        return f"ViewBatch(views={shapes} {self.views[0].dtype}, {self.plan})"


def _views_side_by_side(parts: Sequence[ViewBatch]) -> Any:
    if all(isinstance(p.views, Tensor) for p in parts):
        return torch.cat([p.views for p in parts], dim=1)
    return [torch.cat(list(each)) for each in zip(*(p.views for p in parts), strict=True)]


def _ids_side_by_side(parts: Sequence[ViewBatch], together: bool) -> Tensor | None:
    if all(p.image_ids is None for p in parts):
        return None
    out, first = [], 0
    for p in parts:
        v, b = len(p), p.images
        ids = torch.arange(b, device=p.device).expand(v, b) if p.image_ids is None else p.image_ids
        out.append(ids if together else ids + first)
        first += max(b, int(ids.max()) + 1) if b else 0
    return torch.cat(out, dim=1)


def _side_by_side(values: Sequence[Any]) -> Any:
    """Concatenate the parameters of one view over all parts."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    joined = {k: _side_by_side([v[k] for v in values]) for k in first}
    if not isinstance(first, ViewParameters):
        return joined
    return ViewParameters(joined, from_key={k: _side_by_side([v.from_key[k] for v in values]) for k in first.from_key})


# ---- frameworks traverse a batch as a pytree: views, ids and index are leaves. Parameters are not, as a function that
# is mapped over a batch, such as x * 2 - 1, is meant for pixels.


def _flatten_batch(b: ViewBatch) -> tuple[list[Any], Any]:
    ids = [t for t in (b.image_ids, b.space_index) if t is not None]
    return [b.views, *ids], (b.plan, b.local_ids, Beside(b.image_ids, b.space_index), Beside(*b.parameters))


def _unflatten_batch(children: Any, static: Any) -> ViewBatch:
    views, *ids = children
    out = object.__new__(ViewBatch)
    out.plan, out.local_ids, kept, parameters = static
    out.views, out.parameters, out.origin = views, parameters.items, None
    out.image_ids, out.space_index = (None if k is None else restored(ids.pop(0), k) for k in kept.items)
    return out


register(ViewBatch, _flatten_batch, _unflatten_batch)


# ---- inputs of a model


def views_of(x: Any) -> Any:
    """Views as one tensor, or as a list if their sizes differ; a plain batch is returned unchanged."""
    if isinstance(x, ViewBatch):
        return x.views
    if isinstance(x, list | tuple):
        return stacked(x)[0]
    if not isinstance(x, Tensor):
        hint = "; views(cropped) makes a ViewBatch of crops" if type(x).__name__ == "Cropped" else ""
        raise TypeError(f"expected a ViewBatch, a tensor of images or a list of views: got {type(x).__name__}{hint}")
    return x


def is_plain(views: Tensor | Sequence[Tensor], given: Any, sample_ndim: int) -> bool:
    """True for samples [B, ...], False for views [V, B, ...]; refuses anything else."""
    for t in (views,) if isinstance(views, Tensor) else views:
        if not t.is_floating_point():
            raise TypeError(
                f"expected floating-point images: got {t.dtype}; StructuredViews scales uint8 images, otherwise "
                "divide by 255"
            )
        dimensions = t.ndim if isinstance(views, Tensor) else t.ndim + 1
        if dimensions != sample_ndim + 2 and (dimensions != sample_ndim + 1 or not isinstance(given, Tensor)):
            raise ValueError(
                f"expected views with {sample_ndim + 2} dimensions [V, B, ...] or a batch with {sample_ndim + 1}, as "
                f"samples have {sample_ndim} (sample_ndim): got {t.ndim} dimensions {_checks.shape(t)}"
            )
    return isinstance(views, Tensor) and views.ndim == sample_ndim + 1
