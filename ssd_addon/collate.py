"""`StructuredCollate`: collates samples into a batch of one size, and makes structured views in the loader if asked."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_addon import _checks, _limits
from ssd_addon._optional import needs
from ssd_addon._shapes import Picture, Resized
from ssd_addon.batch import ViewBatch

with needs("ssd_addon.collate"):
    import numpy as np
    from PIL import Image

    from ssd_addon import pictures
    from ssd_addon.files import ImageFiles

__all__ = ["ImageFiles", "StructuredCollate"]

IMAGE_KEYS = ("image", "img", "pixel_values")
LABEL_KEYS = ("label", "labels")
"""Usual column names in Hugging Face datasets."""


class StructuredCollate:
    """Collate function: samples (image, label[, name]) -> (images or ViewBatch, labels, names).

    A sample may also be a mapping, such as a row {"image": ..., "label": ...} of Hugging Face's `datasets`; its name is
    then read from the key "name". Images may differ in size and are

    - PIL images of any mode, which are converted to upright RGB as in `ImageFiles`;
    - arrays of uint8, or of floats in [0, 1]: [H, W] and [H, W, 1] (gray), [H, W, 3] (RGB) and [H, W, 4] (RGBA,
      composited over black) become RGB; [H, W, C] with any other C keeps its C channels;
    - tensors [C, H, W], uint8 or floating point in [0, 1], which keep their channels.

    >>> collate = StructuredCollate(32)
    >>> images, labels, names = collate([(torch.rand(3, 40, 60), 1), (torch.rand(3, 32, 32), 0, "b.jpg")])
    >>> images.shape, labels.tolist(), names
    (torch.Size([2, 3, 32, 32]), [1, 0], ['', 'b.jpg'])

    Args:
        size: side length in pixels, or (height, width).
        fit: "cover" resizes with antialiasing until the image covers the size, then crops the center; "pad" resizes
            until it fits inside, and pads with black.
        views: a `StructuredViews` to apply, or a `StructuredTransform`, whose lists of views become a `ViewBatch`
            (`size` and `fit` are then unused, as its crops take the original images); None returns images
            [B, C, H, W], uint8 if all samples are, which takes a quarter of the memory (`views(images)` scales them on
            the device).
        image_key, label_key: keys of the image and the label in samples that are mappings. None finds the key among
            "image", "img" and "pixel_values", and among "label" and "labels"; label_key=False reads no labels and
            returns a list of None instead.

    Returns:
        images or ViewBatch; labels, an int64 or float tensor [B] if they are numbers, a tensor [B, ...] if they are
        tensors of one shape (several labels per image: of datasets, `with_format("torch")` gives such rows), else a
        list; names, a list with "" for samples without a name, or with the name None.

    Raises:
        ValueError: the batch is empty; views made by the data set are those of other groups, or of another order of
            groups, than `views` has, or differ in size between images; an image has no pixels; a floating-point image
            contains NaN, or an array or tensor values outside [0, 1]; an array's dimensions look like [C, H, W]; images
            have different numbers of channels; labels are tensors of different shapes; a mapping has none, or several,
            of the expected keys.
        TypeError: a sample is neither a tuple nor a mapping; an image has another type or dtype, such as a uint16
            array.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        fit: Literal["cover", "pad"] = "cover",
        views: Callable[[Tensor], ViewBatch] | None = None,
        image_key: str | None = None,
        label_key: str | Literal[False] | None = None,
    ) -> None:
        edges = (size, size) if isinstance(size, int) else size
        if (
            not isinstance(edges, Sequence)
            or len(edges) != 2
            or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in edges)
        ):
            got = repr(size) if isinstance(size, int | float | Sequence) else type(size).__name__
            raise ValueError(f"size: expected an edge or (height, width), in whole pixels, 1 or more: got {got}")
        for s in edges:
            _limits.edge(s, "size: expected an edge")
        self.size = (edges[0], edges[1])
        self.fit: Literal["cover", "pad"] = _checks.choice(fit, ("cover", "pad"), "fit")
        self.views = views
        self.image_key, self.label_key = image_key, label_key

    def __call__(self, samples: Sequence[Any]) -> tuple[Tensor | ViewBatch, Any, list[str]]:
        check_samples(samples)
        images, labels, names = [], [], []
        made: Callable[[Sequence[Any]], ViewBatch] | None = getattr(self.views, "collated", None)
        for sample in samples:
            image, label, name = taken_apart(sample, self.image_key, self.label_key)
            images.append(image if made is not None else _centered(self._fitted(image), *self.size))
            labels.append(label)
            names.append(name)
        if made is not None:
            return made(images), labels_of(labels), names
        batch = torch.stack(alike(images))
        return batch if self.views is None else self.views(batch), labels_of(labels), names

    def _fitted(self, image: object) -> Picture:
        taken = pictures.taken(image)
        if isinstance(taken, Tensor):
            return self._resized_tensor(taken)
        return torch.cat([self._resized_picture(picture) for picture in taken])

    def _resized_picture(self, picture: Image.Image) -> Tensor:
        """Resize a PIL image, RGB or of one channel; returns uint8 [C, h, w]."""
        new = self._resolution(picture.height, picture.width)
        if new != (picture.height, picture.width):
            picture = picture.resize((new[1], new[0]), Image.Resampling.BICUBIC)
        levels = torch.from_numpy(np.array(picture))
        return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1).contiguous()

    def _resized_tensor(self, image: Picture) -> Resized:
        new = self._resolution(image.shape[1], image.shape[2])
        if new == tuple(image.shape[1:]):
            return image
        scaled = F.interpolate(image[None].float(), new, mode="bilinear", antialias=True, align_corners=False)[0]
        return scaled.round().to(torch.uint8) if image.dtype == torch.uint8 else scaled

    def _resolution(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image is resized before cropping or padding."""
        h, w = self.size
        bound = max if self.fit == "cover" else min
        k = bound(h / height, w / width)
        return bound(max(1, round(height * k)), h), bound(max(1, round(width * k)), w)


def _centered(t: Picture, h: int, w: int) -> Resized:
    """Crop the center along an axis that is too long; pad with black along one that is too short."""
    top, left = max(0, (t.shape[1] - h) // 2), max(0, (t.shape[2] - w) // 2)
    t = t[:, top : top + h, left : left + w]
    dh, dw = h - t.shape[1], w - t.shape[2]
    return F.pad(t, (dw // 2, dw - dw // 2, dh // 2, dh - dh // 2)) if dh or dw else t


def check_samples(samples: Sequence[Any]) -> None:
    if not samples:
        raise ValueError("collate: expected at least one sample: got an empty batch")


def alike(images: list[Tensor]) -> list[Tensor]:
    """Convert images to one dtype: uint8 if all are, otherwise floats in [0, 1]; check the number of channels."""
    if any(x.dtype != torch.uint8 for x in images):
        images = [x.float() / 255 if x.dtype == torch.uint8 else x.float() for x in images]
    channels = sorted({x.shape[0] for x in images})
    if len(channels) > 1:
        raise ValueError(f"collate: expected the same number of channels in all images of a batch: got {channels}")
    return images


def taken_apart(sample: Any, image_key: str | None, label_key: str | Literal[False] | None) -> tuple[Any, Any, str]:
    """(image, label, name) of a sample."""
    if isinstance(sample, Mapping):
        image = _column(sample, image_key, IMAGE_KEYS, "image_key")
        label = None
        if label_key is not False:
            label = _column(sample, label_key, LABEL_KEYS, "label_key")
        return image, label, _name(sample.get("name"))
    if image_key is not None or label_key is not None:
        raise TypeError(
            f"collate: expected mappings as samples, because image_key or label_key is given: got "
            f"{type(sample).__name__}"
        )
    if not isinstance(sample, tuple | list) or not 2 <= len(sample) <= 3:
        got = f"{len(sample)} items" if isinstance(sample, tuple | list) else type(sample).__name__
        raise TypeError(
            "collate: expected samples (image, label), (image, label, name) or mappings with an image and a label: "
            f"got {got}"
        )
    return sample[0], sample[1], _name(sample[2] if len(sample) == 3 else None)


def _name(given: Any) -> str:
    return "" if given is None else str(given)


def _column(row: Mapping[str, Any], key: str | None, usual: tuple[str, ...], argument: str) -> Any:
    """The value of a row under a key; with None, under the one usual name that the row has."""
    found = [k for k in (usual if key is None else (key,)) if k in row]
    if len(found) == 1:
        return row[found[0]]
    expected = f"a key {key!r}" if key is not None else f"one key of {_checks.names(usual)}"
    hint = "" if found or argument != "label_key" else "; label_key=False reads no labels"
    raise ValueError(
        f"collate: expected {expected} in every row: got the keys {_checks.names(row)}; {argument} names it{hint}"
    )


def labels_of(labels: list[Any]) -> Any:
    if all(isinstance(x, Tensor) for x in labels):
        shapes = sorted({_checks.shape(x) for x in labels})
        if len(shapes) > 1:
            raise ValueError(f"collate: expected labels of one shape: got tensors of shape {' and '.join(shapes)}")
        return torch.stack(labels)
    if all(isinstance(x, int | np.integer) for x in labels):
        return torch.tensor([int(x) for x in labels])
    if all(isinstance(x, int | float | np.number) for x in labels):
        return torch.tensor([float(x) for x in labels])
    return labels
