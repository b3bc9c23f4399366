"""Crops of all views from images at their original resolution, in a data loader; other operations follow later.

`boxes` draws the crop of every view and image as StructuredViews would: shared where the plan shares the crop's group,
redrawn elsewhere. `finished` draws and applies the other operations. Legend: V views, B images, [H, W] size of a view.
"""

from collections.abc import Callable, Sequence
from typing import Any

import kornia.augmentation as K
import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.augment.crop import corners, near, resized_crops
from ssd_addon.augment.samples import checked, floats
from ssd_addon.augment.stages import Stage, Step
from ssd_addon.batch import ViewBatch, ViewParameters
from ssd_addon.operations.draws import generator
from ssd_addon.plan import ViewPlan

LOADER = -2  # takes the place of the call number, so that no draw of `finished` is repeated
BOX = "src"
"""Kornia's name for the corners of a crop."""


class Cropped:
    """The crops of all views of a batch; `views(cropped.to(device))` applies the other operations.

    Attributes:
        pixels: [V, B, C, H, W] uint8, or floating point in [0, 1].
        boxes: [V, B, 4, 2] corners (x, y) of the crops in their source images, in pixels, inclusive.
        sizes: [V, B, 2] height and width of the source images.
        plan: plan of the views that drew the crops.
        image_ids: [V, B] position of each source image in the batch, or None if every crop shows its own image.
        space_index: [B] the space that each image serves in an interleaved plan, or None.
    """

    def __init__(
        self,
        pixels: Tensor,
        boxes: Tensor,
        sizes: Tensor,
        plan: ViewPlan,
        image_ids: Tensor | None = None,
        space_index: Tensor | None = None,
    ) -> None:
        self.pixels, self.boxes, self.sizes, self.plan = pixels, boxes, sizes, plan
        self.image_ids, self.space_index = image_ids, space_index

    def __len__(self) -> int:
        return int(self.pixels.shape[1])

    def to(self, device: str | torch.device | int, *, non_blocking: bool = False) -> "Cropped":
        """Move the pixels to a device; boxes, sizes and ids stay on the CPU, where views are drawn."""
        return self._with(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Cropped":
        """Copy the pixels to page-locked memory, for a faster transfer to a GPU."""
        return self._with(lambda t: t.pin_memory())

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, to be saved in a file; `Cropped(**tensors, plan=views.plan)` restores the batch."""
        every = vars(self) | {"pixels": self.pixels.cpu()}
        return {k: t for k, t in every.items() if isinstance(t, Tensor)}

    def _with(self, f: Callable[[Tensor], Tensor]) -> "Cropped":
        return Cropped(f(self.pixels), self.boxes, self.sizes, self.plan, self.image_ids, self.space_index)

    def __repr__(self) -> str:
        return f"Cropped({_checks.shape(self.pixels)} {self.pixels.dtype}, {self.plan})"


def crop_stage(views: Any) -> Stage:
    """The stage that starts with the crop, which the data loader makes.

    Raises:
        ValueError: the views do not start with one Kornia RandomResizedCrop of one size that fires on every image.
    """
    stage: Stage = next(s for s in views.stages.values() if s.query)
    sizes = set()
    for step in dict.fromkeys((stage.query[0], (stage.key or stage.query)[0])):
        op: Any = step.module
        if (
            type(op) is not K.RandomResizedCrop
            or op.p != 1
            or op.p_batch != 1
            or getattr(step.operation, "one_by_one", True)
        ):
            raise ValueError(
                "NativeCrops: expected views that start with Kornia's RandomResizedCrop with p=1, so that the crop can "
                f"be made before the other operations: got {stage.name}: {step.key}; put the crop's group first, or "
                "load images of one size with StructuredCollate"
            )
        sizes.add(tuple(int(n) for n in op.flags["size"]))
    if len(sizes) > 1:
        raise ValueError(f"NativeCrops: expected query and keys with the same crop size: got {_checks.names(sizes)}")
    return stage


def boxes(views: Any, sizes: Tensor, seed: tuple[int, ...], turn: int) -> Cropped:
    """Draw the box and the source image of each crop; the pixels are left empty.

    Args:
        views: a `StructuredViews`.
        sizes: [B, 2] height and width of the images.
        seed: seed of the draws.
        turn: by how much an interleaved plan rotates the spaces over the images.
    """
    stage, plan, b = crop_stage(views), views.plan, len(sizes)
    index = plan.default_space_index(b, call=turn) if plan.kind == "interleaved" else None
    sources, ids = views.drawing.sources(b, index)
    found: list[Tensor] = []
    each = [sizes if s is None else sizes[s] for s in sources]
    for view, mine in enumerate(each):
        shared = False if view == 0 else views.drawing._shared_rows(view, stage.name, index)
        step = stage.steps(view > 0)[0]
        place = (*seed, LOADER, view)
        box = resized_crops(mine, step.module, generator(*place))
        if view and shared is not True:
            box = _kept_near(views, box, found[0], each[0], mine, step, view, index, (*place, 1))
        if shared is not False:
            of_query = _elsewhere(found[0], each[0], mine)
            box = of_query if shared is True else torch.where(shared[:, None, None], of_query, box)
        found.append(box)
    empty = torch.empty(plan.num_views, b, 0, dtype=torch.uint8)
    return Cropped(empty, torch.stack(found).float(), torch.stack(each), plan, ids, index)


def _kept_near(
    views: Any, box: Tensor, query: Tensor, there: Tensor, here: Tensor, step: Step, view: int, index: Tensor | None,
    seed: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """The boxes, with constrained crops where StructuredViews would make them."""
    if views.constrained_crop is None:
        return box
    rows = views.drawing._near_rows(view, len(box), index)
    moved = near(_elsewhere(query, there, here), views.constrained_crop, step.module, here, generator(*seed))
    return torch.where(rows[:, None, None], moved, box)


def _elsewhere(box: Tensor, there: Tensor, here: Tensor) -> Tensor:
    """Rescale boxes from images of size `there` to images of size `here`, both [B, 2]."""
    ratio = (here.double() / there).flip(1)
    low, high = box[:, 0] * ratio, (box[:, 2] + 1) * ratio
    limit = here.double().flip(1)
    size = torch.minimum((high - low).round().clamp(min=1), limit)
    return corners(torch.minimum(low.round(), limit - size), size)


def finished(views: Any, cropped: Cropped) -> ViewBatch:
    """Draw and apply every operation after the crop; the result's parameters include the crops."""
    stage = crop_stage(views)
    key = stage.query[0].key
    size = tuple(int(n) for n in stage.query[0].module.flags["size"])  # type: ignore[union-attr, index, arg-type]
    v, b, *shape = cropped.pixels.shape
    if cropped.plan != views.plan or tuple(shape[-2:]) != size:
        raise ValueError(
            f"cropped: expected crops of {size[0]} x {size[1]} pixels for {views.plan}, as in these views: got "
            f"{cropped!r}"
        )
    x = checked(cropped.pixels.flatten(0, 1), views.samples)
    x = x if views.fast and x.dtype == torch.uint8 else floats(x)
    seed = views.next_draw()
    drawn: list[ViewParameters] = views.drawing.views((b, *shape), seed, cropped.space_index)
    rows = torch.arange(b)
    whole = corners(torch.zeros(b, 2), torch.tensor([size[1], size[0]]).expand(b, 2)).float()
    steps = [_with(p, stage.name, key, {BOX: whole}) for p in drawn]
    recorded = [
        _with(p, stage.name, key, {BOX: box, "input_size": extent})
        for p, box, extent in zip(drawn, cropped.boxes, cropped.sizes, strict=True)
    ]
    out = ViewBatch(
        views._made(x, [rows + k * b for k in range(v)], steps),
        views.plan,
        image_ids=None if cropped.image_ids is None else cropped.image_ids.to(x.device),
        space_index=None if cropped.space_index is None else cropped.space_index.to(x.device),
        parameters=recorded,
    )
    out.origin, out.local_ids = seed, True
    return out


def _with(p: ViewParameters, stage: str, key: str, values: dict[str, Tensor]) -> ViewParameters:
    return ViewParameters(p | {stage: p[stage] | {key: p[stage][key] | values}}, from_key=p.from_key)


def sized(images: Sequence[Tensor]) -> Tensor:
    """[B, 2] height and width of images [C, H, W]."""
    return torch.tensor([x.shape[-2:] for x in images])
