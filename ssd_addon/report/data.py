"""What `--data` names: images of one size, with whatever is known of them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.collate import ImageFiles, StructuredCollate
from ssd_addon.metrics import Circular, Factor

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Data:
    """Images with what is known of them.

    Attributes:
        images: [n, C, H, W], uint8 or in [0, 1], not normalised.
        factors: name -> a value for each image, as `r2_matrix` takes them; {} where nothing is known.
        names: [n] a caption for each image, "" where there is none.
        classes: factor -> the names of its classes, where they have names.
        total: images that these were drawn from.
    """

    images: Tensor
    factors: Mapping[str, Factor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    classes: Mapping[str, list[str]] = field(default_factory=dict)
    total: int = 0

    def __post_init__(self) -> None:
        n = len(self.images)
        object.__setattr__(self, "names", list(self.names) or [""] * n)
        object.__setattr__(self, "total", self.total or n)


def read(spec: str | Path | Any, *, size: int, samples: int, seed: int = 0, say: Say | None = None) -> Data:
    """Up to `samples` images, drawn at random (in the order of the data set) where there are more.

    Args:
        spec: a folder of images (with class folders, the class is a factor "class"; with train/ and val/ in it, val is
            taken), a data set (len and items (image, label[, name])), or "FILE.py:NAME" / "MODULE:NAME", where
            NAME(samples) or NAME() returns `Data`, a data set or a pair (images [n, C, H, W], factors). A label is a
            number of a class, or a mapping of factors.
        size: edge in pixels that images of a data set are brought to.
        samples: at most so many.
        seed: of the choice.
        say: told how far it is.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError, TypeError: something else.
    """
    if isinstance(spec, str) and ":" in spec and not Path(spec).exists():
        from ssd_addon.checkpoints import find

        made = find(spec, "--data")
        if callable(made) and not hasattr(made, "__getitem__"):
            takes = inspect.signature(made).parameters
            made = made(samples) if takes else made()
        spec = made
    if isinstance(spec, Data):
        return spec
    classes: dict[str, list[str]] = {}
    if isinstance(spec, str | Path):
        folder = Path(spec)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"--data: expected a folder of images, or FILE.py:NAME: got {spec}, which is neither"
            )
        if (folder / "val").is_dir() or (folder / "train").is_dir():
            folder = folder / ("val" if (folder / "val").is_dir() else "train")
        files = ImageFiles(folder, broken="skip")
        if len(files.classes) > 1:
            classes["class"] = files.classes
        spec = files
    if isinstance(spec, tuple | list) and len(spec) == 2 and isinstance(spec[0], Tensor):
        return _pair(spec[0], spec[1], samples, seed)
    if not hasattr(spec, "__len__") or not hasattr(spec, "__getitem__"):
        raise TypeError(
            "--data: expected a folder, a data set with len() and items (image, label), or a pair (images, factors): "
            f"got {type(spec).__name__}"
        )
    total = len(spec)
    if not total:
        raise ValueError("--data: expected at least one image: got an empty data set")
    chosen = _chosen(total, samples, seed)
    collate = StructuredCollate(size)
    images, labels, names = [], [], []
    for i, k in enumerate(chosen.tolist()):
        sample = spec[k]
        batch, _, name = collate([(sample[0], 0, *sample[2:3])] if isinstance(sample, tuple | list) else [sample])
        assert isinstance(batch, Tensor)
        images.append(batch)
        labels.append(sample[1])
        names.append(name[0])
        if say is not None and ((i + 1) % 250 == 0 or i + 1 == len(chosen)):
            say(f"read {i + 1}/{len(chosen)} images")
    kinds = {i.dtype for i in images}
    if len(kinds) > 1:
        images = [i.float() / 255 if i.dtype == torch.uint8 else i.float() for i in images]
    channels = sorted({i.shape[1] for i in images})
    if len(channels) > 1:
        raise ValueError(f"--data: expected one number of channels: got {channels}")
    factors = _factors(labels)
    if isinstance(spec, ImageFiles) and len(spec.classes) < 2:
        factors = {}
    return Data(torch.cat(images), factors, names, classes, total)


def _chosen(total: int, samples: int, seed: int) -> Tensor:
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:samples].sort().values


def _pair(images: Tensor, factors: Any, samples: int, seed: int) -> Data:
    if images.ndim != 4 or not len(images):
        raise ValueError(f"--data: expected images [n, C, H, W], one or more: got {_checks.shape(images)}")
    if not isinstance(factors, Mapping):
        raise TypeError(f"--data: expected factors as a mapping name -> values: got {type(factors).__name__}")
    rows = _chosen(len(images), samples, seed)
    kept: dict[str, Factor] = {}
    for name, f in factors.items():
        if isinstance(f, Circular):
            fold = f.fold[rows] if isinstance(f.fold, Tensor) and f.fold.ndim else f.fold
            kept[name] = Circular(f.angle[rows], fold)
        else:
            t = torch.as_tensor(f)
            if len(t) != len(images):
                raise ValueError(f"--data: factor {name!r}: expected {len(images)} values, one per image: got {len(t)}")
            kept[name] = t[rows]
    return Data(images[rows], kept, total=len(images))


def _factors(labels: list[Any]) -> dict[str, Factor]:
    """Numbers of classes, or mappings of factors that all samples have; nothing where labels are something else."""
    if all(isinstance(x, Mapping) for x in labels):
        names = list(labels[0])
        if any(set(x) != set(names) for x in labels):
            raise ValueError("--data: expected the same factors for every image: some have others")
        return {name: torch.stack([torch.as_tensor(x[name]) for x in labels]) for name in names}
    numbers = [x.item() if isinstance(x, Tensor) and x.ndim == 0 else x for x in labels]
    if all(isinstance(x, int) and not isinstance(x, bool) for x in numbers):
        return {"class": torch.tensor(numbers)}
    return {}
