"""A collate function that makes the crops of structured views from images at their original resolution.

    views = StructuredViews(**presets("color_spatial"))
    loader = DataLoader(files, batch_size=256, collate_fn=NativeCrops(views), num_workers=8)
    for cropped, labels, names in loader:
        batch = views(cropped.to(device, non_blocking=True))

If images are first resized to squares, what lies outside the center is lost and small crops are upsampled. Here the
workers crop the original images, and the device applies the other operations.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon._optional import needs

with needs("ssd_addon.crops"):
    from ssd_addon import pictures
    from ssd_addon.augment import StructuredViews
    from ssd_addon.augment.fast import geometry
    from ssd_addon.augment.native import Cropped, boxes, crop_stage, sized
    from ssd_addon.augment.turns import Turns
    from ssd_addon.collate import alike, check_samples, labels_of, taken_apart


class NativeCrops:
    """Collate function: samples (image, label[, name]) -> (crops of all views, labels, names).

    The crop of each view is drawn as in `StructuredViews`, for each image at its own size: area and aspect ratio are
    those of RandomResizedCrop on the whole image, and views share the crop as the plan requires, including cross-image
    keys, interleaved plans and constrained crops. Resampling is antialiased. In the workers of a `DataLoader`, draws
    depend only on the loader's generator and the images, so that an epoch can be repeated and resumed exactly (as with
    `StructuredTransform`). After `set_epoch` this also holds without workers, and draws are the same for any number.

    >>> import kornia.augmentation as K
    >>> views = StructuredViews({"spatial": [K.RandomResizedCrop((16, 16))], "color": [K.ColorJitter(0.4)]}, seed=0)
    >>> tall, wide = torch.rand(3, 40, 20), torch.rand(3, 24, 64)
    >>> cropped, labels, names = NativeCrops(views)([(tall, 0), (wide, 1)])
    >>> cropped
    Cropped([4, 2, 3, 16, 16] torch.float32, 3 spaces (content, spatial, color) in a shared-query plan)
    >>> views(cropped).views.shape
    torch.Size([4, 2, 3, 16, 16])

    Args:
        views: a `StructuredViews` whose first operation is Kornia's RandomResizedCrop, with p=1.
        image_key, label_key: as for `StructuredCollate`, which also describes samples and images.

    Attributes:
        short_side: the smallest short side, in pixels, at which no crop has to be upsampled. Photographs may be decoded
            at this size: `ImageFiles(root, short_side=crops.short_side)`.

    Returns:
        `Cropped`, for `views(cropped)`; labels and names as in `StructuredCollate`.

    Raises:
        ValueError, TypeError: the views start with another operation; also as `StructuredCollate`.
    """

    def __init__(
        self, views: StructuredViews, *, image_key: str | None = None, label_key: str | Literal[False] | None = None
    ) -> None:
        if not isinstance(views, StructuredViews):
            raise TypeError(f"views: expected StructuredViews: got {type(views).__name__}")
        self.views, self.image_key, self.label_key = views, image_key, label_key
        stage = crop_stage(views)
        operations: list[Any] = [stage.query[0].module, (stage.key or stage.query)[0].module]
        self.size = tuple(int(n) for n in operations[0].flags["size"])
        self.filter: geometry.Filter = "bicubic" if operations[0].flags["resample"].name == "BICUBIC" else "bilinear"
        near = 1 - (views.constrained_crop or 0.0)
        self.short_side = max(_needed(op, self.size, near) for op in operations)
        self._turns = Turns()

    def set_epoch(self, epoch: int) -> None:
        """Make draws depend on this number and the images from now on; call it before each epoch, as for a sampler."""
        self._turns.begin(_checks.count(epoch, "epoch"))

    def __call__(self, samples: Sequence[Any]) -> tuple[Cropped, Any, list[str]]:
        check_samples(samples)
        images, labels, names = [], [], []
        for sample in samples:
            image, label, name = taken_apart(sample, self.image_key, self.label_key)
            images.append(pictures.tensor(image))
            labels.append(label)
            names.append(name)
        images = alike(images)
        turn = self._turns(images)
        cropped = boxes(self.views, sized(images), (self.views.seed, self.views.rank, *turn), sum(turn))
        cropped.pixels = self._pixels(images, cropped)
        return cropped, labels_of(labels), names

    def _pixels(self, images: Sequence[Tensor], cropped: Cropped) -> Tensor:
        v, b = cropped.boxes.shape[:2]
        shape = (v * b, images[0].shape[0], *self.size)
        out = torch.empty(shape, dtype=images[0].dtype, memory_format=torch.channels_last)
        low, high = cropped.boxes.flatten(0, 1)[:, 0].long(), cropped.boxes.flatten(0, 1)[:, 2].long()
        box = torch.cat([low.flip(1), (high - low + 1).flip(1)], dim=1)  # top, left, height, width
        upright = torch.zeros(v * b, 2, dtype=torch.bool)
        ids = torch.arange(b).repeat(v) if cropped.image_ids is None else cropped.image_ids.flatten()
        for k, image in enumerate(images):
            rows = torch.nonzero(ids == k).flatten()
            place = geometry.Placement(box[rows], upright[rows], (self.size[0], self.size[1]), self.filter)
            out[rows] = geometry.cut(place, image[None], torch.zeros(len(rows), dtype=torch.int64))
        if out.is_floating_point():
            out.clamp_(0, 1)
        return out.view(v, b, *shape[1:])


def _needed(op: Any, size: tuple[int, ...], near: float) -> int:
    """The short side, in pixels, at which the smallest crop has as many pixels as a view."""
    least = float(op._param_generator.scale[0]) * near
    low, high = (float(r) for r in op._param_generator.ratio)
    if least <= 0:
        raise ValueError(
            f"NativeCrops: expected crops of a positive share of the image: got scale {op._param_generator.scale}"
        )
    return math.ceil(max(size[0] / math.sqrt(least / high), size[1] / math.sqrt(least * low)))
