"""What waits for the device: one read a call where values are checked, none where the caller has checked them."""

import itertools
import math

import pytest
import torch
from counting import Counted
from reference import grouped, unit
from tiles import shrink

from ssd_addon import _dist
from ssd_addon.kernels import negative_lse, off_diagonal_energy, ranges, streaming
from ssd_addon.kernels.similarity import Known, log_sums, log_sums_backend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BACKENDS = ("eager", "streaming", "triton")
TEMPERATURES = (1.0, 0.1, 0.0131, 0.0123, 0.003)  # no shift, no shift, a shift, maxima, two fp16 parts


@pytest.fixture
def device(monkeypatch):
    """Small tiles, and reads that cost something, as on a GPU."""
    shrink(monkeypatch)
    monkeypatch.setattr(streaming, "reads_are_free", lambda device: False)


def alone(n):
    return _dist.Shards(None, (n,), 0)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("prefix", [None, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checks_take_one_read(device, backend, prefix, learned):
    z = unit(40, 6).float().requires_grad_()
    tau = torch.tensor(0.1, requires_grad=True) if learned else 0.1
    for ids in (torch.arange(40) // 2, torch.arange(40) * 2**40, torch.arange(40, dtype=torch.uint8)):
        with Counted() as forward:
            lse = negative_lse(z, ids, tau, prefix=prefix, backend=backend, chunk=16)
        with Counted() as backward:
            lse.sum().backward()
        assert forward.reads == ["tolist"] and not backward.reads
        assert not forward.collectives and not backward.collectives


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_caller_knows_is_not_read_again(device, backend, learned):
    z, ids = unit(40, 6).float().requires_grad_(), grouped(40, 15)
    tau = torch.tensor(0.1, requires_grad=True) if learned else 0.1
    options = {"prefix": 2, "backend": backend, "shards": alone(40), "chunk": 16}
    with Counted() as c:
        log_sums(z, ids, tau, known=Known(1.0, 0.1, 0, 14), **options).sum().backward()
    assert not c.reads and not c.collectives
    with Counted() as c:
        log_sums(z, ids, tau, known=None, **options).sum().backward()
    assert len(c.reads) == (backend == "streaming")  # the longest row, and with it a temperature that is a tensor


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("n,d", [(31, 13), (5, 40)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_energies_read_nothing(device, backend, n, d, cross):
    x, y = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with Counted() as c:
        off_diagonal_energy(x, y if cross else None, backend=backend, chunk=9).backward()
    assert not c.reads and not c.collectives


# ------------------------------------------------------------------------------------------ the same result


@pytest.mark.parametrize("prefix", [None, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_sums_equal_the_checked_function(device, backend, prefix):
    """With what the checks find bit by bit; with a bound of unit rows, and with nothing known, to rounding."""
    z, ids = unit(40, 6).float(), grouped(40, 15)
    longest = z.norm(dim=1).max().item()
    options = {"prefix": prefix, "backend": backend, "chunk": 16}
    for tau in TEMPERATURES:
        want = values(z, lambda z, t: negative_lse(z, ids, t, **options), tau)
        cases = [
            (Known(longest, tau, 0, 14), True),
            (Known(1.0, tau, 0, 14), False),
            (Known(1.005, tau, -5, 2**40), False),
        ]
        if backend != "triton" or 1 / tau < ranges.RESOLVED:  # beyond, it must know that two fp16 parts are needed
            cases.append((None, False))
        for known, exact in cases:
            found = values(z, lambda z, t, k=known: log_sums(z, ids, t, shards=alone(40), known=k, **options), tau)
            assert found[0].shape == (40, 1 if prefix is None else 2)
            fine = 2e-5 if backend != "triton" else 1e-3 * max(1, 0.1 / tau)
            for a, b in zip(found, want, strict=True):
                assert torch.equal(a, b.view_as(a)) or not exact
                torch.testing.assert_close(a, b.view_as(a), rtol=0, atol=fine * b.abs().max().item())


def values(z, f, tau):
    leaf, t = z.clone().requires_grad_(), torch.tensor(tau, requires_grad=True)
    lse = f(leaf, t)
    cotangent = torch.randn(lse.shape, generator=torch.Generator().manual_seed(2)).view_as(lse)
    return [lse.detach(), *torch.autograd.grad((lse * cotangent).sum(), (leaf, t))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_negative_are_nan_whatever_is_known(device, backend):
    z, ids = unit(20, 6).float(), torch.full((20,), 7)
    for known in (None, Known(1.0, 0.1, 7, 7)):
        assert log_sums(z, ids, 0.1, backend=backend, shards=alone(20), known=known).isnan().all()


@pytest.mark.parametrize("far", [0, 2**24 - 16, 2**40, -(2**62)])
def test_blocks_are_compared_alike_on_every_device(monkeypatch, far):
    z = unit(40, 6)
    ids = grouped(40, 15) + torch.where(torch.arange(40) % 3 == 0, far, 0)
    want = negative_lse(z, ids, 0.1, backend="eager")
    for free, known in itertools.product((True, False), (None, Known(1.0, 0.1, int(ids.min()), int(ids.max())))):
        monkeypatch.setattr(streaming, "reads_are_free", lambda device, free=free: free)
        got = log_sums(z, ids, 0.1, backend="streaming", shards=alone(40), known=known, chunk=7)[:, 0]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_the_backend_is_named_before_it_runs():
    on_cpu = {"dtype": torch.float32, "device": torch.device("cpu")}
    assert log_sums_backend("auto", alone(256), **on_cpu) == "eager"
    assert log_sums_backend("auto", alone(257), **on_cpu) == "streaming"
    uneven = _dist.Shards(None, (10, 300), 0)  # by the largest shard, the same on every rank
    assert log_sums_backend("auto", uneven, **on_cpu) == "streaming"
    with pytest.raises(ValueError, match="expected one of .*got 'cpu'"):
        log_sums_backend("cpu", alone(2), **on_cpu)


# ------------------------------------------------------------------------------------------ numbers that travel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_travel_exactly_as_integers(dtype):
    f = torch.finfo(dtype)
    t = torch.tensor([0.0, -0.0, 1 / 3, f.max, f.min, f.tiny, f.smallest_normal / 2, math.inf, -math.inf, math.nan])
    t = t.to(dtype) if dtype != torch.float64 else torch.cat([t.double(), torch.tensor([0.1, 1e300, 5e-324]).double()])
    header = torch.cat([torch.tensor([2**63 - 1]), _dist.to_bits(t)])
    assert header.dtype == torch.int64 and header[0] == 2**63 - 1
    back = _dist.from_bits(header[1:].tolist(), dtype)
    for a, b in zip(back, t.tolist(), strict=True):
        assert (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


def test_headers_of_one_process_are_read_once():
    with Counted() as c:
        assert _dist.exchange(torch.tensor([3, -(2**63), 2**63 - 1]), None) == [[3, -(2**63), 2**63 - 1]]
        assert _dist.shards(5, torch.tensor([7]), torch.device("cpu"), None) == (alone(5), [[7]])
    assert c.reads == ["tolist", "tolist"]
    with Counted() as c:
        assert _dist.shards(5, [7], torch.device("cpu"), None) == (alone(5), [[7]])
    assert not c.reads
    assert _dist.rank(None) == 0 and _dist.world_size(None) == 1
    assert _dist.Shards(None, (3, 1), 1).times(4) == _dist.Shards(None, (12, 4), 1)


# ------------------------------------------------------------------------------------------ the range of exp


def test_a_shift_keeps_every_exponential_inside_float32():
    """At the ends of the rule: the smallest and largest sums of N exponentials are normal, even 1 % of length later."""
    limits = torch.finfo(torch.float32)
    for rows, exponent in itertools.product((2, 1000, 10**6), (0.0, 1.0, 40.0, 60.0, 70.0, 73.0, 79.0, 80.0)):
        shift = ranges.constant_shift(exponent, rows)
        assert (shift is None) == (2 * exponent + math.log(rows) > 160)
        if shift is not None:
            longer = 1.01**2 * exponent
            assert math.log(limits.tiny) < -longer - shift
            assert longer - shift + math.log(rows) < math.log(limits.max)
            on_device = ranges.shift_on_device(torch.tensor(0.5), torch.tensor(math.sqrt(exponent / 2)), rows)
            assert on_device.item() == pytest.approx(shift / math.log(2), rel=1e-5, abs=1e-5)
    assert ranges.constant_shift(None, 10) is None and ranges.constant_shift(math.nan, 10) is None
    assert ranges.largest_exponent(4.0, 0.5) == 8.0
    assert ranges.needs_two_parts(129.0) and not ranges.needs_two_parts(128.0) and not ranges.needs_two_parts(None)
