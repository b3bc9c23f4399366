"""The two kernels, both backends, in value and gradient: against the oracle's loops and against bad input."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from reference import grouped, unit
from torch.nn import functional as F

from ssd_addon import JointEntropyLoss
from ssd_addon.kernels import BACKENDS, choose_backend, dispatch, negative_lse, off_diagonal_energy

ROOT = Path(__file__).parents[2]
RUN = ("eager", "streaming")
RTOL, ATOL = 1e-9, 1e-11  # float64 against float64 loops


def both(f, z, ids, tau, prefix, cotangent):
    """(values, dz, dtau) of f, rows and temperature as leaves."""
    rows = z.detach().clone().requires_grad_()
    t = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    lse = f(rows, ids, t, prefix)
    return lse.detach(), *torch.autograd.grad((lse * cotangent).sum(), (rows, t))


def assert_equals_oracle(z, ids, tau, *, prefix=None, backend="eager", chunk=None, seed=0):
    shape = z.shape[:1] if prefix is None else (len(z), 2)
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    want = both(lambda *a: reference.negative_lse(*a), z, ids, tau, prefix, cotangent)
    got = both(
        lambda z, i, t, p: negative_lse(z, i, t, prefix=p, backend=backend, chunk=chunk), z, ids, tau, prefix, cotangent
    )
    for name, a, b in zip(("lse", "dz", "dtau"), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=RTOL, atol=ATOL, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def medium():
    """What a user may allow: float32 products of operands in 16 bits, where the processor has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", RUN)
def test_medium_precision_costs_at_most_half_a_percent_of_the_gradient(medium, backend):
    """As docs/benchmarks.md says; more than float32's rounding only where the processor multiplies 16-bit numbers."""
    z, ids = unit(300, 64), torch.arange(300) // 2
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = z.to(dtype).requires_grad_()
        lse = negative_lse(leaf, ids, 0.15, backend=backend)
        found.append((lse.detach().double(), torch.autograd.grad(lse.sum(), leaf)[0].double()))
    (want, dwant), (got, dgot) = found
    assert (got - want).abs().max() <= 5e-3 and (dgot - dwant).norm() <= 5e-3 * dwant.norm()


# ------------------------------------------------------------------------------------------ negative_lse


@pytest.mark.parametrize("prefix", [None, 1, 3])
@pytest.mark.parametrize("backend,chunk", [("eager", None), *(("streaming", c) for c in (1, 7, 31, 100, None))])
def test_lse_equals_oracle_in_any_chunks(backend, chunk, prefix):
    assert_equals_oracle(unit(31, 5), grouped(31, 12), 0.15, prefix=prefix, backend=backend, chunk=chunk)


@pytest.mark.parametrize("prefix", [None, 2])
@pytest.mark.parametrize("tau", [0.01, 0.0128, 0.014, 0.05, 1.0])  # from the running maximum to no shift at all
@pytest.mark.parametrize("backend", RUN)
def test_lse_equals_oracle_at_any_temperature(backend, tau, prefix):
    assert_equals_oracle(unit(13, 4, seed=1), grouped(13, 5), tau, prefix=prefix, backend=backend, chunk=4)


@pytest.mark.parametrize(
    "z,ids",
    [
        (30 * unit(9, 3), torch.arange(9)),
        (torch.cat([unit(4, 3), 50 * unit(5, 3, seed=2)]), torch.arange(9)),
        (unit(4, 3).repeat(3, 1), torch.arange(12)),
        (unit(1, 3).expand(6, 3), torch.arange(6) // 2),
        (torch.cat([unit(3, 3), -unit(3, 3)]), torch.arange(6)),
        (torch.cat([unit(4, 3), torch.zeros(2, 3)]), torch.arange(6)),
        (unit(8, 3), torch.tensor([5, 5, 5, 5, 5, 5, 5, 2])),
        (unit(8, 3), torch.tensor([3, 1, 3, 1, 3, 1, 3, 1])),
        (unit(2, 3), torch.tensor([1, 0])),
        (unit(8, 1), torch.arange(8) % 3),
    ],
    ids=["long", "mixed", "duplicate", "one-row", "antipodal", "zeros", "one-left-out", "alternating", "two", "narrow"],
)
@pytest.mark.parametrize("tau", [0.02, 0.3])
@pytest.mark.parametrize("backend", RUN)
def test_lse_equals_oracle_on_hard_rows(backend, tau, z, ids):
    for prefix in (None, 1)[: z.shape[1]]:
        assert_equals_oracle(z, ids, tau, prefix=prefix, backend=backend, chunk=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", RUN)
def test_antipodal_rows_at_a_low_temperature(backend, dtype):
    """Two rows against their two opposites: log(2 exp(-100)), far below what float32 can hold as exp."""
    row = F.normalize(torch.ones(1, 4, dtype=dtype), dim=1)
    z = torch.cat([row, row, -row, -row]).requires_grad_()
    lse = negative_lse(z, torch.tensor([0, 0, 1, 1]), 0.01, backend=backend, chunk=3)
    torch.testing.assert_close(lse, torch.full((4,), math.log(2) - 100, dtype=dtype), rtol=1e-6, atol=0)
    (dz,) = torch.autograd.grad(lse.sum(), z)
    torch.testing.assert_close(dz, -200 * z.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1 / 40, 1e-8, 65536.0])
@pytest.mark.parametrize("tau", [0.01, 0.0134, 0.05])
@pytest.mark.parametrize("backend", RUN)
def test_lse_in_float32_keeps_the_digits(backend, tau, scale):
    """Nearly one cluster, and one row on the other side: the widest range of exponents under one shift.

    The cotangents are those of a mean over rows, of a tiny weight, and of a loss scaler.
    """
    z = F.normalize(unit(1, 8) + 0.05 * unit(40, 8, seed=3), dim=1)
    z[7] = -z[7]
    ids = torch.arange(40) // 2
    cotangent = torch.full((40,), scale, dtype=torch.float64)
    want = both(lambda z, i, t, p: negative_lse(z, i, t, backend="eager"), z, ids, tau, None, cotangent)
    rows = z.float().requires_grad_()
    lse = negative_lse(rows, ids, tau, backend=backend, chunk=16)
    (dz,) = torch.autograd.grad((lse * cotangent.float()).sum(), rows)
    torch.testing.assert_close(lse.double(), want[0], rtol=1e-5, atol=2e-5 / tau * 0.05)
    assert ((dz - want[1]).norm() / want[1].norm()).item() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", [None, 3])
@pytest.mark.parametrize("backend", RUN)
def test_half_rows_are_computed_in_float32(backend, prefix, dtype):
    z = unit(12, 6).to(dtype).requires_grad_()
    ids = grouped(12, 5)
    lse = negative_lse(z, ids, 0.1, prefix=prefix, backend=backend, chunk=5)
    exact = z.detach().double().requires_grad_()
    want = reference.negative_lse(exact, ids, 0.1, prefix=prefix)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)
    (dz,) = torch.autograd.grad(lse.sum(), z)
    (dwant,) = torch.autograd.grad(want.sum(), exact)
    assert dz.dtype == dtype
    torch.testing.assert_close(dz.double(), dwant, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("backend", RUN)
def test_strided_and_expanded_rows(backend):
    base = unit(9, 12).T.contiguous().T
    for rows in (base[:, ::3], base.flip(0)[::2, 1:5], unit(1, 4).expand(7, 4)):
        ids = torch.arange(3 * len(rows))[::3] // 4
        leaf = rows.detach().requires_grad_()  # keeps the strides
        assert leaf.stride() == rows.stride()
        (got,) = torch.autograd.grad(negative_lse(leaf, ids, 0.2, backend=backend, chunk=4).sum(), leaf)
        dense = rows.clone(memory_format=torch.contiguous_format).requires_grad_()
        (want,) = torch.autograd.grad(negative_lse(dense, ids, 0.2, backend="eager").sum(), dense)
        torch.testing.assert_close(got, want, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("backend", RUN)
@pytest.mark.parametrize(
    "far",
    [
        lambda ids: ids * 2**32,
        lambda ids: 2**61 - ids,
        lambda ids: ids - 2**61,
        lambda ids: 2**53 + ids,
        lambda ids: -ids.int(),
        lambda ids: ids.to(torch.uint8) + 250 - 12,
        lambda ids: torch.tensor([-(2**63), 2**63 - 1])[ids % 2],
    ],
)
def test_ids_are_only_compared(backend, far):
    """Far apart, beyond int32, beyond the integers of float64, negative, and in small types."""
    z, ids = unit(31, 4), grouped(31, 12, seed=4)
    near = ids % 2 if len(far(ids).unique()) == 2 else ids
    got = negative_lse(z, far(ids), 0.2, backend=backend, chunk=7)
    torch.testing.assert_close(got, negative_lse(z, near, 0.2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", RUN)
def test_rows_may_come_in_any_order(backend):
    z, ids = unit(31, 4), grouped(31, 12)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(8))
    a = negative_lse(z, ids, 0.2, backend=backend, chunk=7)
    b = negative_lse(z[order], ids[order], 0.2, backend=backend, chunk=7)
    torch.testing.assert_close(a[order], b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", RUN)
def test_temperature_as_number_or_tensor(backend):
    z, ids = unit(9, 4), torch.arange(9)
    want = negative_lse(z, ids, 0.2)
    for tau in (torch.tensor(0.2, dtype=torch.float64), torch.tensor([[0.2]], dtype=torch.float64)):
        torch.testing.assert_close(negative_lse(z, ids, tau, backend=backend), want, rtol=1e-12, atol=0)
    tau = torch.tensor([0.25], requires_grad=True)  # float32 beside float64 rows, of one element
    (grad,) = torch.autograd.grad(negative_lse(z, ids, tau, backend=backend).sum(), tau)
    exact = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(reference.negative_lse(z, ids, exact).sum(), exact)
    assert grad.shape == (1,) and grad.dtype == torch.float32
    assert grad.item() == pytest.approx(want.item(), rel=1e-6)
    assert negative_lse(z, ids, 1, backend=backend).dtype == torch.float64  # an int


@pytest.mark.parametrize("backend", RUN)
def test_gradcheck(backend):
    z, ids = unit(8, 3).requires_grad_(), grouped(8, 4)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, t: negative_lse(z, ids, t, prefix=2, backend=backend, chunk=3), (z, tau))
    x, y = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(lambda x, y: off_diagonal_energy(x, y, backend=backend, chunk=2), (x, y))


# ------------------------------------------------------------------------------------------ what does not run


@pytest.mark.parametrize("backend", RUN)
def test_without_a_negative_it_raises_or_is_nan(backend):
    z = unit(5, 3)
    with pytest.raises(ValueError, match="at least 2 images.*all 5 rows carry the image id 7"):
        negative_lse(z, torch.full((5,), 7), 0.1, backend=backend)
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"at least 2 images.*got {n}"):
            negative_lse(z[:n], torch.arange(n), 0.1, backend=backend)
    for tau, prefix in itertools.product((0.1, 0.005), (None, 1)):
        options = {"backend": backend, "prefix": prefix, "validate": False, "chunk": 2}
        assert negative_lse(z, torch.full((5,), 7), tau, **options).isnan().all()
        for n in (0, 1):
            leaf = z[:n].clone().requires_grad_()
            lse = negative_lse(leaf, torch.arange(n), tau, **options)
            assert lse.shape == ((n,) if prefix is None else (n, 2)) and lse.isnan().all()
            assert torch.autograd.grad(lse.sum(), leaf)[0].shape == (n, 3)


@pytest.mark.parametrize("backend", RUN)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_raises_or_is_nan(backend, value):
    z = unit(6, 3)
    z[2, 1] = value
    with pytest.raises(ValueError, match="expected finite values: got NaN or infinity$"):
        negative_lse(z, torch.arange(6), 0.1, backend=backend)
    lse = negative_lse(z, torch.arange(6), 0.1, backend=backend, validate=False, chunk=4)
    assert lse[2].isnan()
    if math.isnan(value):
        assert lse.isnan().all()


@pytest.mark.parametrize("backend", RUN)
@pytest.mark.parametrize("dtype,size", [(torch.float32, 1e20), (torch.float32, -1e38), (torch.float64, -1e200)])
def test_rows_too_long_for_their_type_raise_or_are_not_finite(backend, dtype, size):
    """Of one type each: float64 rows are not told about float32."""
    z = unit(6, 3).to(dtype)
    z[2] = z[2].abs() * size
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"squared length over the temperature {kind} can hold: got longer rows$"):
        negative_lse(z, torch.arange(6), 0.1, backend=backend)
    with pytest.raises(ValueError, match="got longer rows$"):
        negative_lse(z, torch.arange(6), 1e6, backend=backend)  # the squared length itself overflows
    lse = negative_lse(z, torch.arange(6), 0.1, backend=backend, validate=False, chunk=4)
    exact = reference.negative_lse(z.double(), torch.arange(6), torch.tensor(0.1).double())
    right = torch.isclose(lse.double(), exact, rtol=1e-5, atol=0)
    assert (right | ~lse.isfinite()).all()
    for rows in (z, z[:, :1].expand(6, 40)):  # by columns, and by rows
        energy = off_diagonal_energy(rows, backend=backend)
        assert not energy.isfinite()


@pytest.mark.parametrize(
    "z,ids,tau,options,error,message",
    [
        (unit(4, 3), torch.arange(3), 0.1, {}, ValueError, r"one id per row, \[4\]: got \[3\]"),
        (unit(4, 3), torch.zeros(2, 2).long(), 0.1, {}, ValueError, r"one id per row, \[4\]: got \[2, 2\]"),
        (unit(4, 3), torch.arange(4.0), 0.1, {}, TypeError, "expected integers.*got torch.float32"),
        (unit(4, 3), torch.arange(4) > 1, 0.1, {}, TypeError, "expected integers.*got torch.bool"),
        (unit(4, 3), [0, 1, 2, 3], 0.1, {}, TypeError, "expected integers.*got list"),
        (unit(4, 3), torch.arange(4, device="meta"), 0.1, {}, ValueError, "the device of z, cpu: got meta"),
        (unit(4, 3)[0], torch.arange(3), 0.1, {}, ValueError, r"rows \[N, D\]: got \[3\]"),
        (unit(4, 3).long(), torch.arange(4), 0.1, {}, TypeError, "got torch.int64"),
        ([[1.0]], torch.arange(1), 0.1, {}, TypeError, "expected a floating-point tensor: got list"),
        (unit(4, 3), torch.arange(4), 0, {}, ValueError, "above 0 .*got 0"),
        (unit(4, 3), torch.arange(4), -0.1, {}, ValueError, "above 0 .*got -0.1"),
        (unit(4, 3), torch.arange(4), math.nan, {}, ValueError, "above 0 .*got nan"),
        (unit(4, 3), torch.arange(4), True, {}, ValueError, "above 0 .*got True"),
        (unit(4, 3), torch.arange(4), "0.1", {}, ValueError, "above 0 .*got '0.1'"),
        (unit(4, 3), torch.arange(4), torch.tensor(0.0), {}, ValueError, "above 0 .*got 0.0"),
        (unit(4, 3), torch.arange(4), torch.tensor(math.nan), {}, ValueError, "above 0 .*got nan"),
        (unit(4, 3), torch.arange(4), torch.ones(2), {}, ValueError, r"of one element: got torch.float32 \[2\]"),
        (unit(4, 3), torch.arange(4), torch.tensor(1), {}, ValueError, "of one element: got torch.int64"),
        (unit(4, 3), torch.arange(4), 0.1, {"prefix": 0}, ValueError, "expected 1 to 2.*got 0"),
        (unit(4, 3), torch.arange(4), 0.1, {"prefix": 3}, ValueError, "expected 1 to 2.*got 3"),
        (unit(4, 3), torch.arange(4), 0.1, {"validate": "no"}, ValueError, "validate: .*got 'no'"),
        (unit(4, 3), torch.arange(4), 0.1, {"backend": "cpu"}, ValueError, "backend: expected one of .*got 'cpu'"),
        (unit(4, 3), torch.arange(4), 0.1, {"backend": "triton"}, ValueError, "'eager' and 'streaming' run"),
    ],
)
def test_lse_refuses(z, ids, tau, options, error, message):
    with pytest.raises(error, match=message):
        negative_lse(z, ids, tau, **options)


def test_streaming_has_no_second_derivative_and_says_who_has():
    z = unit(6, 3).requires_grad_()
    for f in (
        lambda backend: negative_lse(z, torch.arange(6), 0.2, backend=backend).sum(),
        lambda backend: off_diagonal_energy(z, backend=backend),
    ):
        with pytest.raises(RuntimeError, match="no second derivative.*use backend='eager'"):
            torch.autograd.grad(f("streaming"), z, create_graph=True)
        (g,) = torch.autograd.grad(f("eager"), z, create_graph=True)
        assert torch.autograd.grad(g.square().sum(), z)[0].abs().sum() > 0


def test_auto_goes_by_type_and_size():
    limit = dispatch.EAGER_BYTES // 4
    assert BACKENDS == ("auto", "eager", "streaming", "triton")
    assert choose_backend("auto", matrix_elements=limit, dtype=torch.float32) == "eager"
    assert choose_backend("auto", matrix_elements=limit + 1, dtype=torch.float32) == "streaming"
    assert choose_backend("auto", matrix_elements=limit + 1, dtype=torch.float64) == "eager"
    assert choose_backend("streaming", matrix_elements=1, dtype=torch.float64) == "streaming"


@pytest.mark.parametrize(("rows", "expected"), [(256, "eager"), (257, "streaming")])
def test_auto_streams_the_log_sums_earlier_on_a_cpu(rows, expected):
    on_cpu = {"dtype": torch.float32, "device": torch.device("cpu")}
    assert choose_backend("auto", matrix_elements=rows**2, rows=rows, **on_cpu) == expected
    assert choose_backend("auto", matrix_elements=rows**2, **on_cpu) == "eager"  # covariances
    assert choose_backend(
        "auto", matrix_elements=rows**2, rows=rows, dtype=torch.float64, device=torch.device("cpu")
    ) == ("eager")
    z = {"content": torch.randn(2, -(-rows // 2), 3, generator=torch.Generator().manual_seed(0))}
    assert JointEntropyLoss("simclr").terms(z).backend == expected


# ------------------------------------------------------------------------------------------ off_diagonal_energy


def energy_by_loops(x, y):
    """sum over k != l of (sum_i x_ik y_il)^2."""
    n, d = x.shape
    total = 0 * (x * y).sum()
    for k, l in itertools.product(range(d), range(d)):
        if k != l:
            total = total + sum(x[i, k] * y[i, l] for i in range(n)) ** 2
    return total


@pytest.mark.parametrize("cross", [False, True], ids=["symmetric", "cross"])
@pytest.mark.parametrize("n,d", [(3, 11), (5, 11), (6, 11), (20, 7), (1, 6), (4, 1), (2, 4)])  # n < D / 2 and not
@pytest.mark.parametrize("backend", RUN)
def test_energy_equals_loops(backend, n, d, cross):
    g = torch.Generator().manual_seed(n * d)
    x, y = (torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    leaves = (x, y) if cross else (x,)
    want = energy_by_loops(x, y if cross else x)
    dwant = torch.autograd.grad(3 * want, leaves, allow_unused=True, materialize_grads=True)
    for chunk in (1, 3, 4, d, 512):
        got = off_diagonal_energy(*leaves, backend=backend, chunk=chunk)
        assert got.item() == pytest.approx(want.item(), rel=RTOL, abs=1e-9)
        torch.testing.assert_close(torch.autograd.grad(3 * got, leaves), dwant, rtol=RTOL, atol=1e-9)


@pytest.mark.parametrize("n,d", [(3, 11), (20, 7)])
@pytest.mark.parametrize("backend", RUN)
def test_energy_of_one_tensor_twice_halves_and_strides(backend, n, d):
    base = torch.randn(d, 2 * n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = base.T[::2].detach().requires_grad_()
    want = energy_by_loops(x, x)
    (dwant,) = torch.autograd.grad(want, x)
    for y in (x, x.clone()):
        got = off_diagonal_energy(x, y, backend=backend, chunk=3)
        torch.testing.assert_close(got, want, rtol=RTOL, atol=ATOL)
        torch.testing.assert_close(torch.autograd.grad(got, x)[0], dwant, rtol=RTOL, atol=1e-9)
    half = x.detach().bfloat16().requires_grad_()
    got = off_diagonal_energy(half, backend=backend, chunk=3)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(energy_by_loops(half.double(), half.double()).item(), rel=1e-4)
    assert torch.autograd.grad(got, half)[0].dtype == torch.bfloat16
    assert off_diagonal_energy(x[:0], backend=backend).item() == 0


@pytest.mark.parametrize("backend", RUN)
def test_energy_of_decorrelated_columns_is_small(backend):
    """N side: two parts of one size leave a small difference, which float32 must not lose."""
    q = torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    for n in (200, 90):  # n >= D / 2 and n < D / 2
        x = q[:n].float()
        want = off_diagonal_energy(x.double(), backend="eager").item()
        assert off_diagonal_energy(x, backend=backend).item() == pytest.approx(want, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "x,y,error,message",
    [
        (torch.ones(3), None, ValueError, r"of the same shape \[n, D\]: got x \[3\]"),
        (torch.ones(3, 2), torch.ones(3, 4), ValueError, r"of the same shape \[n, D\]: got y \[3, 4\]"),
        (torch.ones(3, 2).long(), None, TypeError, "off_diagonal_energy, x: .*got torch.int64"),
        (torch.ones(3, 2), torch.ones(3, 2).bool(), TypeError, "off_diagonal_energy, y: .*got torch.bool"),
    ],
)
def test_energy_refuses(x, y, error, message):
    with pytest.raises(error, match=message):
        off_diagonal_energy(x, y)


# ------------------------------------------------------------------------------------------ imports

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"kornia", "lightly", "torchvision", "PIL", "matplotlib", "einops"}:
            raise ImportError(f"blocked: {name}")

sys.meta_path.insert(0, Block())
import torch
from ssd_addon.losses import JointEntropyLoss
import ssd_addon

for family in ("simclr", "vicreg", "barlow"):
    z = {"content": torch.randn(3, 6, 4, requires_grad=True), "color": torch.randn(3, 6, 2)}
    for backend in ("eager", "streaming"):
        ssd_addon.JointEntropyLoss(family, backend=backend)(z).backward()
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"kornia", "lightly", "torchvision", "PIL", "matplotlib", "einops"}, loaded
try:
    import kernels
except ImportError as e:
    print(e)
"""


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # as where it is not installed
import torch
from ssd_addon.kernels import negative_lse, off_diagonal_energy

z = torch.eye(5, requires_grad=True)
for backend in ("auto", "eager", "streaming"):
    lse = negative_lse(z, torch.arange(5), 0.1, backend=backend)
    (lse.sum() + off_diagonal_energy(z, backend=backend)).backward()
try:
    negative_lse(z, torch.arange(5), 0.1, backend="triton")
except ValueError as e:
    print(e)
"""


def test_kernels_run_where_triton_is_not_installed():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "needs the package triton, which is not installed; 'eager' and 'streaming' run" in run.stdout


def test_losses_need_torch_alone_and_kernels_have_one_name():
    """From the root of the repository, where the folder `kernels` lies on the path."""
    run = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "expected to be imported as ssd_addon.kernels: got 'kernels'" in run.stdout


@pytest.mark.parametrize("backend", ["eager", "streaming"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_temperature_whose_inverse_overflows_is_refused(backend, as_tensor):
    z, ids = torch.eye(3), torch.arange(3)
    small = torch.tensor(1e-40) if as_tensor else 1e-40
    with pytest.raises(ValueError, match=r"temperature: expected at least 1\.2e-38.*got 1e-40|got 9\.99"):
        negative_lse(z, ids, small, backend=backend)
    assert torch.isfinite(negative_lse(z, ids, 1e-30, backend=backend)).all()
