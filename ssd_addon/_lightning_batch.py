"""The views of a batch of `ssd_addon.lightning`: drawn in the place of its images, and found again."""

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from ssd_addon import _checks
from ssd_addon.augment.native import Cropped
from ssd_addon.batch import ViewBatch, ViewParameters
from ssd_addon.transform import StructuredTransform


def drawn(batch: Any, views: Any, image_key: str | None) -> Any:
    """The batch with a `ViewBatch` in the place of the images; one that has it already is left as it is.

    Args:
        batch, views, image_key: as `ssd_addon.lightning.StructuredTraining` describes them.

    Raises:
        TypeError: the batch has no images there; `views` return no `ViewBatch`.
    """
    if isinstance(batch, ViewBatch):
        return batch
    if isinstance(batch, Mapping):
        if image_key is None or image_key not in batch:
            raise TypeError(
                f"batch: expected self.image_key to be one of the keys {_checks.names(batch)}: got {image_key!r}"
            )
        inside = drawn(batch[image_key], views, image_key)
        if not isinstance(batch, MutableMapping):
            return {**batch, image_key: inside}
        changed = copy.copy(batch)  # of the same class
        changed[image_key] = inside
        return changed
    made = isinstance(views, StructuredTransform)
    whole = isinstance(batch, Tensor | Cropped) or (made and _is_views(batch, views))
    images = batch if whole or not isinstance(batch, list | tuple) or not batch else batch[0]
    if isinstance(images, ViewBatch):
        return batch
    if made:
        new = of_workers(images, views)
    elif isinstance(images, Tensor | Cropped):
        new = views(images)
    else:
        raise TypeError(
            f"batch: expected images [B, C, H, W], or a tuple that starts with them: got {_named(batch)}"
            + ("; for views made in workers, set self.views to their StructuredTransform" if _lists(images) else "")
        )
    if not isinstance(new, ViewBatch):
        raise TypeError(f"self.views: expected StructuredViews, which return a ViewBatch: got {_named(new)}")
    if images is batch:
        return new
    if hasattr(batch, "_replace"):  # a named tuple
        return batch._replace(**{batch._fields[0]: new})
    return type(batch)([new, *batch[1:]])


def views_in(batch: Any, image_key: str | None) -> ViewBatch:
    """The `ViewBatch` in a batch whose views were drawn."""
    if isinstance(batch, ViewBatch):
        return batch
    return views_in(batch[image_key] if isinstance(batch, Mapping) else batch[0], image_key)


def _lists(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, Tensor) for v in value)


def _with_parameters(value: Any) -> bool:
    """Whether this is (views, parameters), as a transform with `parameters=True` returns."""
    pair = isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], list | tuple)
    return pair and all(isinstance(p, Mapping) for p in value[1])


def _is_views(value: Any, transform: StructuredTransform) -> bool:
    """Whether this is a list of V views [B, ...], into which `default_collate` combines a transform's results."""
    if _with_parameters(value):
        return _is_views(value[0], transform)
    return _lists(value) and all(v.ndim == transform.views.samples.ndim + 1 for v in value)


def of_workers(images: Any, transform: StructuredTransform) -> ViewBatch:
    """A `ViewBatch` of views that `default_collate` combined, with parameters if the transform returns them."""
    drawn: Sequence[Any] = ()
    if _with_parameters(images):
        images, drawn = images
    if not _is_views(images, transform):
        raise TypeError(
            f"batch: expected {transform.plan.num_views} views made by the data set's StructuredTransform, in a list: "
            f"got {_named(images)}"
        )
    return ViewBatch(list(images), transform.plan, parameters=[ViewParameters(p) for p in drawn])


def _named(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {_checks.names(dict.fromkeys(type(v).__name__ for v in value))}"
    return f"tensor {_checks.shape(value)}" if isinstance(value, Tensor) else type(value).__name__
