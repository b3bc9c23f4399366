"""Packages that a part of the library needs and the rest does without: what needs one says so by name."""

from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = {
    "kornia": "kornia",
    "litdata": "litdata",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "PIL": "pillow",
    "timm": "timm",
    "torchcodec": "torchcodec",
    "torchvision": "torchvision",
}
"""Package -> what pip calls it."""


@contextmanager
def needs(what: str) -> Iterator[None]:
    """An import inside that fails for want of one of `PACKAGES` names what needed it, and how to install it.

    >>> with needs("a backbone"):
    ...     raise ModuleNotFoundError("No module named 'timm'", name="timm")
    Traceback (most recent call last):
    ImportError: a backbone needs timm, which is not installed: pip install timm

    Raises:
        ImportError: the package is missing. Any other error, such as one inside the package, is left as it is.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        raise ImportError(
            f"{what} needs {package}, which is not installed: pip install {PACKAGES[package]}", name=package
        ) from error
