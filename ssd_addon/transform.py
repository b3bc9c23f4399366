"""Structured views of one sample at a time, in data-loader workers, as most image pipelines augment.

    dataset = LightlyDataset("images", transform=StructuredTransform({"color": [...], "spatial": [...]}))
    for views, labels, names in DataLoader(dataset, batch_size=256, num_workers=8):   # views: a list of V batches
        loss = criterion(model(views), transform.plan)

Crops see each image at its own resolution, before a batch is made. Legend: V views, C channels, [H, W] size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from ssd_addon import _checks, pictures
from ssd_addon.augment.samples import Samples, checked, floats
from ssd_addon.augment.stages import Stage
from ssd_addon.augment.turns import Turns
from ssd_addon.augment.views import StructuredViews
from ssd_addon.batch import ViewBatch, ViewParameters
from ssd_addon.plan import PlanKind, ViewPlan


class StructuredTransform:
    """One sample -> its list of V structured views.

    Draws are fresh for every sample, worker, rank and epoch. In the workers of a `DataLoader` they depend on the
    loader's generator and on the sample alone, so that an epoch is repeated exactly from the same generator,
    `DataLoader(..., generator=torch.Generator().manual_seed(seed + epoch))`, with any number of workers, and continued
    in the middle by a sampler that starts there (`runs.ResumableSampler`). Persistent workers, and a loader without
    workers, draw from torch's global generator of their process, one sample after the other: fresh too, and exact from
    the start of the training. Workers may be forked or spawned.

    `default_collate` makes a list of V batches [B, C, H, W], which `StyleHeads` takes; the loss takes `transform.plan`
    beside the embeddings, so that spaces are matched by name. `StructuredCollate(size, views=transform)` makes a
    `ViewBatch` of them, which carries the plan, and with `parameters=True` how each view was drawn.

    >>> import kornia.augmentation as K
    >>> transform = StructuredTransform({"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1)]},
    ...                                 then=[K.RandomResizedCrop((16, 16))])
    >>> views = transform(torch.rand(3, 24, 32))
    >>> len(views), views[0].shape, transform.plan.spaces
    (3, torch.Size([3, 16, 16]), ('content', 'color'))

    Args:
        groups, then, key_groups, key_then: as of `StructuredViews`, with any of its operations.
        plan: "shared_query". An interleaved plan gives the rows of a batch different spaces, which one sample does not
            know: use `StructuredCollate(views=StructuredViews(..., plan="interleaved"))`.
        seed: of the draws, beside the generator of the process.
        parameters: return (views, parameters) instead, parameters a list of V mappings group -> operation -> name ->
            value, as `ViewBatch.parameters` without the batch dimension; `default_collate` gives them one.
        sample_ndim, value_range: of `StructuredViews`.

    Takes a PIL image of any mode (upright RGB, as in `ImageFiles`), an array [H, W] or [H, W, C], or a tensor of one
    sample. Cross-image keys need other images: use `StructuredViews`.

    Raises:
        ValueError, TypeError: as `StructuredViews`; views of one sample that differ in size.
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
                f"plan: expected 'shared_query', as one sample does not know which space its row serves: got {plan!r}; "
                "StructuredCollate(size, views=StructuredViews(...)) interleaves whole batches"
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
        """Which views are pairs, for `criterion(z, transform.plan)`."""
        return self.views.plan

    @property
    def stages(self) -> Mapping[str, Stage]:
        """Name -> operations, as of `StructuredViews`."""
        return self.views.stages

    @torch.no_grad()
    def __call__(self, sample: Any) -> Any:
        x = self._batch(sample)
        drawn = self.views.drawing.views(tuple(x.shape), (self.views.seed, self.views.rank, *self._turns([x])), None)
        made = self.views._made(x, [None] * len(drawn), drawn)
        views = [view[0] for view in made]
        return (views, [_first(p) for p in drawn]) if self.parameters else views

    def collated(self, made: Sequence[Any]) -> ViewBatch:
        """Samples as a batch, with their parameters where these were asked for: for `StructuredCollate`.

        Args:
            made: of each sample what this transform returned, or a sample that it has not seen yet.
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
        if isinstance(sample, Image.Image) or (isinstance(sample, np.ndarray) and samples.ndim == 3):
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
        return x if self.views.fast else floats(x)

    def __repr__(self) -> str:
        groups = {n: [s.key for s in stage.query] for n, stage in self.stages.items()}
        return f"StructuredTransform({self.plan}: {groups})"


def _first(p: ViewParameters) -> dict[str, Any]:
    return {stage: {op: {k: t[0] for k, t in each.items()} for op, each in ops.items()} for stage, ops in p.items()}
