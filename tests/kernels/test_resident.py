"""Column sums by halves, and the gradient that stays in registers: in the interpreter, against float64."""

import pytest
import reference
import torch
import triton
import triton.language as tl
from reference import grouped, unit
from tiles import SQUARE, shrink

from ssd_addon.kernels import negative_lse, operators, table
from ssd_addon.kernels.tiles import column_sums

# The interpreter computes with numpy, which warns of what is masked afterwards (a row's similarity to its own image).
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

HIGH = table.Configuration(32, 16, 64, 4, 2, False, 1, 0, True)
FLAT = table.Configuration(16, 32, 64, 4, 2, False, 1, 0, True)
DESCRIPTORS = table.Configuration(16, 16, 64, 4, 2, True, 1, 0, True)


@triton.jit
def column_sums_kernel(p_s, p_out, b_M: tl.constexpr, b_N: tl.constexpr):
    o_m, o_n = tl.arange(0, b_M), tl.arange(0, b_N)
    tl.store(p_out + o_n, column_sums(tl.load(p_s + o_m[:, None] * b_N + o_n[None, :]), b_M, b_N))


@pytest.mark.parametrize("m,n", [(16, 16), (32, 8), (64, 128), (128, 64), (128, 256)])
def test_column_sums_are_those_of_float64(m, n):
    s = torch.rand(m, n, generator=torch.Generator().manual_seed(m + n))
    out = torch.full((n,), torch.nan)
    column_sums_kernel[(1,)](s, out, b_M=m, b_N=n)
    torch.testing.assert_close(out.double(), s.double().sum(dim=0), rtol=1e-6, atol=0)


def of_mode(configuration):
    """The configuration for weights of at most its block_k columns; pairs for what it does not take."""

    def find(arch, mode, width, own=None):
        return configuration if mode.startswith("weights") and width <= configuration.block_k else SQUARE

    return find


@pytest.fixture(params=[HIGH, FLAT, DESCRIPTORS], ids=["high", "flat", "descriptors"])
def resident(request, monkeypatch):
    shrink(monkeypatch)
    monkeypatch.setattr(table, "configuration", of_mode(request.param))


def results(f, z, ids, tau, cotangent, dtype):
    """(lse, dz, dtau) in float64."""
    rows = z.detach().to(dtype).requires_grad_()
    t = torch.tensor(tau, dtype=dtype, requires_grad=True)
    lse = f(rows, ids, t)
    return [lse.detach().double(), *(g.double() for g in torch.autograd.grad((lse * cotangent).sum(), (rows, t)))]


@pytest.mark.parametrize("n,d", [(31, 13), (57, 40), (70, 64), (2, 8), (33, 1)])
@pytest.mark.parametrize("tau", [0.15, 0.01])  # a constant shift, and maxima
def test_value_and_gradients_equal_float64(resident, n, d, tau):
    z, ids = unit(n, d), grouped(n, max(2, n // 3))
    cotangent = torch.randn(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    truth = reference.negative_lse if n < 32 else lambda z, i, t: negative_lse(z, i, t, backend="eager")
    want = results(truth, z, ids, tau, cotangent, torch.float64)
    got = results(
        lambda z, i, t: negative_lse(z, i, t, backend="triton"), z, ids, tau, cotangent.float(), torch.float32
    )
    # fp16 rows: s is off by 2^-11 / tau at most, and the gradient by some of that share.
    assert (got[0] - want[0]).abs().max() <= 2**-11 / tau
    assert (got[1] - want[1]).norm() <= 1e-3 * (0.15 / tau) * want[1].norm()
    assert (got[2] - want[2]).abs() <= 1e-3 * (0.15 / tau) * (want[2].abs() + want[1].norm() / tau)


@pytest.mark.parametrize("maximum", [False, True])
def test_the_rows_of_a_rank_get_the_same_gradient(monkeypatch, maximum):
    """n of N rows against all of them, as a rank computes it; beside block pairs."""
    shrink(monkeypatch)
    z, ids = unit(45, 20).float(), grouped(45, 15).int()
    g = torch.randn(1, 45, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)

    def prepared(s):
        return list(operators.prepared(z[s], ids[s], None, None, 0.1, 1.0, 45, 0, maximum, False))

    def gradient(s):
        a, b = prepared(s), prepared(slice(None))
        lse = operators.lse_rows(b, [], 20, 0, maximum, False)
        return operators.lse_rows_grad(g, lse, a, b, s.start, 20, 0, maximum, False, 16, False, torch.float32)[0]

    want = gradient(slice(7, 30))
    monkeypatch.setattr(table, "configuration", of_mode(HIGH))
    got = gradient(slice(7, 30))
    assert got.shape == (23, 20) and (got - want).norm() <= 5e-4 * want.norm()
    assert torch.equal(got, gradient(slice(7, 30)))


def test_two_fp16_parts_and_two_spaces_take_block_pairs(monkeypatch):
    """A table may name residency for one space in fp16 alone; what it does not fit is computed as before."""
    shrink(monkeypatch)
    asked = []
    find = of_mode(HIGH)
    monkeypatch.setattr(table, "configuration", lambda *a: asked.append(a[1:3]) or find(*a))
    z = unit(20, 6)
    want = negative_lse(z, torch.arange(20), 0.003, backend="eager")
    leaf = z.float().requires_grad_()
    lse = negative_lse(leaf, torch.arange(20), 0.003, backend="triton")
    torch.testing.assert_close(lse.double(), want, rtol=3e-6, atol=0)
    torch.autograd.grad(lse.sum(), leaf)
    assert asked[-2:] == [("weights_maximum", 6), ("weights_maximum", 65)]


@pytest.mark.parametrize("d,tau,prefix", [(65, 0.1, None), (8, 0.003, None), (8, 0.1, 3)])
def test_what_registers_do_not_hold_is_refused(monkeypatch, d, tau, prefix):
    shrink(monkeypatch)
    monkeypatch.setattr(table, "configuration", lambda arch, mode, *_: HIGH if "weights" in mode else SQUARE)
    leaf = unit(20, d).float().requires_grad_()
    lse = negative_lse(leaf, torch.arange(20), tau, prefix=prefix, backend="triton")
    with pytest.raises(
        ValueError, match="expected (float16 rows of at most|no prefix).* keeps the gradient in registers"
    ):
        lse.sum().backward()


def test_candidates_of_the_table_are_for_a_width(monkeypatch):
    entries = {"default": {"weights": {"128": [list(HIGH)], "inf": [list(SQUARE)]}}, "sm_90": {"sums": {"inf": []}}}
    monkeypatch.setattr(table, "table", lambda: {"candidates": entries})
    assert table.candidates("sm_90", "weights", 128) == [HIGH, SQUARE]
    assert table.candidates("sm_80", "weights", 129) == [SQUARE]
    assert table.candidates("sm_90", "sums", 8) == table.candidates("sm_90", "products", 8) == []
