"""Autocast reaches neither the arithmetic of the package nor its derivatives, wherever forward and backward run."""

import gc
import importlib
import pkgutil
import weakref

import pytest
import torch
from reference import grouped, unit
from tiles import shrink
from torch.utils.checkpoint import checkpoint

import ssd_addon
from ssd_addon import JointEntropyLoss, _autocast, _unit
from ssd_addon._autocast import matmul, outside_autocast
from ssd_addon.kernels import negative_lse, off_diagonal_energy
from ssd_addon.losses import FAMILIES

# The interpreter computes with numpy, which warns of what is masked afterwards (a row's similarity to its own image).
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(*shapes, dtype=torch.float64):
    return [drawn(*shape, seed=k, dtype=dtype).requires_grad_() for k, shape in enumerate(shapes)]


def on(where, this, kind=torch.bfloat16):
    """Autocast for the forward or the backward, where a case has it there."""
    return torch.autocast("cpu", dtype=kind, enabled=where in (this, "both"))


def run(f, tensors, where, kind=torch.bfloat16):
    """Outputs of f, and the gradients of their weighted sum, with autocast on in one of the passes, or both."""
    fresh = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    with on(where, "forward", kind):
        out = f(*fresh)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((o * drawn(*o.shape, seed=7, dtype=o.dtype)).sum() for o in out)
    with on(where, "backward", kind):
        loss.backward()
    return [o.detach() for o in out] + [t.grad for t in fresh if t.requires_grad]


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


# ------------------------------------------------------------------------------------------ the package's functions


def lse(prefix, learned):
    def f(z, tau):
        tau = tau if learned else 0.1
        return negative_lse(z, grouped(31, 12), tau, prefix=prefix, backend=f.backend, chunk=None if prefix else 7)

    return f, lambda dtype: [unit(31, 13).to(dtype).requires_grad_(), torch.tensor(0.1, requires_grad=learned)]


def energy(n, d, cross):
    def f(*xy):
        return off_diagonal_energy(*xy, backend=f.backend, chunk=9)

    return f, lambda dtype: leaves(*[(n, d)] * (1 + cross), dtype=dtype)


CASES = {
    "log-sums": lse(None, False),
    "two spaces, learned temperature": lse(5, True),
    "energy by columns": energy(31, 13, False),
    "energy by columns, crossed": energy(31, 13, True),
    "energy by rows": energy(9, 40, False),
    "energy by rows, crossed": energy(9, 40, True),
}


@pytest.mark.parametrize("where", ["forward", "backward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "streaming", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_give_the_same_bits_under_autocast(monkeypatch, case, backend, dtype, where):
    shrink(monkeypatch)
    f, inputs = CASES[case]
    f.backend = backend
    want = run(f, inputs(dtype), "nowhere")
    for kind in (torch.bfloat16, torch.float16):
        assert_same_bits(run(f, inputs(dtype), where, kind), want)


@pytest.mark.parametrize("backend", ["eager", "streaming", "triton"])
def test_compiled_kernels_give_the_same_bits_under_autocast(monkeypatch, backend):
    """Compiled inside autocast. Backward alone inside it depends on the compiler: aot_eager then runs it in 16 bits."""
    shrink(monkeypatch)

    def f(z, x):
        return negative_lse(z, torch.arange(31), 0.1, backend=backend), off_diagonal_energy(x, backend=backend)

    results = []
    for where in ("nowhere", "forward", "both"):
        torch._dynamo.reset()
        inputs = [unit(31, 13).float().requires_grad_(), *leaves((31, 13), dtype=torch.float32)]
        results.append(run(torch.compile(f, fullgraph=True, backend="aot_eager"), inputs, where))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("backend", ["eager", "streaming", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_give_the_same_bits_under_autocast(monkeypatch, family, backend):
    """Backward too: autocast there would compute the derivatives of products in 16 bits, or meet mixed types."""
    if family not in ("simclr", "vicreg", "barlow") and backend != "eager":
        pytest.skip("one backend")
    shrink(monkeypatch)

    def f(*z):
        torch.manual_seed(0)  # sigreg draws
        return JointEntropyLoss(family, backend=backend)({"content": z[0], "color": z[1]})

    inputs = leaves((3, 9, 7), (3, 9, 4), dtype=torch.float32)
    want = run(f, inputs, "nowhere")
    for where in ("forward", "backward", "both"):
        assert_same_bits(run(f, inputs, where), want)


def test_unit_rows_give_the_same_bits_under_autocast():
    for where in ("forward", "backward", "both"):
        inputs = leaves((2, 9, 5), (2, 9, 3), dtype=torch.float32)

        def f(*z):
            return _unit.joint_and_cosines(z, ((0, 1, 0), (0, 1, 1)))

        assert_same_bits(run(f, inputs, where), run(f, inputs, "nowhere"))


@pytest.mark.parametrize("case", ["log-sums", "energy by columns, crossed", "unit rows"])
def test_second_derivatives_give_the_same_bits_under_autocast(case):
    if case == "unit rows":
        tensors = leaves((2, 9, 5), (2, 9, 3), dtype=torch.float32)

        def f(*z):
            return _unit.joint_and_cosines(z, ((0, 1, 0), (0, 1, 1)))[1]

    else:
        f, inputs = CASES[case]
        f.backend, tensors = "eager", inputs(torch.float32)
    assert_same_bits(second(f, tensors, True), second(f, tensors, False))


def second(f, tensors, autocast):
    tensors = [t for t in tensors if t.requires_grad] + [t for t in tensors if not t.requires_grad]
    wanted = [t for t in tensors if t.requires_grad]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        first = torch.autograd.grad(f(*tensors).sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)


def test_every_backward_of_the_package_turns_autocast_off():
    """Collectives do not show it: the kind is tested by its form."""
    for module in pkgutil.walk_packages(ssd_addon.__path__, "ssd_addon."):
        if ".kernels" in module.name or "._" in module.name:
            importlib.import_module(module.name)
    ours = {f for f in torch.autograd.Function.__subclasses__() if f.__module__.startswith("ssd_addon.")}
    assert len(ours) >= 7
    for f in ours - {_autocast._End}:
        assert hasattr(f.backward, "__wrapped__"), f


# ------------------------------------------------------------------------------------------ matmul


PRODUCTS = (matmul, torch.matmul)


def test_products_have_the_bits_of_torch_and_its_derivatives():
    forms = (
        lambda g, x, y: g(x, y.T),
        lambda g, x, y: g(x[:, 1:], y[:, 1:].T),
        lambda g, x, y: g(y, x.T),
        lambda g, x, y: g(x.T, x.sin()),
        lambda g, x, y: g(x.T, x.T.contiguous().T),
    )
    for m, k, n in ((5, 4, 7), (9, 13, 9), (70, 24, 3), (1, 6, 1)):
        x, y = leaves((m, k), (n, k))
        for f in forms:
            got, want = (run(lambda *t, f=f, g=g: f(g, *t) + 0 * t[1].sum(), (x, y), "nowhere") for g in PRODUCTS)
            assert_same_bits(got, want)
        assert torch.autograd.gradgradcheck(lambda x, y: matmul(x, y.T), (x, y))
    (got,) = torch.autograd.grad(matmul(x, y.detach().T).sum(), x)
    assert torch.equal(got, torch.autograd.grad((x @ y.detach().T).sum(), x)[0])


# ------------------------------------------------------------------------------------------ outside_autocast


def products(x, y):
    return (x @ y.T).exp().sum(dim=1), (x * y).sum()


def both(f):
    return lambda *tensors: outside_autocast(f, *tensors)


def test_it_has_the_values_and_derivatives_of_the_function():
    x, y = leaves((5, 4), (5, 4))
    assert_same_bits(run(both(products), (x, y), "nowhere"), run(products, (x, y), "nowhere"))
    assert torch.autograd.gradcheck(both(products), (x, y))
    assert torch.autograd.gradgradcheck(both(products), (x, y))
    for output in (0, 1):  # one output alone, and then a third derivative
        want, got = [], []
        for f, found in ((products, want), (both(products), got)):
            (g,) = torch.autograd.grad(f(x, y)[output].sum(), x, create_graph=True)
            (h,) = torch.autograd.grad(g.pow(3).sum(), x, create_graph=True, allow_unused=True, materialize_grads=True)
            inputs = {"allow_unused": True, "materialize_grads": True}
            found += [g, h, *torch.autograd.grad(h.pow(2).sum() + 0 * x.sum(), (x, y), **inputs)]
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_autocast_would_have_changed_the_result(where):
    x, y = leaves((5, 4), (5, 4), dtype=torch.float32)
    want = run(products, (x, y), "nowhere")
    assert not all(map(torch.equal, run(products, (x, y), where), want))
    assert_same_bits(run(both(products), (x, y), where), want)


def test_inputs_without_a_gradient_and_outputs_without_one():
    x, y = leaves((5, 4), (5, 4))
    index = torch.tensor([3, 1])

    def f(x, index, y):
        return x[index] @ y.T, index + 1, (x > 0).sum(), "as it is"

    out, shifted, count, word = outside_autocast(f, x, index, y.detach())
    assert torch.equal(shifted, index + 1) and count == (x > 0).sum() and word == "as it is"
    assert out.requires_grad and not shifted.requires_grad and not count.requires_grad
    (got,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(got, torch.autograd.grad((x[index] @ y.detach().T).sum(), x)[0])
    constant = outside_autocast(lambda x: x.detach() * 2, x)
    assert not constant.requires_grad
    assert outside_autocast(lambda x: 3.0, x) == 3.0


def test_parameters_of_the_function_get_their_gradients():
    (x,) = leaves((6, 4), dtype=torch.float32)
    layer = torch.nn.Linear(4, 3)

    def f(x):
        return torch.tanh(layer(x)).square().sum(dim=1)

    parameters = tuple(layer.parameters())
    results = []
    for g in (f, lambda x: outside_autocast(f, x, parameters=parameters)):
        for inputs in ((x, *parameters), parameters):
            first = torch.autograd.grad(g(x).sum(), inputs, create_graph=True)
            results.append([*first, *torch.autograd.grad(sum(t.square().sum() for t in first), inputs)])
    for a, b in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(outside_autocast(f, x.detach(), parameters=parameters).sum(), parameters)
    assert_same_bits(got, torch.autograd.grad(f(x).sum(), parameters))


def test_a_graph_may_be_used_again_only_where_it_was_kept():
    x, y = leaves((5, 4), (5, 4))
    out, _ = outside_autocast(products, x, y)
    a = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    assert torch.equal(a, torch.autograd.grad(out.sum(), x)[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out.sum(), x)


def test_the_graph_of_the_function_is_freed_with_the_graph_around_it():
    (x,) = leaves((5, 4))
    inner = []

    def f(x):
        saved = x.exp()
        inner.append(weakref.ref(saved))
        return (saved @ saved.T).sum()

    gc.disable()  # freed by counting references, not by the collector
    try:
        out = outside_autocast(f, x)
        torch.autograd.grad(out, x, retain_graph=True)
        assert inner[-1]() is not None
        torch.autograd.grad(out, x)
        assert inner[-1]() is None  # while the output is alive
        out = outside_autocast(f, x)
        del out
        assert inner[-1]() is None  # and without a backward
        out = outside_autocast(f, x)
        (g,) = torch.autograd.grad(out, x, create_graph=True)
        del out, g
        assert all(r() is None for r in inner)
    finally:
        gc.enable()


def test_outputs_may_be_changed_in_place_and_inputs_not():
    x, y = leaves((5, 4), (5, 4))
    out, _ = outside_autocast(products, x, y)
    want = torch.autograd.grad(3 * products(x, y)[0].sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(out.mul_(3).sum(), x)[0], want)
    out = outside_autocast(torch.exp, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # exp needs its own result
        out.mul_(3).sum().backward()
    z = x * 1
    out, _ = outside_autocast(products, z, y)
    with torch.no_grad():
        z += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_is_recorded_where_gradients_are_off():
    x, y = leaves((5, 4), (5, 4))
    for off in (torch.no_grad, torch.inference_mode):
        with off(), torch.autocast("cpu", dtype=torch.bfloat16):
            out, _ = outside_autocast(products, x, y)
        assert not out.requires_grad and torch.equal(out, products(x, y)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_it_works_inside_other_frameworks_of_autograd():
    x, y = leaves((5, 4), (5, 4))
    want = torch.autograd.grad(sum(o.sum() for o in products(x, y)), (x, y))

    def gradients(f, *around):
        return torch.autograd.grad(sum(o.sum() for o in f(x, y)), (x, y))

    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(gradients(both(products)), want)
    for reentrant in (False, True):
        x.grad = y.grad = None
        sum(o.sum() for o in checkpoint(both(products), x, y, use_reentrant=reentrant)).backward()
        assert_same_bits((x.grad, y.grad), want)
    for f in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        found = f(lambda x, y: sum(o.sum() for o in outside_autocast(products, x, y)), argnums=(0, 1))(x, y)
        torch.testing.assert_close(found, want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(outside_autocast(products, dual, y)[1]).tangent
        torch.testing.assert_close(tangent, y.sum())
