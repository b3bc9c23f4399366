"""Structured views of one sample at a time, in data-loader workers, where most image pipelines augment.

    dataset = LightlyDataset("images", transform=StructuredTransform({"color": [...], "spatial": [...]}))
    for views, labels, names in DataLoader(dataset, batch_size=256, num_workers=8):   # views: a list of V batches
        loss = criterion(model(views), transform.plan)

Crops are taken from each image at its original resolution. Legend: V views, C channels, [H, W] size.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node
from torch.utils.data import default_collate

from ssd_addon import _checks
from ssd_addon._optional import needs
from ssd_addon.batch import FROM_KEY, ViewBatch, ViewParameters
from ssd_addon.plan import PlanKind, ViewPlan

with needs("ssd_addon.transform"):
    import numpy as np
    from PIL import Image

    from ssd_addon import pictures
    from ssd_addon.augment.samples import Samples, checked, floats
    from ssd_addon.augment.stages import Stage
    from ssd_addon.augment.turns import Turns
    from ssd_addon.augment.views import StructuredViews


class _Views(list[Tensor]):
    """The views of one sample and the names of their spaces; copied or sent to another process, a plain list."""

    def __init__(self, views: Iterable[Tensor], spaces: tuple[str, ...] = ()) -> None:
        super().__init__(views)
        self.spaces = spaces

    def __reduce__(self) -> Any:
        return list, (list(self),)

    def unsqueeze(self, dim: int) -> Tensor:  # as lightly's MultiViewCollate calls it on what it takes for a view
        raise TypeError(
            "collate: expected the views of a sample alone: got them with their parameters, or inside another list of "
            "views; use StructuredCollate(size, views=transform), or StructuredTransform(..., parameters=False) as the "
            "only transform that makes views"
        )


# What maps a function over tensors, such as the transforms of torchvision that come after, finds the views inside.
register_pytree_node(_Views, lambda views: (list(views), None), lambda views, _: list(views))


class StructuredTransform:
    """Transform for a data set: turns one sample into a list of V structured views.

    Every sample, worker, rank and epoch gets different draws. In the workers of a `DataLoader` they depend only on the
    loader's generator, on the sample and on the indices of its batch. So an epoch can be repeated exactly from the same
    generator, `DataLoader(..., generator=torch.Generator().manual_seed(seed + epoch))`, with any number of workers, and
    resumed between two batches by a sampler that starts there (`runs.ResumableSampler`). Persistent workers, and a
    loader without workers, draw from torch's global generator of their process, one sample after the other; a training
    run then repeats exactly only from its start. Workers may be forked or spawned. In ranks that
    `torch.multiprocessing.spawn` starts, make the transform an attribute of the data set, with which the rank is sent
    to the workers: a transform that spawned workers import anew draws as on rank 0, with a warning.

    A sample that a sampler draws several times in an epoch (weighted sampling, repeated augmentation) gets different
    views each time. Two batches of the same indices in the same order are the exception (a batch size of 1, one image
    with most of the weight, a fixed order that is repeated): in different workers their views are equal, unless the
    workers are persistent.

    `default_collate` makes a list of V batches [B, C, H, W], which `StyleHeads` accepts; pass `transform.plan` to the
    loss together with the embeddings, so that spaces are matched by name. `StructuredCollate(size, views=transform)`
    makes a `ViewBatch`, which carries the plan and, with `parameters=True`, the parameters of each view.

    >>> import kornia.augmentation as K
    >>> transform = StructuredTransform({"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1)]},
    ...                                 then=[K.RandomResizedCrop((16, 16))])
    >>> views = transform(torch.rand(3, 24, 32))
    >>> len(views), views[0].shape, transform.plan.spaces
    (3, torch.Size([3, 16, 16]), ('content', 'color'))

    Args:
        groups, then, key_groups, key_then: as for `StructuredViews`, with any of its operations.
        plan: "shared_query". In an interleaved plan the images of a batch serve different spaces, which needs whole
            batches: use `StructuredCollate(views=StructuredViews(..., plan="interleaved"))`.
        seed: seed of the draws, combined with the generator of the process.
        parameters: return (views, parameters) instead. The parameters are a list of V mappings group -> operation ->
            name -> value, like `ViewBatch.parameters` without the batch dimension, which `default_collate` adds.
        sample_ndim, value_range: as for `StructuredViews`.

    A sample is a PIL image of any mode (converted to upright RGB, as in `ImageFiles`), an array [H, W] or [H, W, C], or
    a tensor. Cross-image keys need other images: use `StructuredViews`.

    Raises:
        ValueError, TypeError: as `StructuredViews`; also if the views of one sample differ in size.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[Any]],
        *,
        then: Sequence[Any] = (),
        plan: PlanKind = "shared_query",
        key_groups: Mapping[str, Sequence[Any]] | None = None,
        key_then: Sequence[Any] | None = None,
        seed: int | None = None,
        parameters: bool = False,
        sample_ndim: int = 3,
        value_range: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        if plan != "shared_query":
            raise ValueError(
                f"plan: expected 'shared_query', as an interleaved plan needs whole batches: got {plan!r}; use "
                "StructuredCollate(size, views=StructuredViews(...))"
            )
        self.views = StructuredViews(
            groups,
            then=then,
            key_groups=key_groups,
            key_then=key_then,
            seed=0 if seed is None else seed,
            sample_ndim=sample_ndim,
            value_range=value_range,
        )
        self.parameters = bool(parameters)
        self._turns = Turns(single=True)

    @property
    def plan(self) -> ViewPlan:
        """The plan of positive pairs, for `criterion(z, transform.plan)`."""
        return self.views.plan

    @property
    def stages(self) -> Mapping[str, Stage]:
        """Name -> operations, as in `StructuredViews`."""
        return self.views.stages

    @torch.no_grad()
    def __call__(self, sample: Any) -> Any:
        x = self._batch(sample)
        drawn = self.views.drawing.views(tuple(x.shape), (self.views.seed, self.views.rank, *self._turns([x])), None)
        made = self.views._made(x, [None] * len(drawn), drawn)
        views = _Views((view[0] for view in made), self.plan.spaces)
        return (views, [_first(p) for p in drawn]) if self.parameters else views

    def collated(self, made: Sequence[Any]) -> ViewBatch:
        """Collate samples into a batch, with parameters if the transform returns them; used by `StructuredCollate`.

        Args:
            made: for each sample the result of this transform, or the sample itself, to which it is then applied.

        Raises:
            ValueError: the views are those of a transform with other groups, or another order of groups; they differ
                in size between samples, or in number from the plan's.
            TypeError: the views are not tensors.
        """
        views: list[list[Tensor]] = []
        drawn: list[Any] = []
        for each in made:
            done = each if isinstance(each, list | tuple) else self(each)
            whole = len(done) == 2 and isinstance(done[0], list)
            self._check_views(done[0] if whole else done)
            views.append(list(done[0]) if whole else list(done))
            drawn.append(done[1] if whole else None)
        sizes = dict.fromkeys(_checks.shape(view) for each in views for view in each)
        counts = {len(each) for each in views}
        if len(sizes) > 1 and len(counts) == 1:
            raise ValueError(
                f"collate: expected views of one size, to be stacked to a batch: got {' and '.join(sizes)}; add an "
                "operation that gives every image one size, such as K.RandomResizedCrop((224, 224)) or K.Resize"
            )
        stacked = [torch.stack(list(each)) for each in zip(*views, strict=True)]
        parameters = [] if None in drawn else [ViewParameters(p) for p in default_collate(drawn)]
        return ViewBatch(stacked, self.plan, parameters=parameters)

    def _check_views(self, views: Sequence[Any]) -> None:
        """Check that the data set's views are tensors, and of the spaces of this transform, in their order."""
        if wrong := [type(view).__name__ for view in views if not isinstance(view, Tensor)]:
            raise TypeError(f"collate: expected views as tensors, as StructuredTransform makes them: got {wrong[0]}")
        if isinstance(views, _Views) and views.spaces and views.spaces != self.plan.spaces:
            raise ValueError(
                f"collate: expected the views of {_checks.names(self.plan.spaces)}, in this order: got those of "
                f"{_checks.names(views.spaces)}; give StructuredCollate the transform that makes the data set's views"
            )

    def _batch(self, sample: Any) -> Tensor:
        """The sample as a batch of one, uint8 or float32."""
        samples: Samples = self.views.samples
        values = isinstance(sample, np.ndarray) and samples.value_range != (0.0, 1.0) and sample.dtype != np.uint8
        if values and samples.ndim == 3 and sample.ndim in (2, 3):  # an array [H, W, C] that is no picture
            sample = torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.atleast_3d(sample), 2, 0)))
        elif isinstance(sample, Image.Image) or (isinstance(sample, np.ndarray) and samples.ndim == 3):
            sample = pictures.tensor(sample)
        elif isinstance(sample, np.ndarray):
            sample = torch.from_numpy(sample)
        if not isinstance(sample, Tensor):
            raise TypeError(f"sample: expected a PIL image, an array or a tensor: got {type(sample).__name__}")
        if sample.ndim != samples.ndim:
            raise ValueError(
                f"sample: expected {samples.ndim} dimensions (sample_ndim), without the batch: got "
                f"{_checks.shape(sample)}; StructuredViews takes whole batches"
            )
        x = checked(sample[None], samples)
        return x if self.views.fast and x.dtype == torch.uint8 else floats(x)

    def __repr__(self) -> str:
        groups = {n: [s.key for s in stage.query] for n, stage in self.stages.items()}
        return f"StructuredTransform({self.plan}: {groups})"


def _first(p: ViewParameters) -> dict[str, Any]:
    """The parameters of the only sample, as a plain dictionary that every collate function takes."""
    found = {stage: {op: {k: t[0] for k, t in each.items()} for op, each in ops.items()} for stage, ops in p.items()}
    return found | ({FROM_KEY: {"": {k: t[0] for k, t in p.from_key.items()}}} if p.from_key else {})
