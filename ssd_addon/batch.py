"""What travels between the steps: the plan of the views, a batch of views, and their embeddings.

V views of B images, S = 1 + M spaces (content, then one style space per group of augmentations):

    ViewPlan     which views are a positive pair for which space           (static)
    ViewBatch    views [V, B, C, H, W] and how each of them was drawn      (from StructuredViews)
    Embeddings   name -> [V, B, d]                                         (from StyleHeads, to JointEntropyLoss)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssd_addon import _checks


@dataclass(frozen=True)
class ViewPlan:
    """Which views form the positive pair of which space.

    *Shared query* (V = S + 1): view 0 is the query, view 1 redraws every group (the content key), and view 1 + m
    takes group m's parameters from the query. Pairs: content (0, 1), style m (0, 1 + m).
    *Interleaved* (V = 2): one query and one key per image; row r of the local batch serves space r mod S.

    Source: Eastwood et al., arXiv 2311.08815, structured views; the interleaved form is its two-view variant.

    >>> ViewPlan.shared_query(("content", "color")).num_views
    3
    >>> {name: (a, b) for name, (a, b, _) in ViewPlan.shared_query(("content", "color")).pairs(4).items()}
    {'content': (0, 1), 'color': (0, 2)}
    >>> ViewPlan.interleaved(("content", "color")).pairs(5)["color"]
    (0, 1, tensor([1, 3]))
    """

    kind: str
    spaces: tuple[str, ...]

    def __post_init__(self) -> None:
        _checks.choice(self.kind, ("shared_query", "interleaved"), "ViewPlan")
        object.__setattr__(self, "spaces", _checks.spaces(self.spaces, "ViewPlan"))

    @classmethod
    def shared_query(cls, spaces: Sequence[str]) -> "ViewPlan":
        """One query, a content key, and one key per style: V = S + 1 views."""
        return cls("shared_query", spaces)  # type: ignore[arg-type]

    @classmethod
    def interleaved(cls, spaces: Sequence[str]) -> "ViewPlan":
        """One query and one key per image; the key's space rotates over the rows: V = 2 views."""
        return cls("interleaved", spaces)  # type: ignore[arg-type]

    @property
    def num_views(self) -> int:
        """V, the views per image."""
        return 2 if self.kind == "interleaved" else len(self.spaces) + 1

    def default_space_index(self, batch: int, device: torch.device | None = None) -> Tensor:
        """The space that each row serves in an interleaved batch: r mod S, [B] int64."""
        return torch.arange(batch, device=device) % len(self.spaces)

    def pairs(self, batch: int, space_index: Tensor | None = None) -> dict[str, tuple[int, int, Tensor]]:
        """Space -> (view a, view b, rows [n] int64): the positive pair of each space.

        Args:
            batch: B, the images in the batch.
            space_index: [B] integers, interleaved only: the space of each row. None means r mod S.
        """
        if self.kind == "shared_query":
            rows = torch.arange(batch)
            return {name: (0, 1 + s, rows) for s, name in enumerate(self.spaces)}
        index = self.default_space_index(batch) if space_index is None else space_index
        return {name: (0, 1, torch.nonzero(index == s).flatten()) for s, name in enumerate(self.spaces)}

    def __str__(self) -> str:
        kind = "a shared-query plan" if self.kind == "shared_query" else "an interleaved plan"
        return f"{len(self.spaces)} spaces ({', '.join(self.spaces)}) in {kind}"


class ViewParameters(dict[str, dict[str, dict[str, Tensor]]]):
    """How one view was drawn: group -> "0.ColorJitter" -> parameter -> [B, ...].

    `from_key` says for which rows a group ran the key's own operations (`key_groups`): group -> [B] bool, or absent
    where all rows ran the query's. It is part of what `StructuredViews.apply` needs to replay a view.
    """

    def __init__(self, *args: Any, from_key: Mapping[str, Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.from_key: dict[str, Tensor] = dict(from_key or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return (_view_parameters, (dict(self), self.from_key))


def _view_parameters(items: dict[str, Any], from_key: dict[str, Tensor]) -> ViewParameters:
    return ViewParameters(items, from_key=from_key)


def _tensor_map(value: Any, f: Any) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, ViewParameters):
        moved = {k: f(t) for k, t in value.from_key.items()}
        return ViewParameters({k: _tensor_map(v, f) for k, v in value.items()}, from_key=moved)
    if isinstance(value, dict):
        return {k: _tensor_map(v, f) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_tensor_map(v, f) for v in value)
    return value


class ViewBatch:
    """Structured views of a batch of images.

    Attributes:
        views: [V, B, C, H, W] float (any sample shape: latents are [V, B, n]).
        plan: the `ViewPlan` that says which views are a pair.
        image_ids: [V, B] int64, the image that each view was made from, or None where it is the row.
            Row numbers of the local batch, 0 to B - 1; over ranks the loss adds the sizes of the shards before.
        space_index: [B] int64, the space of each row (interleaved), or None.
        parameters: V mappings group -> "0.ColorJitter" -> parameter -> [B, ...], and "then" likewise.

    Raises:
        ValueError: views whose number does not fit the plan; ids or index of another shape.
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
        _check_ids(plan, v, b, image_ids, space_index)
        self.views, self.plan = views, plan
        self.image_ids, self.space_index = image_ids, space_index
        self.parameters: tuple[Any, ...] = tuple(parameters)

    def __len__(self) -> int:
        return self.views.shape[0]

    def __getitem__(self, view: int) -> Tensor:
        return self.views[view]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.views)

    def _map(self, f: Any) -> "ViewBatch":
        out = object.__new__(ViewBatch)
        out.plan = self.plan
        out.views = f(self.views)
        out.image_ids, out.space_index = _tensor_map((self.image_ids, self.space_index), f)
        out.parameters = _tensor_map(self.parameters, f)
        return out

    def to(self, *args: Any, **kwargs: Any) -> "ViewBatch":
        """Move every tensor; a dtype changes the views alone, never ids or parameters."""
        out = self._map(lambda t: t)
        out.views = self.views.to(*args, **kwargs)
        device = out.views.device
        non_blocking = bool(kwargs.get("non_blocking", False))
        moved = self._map(lambda t: t if t is self.views else t.to(device, non_blocking=non_blocking))
        moved.views = out.views
        return moved

    def pin_memory(self) -> "ViewBatch":
        return self._map(lambda t: t.pin_memory())

    @property
    def device(self) -> torch.device:
        return self.views.device

    def __repr__(self) -> str:
        return f"ViewBatch(views={_checks.shape(self.views)} {self.views.dtype}, {self.plan})"


class Embeddings(dict[str, Tensor]):
    """Embeddings of structured views: space -> [V, B, d], with the plan that says what pairs with what.

    A dict, so DDP, Lightning and plain loops walk it. `StyleHeads` returns one; build your own to use the loss alone:

    >>> z = Embeddings({"content": torch.randn(2, 8, 4), "color": torch.randn(2, 8, 2)},
    ...                ViewPlan.interleaved(("content", "color")))
    >>> z.plan.num_views
    2

    Args:
        tensors: space -> [V, B, d]; matched to the plan by name.
        plan: None means shared query in the mapping's own order, content first.
        image_ids: [V, B] integers: the image that each row was made from; None means the column.
        space_index: [B] integers (interleaved): the space that each row serves; None means r mod S.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        plan: ViewPlan | None = None,
        *,
        image_ids: Tensor | None = None,
        space_index: Tensor | None = None,
    ) -> None:
        super().__init__(tensors)
        if plan is None:
            plan = ViewPlan.shared_query(tuple(tensors))
        elif not isinstance(plan, ViewPlan):
            raise TypeError(f"Embeddings: expected a ViewPlan, such as ViewPlan.interleaved(...): got {plan!r}")
        self.plan = plan
        self.image_ids = image_ids
        self.space_index = space_index

    def __reduce__(self) -> tuple[Any, ...]:
        return (_embeddings, (dict(self), self.plan, self.image_ids, self.space_index))

    def check(self) -> tuple[int, torch.device]:
        """Names, shapes, ids against the plan. Returns (B, device); raises what was expected and what came."""
        plan = self.plan
        _checks.same_names(self, plan.spaces, "embeddings", "plan")
        if next(iter(self)) != "content":
            raise ValueError(f"embeddings: 'content' must be the first space: got {_checks.names(self)}")
        batch, device = _checks.embeddings(self, plan.num_views, str(plan))
        _check_ids(plan, plan.num_views, batch, self.image_ids, self.space_index)
        return batch, device

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}: {_checks.shape(v)}" for k, v in self.items())
        return f"Embeddings({inside}, {self.plan})"


def _embeddings(
    tensors: dict[str, Tensor], plan: ViewPlan, image_ids: Tensor | None, space_index: Tensor | None
) -> Embeddings:
    return Embeddings(tensors, plan, image_ids=image_ids, space_index=space_index)


def as_embeddings(z: Mapping[str, Tensor]) -> Embeddings:
    """A plain dict is a shared-query plan in its own order; anything else must say what it is."""
    if isinstance(z, Embeddings):
        return z
    if not isinstance(z, Mapping):
        raise TypeError(f"expected embeddings as a mapping space -> [V, B, d]: got {type(z).__name__}")
    spaces = _checks.spaces(tuple(z), "embeddings")
    first = z["content"]
    if isinstance(first, Tensor) and first.ndim == 3 and first.shape[0] != len(spaces) + 1:
        raise ValueError(
            f"{ViewPlan.shared_query(spaces)} need {len(spaces) + 1} views: got {first.shape[0]}; a plain dict is read "
            "as a shared-query plan, for two interleaved views give Embeddings(tensors, ViewPlan.interleaved(...))"
        )
    return Embeddings(z)


_INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_ids(plan: ViewPlan, v: int, b: int, image_ids: Tensor | None, space_index: Tensor | None) -> None:
    if image_ids is not None:
        if image_ids.dtype not in _INTS:
            raise TypeError(f"image_ids: expected integers, one id per view and image: got {image_ids.dtype}")
        if tuple(image_ids.shape) != (v, b):
            raise ValueError(f"image_ids: expected [V, B] = [{v}, {b}]: got {_checks.shape(image_ids)}")
    if space_index is not None:
        if plan.kind != "interleaved":
            raise ValueError("space_index: only an interleaved plan gives each row a space; this plan is shared query")
        if space_index.dtype not in _INTS:
            raise TypeError(f"space_index: expected integers, the space of each row: got {space_index.dtype}")
        if tuple(space_index.shape) != (b,):
            raise ValueError(f"space_index: expected [B] = [{b}]: got {_checks.shape(space_index)}")
