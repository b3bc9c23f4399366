"""Structured views of one sample at a time, in data-loader workers, where most image pipelines augment.

    dataset = LightlyDataset("images", transform=StructuredTransform({"color": [...], "spatial": [...]}))
    for views, labels, names in DataLoader(dataset, batch_size=256, num_workers=8):   # views: a list of V batches
        loss = criterion(model(views), transform.plan)

Crops are taken from each image at its original resolution. Legend: V views, C channels, [H, W] size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
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


class StructuredTransform:
    """Transform for a data set: turns one sample into a list of V structured views.

    Every sample, worker, rank and epoch gets different draws. In the workers of a `DataLoader` they depend only on the
    loader's generator and on the sample, so that an epoch can be repeated exactly from the same generator,
    `DataLoader(..., generator=torch.Generator().manual_seed(seed + epoch))`, with any number of workers, and resumed in
    the middle by a sampler that starts there (`runs.ResumableSampler`). Persistent workers, and a loader without
    workers, draw from torch's global generator of their process, one sample after the other; a training run then
    repeats exactly only from its start. Workers may be forked or spawned.

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
        self._turns = Turns()

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
        views = [view[0] for view in made]
        return (views, [_first(p) for p in drawn]) if self.parameters else views

    def collated(self, made: Sequence[Any]) -> ViewBatch:
        """Collate samples into a batch, with parameters if the transform returns them; used by `StructuredCollate`.

        Args:
            made: for each sample the result of this transform, or the sample itself, to which it is then applied.
        """
        views: list[list[Tensor]] = []
        drawn: list[Any] = []
        for each in made:
            done = each if isinstance(each, list | tuple) else self(each)
            whole = len(done) == 2 and isinstance(done[0], list)
            views.append(list(done[0]) if whole else list(done))
            drawn.append(done[1] if whole else None)
        stacked = [torch.stack(list(each)) for each in zip(*views, strict=True)]
        parameters = [] if None in drawn else [ViewParameters(p) for p in default_collate(drawn)]
        return ViewBatch(stacked, self.plan, parameters=parameters)

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
