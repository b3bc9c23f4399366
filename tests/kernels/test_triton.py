"""The triton backend in the interpreter, with small tiles, against float64; what it must refuse; its operators."""

import math
import os
import subprocess
import sys

import pytest
import reference
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference import grouped, unit
from tiles import DESCRIPTORS, SQUARE, WIDE, shrink
from torch import nn
from torch.nn import functional as F

from ssd_addon import Embeddings, JointEntropyLoss, StyleHeads, ViewPlan
from ssd_addon.kernels import dispatch, energies, launch, negative_lse, off_diagonal_energy, operators, table

# The interpreter computes with numpy, which warns of what is masked afterwards (a row's similarity to its own image).
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

RESOLUTION = 2e-3
"""Named constant of the error budget: lse of fp16 rows at temperature 0.15; the worst is 2^-11 / 0.15 = 3.3e-3."""


@pytest.fixture(params=[SQUARE, WIDE], ids=["square", "wide"])
def tiles(request, monkeypatch):
    shrink(monkeypatch, request.param)


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch)


def run(f, z, ids, tau, prefix, cotangent, dtype):
    """(lse, dz, dtau)"""
    rows = z.detach().to(dtype).requires_grad_()
    t = torch.tensor(tau, dtype=dtype if dtype == torch.float64 else torch.float32, requires_grad=True)
    lse = f(rows, ids, t, prefix)
    dz, dtau = torch.autograd.grad((lse * cotangent.to(lse.dtype)).sum(), (rows, t))
    return lse.detach().double(), dz.double(), dtau.double()


def drawn(n, prefix, seed=5):
    shape = (n,) if prefix is None else (n, 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(z, ids, tau, *, prefix=None, dtype=torch.float32, cotangent=None, exact=False, budget=1.0):
    """Against float64: no more than twice the error of eager on rows of fp16, and a constant."""
    cotangent = drawn(len(z), prefix) if cotangent is None else cotangent
    want = run(
        lambda z, i, t, p: reference.negative_lse(z, i, t, prefix=p), z, ids, tau, prefix, cotangent, torch.float64
    )
    rough = run(
        lambda z, i, t, p: negative_lse(z.half().float(), i, t, prefix=p, backend="eager"),
        z, ids, tau, prefix, cotangent, torch.float32,
    )  # fmt: skip
    got = run(
        lambda z, i, t, p: negative_lse(z, i, t, prefix=p, backend="triton"), z, ids, tau, prefix, cotangent, dtype
    )
    scale = 0.15 / tau * budget
    fine = 1e-5 * max(1, scale)
    constants = (fine, fine, fine) if exact else (RESOLUTION * scale, 1e-3 * budget, 1e-3 * budget)
    sizes = (1.0, want[1].norm().item(), abs(want[2].item()) + want[1].norm().item() / tau)
    for name, g, r, w, constant, size in zip(("lse", "dz", "dtau"), got, rough, want, constants, sizes, strict=True):
        error = (g - w).abs().max().item() if name == "lse" else (g - w).norm().item()
        allowed = 0.0 if exact else 2 * ((r - w).abs().max() if name == "lse" else (r - w).norm()).item()
        assert error <= allowed + constant * size, (name, error, allowed, constant * size)


# ------------------------------------------------------------------------------------------ log-sums


@pytest.mark.parametrize("prefix", [None, 1, 7])
@pytest.mark.parametrize("n,d", [(31, 13), (57, 40), (70, 8), (2, 8)])
def test_lse_equals_float64_at_odd_sizes(tiles, n, d, prefix):
    compare(unit(n, d), grouped(n, max(2, n // 3)), 0.15, prefix=prefix)


@pytest.mark.parametrize("prefix", [None, 5])
@pytest.mark.parametrize("tau", [1.0, 0.05, 0.0135, 0.0123, 0.01, 0.003, 1e-4])  # shift, maximum, two fp16 parts
def test_lse_equals_float64_at_any_temperature(tiles, tau, prefix):
    exact = 1 / tau > 128
    compare(unit(45, 12), grouped(45, 20), tau, prefix=prefix, exact=exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows(small, dtype):
    z = unit(31, 12).to(dtype).double()
    compare(z, grouped(31, 9), 0.15, dtype=dtype, budget=8 if dtype == torch.bfloat16 else 1)
    rows = z.to(dtype).requires_grad_()
    lse = negative_lse(rows, grouped(31, 9), 0.15, backend="triton")
    assert lse.dtype == torch.float32 and torch.autograd.grad(lse.sum(), rows)[0].dtype == dtype


@pytest.mark.parametrize(
    "z,ids",
    [
        (unit(4, 3).repeat(9, 1), torch.arange(36)),
        (unit(1, 3).expand(36, 3), torch.arange(36) // 2),
        (torch.cat([unit(20, 3), -unit(20, 3)]), torch.arange(40)),
        (torch.cat([unit(20, 3), torch.zeros(2, 3)]), torch.arange(22)),
        (torch.zeros(20, 3), torch.arange(20)),
        (1e-9 * unit(20, 3), torch.arange(20)),
        (unit(40, 3), torch.tensor([5] * 38 + [2, 5])),
        (unit(40, 3), torch.arange(40) % 2),
        (unit(40, 1), torch.arange(40) % 3),
        (unit(40, 150), torch.arange(40)),
    ],
    ids=["duplicate", "one-row", "antipodal", "zeros", "all-zero", "tiny", "one-left-out", "two", "narrow", "long-k"],
)
@pytest.mark.parametrize("tau", [0.012, 0.3])
def test_lse_on_hard_rows(small, tau, z, ids):
    for prefix in (None, 1)[: z.shape[1]]:
        compare(z.double(), ids, tau, prefix=prefix)


@pytest.mark.parametrize("length", [3.0, 30.0, 1e4])
def test_longer_rows_keep_float32_digits(tiles, length):
    """R/tau beyond what fp16 products resolve: rows are split in two parts, maxima are taken."""
    z = torch.cat([unit(30, 6), length * unit(9, 6, seed=2)])
    want = negative_lse(z, torch.arange(39), 0.02, backend="eager")
    got = negative_lse(z.float(), torch.arange(39), 0.02, backend="triton")
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6 * length**2 / 0.02)


def test_antipodal_rows_underflow_nothing(small):
    row = F.normalize(torch.ones(1, 4), dim=1)
    z = torch.cat([row, row, -row, -row]).requires_grad_()
    for validate in (True, False):
        lse = negative_lse(z, torch.tensor([0, 0, 1, 1]), 0.01, backend="triton", validate=validate)
        torch.testing.assert_close(lse, torch.full((4,), math.log(2) - 100), rtol=2e-4, atol=0)
        (dz,) = torch.autograd.grad(lse.sum(), z)
        torch.testing.assert_close(dz, -200 * z.detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-8, 1 / 40, 65536.0])
@pytest.mark.parametrize("tau", [0.01, 0.05])
def test_cotangents_of_any_size(small, tau, scale):
    compare(unit(40, 8), torch.arange(40) // 2, tau, cotangent=torch.full((40,), scale, dtype=torch.float64))


def test_cotangents_that_differ_by_orders(small):
    cotangent = 10.0 ** torch.linspace(-6, 0, 40, dtype=torch.float64) * (-1) ** torch.arange(40)
    compare(unit(40, 8), torch.arange(40) // 2, 0.1, cotangent=cotangent)
    compare(unit(40, 8), torch.arange(40) // 2, 0.1, cotangent=torch.zeros(40, dtype=torch.float64))


def test_a_graph_may_be_used_twice_and_bits_stay(tiles):
    z = unit(45, 12).float().requires_grad_()
    results = []
    for _ in range(2):
        lse = negative_lse(z, grouped(45, 20), 0.1, backend="triton")
        first = torch.autograd.grad(lse.sum(), z, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(lse.sum(), z)[0])
        results.append((lse.detach(), first))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_strided_expanded_and_narrow_rows(small):
    base = unit(40, 24)
    for rows in (base[:, ::3], base.flip(0)[::2, 1:8], base.T.contiguous().T, unit(1, 4).expand(20, 4)):
        ids = torch.arange(3 * len(rows))[::3] // 4
        leaf = rows.float().detach().requires_grad_()
        lse = negative_lse(leaf, ids, 0.2, backend="triton")
        want = negative_lse(rows, ids, 0.2, backend="eager")
        torch.testing.assert_close(lse.double(), want, rtol=0, atol=RESOLUTION)
        assert torch.autograd.grad(lse.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("validate", ["auto", False])
@pytest.mark.parametrize(
    "far",
    [
        lambda ids: ids * 2**32,
        lambda ids: 2**61 - ids,
        lambda ids: -ids.int(),
        lambda ids: ids.to(torch.uint8) + 240,
        lambda ids: ids.to(torch.int8),
        lambda ids: torch.tensor([-(2**63), 2**63 - 1])[ids % 2],
    ],
)
def test_ids_are_only_compared(small, far, validate):
    z, ids = unit(31, 4).float(), grouped(31, 12, seed=4)
    near = ids % 2 if len(far(ids).unique()) == 2 else ids
    got = negative_lse(z, far(ids), 0.2, backend="triton", validate=validate)
    assert torch.equal(got, negative_lse(z, near, 0.2, backend="triton"))


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    n=st.integers(2, 40),
    d=st.integers(2, 40),
    groups=st.integers(2, 20),
    tau=st.floats(0.01, 1.0),
    prefix=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_properties(small, n, d, groups, tau, prefix, seed):
    g = torch.Generator().manual_seed(seed)
    z, p = unit(n, d, seed).float(), d // 2 if prefix else None
    ids = grouped(n, min(groups, n), seed)
    cotangent = torch.randn((n, 2) if prefix else (n,), generator=g, dtype=torch.float64)

    def f(z, ids):
        return run(
            lambda z, i, t, p: negative_lse(z, i, t, prefix=p, backend="triton"), z, ids, tau, p, cotangent, z.dtype
        )

    lse, dz, dtau = f(z, ids)
    close = {"rtol": 0, "atol": 4 * RESOLUTION * 0.15 / tau}
    # Rows in another order, with their ids; ids renamed.
    order = torch.randperm(n, generator=g)
    again = negative_lse(z[order], ids[order] * 7 + 3, tau, prefix=p, backend="triton")
    torch.testing.assert_close(again.double(), lse[order], rtol=1e-5, atol=1e-5)
    # Rotated within each part.
    parts = [z] if p is None else [z[:, :p], z[:, p:]]
    turned = [t.double() @ torch.linalg.qr(torch.randn(t.shape[1], t.shape[1], generator=g).double())[0] for t in parts]
    again = negative_lse(torch.cat(turned, dim=1).float(), ids, tau, prefix=p, backend="triton")
    torch.testing.assert_close(again.double(), lse, **close)
    # dtau is that of a function of z z^T / tau.
    torch.testing.assert_close(dtau, -(z.double() * dz).sum() / (2 * tau), rtol=1e-3, atol=1e-3 * dz.norm().item())
    # The log-sum over all is that over two parts of the rows.
    cut = n // 2
    if 0 < cut < n:
        whole = prepared(z, ids, tau, p or 0, True)
        parts = [prepared(z[s], ids[s], tau, p or 0, True) for s in (slice(0, cut), slice(cut, n))]
        halves = [operators.lse_rows(whole, part, d, p or 0, True, False) for part in parts]
        # A row may have no negative in one of the parts.
        joined = torch.logaddexp(*(h.nan_to_num(-math.inf) for h in halves))
        torch.testing.assert_close(joined.double(), lse.view(n, -1).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block,strip", [(16, 1), (48, 700), (4096, 2**23)])
@pytest.mark.parametrize("configuration", [DESCRIPTORS, WIDE, table.Configuration(64, 128, 64, 8, 3, False, 8)])
def test_any_blocks_give_the_same_result(monkeypatch, configuration, block, strip):
    monkeypatch.setattr(table, "configuration", lambda *_: configuration)
    monkeypatch.setattr(launch, "STRIP_ELEMENTS", strip)
    monkeypatch.setattr(launch, "block_rows", lambda d, unit: -(-block // unit) * unit)
    for prefix in (None, 8):
        compare(unit(70, 24), grouped(70, 20), 0.1, prefix=prefix)


# ------------------------------------------------------------------------------------------ covariances


@pytest.mark.parametrize("cross", [False, True], ids=["symmetric", "cross"])
@pytest.mark.parametrize("n,d", [(31, 13), (13, 57), (40, 33), (5, 40), (1, 6), (4, 1)])
def test_energy_equals_float64(tiles, n, d, cross):
    g = torch.Generator().manual_seed(n * d)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    leaves = [x, x + 0.3 * torch.randn(n, d, generator=g, dtype=torch.float64)][: 1 + cross]
    exact = [t.clone().requires_grad_() for t in leaves]
    want = off_diagonal_energy(*exact, backend="eager")
    dwant = torch.autograd.grad(3 * want, exact)
    rows = [t.float().requires_grad_() for t in leaves]
    got = off_diagonal_energy(*rows, backend="triton")
    assert got.item() == pytest.approx(want.item(), rel=1e-3, abs=1e-3)
    for a, b in zip(torch.autograd.grad(3 * got, rows), dwant, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-2


def test_energy_of_columns_of_unlike_length(small):
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.linspace(-3, 3, 12)
    want = off_diagonal_energy(x.double(), backend="eager").item()
    # An entry of C is off by 2^-11 of the product of its columns' lengths at the very most.
    lengths = x.double().square().sum(dim=0)
    bound = 2 * math.sqrt(want * (lengths.sum().square() - lengths.square().sum()).item()) * 2**-11
    assert abs(off_diagonal_energy(x, backend="triton").item() - want) <= bound
    assert off_diagonal_energy(0 * x, backend="triton").item() == 0
    assert off_diagonal_energy(x[:0], backend="triton").item() == 0


@pytest.mark.parametrize("n,d", [(31, 13), (13, 57)])
def test_energy_of_columns_that_overflow_is_not_finite(small, n, d):
    for size in (1e20, math.inf, math.nan):
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
        x[2, 1] *= size
        x.requires_grad_()
        for other in (None, x.detach().roll(1, 1)):
            energy = off_diagonal_energy(x, other, backend="triton")
            assert not energy.isfinite() and not torch.autograd.grad(energy, x)[0].isfinite().all()


# ------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("options", [{}, {"content_entropy": True, "content_keys": "all"}], ids=["plain", "all"])
@pytest.mark.parametrize("plan", ["shared_query", "interleaved"])
@pytest.mark.parametrize("family", ["simclr", "vicreg", "barlow"])
def test_loss_equals_eager(small, family, plan, options):
    p = getattr(ViewPlan, plan)(("content", "color"))
    g = torch.Generator().manual_seed(3)
    tensors = {
        n: torch.randn(p.num_views, 20, d, generator=g, dtype=torch.float64) for n, d in (("content", 8), ("color", 5))
    }
    results = []
    for backend, dtype in (("eager", torch.float64), ("triton", torch.float32)):
        leaves = {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}
        criterion = JointEntropyLoss(family, backend=backend, **options)
        terms = criterion.terms(Embeddings(leaves, p))
        assert terms.backend == backend
        results.append([terms.loss.detach(), *torch.autograd.grad(terms.loss, list(leaves.values()))])
    for got, want in zip(results[1], results[0], strict=True):
        assert (got - want).norm() <= 2e-3 * want.norm()


class Backbone(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(12, 16), nn.ReLU())


@pytest.mark.parametrize("backend", ["eager", "streaming", "triton"])
@pytest.mark.parametrize(
    "family,options", [("simclr", {}), ("simclr", {"content_entropy": True}), ("vicreg", {}), ("barlow", {})]
)
def test_heads_and_loss_compile_without_a_break(family, options, backend):
    torch.manual_seed(0)
    model = StyleHeads(Backbone(), {"content": 8, "color": 4}, in_features=16, hidden=(16,))
    criterion = JointEntropyLoss(family, backend=backend, **options)
    x = torch.randn(3, 16, 3, 2, 2)
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()

        def step(x):
            return criterion(model(x))

        loss = (torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step)(x)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    for a, b in zip(*results, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------ operators


def prepared(z, ids, tau, prefix, maximum, exact=False):
    """Operands of unit rows."""
    return operators.prepared(z, ids, None, None, tau, 1.0, len(z), prefix, maximum, exact)


def samples():
    z, ids, one = unit(31, 12).float(), torch.arange(31, dtype=torch.int32) // 2, torch.tensor(1.0)
    tau = torch.tensor(0.1)
    leaf, t = z.clone().requires_grad_(), tau.clone().requires_grad_()
    x, two = (list(prepared(z, ids, 0.1, p, p > 0)) for p in (0, 5))
    some = list(prepared(z[:20], ids[:20], 0.1, 5, True))
    lse, lse_two = operators.lse_rows(x, [], 12, 0, False, False), operators.lse_rows(two, [], 12, 5, True, False)
    a, b = x[0][:20], x[0][11:]
    columns = energies.off_diagonal_energy(z, None, False)
    rows = energies.off_diagonal_energy(z, z + 1, True)
    kind = torch.float16
    return {
        "negative_lse": (leaf, ids, t, None, 0.0, 1.0, 0, False, False),
        "negative_lse_prefix": (leaf, ids.long(), None, one, 0.1, 0.0, 5, True, True),
        "prepared": (z, ids, tau, None, 0.0, 1.0, 40, 5, True, True),
        "with_bounds": (x[0], ids.long(), 12, 0, False),
        "lse_rows": (some, two, 12, 5, True, False),
        "lse_rows_grad": (lse_two + 1, lse_two, some, two, 0, 12, 5, True, False, True, kind),
        "lse_rows_grad_alone": (lse + 1, lse, x, [], 0, 12, 0, False, False, False, torch.float32),
        "products": (a, b, None, None, False, True, 12),
        "products_pair": (a, None, b, None, True, False, 12),
        "off_diagonal_energy": (leaf, None, False),
        "off_diagonal_energy_rows": (leaf, leaf.detach() + 1, True),
        "off_diagonal_energy_backward": (one, *columns, 31, 12, False, kind),
        "off_diagonal_energy_backward_rows": (one, *rows, 31, 12, True, torch.float32),
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "name",
    [
        "negative_lse",
        "negative_lse_prefix",
        "prepared",
        "with_bounds",
        "lse_rows",
        "lse_rows_grad",
        "lse_rows_grad_alone",
        "products",
        "products_pair",
        "off_diagonal_energy",
        "off_diagonal_energy_rows",
        "off_diagonal_energy_backward",
        "off_diagonal_energy_backward_rows",
    ],
)
def test_opcheck(monkeypatch, name):
    monkeypatch.setattr(table, "configuration", lambda *_: SQUARE)
    base = name
    for suffix in ("_prefix", "_pair", "_alone", "" if name == "lse_rows" else "_rows"):
        base = base.removesuffix(suffix)
    torch.library.opcheck(getattr(torch.ops.ssd_addon, base).default, samples()[name], rtol=1e-3, atol=1e-3)


def test_no_second_derivative_and_says_who_has(small):
    z = unit(6, 3).float().requires_grad_()
    for f in (
        lambda: negative_lse(z, torch.arange(6), 0.2, backend="triton").sum(),
        lambda: off_diagonal_energy(z, backend="triton"),
    ):
        (g,) = torch.autograd.grad(f(), z, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative; use backend='eager'"):
            g.square().sum().backward()


# ------------------------------------------------------------------------------------------ bad input


def test_longer_rows_without_checks_are_nan_never_wrong(small):
    z = unit(20, 6).float()
    assert negative_lse(z, torch.arange(20), 0.1, backend="triton", validate=False).isfinite().all()
    z[3] *= 1.1
    for tau in (0.1, torch.tensor(0.1)):
        assert negative_lse(z, torch.arange(20), tau, backend="triton", validate=False).isnan().all()
        assert negative_lse(z, torch.arange(20), tau, backend="triton").isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_raises_or_is_nan(small, value):
    z = unit(20, 3).float()
    z[2, 1] = value
    with pytest.raises(ValueError, match="expected finite values: got NaN or infinity$"):
        negative_lse(z, torch.arange(20), 0.1, backend="triton")
    assert negative_lse(z, torch.arange(20), 0.1, backend="triton", validate=False).isnan().all()


@pytest.mark.parametrize("backend", ["eager", "streaming", "triton"])
def test_similarities_beyond_float32_are_refused(backend):
    with pytest.raises(ValueError, match="squared length over the temperature float32 can hold"):
        negative_lse(1e18 * torch.eye(3), torch.arange(3), 0.001, backend=backend)


def test_without_a_negative(small):
    z = unit(20, 3).float()
    with pytest.raises(ValueError, match="at least 2 images.*all 20 rows carry the image id 7"):
        negative_lse(z, torch.full((20,), 7), 0.1, backend="triton")
    for tau, prefix in ((0.1, None), (0.1, 1), (0.005, None)):
        options = {"backend": "triton", "prefix": prefix, "validate": False}
        assert negative_lse(z, torch.full((20,), 7), tau, **options).isnan().all()
        for n in (0, 1):
            leaf = z[:n].clone().requires_grad_()
            lse = negative_lse(leaf, torch.arange(n), tau, **options)
            assert lse.shape == ((n,) if prefix is None else (n, 2)) and lse.isnan().all()
            assert torch.autograd.grad(lse.sum(), leaf)[0].shape == (n, 3)


def test_what_cannot_run_says_what_can(monkeypatch):
    with pytest.raises(ValueError, match="'triton'.*rows are torch.float64; 'eager' and 'streaming' run"):
        negative_lse(unit(4, 3), torch.arange(4), 0.1, backend="triton")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="'triton'.*is not installed; 'eager' and 'streaming' run"):
        negative_lse(unit(4, 3).float(), torch.arange(4), 0.1, backend="triton")


REFUSED = """
import torch
from ssd_addon import JointEntropyLoss
from ssd_addon.kernels import negative_lse

criterion = JointEntropyLoss("simclr", backend="triton")
for f in (
    lambda: negative_lse(torch.eye(3), torch.arange(3), 0.1, backend="triton"),
    lambda: criterion({"content": torch.randn(2, 3, 4)}),
):
    try:
        f()
    except ValueError as e:
        print(e)
"""


def test_without_the_interpreter_a_cpu_cannot():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", REFUSED], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("needs a CUDA device, or TRITON_INTERPRET=1") == 2, done.stderr
