"""Optional packages: an import error names the part of the library that needs the package, and how to install it."""

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
"""Package -> its name for pip."""


@contextmanager
def needs(what: str) -> Iterator[None]:
    """Context for imports: if one of `PACKAGES` is missing, the error names what needs it and how to install it.

    >>> with needs("a backbone"):
    ...     raise ModuleNotFoundError("No module named 'timm'", name="timm")
    Traceback (most recent call last):
    ImportError: a backbone needs timm, which is not installed: pip install timm

    Raises:
        ImportError: the package is missing. Other errors, such as one inside the package, are not changed.
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
