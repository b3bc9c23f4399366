"""`ImageFiles`: a data set of the images in a folder, whose sub-folders are the classes."""

import errno
import operator
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

from torch import Tensor
from torch.utils.data import Dataset

from ssd_addon import _checks
from ssd_addon._optional import needs

with needs("ssd_addon.files"):
    from PIL import Image

    from ssd_addon import _listing, pictures

# Errors of the process, the machine or the network, not of a single file.
_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT)


class ImageFiles(Dataset[tuple[Image.Image | Tensor, int, str]]):
    """The images in a folder and its sub-folders; items are (upright RGB PIL image, label, path below the folder).

    The classes are the sub-folders that contain an image at any depth, sorted by name; labels and order are those of
    torchvision's ImageFolder. A folder of images without such sub-folders has no classes, and all labels are 0.
    Files are recognized by their extension, in upper or lower case (.jpg, .jpeg, .png, .bmp, .webp, .ppm, .pgm, .tif,
    .tiff, and .gif, of which the first frame is used). They are opened when an item is read.

    Images are rotated according to their EXIF orientation, and transparency is composited over black. 16-bit levels are
    divided by 65535, or, if no pixel exceeds 4095, 1023 or 255, treated as 12, 10 or 8 bits stored in 16, because files
    do not record how many of their bits are used. Floating-point levels in [0, 1] are used unchanged; other
    floating-point and 32-bit levels are scaled from the minimum to the maximum of the image.

    Files and folders that are left out are counted in `.left_out` and shown by repr: hidden ones (.DS_Store, ._x.jpg,
    .ipynb_checkpoints), those of operating systems and file servers (__MACOSX, @eaDir, Thumbs.db), files with another
    extension, and links back to a folder that contains them. Other links are followed. A RuntimeWarning reports
    sub-folders without images, which are not classes, so that labels may differ from those of another split (compare
    `.classes`); images outside the class folders; broken links without an image's extension; and folders that are
    listed again through links, whose images then appear once per listing, with the label of each place.

    Args:
        root: the folder.
        short_side: short side, in pixels, that images are needed at, such as the size of a subsequent
            `StructuredCollate`. JPEGs at least twice as large are decoded at 1/2, 1/4 or 1/8 of their size, which is
            several times as fast; other formats are reduced by an integer factor, which takes less memory. None decodes
            images at full size.
        decode: "pil", or "torchcodec" (`pip install torchcodec`), which decodes JPEGs to the same pixels, about a third
            faster, unless they have to be reduced or rotated; items then hold a uint8 tensor [3, H, W].
        broken: "raise", or "skip", which replaces a file that cannot be decoded (a truncated JPEG, an image beyond
            Pillow's pixel limit), is missing or may not be read by another image, with its label and name. The
            replacement is the same in every epoch and worker, and different broken files get different replacements if
            there are enough files. Each broken file is counted in `.skipped` of the process that read it, and named in
            one RuntimeWarning.

    Attributes:
        classes: names of the class folders; [] if there are none.
        samples: (path, label) of every file, created on first use.
        targets: label of every file.
        names: path of every file relative to the folder, as in the items. Names and classes are printable and unique: a
            byte that is not UTF-8 is written as a backslash, x and two digits.
        left_out: reason -> number of files and folders.
        repeated: folder that is listed again through a link -> the folder that is listed first. Links to single files
            are not compared.
        skipped: number of broken files that this process has read.

    Raises:
        FileNotFoundError: the folder does not exist or contains no image.
        OSError: a folder cannot be listed; a file is broken and broken="raise"; all files are broken and broken="skip";
            or, with either, an error that does not concern a single file, such as too many open files.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        broken: Literal["raise", "skip"] = "raise",
        short_side: int | None = None,
        decode: Literal["pil", "torchcodec"] = "pil",
    ) -> None:
        self.root = Path(root).expanduser()
        self.short_side = None if short_side is None else _checks.width(short_side, "short_side")
        self.decode: Literal["pil", "torchcodec"] = _checks.choice(decode, ("pil", "torchcodec"), "decode")
        if self.decode == "torchcodec":
            pictures.torchcodec_decoders()  # fail now, not in the first epoch, if it is not installed
        self.broken: Literal["raise", "skip"] = _checks.choice(broken, ("raise", "skip"), "broken")
        self._shown_root = _listing.printable(str(self.root))
        if not self.root.is_dir():
            raise FileNotFoundError(f"root: expected a folder of images: got {self._shown_root}, which is not a folder")
        self._listing, left_out, empty, self.repeated = self._scan()
        self.left_out: dict[str, int] = dict(left_out)
        self._bad: set[int] = set()
        if not len(self):
            raise FileNotFoundError(
                f"expected images ({', '.join(_listing.SUFFIXES)}) in {self._shown_root} or its class folders: got none"
                f"{self._without()}"
            )
        surprises = _surprises(self.left_out, empty if self.classes else [])
        if surprises:
            warnings.warn(f"{self._shown_root}: left out {'; '.join(surprises)}", RuntimeWarning, stacklevel=2)
        if self.repeated:
            again, first = next(iter(self.repeated.items()))
            warnings.warn(
                f"{self._shown_root}: {len(self.repeated)} folders are listed again through links ({again}, which is "
                f"{first}, ...), so their images are in the data more than once, with the label of each place",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def classes(self) -> list[str]:
        return self._listing.classes

    @property
    def targets(self) -> list[int]:
        return self._listing.labels

    @property
    def samples(self) -> Sequence[tuple[Path, int]]:
        return _listing.Column(self._listing.sample, len(self))

    @property
    def names(self) -> Sequence[str]:
        return _listing.Column(self._listing.name, len(self))

    @property
    def skipped(self) -> int:
        return len(self._bad)

    def _scan(self) -> _listing.Scan:
        """List the images; a subclass may keep them elsewhere than in files."""
        return _listing.scan(self.root)

    def _source(self, k: int) -> Path | IO[bytes]:
        """The path or file object from which Pillow opens an image."""
        return self._listing.path(k)

    def __len__(self) -> int:
        return len(self._listing)

    def __repr__(self) -> str:
        found = f"{len(self)} images, {len(self.classes)} class folders"
        again = f"; listed again through links: {len(self.repeated)} folders" if self.repeated else ""
        return f"ImageFiles({str(self.root)!r}: {found}{self._without()}{again})"

    def _without(self) -> str:
        listed = ", ".join(f"{n} {reason}" for reason, n in sorted(self.left_out.items()))
        return f"; left out: {listed}" if listed else ""

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int, str]:
        first = operator.index(index)
        if not -len(self) <= first < len(self):
            raise IndexError(f"index: expected a number from {-len(self)} to {len(self) - 1}: got {first}")
        read = pictures.read if self.decode == "pil" else pictures.read_by_torchcodec
        for k in _order(first % len(self), len(self)):
            if k in self._bad:
                continue
            try:
                image = read(self._source(k), self.short_side)
            except Exception as error:  # decoders raise much more than OSError; see `pictures.read`
                self._meet(k, error)
            else:
                return image, self.targets[k], self._listing.name(k)
        raise OSError(f"{self._shown_root}: expected an image: none of the {len(self)} images could be decoded")

    def _meet(self, k: int, error: Exception) -> None:
        """Raise for a broken file, or count it and warn."""
        number = error.errno if isinstance(error, OSError) else None
        path = _listing.printable(str(self._listing.path(k)))
        reason = f"could not be {'decoded' if number is None else 'read'} ({type(error).__name__}: {error})"
        if self.broken == "raise" or number in _NOT_THE_FILE or not self.root.is_dir():
            message = f"{path}: expected an image: {reason}"
            raise (OSError(message) if number is None else OSError(number, message)) from error
        self._bad.add(k)
        warnings.warn(f"skipped {path}: {reason}", RuntimeWarning, stacklevel=3)


def _order(first: int, n: int) -> Iterator[int]:
    """`first`, then the n - 1 other indices as its replacements.

    The k-th replacement is `first` plus the k-th of a sequence of distances that is drawn once for all files. So the
    k-th replacements of different files differ, and neighbors, which are often broken together, are not replaced by
    each other.
    """
    yield first
    near = random.Random(n).sample(range(1, n), min(n - 1, 256))
    for distance in near:
        yield (first + distance) % n
    tried = set(near)
    for distance in range(1, n):
        if distance not in tried:
            yield (first + distance) % n


def _surprises(left_out: dict[str, int], empty: list[str]) -> list[str]:
    """What was left out that a user may not expect, for a warning."""
    words = []
    if empty:
        some = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        meaning = "which are not classes, so that labels may differ from those of another split"
        words.append(f"{len(empty)} {_listing.EMPTY} ({some}), {meaning}")
    for reason in (_listing.BESIDE, _listing.BROKEN_LINK):
        if reason in left_out:
            words.append(f"{left_out[reason]} {reason}")
    return words
