"""The shape checks that conftest installs: they see every annotated function, and see a wrong shape."""

import pytest
import shapes
import torch

from ssd_addon._shapes import Matrix, Scalar, Vector
from ssd_addon.kernels import negative_lse
from ssd_addon.losses import FAMILIES, resolve_family


def test_a_wrong_result_and_an_argument_that_is_taken_without_a_word_are_found():
    def product(a: Matrix, b: Matrix) -> Vector:
        return (a * b).sum()

    def takes(a: Matrix, b: Matrix) -> Scalar:
        if a.ndim != 2:
            raise ValueError("expected [n, d]")
        return a.sum()

    rows = torch.ones(2, 3)
    with pytest.raises(AssertionError, match="result has another shape than annotated"):
        shapes._wrapped(product)(rows, rows)
    with pytest.raises(AssertionError, match=r"took \['b'\] of another shape"):
        shapes._wrapped(takes)(rows, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"expected \[n, d\]"):  # in its own words
        shapes._wrapped(takes)(torch.ones(2), rows)


def test_the_package_is_checked():
    before = shapes.CHECKED["ssd_addon.kernels.similarity.negative_lse"]
    negative_lse(torch.eye(3), torch.arange(3), 1.0)
    assert shapes.CHECKED["ssd_addon.kernels.similarity.negative_lse"] == before + 1
    for name in FAMILIES:
        family = type(resolve_family(name))
        assert f"{family.__module__}.{family.__name__}.alignment" in shapes.CHECKED
    assert len(shapes.CHECKED) > 40
