"""Structured views of a batch of images, and how each of them was drawn.

V views of B images; S = 1 + M spaces (content, then one style space per group of augmentations). A `ViewBatch` comes
from `StructuredViews` or from your own loader and goes to `StyleHeads` and, beside the embeddings, to the loss.
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


class ViewParameters(dict[str, dict[str, dict[str, Tensor]]]):
    """How one view was drawn: group -> "0.ColorJitter" -> parameter -> [B, ...].

    `from_key` says which rows of a group ran the key's own operations (`key_groups`): group -> [B] bool, or absent
    where all rows ran the query's. `StructuredViews.replay` needs it to make a view again.
    """

    def __init__(
        self, items: Mapping[str, dict[str, dict[str, Tensor]]] | None = None, *, from_key: Mapping[str, Tensor] = {}
    ) -> None:
        super().__init__(items or {})
        self.from_key: dict[str, Tensor] = dict(from_key)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_view_parameters, (dict(self), self.from_key))

    def map(self, f: _Map) -> "ViewParameters":
        """The same parameters with f applied to every tensor."""
        moved = {k: f(t) for k, t in self.from_key.items()}
        return ViewParameters(_mapped(dict(self), f), from_key=moved)


def _view_parameters(items: dict[str, Any], from_key: dict[str, Tensor]) -> ViewParameters:
    return ViewParameters(items, from_key=from_key)


def _mapped(value: Any, f: _Map) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    return {k: _mapped(v, f) for k, v in value.items()} if isinstance(value, Mapping) else value


class ViewBatch:
    """Structured views of a batch of images.

    Attributes:
        views: [V, B, C, H, W] float (any sample shape: latents are [V, B, n]).
        plan: the `ViewPlan` that says which views are a pair.
        image_ids: [V, B] int64, the image that each view was made from, or None where it is the row. Row numbers of
            the local batch; over ranks the loss adds the sizes of the shards before.
        space_index: [B] int64, the space of each row (interleaved), or None.
        parameters: V mappings group -> "0.ColorJitter" -> parameter -> [B, ...], and "then" likewise.

    Raises:
        ValueError: views whose number does not fit the plan; ids or index of another shape.
        TypeError: ids or index that are not integers.
    """

    def __init__(
        self,
        views: Tensor,
        plan: ViewPlan,
        *,
        image_ids: Tensor | None = None,
        space_index: Tensor | None = None,
        parameters: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if views.ndim < 3:
            raise ValueError(f"ViewBatch: expected views [V, B, ...]: got {_checks.shape(views)}")
        if views.shape[0] != plan.num_views:
            raise ValueError(f"{plan} need {plan.num_views} views: got {views.shape[0]} {_checks.shape(views)}")
        v, b = views.shape[:2]
        check_ids(plan, v, b, image_ids, space_index)
        self.views, self.plan = views, plan
        self.image_ids, self.space_index = image_ids, space_index
        self.parameters: tuple[Any, ...] = tuple(parameters)
        self.origin: tuple[int, ...] | None = None  # the call of StructuredViews that drew it
        self.local_ids = False  # the ids are known to be row numbers of that call, so they are numbered by rank

    def __len__(self) -> int:
        return self.views.shape[0]

    def __getitem__(self, view: int) -> Tensor:
        return self.views[view]

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
        """Move every tensor; a dtype changes the views alone, never ids or parameters."""
        if isinstance(device, torch.dtype):
            views = self.views.to(device, non_blocking=non_blocking)
        else:
            views = self.views.to(device, dtype, non_blocking=non_blocking)
        moved = self.map(lambda t: t if t is self.views else t.to(views.device, non_blocking=non_blocking))
        moved.views = views
        return moved

    def pin_memory(self) -> "ViewBatch":
        """The batch in page-locked memory, for a faster transfer to a GPU."""
        return self.map(lambda t: t.pin_memory())

    def map(self, f: _Map) -> "ViewBatch":
        """The batch with f applied to every tensor: views, ids, index and parameters."""
        parameters = tuple(p.map(f) if isinstance(p, ViewParameters) else _mapped(p, f) for p in self.parameters)
        ids = None if self.image_ids is None else f(self.image_ids)
        index = None if self.space_index is None else f(self.space_index)
        return self._with(f(self.views), ids, index, parameters)

    def rows(self, index: Rows) -> "ViewBatch":
        """The views of some images of the batch: plan, ids, index and parameters go along.

        >>> batch = ViewBatch(torch.rand(3, 4, 2), ViewPlan.shared_query(("content", "color")))
        >>> batch.rows([2, 0]).views.shape
        torch.Size([3, 2, 2])

        Args:
            index: positions [n], a mask [B], or a slice. An image that is named twice keeps one id.
        """
        b, device = self.views.shape[1], self.views.device
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
            take(self.views, 1),
            None if ids is None else take(ids, 1),
            None if self.space_index is None else take(self.space_index),
            parameters,
        )

    @classmethod
    def cat(cls, parts: Sequence["ViewBatch"]) -> "ViewBatch":
        """One batch of the images of several, side by side; the inverse of taking `rows` in turn.

        Parts of one call of `StructuredViews` keep their ids; parts of different calls show different images, so their
        ids are numbered one after the other.

        Raises:
            ValueError: no part, or parts of different plans, of which some have ids, an index or parameters that
                others lack.
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
                raise ValueError("ViewBatch.cat: expected every batch to have an index and parameters, or none of them")
        together = all(p.origin is not None and p.origin == first.origin for p in parts)
        out = first._with(
            torch.cat([p.views for p in parts], dim=1),
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
        self, views: Tensor, image_ids: Tensor | None, space_index: Tensor | None, parameters: tuple[Any, ...]
    ) -> "ViewBatch":
        """The same plan and origin around other tensors, which are not checked again."""
        out = object.__new__(ViewBatch)
        out.plan, out.views, out.parameters = self.plan, views, parameters
        out.image_ids, out.space_index = image_ids, space_index
        out.origin, out.local_ids = self.origin, self.local_ids
        return out

    @property
    def device(self) -> torch.device:
        return self.views.device

    def __repr__(self) -> str:
        return f"ViewBatch(views={_checks.shape(self.views)} {self.views.dtype}, {self.plan})"


def _ids_side_by_side(parts: Sequence[ViewBatch], together: bool) -> Tensor | None:
    if all(p.image_ids is None for p in parts):
        return None
    out, first = [], 0
    for p in parts:
        v, b = p.views.shape[:2]
        ids = torch.arange(b, device=p.device).expand(v, b) if p.image_ids is None else p.image_ids
        out.append(ids if together else ids + first)
        first += max(b, int(ids.max()) + 1) if b else 0
    return torch.cat(out, dim=1)


def _side_by_side(values: Sequence[Any]) -> Any:
    """Parameters of one view from all parts."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    joined = {k: _side_by_side([v[k] for v in values]) for k in first}
    if not isinstance(first, ViewParameters):
        return joined
    return ViewParameters(joined, from_key={k: _side_by_side([v.from_key[k] for v in values]) for k in first.from_key})


# ---- frameworks walk a batch as a pytree: views, ids and index are leaves. Parameters are not: a function of every
# tensor, such as x * 2 - 1, is meant for pixels.


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
