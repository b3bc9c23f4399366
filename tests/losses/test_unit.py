"""Unit rows and their cosines: against torch's own functions, and where a row has no direction or overflows."""

import math

import pytest
import torch
from torch.nn import functional as F

from ssd_addon import _unit
from ssd_addon._unit import joint_and_cosines
from ssd_addon.kernels import unit

# The interpreter computes with numpy, which warns of what overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BF16 = (torch.bfloat16, torch.bfloat16)
PAIRS = ((0, 1, 0), (0, 1, 1), (1, 0, 1))


def spaces(dtype=torch.float64, b=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, b, d, generator=g, dtype=torch.float64).to(dtype) for d in (3, 2)]


def oracle(z, pairs):
    """From the definition, one pair and one image at a time."""
    unit = [F.normalize(t, dim=-1) for t in z]
    cosines = [[(unit[s][a, i] * unit[s][b, i]).sum() for i in range(z[0].shape[1])] for a, b, s in pairs]
    return torch.cat(unit, dim=-1) / math.sqrt(len(z)), torch.stack([torch.stack(row) for row in cosines])


def both(f, z):
    """(joint, cosines, gradients)"""
    leaves = [t.detach().clone().requires_grad_() for t in z]
    joint, cosines = f(leaves, PAIRS)
    weight = torch.arange(joint.numel(), dtype=joint.dtype).view_as(joint).sin()
    return [
        joint.detach(),
        cosines.detach(),
        *torch.autograd.grad((joint * weight).sum() + cosines.cos().sum(), leaves),
    ]


def fused(types=None):
    """The Triton kernels."""
    return lambda z, pairs: joint_and_cosines(z, pairs, types, fused=True)


def plain(types=None):
    """What a compiler traces."""
    smallest = None if types is None else tuple(map(_unit.without_direction, types))
    return lambda z, pairs: _unit._plain(z, pairs, smallest)


def short(z):
    """Rows of zeros, and of lengths around the smallest normal numbers of the 16-bit types and of 1e-12."""
    for space, (v, i), length in (
        (0, (0, 1), 0),
        (0, (1, 2), 3e-5),
        (0, (0, 4), 1e-4),
        (1, (1, 4), 0),
        (1, (0, 5), 1e-13),
    ):
        z[space][v, i] *= length / z[space][v, i].norm()
    return z


@pytest.mark.parametrize("f", [joint_and_cosines, plain()])
def test_rows_and_gradients_are_those_of_normalize(f, monkeypatch):
    monkeypatch.setattr(_unit, "ROWS", 4)  # of the six
    for z in (spaces(), short(spaces())):
        torch.testing.assert_close(both(f, z), both(oracle, z), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("images,columns", [(1, 4), (4, 128)])
def test_the_kernels_give_the_rows_and_gradients_of_the_definition(monkeypatch, images, columns):
    """As far from float64 as float32 is, with strided spaces and gradients, one without a gradient, and no images."""
    monkeypatch.setattr(unit, "IMAGES", images)
    monkeypatch.setattr(unit, "COLUMNS", columns)
    for z in (spaces(), short(spaces()), [t.transpose(0, 1).contiguous().transpose(0, 1) for t in spaces(b=9)]):
        want = both(oracle, z)
        for got, exact in zip(both(fused(), [t.float() for t in z]), want, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=2e-6 * exact.abs().max().item())
    leaf = spaces(torch.float32)[1].requires_grad_()
    joint, cosines = fused()([spaces(torch.float32)[0], leaf], PAIRS)
    (some,) = torch.autograd.grad(joint[..., 3:].mT.sum() + cosines[1:].sum(), leaf)
    joint, cosines = joint_and_cosines([spaces(torch.float32)[0], leaf], PAIRS)
    (want,) = torch.autograd.grad(joint[..., 3:].mT.sum() + cosines[1:].sum(), leaf)
    torch.testing.assert_close(some, want, rtol=1e-5, atol=1e-6)
    assert [t.shape for t in both(fused(), spaces(torch.float32, b=0))[:2]] == [(2, 0, 5), (3, 0)]


def test_the_kernels_have_second_derivatives():
    found = []
    for f in (fused(), joint_and_cosines):
        z = [t.requires_grad_() for t in spaces(torch.float32)]
        joint, cosines = f(z, PAIRS)
        first = torch.autograd.grad(cosines.sum() + joint.sin().sum(), z, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), z)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("types", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_rows_of_16_bits_without_a_direction_get_no_gradient(types):
    z = short(spaces(torch.float32))
    want = both(joint_and_cosines, z)
    for f in (lambda z, pairs: joint_and_cosines(z, pairs, types), plain(types), fused(types)):
        got = both(f, z)
        torch.testing.assert_close(got[:2], want[:2])  # values are the same
        for t, space, kind, exact in zip(got[2:], z, types, want[2:], strict=True):
            gone = space.norm(dim=-1) <= torch.finfo(kind).smallest_normal
            assert 1 <= gone.sum() <= 2 and not t[gone].any()
            torch.testing.assert_close(t[~gone], exact[~gone], rtol=1e-5, atol=1e-6)
            assert t.to(kind).isfinite().all()


def test_a_row_of_zeros_has_a_gradient_of_0_through_half_precision():
    """As the loss computes: 16-bit embeddings promoted to float32, the gradient cast back, under a loss scaler."""
    for kind in (torch.float16, torch.bfloat16):
        leaves = [t.to(kind) for t in spaces()]
        leaves[0][0, 1] = 0
        leaves[1][1] = 0
        leaves = [t.requires_grad_() for t in leaves]
        joint, cosines = joint_and_cosines([t.float() for t in leaves], PAIRS, [kind, kind])
        (1024 * (joint.sin().sum() + cosines.sum())).backward()
        for t in leaves:
            assert t.grad.isfinite().all() and t.grad.abs().sum() > 0
            assert not t.grad[t.norm(dim=-1) == 0].any()


@pytest.mark.parametrize(
    "f", [joint_and_cosines, plain(), fused(), lambda *z: joint_and_cosines(*z, BF16), plain(BF16), fused(BF16)]
)
@pytest.mark.parametrize("dtype,size", [(torch.float32, 1e20), (torch.float32, 1e38), (torch.float64, 1e200)])
def test_a_length_that_overflows_is_nan_never_a_wrong_number(f, dtype, size):
    if dtype == torch.float64 and "fused" in f.__qualname__:
        pytest.skip("the kernels compute in float32")
    z = spaces(dtype)
    want = both(f, z)
    z[0][1, 2] *= size
    joint, cosines, *grads = both(f, z)
    assert joint[1, 2, :3].isnan().all() and cosines[0, 2].isnan() and grads[0][:, 2].isnan().all()
    joint[1, 2, :3] = cosines[0, 2] = 0
    want[0][1, 2, :3] = want[1][0, 2] = 0
    assert torch.equal(joint, want[0]) and torch.equal(cosines, want[1])  # all other rows keep their bits


def test_a_space_without_a_gradient_and_second_derivatives():
    z = [t.requires_grad_() for t in spaces(b=3)]
    for types in (None, (torch.float16, torch.float16)):
        assert torch.autograd.gradcheck(lambda *z, k=types: joint_and_cosines(z, PAIRS, k), z)
        assert torch.autograd.gradgradcheck(lambda *z, k=types: joint_and_cosines(z, PAIRS, k), z)
    constant, leaf = z[0].detach(), z[1]
    _, cosines = joint_and_cosines([constant, leaf], PAIRS)
    (g,) = torch.autograd.grad(cosines.sum(), leaf, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), leaf)
    assert g.abs().sum() > 0 and h.abs().sum() > 0


def test_it_compiles_without_a_break():
    types = (torch.float16, torch.float32)
    z = short(spaces(torch.float32))
    compiled = torch.compile(lambda z, pairs: joint_and_cosines(z, pairs, types), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(both(compiled, z), both(lambda z, pairs: joint_and_cosines(z, pairs, types), z))
