"""Images of one size, with whatever is known of them: from a folder, a data set, or code that makes them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from ssd_addon import _checks, _limits
from ssd_addon.collate import ImageFiles, StructuredCollate
from ssd_addon.metrics import Circular, Factor

Say = Callable[[str], None]
SPLITS = ("val", "valid", "validation", "test", "train")
"""Names of folders that are splits of a data set, not classes; the first of them that is there is read."""


@dataclass(frozen=True, eq=False)
class Data:
    """Images with what is known of them.

    Attributes:
        images: [n, C, H, W], uint8 or in [0, 1], not normalized.
        factors: name -> a value for each image, as `r2_matrix` takes them; {} where nothing is known.
        names: [n] a caption for each image, "" where there is none.
        classes: factor -> the names of its classes, where they have names.
        total: images that these were drawn from.
        broken: files among them that could not be decoded and were left out.
        enlarged: [n] booleans, whether an image was smaller than the size that it was brought to; None if none was.
        split: the folder of a data set in splits that was read; "" where there is none.
    """

    images: Tensor
    factors: Mapping[str, Factor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    classes: Mapping[str, list[str]] = field(default_factory=dict)
    total: int = 0
    broken: int = 0
    enlarged: Tensor | None = None
    split: str = ""

    def __post_init__(self) -> None:
        n = len(self.images)
        names = ["" if name is None else str(name) for name in self.names]
        object.__setattr__(self, "names", names or [""] * n)
        object.__setattr__(self, "total", self.total or n)

    def check(self) -> None:
        """Raises what does not fit: images without a picture, names, factors or classes that are not theirs."""
        x, n = self.images, len(self.images)
        if x.ndim != 4 or not x.numel():
            raise ValueError(f"images: expected [n, C, H, W], one image or more: got {_checks.shape(x)}")
        if x.shape[1] == x.shape[2] > 4 >= x.shape[3]:
            raise ValueError(
                f"images: expected [n, C, H, W]: got {_checks.shape(x)}, which looks like [n, H, W, C]; give "
                "images.permute(0, 3, 1, 2)"
            )
        if len(self.names) != n:
            raise ValueError(f"names: expected {n}, one per image: got {len(self.names)}")
        for name, f in self.factors.items():
            if not isinstance(name, str):
                raise TypeError(f"factors: expected their names as strings: got {name!r}")
            values = f.angle if isinstance(f, Circular) else f
            if not isinstance(values, Tensor) or values.ndim < 1 or len(values) != n:
                got = _checks.shape(values) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"factor {name!r}: expected a tensor of {n} values, one per image: got {got}")
        for name, words in self.classes.items():
            if name in self.factors:
                factor = self.factors[name]
                values = torch.zeros(1) if isinstance(factor, Circular) else torch.as_tensor(factor)
                least, most = int(values.min()), int(values.max())
                if least < 0 or most >= len(words):
                    expected = f"classes from 0 on, and a word for each class up to {most}"
                    raise ValueError(
                        f"classes {name!r}: expected {expected}: got {len(words)} words, least class {least}"
                    )


def read(spec: str | Path | Any, *, size: int | None, samples: int, seed: int = 0, say: Say | None = None) -> Data:
    """Up to `samples` images, drawn at random (in the order of the data set) where there are more.

    A broken file of a folder (or of an `ImageFiles`) is left out and counted, and another takes its place while there
    are more.

    Args:
        spec: a folder of images (with class folders, the class is a factor "class"; where all folders in it are
            splits, of the names in SPLITS, the first of these is taken), a data set (len and items (image, label[,
            name])), or "FILE.py:NAME" / "MODULE:NAME", where NAME(samples=...), where it takes that, or NAME() returns
            `Data`, a data set or a pair (images [n, C, H, W], factors). A label is a class (an integer or a word), a
            number, or a mapping of factors.
        size: edge in pixels that images of a folder or a data set are brought to; None only for tensors of images.
        samples: largest number of images.
        seed: seed of the choice of images.
        say: called with a line on the progress.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError, TypeError: something else.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples: expected a whole number of images, 1 or more: got {samples!r}")
    if isinstance(spec, str) and ":" in spec and not Path(spec).exists():
        from ssd_addon.runs.build import find

        made = find(spec, "data")
        if inspect.isclass(made) or (callable(made) and not hasattr(made, "__getitem__")):
            try:
                made = made(samples=samples) if "samples" in inspect.signature(made).parameters else made()
            except Exception as error:  # whatever the caller's own code raises
                raise ValueError(f"data: {spec} raised {type(error).__name__}: {error}") from error
        spec = made
    if isinstance(spec, Data):
        return _subset(spec, samples, seed)
    classes: dict[str, list[str]] = {}
    split = ""
    if isinstance(spec, str | Path):
        folder = Path(spec)
        if not folder.is_dir():
            raise FileNotFoundError(f"data: expected a folder of images, or FILE.py:NAME: got {spec}, which is neither")
        if split := _split(folder):
            folder = folder / split
            if say is not None:
                say(f"reading {split}/, as the folders in {spec} are splits")
        files = ImageFiles(folder, broken="skip")
        if len(files.classes) > 1:
            classes["class"] = files.classes
        spec = files
    if isinstance(spec, tuple | list) and len(spec) == 2 and isinstance(spec[0], Tensor):
        if not isinstance(spec[1], Mapping):
            raise TypeError(f"data: expected factors as a mapping name -> values: got {type(spec[1]).__name__}")
        return _subset(Data(spec[0], spec[1]), samples, seed)
    if not hasattr(spec, "__len__") or not hasattr(spec, "__getitem__"):
        raise TypeError(
            "data: expected a folder, a data set with len() and items (image, label), or a pair (images, factors): "
            f"got {type(spec).__name__}"
        )
    if size is None:
        raise ValueError(
            "size: expected the edge in pixels of the images that the model was trained on, as embeddings depend on "
            "it: got none; give size (on the command line --size), or name it on the checkpoint's card"
        )
    total = len(spec)
    if not total:
        raise ValueError("data: expected at least one image: got an empty data set")
    images, labels, names, broken, enlarged = _samples(spec, _shuffled(total, seed), samples, size, say)
    kinds = {i.dtype for i in images}
    if len(kinds) > 1:
        images = [i.float() / 255 if i.dtype == torch.uint8 else i.float() for i in images]
    channels = sorted({i.shape[1] for i in images})
    if len(channels) > 1:
        raise ValueError(f"data: expected one number of channels: got {channels}")
    factors, words = _factors(labels)
    if isinstance(spec, ImageFiles) and len(spec.classes) < 2:
        factors = {}
    classes |= words
    return Data(torch.cat(images), factors, names, classes, total, broken, enlarged if enlarged.any() else None, split)


def facts(data: Data) -> list[tuple[str, str]]:
    """What the head of a page says of the split that was read, files that were left out and enlarged images."""
    out = [("split", data.split)] if data.split else []
    out += [("broken files", f"{data.broken}, which are left out")] if data.broken else []
    if data.enlarged is not None and (count := int(data.enlarged.sum())):
        out.append(("enlarged images", f"{count} of {len(data.enlarged)}, which were smaller"))
    return out


def _split(folder: Path) -> str:
    """The folder inside that is read where all or several of them are splits; "" where they are not, as of classes."""
    inside = {p.name.lower(): p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    found = [inside[s] for s in SPLITS if s in inside]
    return found[0] if found and (len(found) > 1 or len(inside) == 1) else ""


def _shuffled(total: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))


def _samples(
    spec: Any, order: Tensor, samples: int, size: int, say: Say | None
) -> tuple[list[Tensor], list[Any], list[str], int, Tensor]:
    """The first samples in this order that are not broken: images, labels, names, how many broken ones were left out,
    and whether each image is smaller than the size.

    The image that `ImageFiles` gives in the place of a broken one is not taken: it would lie on both sides of a split.
    """
    collate = StructuredCollate(size)
    found: dict[int, tuple[Tensor, Any, str]] = {}
    broken, wanted = 0, min(samples, len(order))
    smaller: dict[int, bool] = {}
    _limits.fits(wanted * 3 * size**2, "size", f"{wanted} images of {size} x {size} pixels")
    while len(found) < wanted and len(order):
        missing = wanted - len(found)
        chosen, order = order[:missing].sort().values.tolist(), order[missing:]
        for k in chosen:
            sample = spec[k]
            if not isinstance(sample, tuple | list) or not 2 <= len(sample) <= 3:
                got = f"{len(sample)} items" if isinstance(sample, tuple | list) else type(sample).__name__
                raise TypeError(f"data: expected items (image, label) or (image, label, name): got {got}")
            own = _name_of_file(spec, k)
            if own is not None and len(sample) == 3 and sample[2] != own:
                broken += 1
                continue
            batch, _, name = collate([(sample[0], 0, *sample[2:3])])
            assert isinstance(batch, Tensor)
            found[k] = batch, sample[1], name[0]
            smaller[k] = _shorter_edge(sample[0]) < size
            if say is not None and (len(found) % 250 == 0 or len(found) == wanted):
                say(f"read {len(found)}/{wanted} images")
    if broken and say is not None:
        say(f"left out {broken} broken files, {len(found)} images are read")
    enlarged = torch.tensor([smaller[k] for k in sorted(found)])
    if enlarged.any() and say is not None:
        say(f"{int(enlarged.sum())} of {len(found)} images are smaller than {size} pixels and are enlarged")
    images, labels, names = (list(column) for column in zip(*(found[k] for k in sorted(found)), strict=True))
    return images, labels, names, broken, enlarged


def _shorter_edge(image: Any) -> int:
    """Of a PIL image, a tensor [C, H, W] or an array [H, W] or [H, W, C], in pixels."""
    if isinstance(image, Tensor):
        return min(image.shape[-2:])
    height, width = image.shape[:2] if hasattr(image, "shape") else image.size
    return int(min(height, width))


def _name_of_file(spec: Any, k: int) -> str | None:
    """The name that sample k has unless its file is broken; None where files are not known."""
    while isinstance(spec, Subset):
        spec, k = spec.dataset, spec.indices[k]
    return spec.names[k] if isinstance(spec, ImageFiles) else None


def _subset(data: Data, samples: int, seed: int) -> Data:
    """At most `samples` images, with their labels and factors."""
    n = len(data.images)
    if data.images.ndim != 4 or not n:
        raise ValueError(f"data: expected images [n, C, H, W], one or more: got {_checks.shape(data.images)}")
    if len(data.names) != n:
        raise ValueError(f"data: expected {n} names, one per image: got {len(data.names)}")
    rows = _shuffled(n, seed)[:samples].sort().values
    kept: dict[str, Factor] = {}
    for name, f in data.factors.items():
        try:
            values = f.angle if isinstance(f, Circular) else torch.as_tensor(f)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"data: factor {name!r}: expected numbers: got {type(f).__name__} ({error})") from error
        if values.ndim < 1:
            raise ValueError(f"data: factor {name!r}: expected {n} values, one per image: got a single number")
        if len(values) != n:
            raise ValueError(f"data: factor {name!r}: expected {n} values, one per image: got {len(values)}")
        if isinstance(f, Circular):
            fold = f.fold[rows] if isinstance(f.fold, Tensor) and f.fold.ndim else f.fold
            kept[name] = Circular(values[rows], fold)
        else:
            kept[name] = values[rows]
    names = [data.names[i] for i in rows.tolist()]
    enlarged = None if data.enlarged is None else data.enlarged[rows]
    return Data(data.images[rows], kept, names, data.classes, max(data.total, n), data.broken, enlarged, data.split)


def _factors(labels: list[Any]) -> tuple[dict[str, Factor], dict[str, list[str]]]:
    """Labels, or mappings of factors that all samples have; and the names of classes that are words."""
    if all(isinstance(x, Mapping) for x in labels):
        names = list(labels[0])
        if any(set(x) != set(names) for x in labels):
            raise ValueError("data: expected the same factors for every image: some have others")
        columns = {name: [x[name] for x in labels] for name in names}
    else:
        columns = {"class": labels}
    factors: dict[str, Factor] = {}
    words: dict[str, list[str]] = {}
    for name, values in columns.items():
        if all(isinstance(v, str) for v in values):
            words[name] = sorted(set(values))
            factors[name] = torch.tensor([words[name].index(v) for v in values])
            continue
        try:
            factors[name] = torch.stack([torch.as_tensor(v) for v in values])
        except (TypeError, ValueError, RuntimeError) as error:
            if name == "class" and not isinstance(labels[0], Mapping):
                return {}, {}  # a label that is neither a number nor a word: nothing is known
            raise ValueError(
                f"data: factor {name!r}: expected numbers, or words, of one kind for every image ({error})"
            ) from error
    return factors, words
