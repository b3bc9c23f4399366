"""What a GPU may run out of, or cannot tell: memory, a library's products, values during the capture of a graph."""

import math
from types import SimpleNamespace

import pytest
import torch
from counting import Counted
from reference import grouped, unit
from tiles import shrink
from torch import nn

from ssd_addon import JointEntropyLoss
from ssd_addon.kernels import dispatch, fast_product, launch, launch_around, negative_lse, operators, streaming
from ssd_addon.kernels.launch import affordable_rows

pytestmark = pytest.mark.filterwarnings("ignore:invalid value|overflow|divide:RuntimeWarning")

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------ fp16 products


@pytest.fixture
def products(monkeypatch):
    """Names of the functions that ran; `products.raises[name]` makes one raise."""
    seen = SimpleNamespace(ran=[], raises={})
    monkeypatch.setattr(fast_product, "_found", {})
    for name in ("addmm_in_place", "mm_and_add", "through_float32"):

        def f(out, a, b, name=name):
            seen.ran.append((name, tuple(a.shape)))
            if name in seen.raises:
                raise seen.raises[name]
            out.addmm_(a.float(), b.float())

        monkeypatch.setattr(fast_product, name, f)
    return seen


def add(rows=20):
    """One product of fp16 rows, as if they lay on a GPU."""
    a, b = torch.ones(rows, 3).half(), torch.ones(3, 5).half()
    out = torch.zeros(rows, 5)
    fast_product.product(CPU)(out, a, b)
    assert out.eq(3).all()


def test_the_product_is_found_out_once_with_a_small_one(products):
    products.raises["addmm_in_place"] = RuntimeError("out must be of the type of the operands")
    for _ in range(3):
        add()
    small = [("addmm_in_place", (16, 16)), ("mm_and_add", (16, 16))]
    assert products.ran == [*small, *[("mm_and_add", (20, 3))] * 3]


def test_an_exhausted_memory_passes_through_and_disables_nothing(products):
    add()
    products.raises["addmm_in_place"] = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        add()
    products.raises.clear()
    add()
    assert {name for name, _ in products.ran} == {"addmm_in_place"}


def test_an_exhausted_memory_during_the_small_product_settles_nothing(products):
    products.raises["addmm_in_place"] = torch.cuda.OutOfMemoryError("CUDA out of memory")
    for _ in range(2):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            add()
    products.raises.clear()
    add()
    assert {name for name, _ in products.ran} == {"addmm_in_place"}


def test_a_setting_that_refuses_a_product_is_asked_again_when_it_changes(products, monkeypatch):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "allow_fp16_accumulation"):
        pytest.skip("a newer torch has it")
    refusal = RuntimeError("fp16 accumulation is on")
    products.raises |= {"addmm_in_place": refusal, "mm_and_add": refusal}
    try:
        matmul.allow_fp16_accumulation = True
        add()
        assert products.ran[-1][0] == "through_float32"
        products.raises.clear()
        matmul.allow_fp16_accumulation = False
        add()
        assert products.ran[-1] == ("addmm_in_place", (20, 3))
    finally:
        matmul.allow_fp16_accumulation = False


def test_fp16_on_a_gpu_takes_the_fast_product_and_everything_else_float32(monkeypatch):
    a = torch.ones(2, 2).half()
    taken = []
    monkeypatch.setattr(fast_product, "product", lambda device: lambda *args: taken.append(args))
    fast_product.add_product(torch.zeros(2, 2), SimpleNamespace(is_cuda=True, dtype=torch.float16, device=CPU), a)
    assert len(taken) == 1
    out = torch.zeros(2, 2)
    fast_product.add_product(out, a, a)
    assert len(taken) == 1 and out.eq(2).all()


@pytest.mark.parametrize("old", [False, True], ids=["torch 2.9", "torch 2.5"])
def test_products_through_float32_run_in_tf32_and_in_parts(monkeypatch, old):
    matmul = SimpleNamespace(allow_tf32=False) if old else torch.backends.cuda.matmul
    if old:
        monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    elif not hasattr(matmul, "fp32_precision"):
        pytest.skip("a newer torch has it")
    setting = (lambda: matmul.allow_tf32) if old else (lambda: matmul.fp32_precision == "tf32")
    whole, seen = torch.Tensor.addmm_, []
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda o, a, b: seen.append((len(a), setting())) or whole(o, a, b))
    monkeypatch.setattr(fast_product, "COPY_ELEMENTS", 24)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(11, 6, generator=g).half(), torch.randn(6, 5, generator=g).half()
    out = torch.ones(11, 9)
    fast_product.through_float32(out[:, 2:7], a, b)
    torch.testing.assert_close(out[:, 2:7], 1 + a.float() @ b.float())
    assert out[:, :2].eq(1).all() and seen == [(4, True), (4, True), (3, True)] and not setting()
    with pytest.raises(ZeroDivisionError), fast_product.float32_products(True):
        _ = 1 / 0
    assert not setting()


# ------------------------------------------------------------------------------------------ the memory of W


@pytest.mark.parametrize("entry", [2, 4, 8])
@pytest.mark.parametrize("free", [2**40, 2**33, 2**30, 2**26, 0])
def test_w_takes_no_more_than_it_may(entry, free):
    """Two levels, or float32, or both: 512 MiB together, and a quarter of what is free."""
    for wanted in (16384, 8192, 3000, 512):
        rows = affordable_rows(wanted, entry, free)
        assert rows <= wanted
        fits = rows * rows * entry <= min(512 * 2**20, free / 4)
        assert fits or rows <= launch.SMALLEST_BLOCK
        assert rows == wanted or 4 * rows * rows * entry > min(512 * 2**20, free / 4)  # not smaller than needed
    assert affordable_rows(16384, 2, 2**40) == 16384 and affordable_rows(16384, 8, 2**40) == 8192


@pytest.mark.slow
@pytest.mark.parametrize("prefix,tau", [(None, 0.1), (4, 0.1), (4, 0.005)], ids=["one", "two", "two in float32"])
@pytest.mark.parametrize("short", ["the whole", "free memory"])
def test_short_of_memory_the_gradient_is_the_same(monkeypatch, prefix, tau, short):
    shrink(monkeypatch)
    z, ids = unit(100, 8).float().requires_grad_(), grouped(100, 30)
    monkeypatch.setattr(launch, "block_rows", lambda d, unit: 96)
    sizes, whole = [], launch_around.empty
    monkeypatch.setattr(launch_around, "empty", lambda x, shape, *a: sizes.append((shape, *a)) or whole(x, shape, *a))

    def gradient():
        sizes.clear()
        lse = negative_lse(z, ids, tau, prefix=prefix, backend="triton")
        found = torch.autograd.grad(lse.sum(), z)[0]
        rooms = [e for e in sizes if len(e) == 2 and len(e[0]) == 1 and e[1].is_floating_point]
        return found, sum(math.prod(s) * kind.itemsize for s, kind in rooms)

    want, room = gradient()
    monkeypatch.setattr(launch, "SMALLEST_BLOCK", 16)
    if short == "the whole":
        monkeypatch.setattr(launch, "WEIGHT_BYTES", 12_000)
    else:
        monkeypatch.setattr(launch, "WEIGHT_BYTES", 10**5)
        monkeypatch.setattr(launch, "_free_memory", lambda x: 4 * 12_000)
    got, less = gradient()
    assert less <= 12_000 < room
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.norm().item())


def test_free_memory_counts_the_allocators_reserve_and_asks_for_its_statistics_once(monkeypatch):
    """They are hundreds of numbers, and `torch.cuda.memory_reserved()` sorts all of them for one."""
    held = {"reserved_bytes": {"all": {"current": 700}}, "allocated_bytes": {"all": {"current": 300}}}
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: asked.append(device) or held)
    monkeypatch.setattr(torch.cuda.memory, "memory_stats", lambda device: pytest.fail("all statistics are flattened"))
    device = torch.device("cuda", 0)
    assert dispatch.free_memory(device) == 1000 + 700 - 300 and asked == [device]
    assert dispatch.free_memory(torch.device("cpu")) > 2**60


# ------------------------------------------------------------------------------------------ capture


@pytest.mark.parametrize("prefix", [None, 3])
@pytest.mark.parametrize("learned", [False, True])
def test_streaming_reads_nothing_while_a_graph_is_captured(monkeypatch, learned, prefix):
    monkeypatch.setattr(streaming, "capturing", lambda device: True)
    monkeypatch.setattr(streaming, "reads_are_free", lambda device: False)
    ids = torch.arange(40) // 2
    results = []
    for backend in ("eager", "streaming"):
        z = unit(40, 6).requires_grad_()
        tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        with Counted() as c:
            options = {"prefix": prefix, "backend": backend, "validate": False, "chunk": 16}
            lse = negative_lse(z, ids, tau if learned else 0.1, **options)
            leaves = (z, tau) if learned else (z,)
            results.append((lse.detach(), *torch.autograd.grad(lse.square().sum(), leaves)))
        assert not c.reads
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_the_compiled_streaming_operator_reads_nothing_while_a_graph_is_captured(monkeypatch):
    """Inductor's CUDA graphs capture it."""
    monkeypatch.setattr(streaming, "reads_are_free", lambda device: False)
    z, ids, tau = unit(40, 6), torch.arange(40) // 2, torch.tensor(0.1, dtype=torch.float64)
    want = streaming.streaming_lse(z, tau, ids, 3, 16)
    dwant = streaming.streaming_lse_backward(torch.ones_like(want), want, z, tau, ids, 3, 16)
    monkeypatch.setattr(streaming, "capturing", lambda device: True)
    with Counted() as c:
        got = streaming.streaming_lse(z, tau, ids, 3, 16)
        dgot = streaming.streaming_lse_backward(torch.ones_like(got), got, z, tau, ids, 3, 16)
    assert not c.reads
    torch.testing.assert_close((got, *dgot), (want, *dwant), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tau", [math.nan, 0.0, math.inf])
def test_a_temperature_that_is_none_makes_everything_nan(tau):
    """Products with a factor of NaN came out of some matrix libraries as if it were 1."""
    z, ids = unit(40, 6).requires_grad_(), torch.arange(40) // 2
    lse = negative_lse(z, ids, torch.tensor(tau), backend="streaming", validate=False)
    assert lse.isnan().all() and torch.autograd.grad(lse.sum(), z)[0].isnan().all()


# ------------------------------------------------------------------------------------------ temperature_floor


@pytest.fixture
def forms(monkeypatch):
    """(maximum, exact) of every call of the operator."""
    shrink(monkeypatch)
    seen, whole = [], operators.log_sums

    def note(*args):
        seen.append(args[-2:])
        return whole(*args)

    monkeypatch.setattr(operators, "log_sums", note)
    return seen


@pytest.mark.parametrize(
    "floor,expected", [(None, (True, False)), (0.05, (False, False)), (0.0126, (True, False)), (0.005, (True, False))]
)
def test_a_floor_gives_an_unread_temperature_the_form_of_a_number(forms, floor, expected):
    z, ids = unit(40, 6).float(), torch.arange(40) // 2
    tau = torch.tensor(0.1)
    lse = negative_lse(z, ids, tau, backend="triton", validate=False, temperature_floor=floor)
    assert forms == [expected]
    torch.testing.assert_close(lse.double(), negative_lse(z.double(), ids, 0.1, backend="eager"), rtol=0, atol=5e-3)


@pytest.mark.parametrize("prefix", [None, 3])
@pytest.mark.parametrize("backend", ["eager", "streaming", "triton"])
def test_a_temperature_below_its_floor_is_never_a_wrong_number(forms, backend, prefix):
    z, ids = unit(40, 6).float().requires_grad_(), torch.arange(40) // 2
    options = {"backend": backend, "prefix": prefix, "temperature_floor": 0.05}
    for tau in (torch.tensor(0.049), torch.tensor(0.002), torch.tensor(math.nan)):
        lse = negative_lse(z, ids, tau.requires_grad_(), validate=False, **options)
        assert lse.isnan().all() and torch.autograd.grad(lse.sum(), z)[0].isnan().all()
    with pytest.raises(ValueError, match="temperature: expected at least the temperature_floor, 0.05: got 0.049"):
        negative_lse(z, ids, torch.tensor(0.049), **options)
    for validate in (True, False):
        with pytest.raises(ValueError, match="temperature: expected at least the temperature_floor, 0.05: got 0.049"):
            negative_lse(z, ids, 0.049, validate=validate, **options)
    tau = torch.tensor(0.05, requires_grad=True)
    lse = negative_lse(z, ids, tau, validate=False, **options)
    assert lse.isfinite().all() and torch.autograd.grad(lse.sum(), tau)[0].isfinite()


@pytest.mark.parametrize("floor", [0, -1.0, math.nan, "0.1", True])
def test_a_floor_is_a_number_above_zero(floor):
    with pytest.raises(ValueError, match="temperature_floor"):
        negative_lse(unit(4, 3), torch.arange(4), torch.tensor(0.1), temperature_floor=floor)
    with pytest.raises(ValueError, match="temperature_floor"):
        JointEntropyLoss("simclr", temperature_floor=floor)


def test_the_loss_has_the_floor_of_a_learned_temperature(forms):
    z = {"content": torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0))}
    tau = nn.Parameter(torch.tensor(0.1))
    options = {"temperature": tau, "temperature_floor": 0.05, "backend": "triton"}
    assert JointEntropyLoss("simclr", validate=False, **options)(z).isfinite()
    assert forms == [(False, False)]
    criterion = JointEntropyLoss("simclr", **options)
    assert criterion(z).isfinite()
    with torch.no_grad():
        tau.fill_(0.04)
    assert JointEntropyLoss("simclr", validate=False, **options)(z).isnan()
    with pytest.raises(ValueError, match="expected at least the temperature_floor, 0.05: got 0.04"):
        criterion(z)
    with pytest.raises(ValueError, match="temperature: expected at least the temperature_floor"):
        JointEntropyLoss("simclr", temperature=0.04, temperature_floor=0.05)
    with pytest.raises(ValueError, match="'vicreg' family has variance, covariance, not temperature_floor"):
        JointEntropyLoss("vicreg", temperature_floor=0.05)
