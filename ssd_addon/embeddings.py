"""`Embeddings` of structured views: what `StyleHeads` returns and `JointEntropyLoss` takes."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon._pytree import CHANGED, Beside, register, restored
from ssd_addon.batch import ViewBatch
from ssd_addon.plan import ViewPlan, check_ids


@dataclass(init=False, repr=False, eq=False)
class Embeddings(dict[str, Tensor]):
    """Embeddings of structured views: space -> [V, B, d], with the plan that defines the positive pairs.

    It is a dict, which frameworks can traverse, and also a dataclass and a node of torch's pytrees, so that frameworks
    that rebuild outputs in either way (FSDP, DDP) keep the plan. `StyleHeads` returns one; build your own to use the
    loss alone:

    >>> z = Embeddings({"content": torch.randn(2, 8, 4), "color": torch.randn(2, 8, 2)},
    ...                ViewPlan.interleaved(("content", "color")))
    >>> z.plan.num_views
    2

    `copy`, `|`, `copy.copy`, pickling and `torch.utils._pytree.tree_map` keep plan, ids and index. A framework that
    rebuilds it as `type(z)({...})` (accelerate, Fabric, Lightning) loses them: `plan` is then None, and the loss
    requires the batch, `criterion(z, batch)`, instead of guessing.

    Args:
        tensors: space -> [V, B, d]; matched to the plan by name.
        plan: the `ViewPlan`; None if it is unknown (with "content" as the only space it is always known).
        image_ids: [V, B] integers: the source image of each view; None means its own position in the batch.
        space_index: [B] integers, interleaved plans only: the space that each image serves; None means r mod S.
        local_ids: True if the ids are positions in the local batch, as those of `StructuredViews` are.
        assumed: True if the plan was guessed for views without one; a batch or plan given to the loss overrides it.
    """

    tensors: dict[str, Tensor]
    plan: ViewPlan | None
    image_ids: Tensor | None
    space_index: Tensor | None
    local_ids: bool
    assumed: bool

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (),
        plan: ViewPlan | None = None,
        *,
        image_ids: Tensor | None = None,
        space_index: Tensor | None = None,
        local_ids: bool = False,
        assumed: bool = False,
    ) -> None:
        super().__init__(tensors)
        if plan is not None and not isinstance(plan, ViewPlan):
            raise TypeError(f"Embeddings: expected a ViewPlan, such as ViewPlan.interleaved(...): got {plan!r}")
        self.plan, self.image_ids, self.space_index = plan, image_ids, space_index
        self.local_ids, self.assumed = local_ids, assumed
        if plan is None and isinstance(tensors, Embeddings):
            self._describe(tensors)
        elif plan is None and tuple(self) == ("content",):
            self.plan = ViewPlan.shared_query(("content",))

    def __setattr__(self, name: str, value: Any) -> None:
        """Convert ids and index back to integers when a framework casts every tensor of a copy (Lightning)."""
        before = self.__dict__.get(name) if name in ("image_ids", "space_index") else None
        if before is not None and isinstance(value, Tensor) and value.is_floating_point():
            value = restored(value, before)
        super().__setattr__(name, value)

    def _describe(self, other: "Embeddings") -> "Embeddings":
        """Copy plan, ids and index from other embeddings."""
        self.plan, self.image_ids, self.space_index = other.plan, other.image_ids, other.space_index
        self.local_ids, self.assumed = other.local_ids, other.assumed
        return self

    def copy(self) -> "Embeddings":
        """A shallow copy with the same plan, ids and index."""
        return Embeddings(self)

    __copy__ = copy

    def __or__(self, other: Any) -> "Embeddings":  # type: ignore[override]
        return Embeddings({**self, **other})._describe(self)

    def __ror__(self, other: Any) -> "Embeddings":  # type: ignore[override]
        return Embeddings({**other, **self})._describe(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuilt, (dict(self), self.plan, self.image_ids, self.space_index, self.local_ids, self.assumed))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Embeddings":
        """Copy; tensors that require a graph are shared, as torch cannot deep-copy them."""
        tensors = {k: t if t.grad_fn is not None else copy.deepcopy(t, memo) for k, t in self.items()}
        ids, index = copy.deepcopy(self.image_ids, memo), copy.deepcopy(self.space_index, memo)
        return _rebuilt(tensors, self.plan, ids, index, self.local_ids, self.assumed)

    def check(self) -> tuple[ViewPlan, int, torch.device]:
        """Check names, shapes and ids against the plan.

        Returns:
            (plan, B, device).

        Raises:
            ValueError, TypeError: they do not fit the plan, or there is none.
        """
        plan = self.plan
        if plan is None:
            raise ValueError(
                f"embeddings: expected Embeddings with a plan: got the spaces {_checks.names(self)} without a plan, as "
                "happens if a framework rebuilds the model's output (mixed precision in Fabric, accelerate, Lightning, "
                "FSDP); pass the batch too, criterion(z, batch)"
            )
        _checks.same_names(self, plan.spaces, "embeddings", "plan")
        if next(iter(self)) != "content":
            raise ValueError(f"embeddings: expected 'content' as the first space: got {_checks.names(self)}")
        batch, device = _checks.embeddings(self, plan.num_views, str(plan))
        check_ids(plan, plan.num_views, batch, self.image_ids, self.space_index)
        return plan, batch, device

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}: {_checks.shape(v) if isinstance(v, Tensor) else v!r}" for k, v in self.items())
        return f"Embeddings({inside}, {self.plan})"


def _rebuilt(
    tensors: dict[str, Any],
    plan: ViewPlan | None,
    image_ids: Tensor | None,
    space_index: Tensor | None,
    local_ids: bool,
    assumed: bool,
) -> Embeddings:
    more: dict[str, Any] = {"image_ids": image_ids, "space_index": space_index}
    return Embeddings(tensors, plan, local_ids=local_ids, assumed=assumed, **more)


def _tensors(z: Embeddings) -> dict[str, Tensor]:
    return dict(z)


def _replace_tensors(z: Embeddings, tensors: Mapping[str, Tensor]) -> None:
    z.clear()
    z.update(tensors)


# The dict is a dataclass field, for frameworks that copy dataclasses field by field.
Embeddings.tensors = property(_tensors, _replace_tensors)  # type: ignore[assignment]


def of_batch(tensors: Mapping[str, Tensor], batch: ViewBatch) -> Embeddings:
    """Embeddings [V, B, d] of a batch of views, with the batch's plan, ids and index."""
    return Embeddings(
        tensors,
        batch.plan,
        image_ids=batch.image_ids,
        space_index=batch.space_index,
        local_ids=batch.local_ids,
    )


TOGETHER = (
    "; criterion(z0, z1) is the call of two-view losses: here z holds the embeddings of all views, "
    "z = heads(backbone(torch.cat(views))), and the plan defines the pairs, criterion(z, transform.plan)"
)


def as_embeddings(z: Mapping[str, Tensor], batch: ViewBatch | ViewPlan | None = None) -> Embeddings:
    """Convert the loss's arguments to `Embeddings` with a plan.

    Args:
        z: `Embeddings`, or a plain mapping, which without a batch is read as a shared-query plan in its own order. With
            a batch a space may also be [V*B, d], view 0 first.
        batch: the `ViewBatch` that the embeddings belong to, or its plan, which defines the pairs.

    Raises:
        ValueError: plan, spaces or sizes of the embeddings differ from the batch's.
        TypeError: z is not a mapping.
    """
    if not isinstance(z, Mapping):
        raise TypeError(f"expected embeddings as a mapping space -> [V, B, d]: got {type(z).__name__}{TOGETHER}")
    if batch is not None:
        return _with_batch(z, batch)
    if isinstance(z, Embeddings):
        return z
    spaces = _checks.spaces(tuple(z), "embeddings")
    plan = ViewPlan.shared_query(spaces)
    first = z["content"]
    if isinstance(first, Tensor) and first.ndim == 3 and first.shape[0] != plan.num_views:
        raise ValueError(
            f"{plan} need {plan.num_views} views: got {first.shape[0]}; a plain dict is read as a shared-query plan, "
            "for two interleaved views pass Embeddings(tensors, ViewPlan.interleaved(...)), or the batch, "
            "criterion(z, batch)"
        )
    return Embeddings(z, plan)


def _with_batch(z: Mapping[str, Tensor], batch: ViewBatch | ViewPlan) -> Embeddings:
    if not isinstance(batch, ViewBatch | ViewPlan):
        hint = ""
        if isinstance(batch, Mapping) or (isinstance(batch, Tensor) and batch.is_floating_point()):
            hint = TOGETHER
        elif isinstance(getattr(batch, "plan", None), ViewPlan):
            hint = "; pass its plan, such as transform.plan"
        raise TypeError(f"batch: expected a ViewBatch or its ViewPlan: got {type(batch).__name__}{hint}")
    plan = batch if isinstance(batch, ViewPlan) else batch.plan
    if isinstance(z, Embeddings) and z.plan is not None and not z.assumed and z.plan != plan:
        raise ValueError(f"batch: expected the embeddings' own plan, {z.plan}: got {plan}")
    _checks.same_names(z, plan.spaces, "embeddings", "plan of the batch")
    views = plan.num_views
    shaped = {name: _by_view(name, z[name], views) for name in plan.spaces}
    if isinstance(batch, ViewPlan):
        out = Embeddings(shaped, plan)
        if isinstance(z, Embeddings):
            out.image_ids, out.space_index, out.local_ids = z.image_ids, z.space_index, z.local_ids
        if plan.kind == "interleaved" and out.space_index is None and len(plan.spaces) > 1:
            raise ValueError(
                f"batch: expected the ViewBatch itself: got {plan} without the space that each image serves, which "
                "rotates from call to call"
            )
        return out
    images = batch.images
    for name, t in shaped.items():
        if isinstance(t, Tensor) and t.ndim == 3 and t.shape[1] != images:
            raise ValueError(f"space {name!r}: expected the {images} images of the batch: got {_checks.shape(t)}")
    out = of_batch(shaped, batch)
    if isinstance(z, Embeddings) and not z.assumed:
        out.image_ids = _agreed(z.image_ids, batch.image_ids, "image_ids")
        out.space_index = _agreed(z.space_index, batch.space_index, "space_index")
    return out


def _agreed(mine: Tensor | None, batchs: Tensor | None, what: str) -> Tensor | None:
    """The batch's ids; or, if the embeddings have different ones, `CHANGED` everywhere, which the loss refuses."""
    if mine is None or batchs is None or mine is batchs:
        return batchs
    if mine.shape != batchs.shape:
        raise ValueError(
            f"{what}: expected those of the embeddings, {_checks.shape(mine)}: got a batch with {_checks.shape(batchs)}"
        )
    return torch.where((mine.to(batchs.device) == batchs).all(), batchs, CHANGED)


def _by_view(name: str, t: Tensor, views: int) -> Tensor:
    """Reshape [V*B, d] to [V, B, d]."""
    if not isinstance(t, Tensor) or t.ndim != 2:
        return t
    if t.shape[0] % views:
        raise ValueError(f"space {name!r}: expected [V, B, d] or [V*B, d] with V = {views}: got {_checks.shape(t)}")
    return t.reshape(views, -1, t.shape[1])


# ---- a node of torch's pytrees: names and plan are static, embeddings, ids and index are leaves


def _flatten(z: Embeddings) -> tuple[list[Any], Any]:
    ids = [t for t in (z.image_ids, z.space_index) if t is not None]
    static = (tuple(z), z.plan, Beside(z.image_ids, z.space_index), z.local_ids, z.assumed)
    return [*z.values(), *ids], static


def _unflatten(children: Any, static: Any) -> Embeddings:
    names, plan, kept, local_ids, assumed = static
    values, ids = list(children)[: len(names)], list(children)[len(names) :]
    image_ids, space_index = (None if k is None else restored(ids.pop(0), k) for k in kept.items)
    return _rebuilt(dict(zip(names, values, strict=True)), plan, image_ids, space_index, local_ids, assumed)


register(Embeddings, _flatten, _unflatten)
