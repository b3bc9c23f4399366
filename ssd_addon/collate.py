"""From samples to a batch: one size, three channels, and the structured views where they are made in the loader."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from ssd_addon import _checks
from ssd_addon.batch import ViewBatch

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif")


class StructuredCollate:
    """Collate function: samples (image, label[, name]) -> (images or ViewBatch, labels, names).

    Images are PIL images (grey, palette and RGBA become RGB, transparency over black), uint8 arrays [H, W, 3], or
    tensors [C, H, W]. Sizes may differ.

    >>> collate = StructuredCollate(32)
    >>> images, labels, names = collate([(torch.rand(3, 40, 60), 1), (torch.rand(3, 32, 32), 0, "b.jpg")])
    >>> images.shape, labels.tolist(), names
    (torch.Size([2, 3, 32, 32]), [1, 0], ['', 'b.jpg'])

    Args:
        size: edge in pixels, or (height, width).
        fit: "cover" resizes with antialiasing until the image covers the size, then crops the centre; "pad" resizes
            until it fits inside, and pads with black.
        views: a `StructuredViews` to apply; None returns images [B, C, H, W] (uint8 where all samples are,
            a quarter of the memory to move: `views(images)` on the device scales them).

    Returns:
        images or ViewBatch; labels (an int64 or float tensor [B] where they are numbers, else a list); names, a list
        with "" where a sample has none.

    Raises:
        ValueError, TypeError: an empty batch, a sample that is no tuple, an image that is none.
    """

    def __init__(
        self, size: int | tuple[int, int], *, fit: str = "cover", views: Callable[[Tensor], ViewBatch] | None = None
    ) -> None:
        edges = (size, size) if isinstance(size, int) else size
        if (
            not isinstance(edges, Sequence)
            or len(edges) != 2
            or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in edges)
        ):
            got = repr(size) if isinstance(size, int | float | Sequence) else type(size).__name__
            raise ValueError(f"size: expected an edge or (height, width) in whole pixels, 1 or more: got {got}")
        self.size = (edges[0], edges[1])
        self.fit = _checks.choice(fit, ("cover", "pad"), "fit")
        self.views = views

    def __call__(self, samples: Sequence[Any]) -> tuple[Tensor | ViewBatch, Any, list[str]]:
        if not samples:
            raise ValueError("collate: expected at least one sample: got an empty batch")
        images, labels, names = [], [], []
        for sample in samples:
            if not isinstance(sample, tuple | list) or not 2 <= len(sample) <= 3:
                got = f"{len(sample)} items" if isinstance(sample, tuple | list) else type(sample).__name__
                raise TypeError(f"collate: expected samples (image, label) or (image, label, name): got {got}")
            images.append(self._fitted(sample[0]))
            labels.append(sample[1])
            names.append(str(sample[2]) if len(sample) == 3 else "")
        if any(i.dtype != torch.uint8 for i in images):
            images = [i.float() / 255 if i.dtype == torch.uint8 else i.float() for i in images]
        channels = sorted({i.shape[0] for i in images})
        if len(channels) > 1:
            raise ValueError(f"collate: expected one number of channels in a batch: got {channels}")
        batch = torch.stack(images)
        return batch if self.views is None else self.views(batch), _labels(labels), names

    def _fitted(self, image: Any) -> Tensor:
        h, w = self.size
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3):
                raise TypeError(f"collate: expected a uint8 array [H, W, C]: got {image.dtype} {image.shape}")
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            rgb = _rgb(image)
            k = _ratio(rgb.height, rgb.width, h, w, self.fit)
            new = _scaled(rgb.height, rgb.width, k, h, w, self.fit)
            if new != (rgb.height, rgb.width):
                rgb = rgb.resize((new[1], new[0]), Image.Resampling.BICUBIC)
            tensor = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()
        elif isinstance(image, Tensor):
            if image.ndim != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
                raise TypeError(
                    f"collate: expected an image [C, H, W], uint8 or floating point: got {image.dtype} "
                    f"{_checks.shape(image)}"
                )
            height, width = image.shape[1:]
            new = _scaled(height, width, _ratio(height, width, h, w, self.fit), h, w, self.fit)
            tensor = image
            if new != tuple(image.shape[1:]):
                scaled = F.interpolate(image[None].float(), new, mode="bilinear", antialias=True, align_corners=False)[
                    0
                ]
                tensor = scaled.round().to(torch.uint8) if image.dtype == torch.uint8 else scaled
        else:
            raise TypeError(f"collate: expected a PIL image, an array or a tensor: got {type(image).__name__}")
        return _centred(tensor, h, w)


class ImageFiles(Dataset[tuple[Image.Image, int, str]]):
    """Images below a folder: (RGB PIL image, label, path relative to the folder).

    The classes are the folder's sub-folders, sorted; images that lie in the folder itself are class 0 of a folder
    without sub-folders. Files are opened when asked for.

    Args:
        root: the folder.
        broken: "raise", or "skip": a file that cannot be decoded (a truncated JPEG) is replaced by the next one that
            can, counted in `.skipped` of the process that met it, and named in one warning.

    Raises:
        FileNotFoundError: no such folder, or no image below it.
        OSError: a broken file, with broken="raise"; every file broken, with "skip".
    """

    def __init__(self, root: str | Path, *, broken: str = "raise") -> None:
        self.root = Path(root)
        self.broken = _checks.choice(broken, ("raise", "skip"), "broken")
        self.skipped = 0
        self._bad: set[int] = set()
        if not self.root.is_dir():
            raise FileNotFoundError(f"expected a folder of images: got {self.root}, which is no folder")
        self.classes = sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        where = [(self.root / c, k) for k, c in enumerate(self.classes)] or [(self.root, 0)]
        self.samples = [
            (path, label)
            for folder, label in where
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in SUFFIXES and path.is_file()
        ]
        if not self.samples:
            raise FileNotFoundError(
                f"expected images ({', '.join(SUFFIXES)}) in {self.root} or its class folders: got none"
            )
        self.targets = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"ImageFiles({str(self.root)!r}: {len(self)} images, {len(self.classes)} class folders)"

    def __getitem__(self, index: int) -> tuple[Image.Image, int, str]:
        for step in range(len(self.samples)):
            k = (index + step) % len(self.samples)
            path, label = self.samples[k]
            try:
                with Image.open(path) as image:
                    return _rgb(image), label, str(path.relative_to(self.root))
            except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
                if self.broken == "raise":
                    raise OSError(f"{path}: expected an image: could not be decoded ({error})") from error
                if k not in self._bad:
                    self._bad.add(k)
                    self.skipped += 1
                    warnings.warn(f"skipped {path}: could not be decoded ({error})", RuntimeWarning, stacklevel=2)
        raise OSError(f"{self.root}: none of the {len(self.samples)} images could be decoded")


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; transparency over black."""
    if image.mode == "RGB":
        image.load()
        return image.copy()
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _ratio(height: int, width: int, h: int, w: int, fit: str) -> float:
    return (max if fit == "cover" else min)(h / height, w / width)


def _scaled(height: int, width: int, k: float, h: int, w: int, fit: str) -> tuple[int, int]:
    bound = max if fit == "cover" else min
    return bound(max(1, round(height * k)), h), bound(max(1, round(width * k)), w)


def _centred(t: Tensor, h: int, w: int) -> Tensor:
    """Centre crop where larger, black padding where smaller, per axis."""
    top, left = max(0, (t.shape[1] - h) // 2), max(0, (t.shape[2] - w) // 2)
    t = t[:, top : top + h, left : left + w]
    dh, dw = h - t.shape[1], w - t.shape[2]
    return F.pad(t, (dw // 2, dw - dw // 2, dh // 2, dh - dh // 2)) if dh or dw else t


def _labels(labels: list[Any]) -> Any:
    if all(isinstance(x, Tensor) for x in labels):
        return torch.stack(labels)
    if all(isinstance(x, int | np.integer) for x in labels):
        return torch.tensor([int(x) for x in labels])
    if all(isinstance(x, int | float | np.number) for x in labels):
        return torch.tensor([float(x) for x in labels])
    return labels
