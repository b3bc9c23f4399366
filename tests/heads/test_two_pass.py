"""Gradients of a large batch part by part: those of the whole batch at once."""

import contextlib
import copy
import functools
import random
import warnings

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from timm.layers import EvoNorm2dB0
from torch import nn

from ssd_addon import DualAscent, JointEntropyLoss, StructuredViews, StyleHeads, ViewBatch, ViewPlan, two_pass
from ssd_addon.losses import FAMILIES

SPACES = {"content": 5, "color": 3}
PLANS = {
    "shared query": {},
    "interleaved": {"plan": "interleaved"},
    "cross-image": {"cross_image": ("color",)},
    "interleaved, cross-image": {"plan": "interleaved", "cross_image": ("color",)},
}


def batch(kind, b=11):
    if kind == "pairs of several sizes":
        g = torch.Generator().manual_seed(0)
        views = [torch.rand(b, 3, n, n, generator=g, dtype=torch.float64) for n in (12, 12, 12, 8)]
        return ViewBatch(views, ViewPlan(pairs={"content": [(0, 1), (0, 3)], "color": [(0, 2)]}))
    views = StructuredViews({"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1)]}, seed=0, **PLANS[kind])
    x = torch.rand(b, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return [views(x) for _ in range(2)][-1].to(torch.float64)


def model(*extra, hidden=()):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), *extra, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return StyleHeads(net, SPACES, in_features=6, hidden=hidden).double()


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 4, 11, 50])
@pytest.mark.parametrize("kind", [*PLANS, "pairs of several sizes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_batch(family, kind, chunk):
    given, criterion, found = batch(kind), JointEntropyLoss(family), []
    for by_parts in (False, True):
        net = model()
        torch.manual_seed(1)
        if by_parts:
            loss = two_pass(net, given, criterion, chunk=chunk)
        else:
            loss = criterion(net(given))
            loss.backward()
        found.append((loss.detach(), gradients(net)))
    (loss, want), (again, got) = found
    torch.testing.assert_close(again, loss, rtol=1e-10, atol=1e-12)
    assert want.keys() == got.keys() and not again.requires_grad
    for n, w in want.items():
        torch.testing.assert_close(got[n], w, rtol=1e-9, atol=1e-10 * max(1.0, w.abs().max().item()))


def test_gradients_are_added_and_the_criterion_gets_its_own():
    given, tau = batch("shared query"), nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    criterion, net = JointEntropyLoss(temperature=tau), model()
    two_pass(net, given, criterion, chunk=3)
    once, own = gradients(net), tau.grad.clone()
    two_pass(net, given, criterion, chunk=5)
    for n, w in gradients(net).items():
        torch.testing.assert_close(w, 2 * once[n], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tau.grad, 2 * own)


def test_dropout_draws_the_same_twice_and_the_generator_goes_on_once():
    given, criterion = batch("shared query"), JointEntropyLoss()
    net = model(nn.Dropout(0.5))
    torch.manual_seed(3)
    parts = [net(given.rows(slice(i, i + 4))) for i in range(0, 11, 4)]
    z = {n: torch.cat([p[n] for p in parts], 1) for n in SPACES}
    loss = criterion(z, given)
    loss.backward()
    want, after = gradients(net), torch.get_rng_state()
    net.zero_grad()
    torch.manual_seed(3)
    again = two_pass(net, given, criterion, chunk=4)
    torch.testing.assert_close(again, loss.detach())
    for n, w in gradients(net).items():
        torch.testing.assert_close(w, want[n], rtol=1e-9, atol=1e-12)
    assert torch.equal(after, torch.get_rng_state())


def test_batch_norm_is_warned_of_and_its_statistics_move_once():
    given, criterion = batch("shared query", 12), JointEntropyLoss()
    net, other = model(nn.BatchNorm2d(6)), model(nn.BatchNorm2d(6))
    with pytest.warns(RuntimeWarning, match="batch norm uses the statistics of 4 images at a time, not of all 12"):
        two_pass(net, given, criterion, chunk=4)
    for i in range(0, 12, 4):
        other(given.rows(slice(i, i + 4)))
    for (n, a), b in zip(net.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), n
    two_pass(net.eval(), given, criterion, chunk=4)  # and no warning
    two_pass(net.train(), given, criterion, chunk=12)


def test_weights_that_adapt_and_terms_beside():
    given, net = batch("shared query"), model()
    criterion = JointEntropyLoss(weights=DualAscent(tuple(SPACES), tolerance=0.1, step_size=0.5))
    kept = {}

    def with_terms(z):
        kept["terms"] = criterion.terms(z)
        return kept["terms"].loss + z["content"].square().mean()

    loss = two_pass(net, given, with_terms, chunk=4)
    criterion.weights.step(kept["terms"])
    assert loss > kept["terms"].loss.detach()


# ---- both passes compute the same


def by_chunks(net, given, criterion, chunk=4):
    """Loss and gradients as of gradient accumulation: one graph of all chunks."""
    parts = [net(given.rows(slice(i, i + chunk))) for i in range(0, given.images, chunk)]
    loss = criterion({n: torch.cat([p[n] for p in parts], 1) for n in SPACES}, given)
    loss.backward()
    return loss.detach()


class Moved(nn.Module):
    """Buffers that every forward changes: in place, by another tensor, from None on; and one that cannot change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("a", torch.zeros((), dtype=torch.float64))
        self.register_buffer("b", torch.zeros((), dtype=torch.float64))
        self.register_buffer("c", None)
        self.register_buffer("wide", torch.ones((), dtype=torch.float64).expand(6))

    def forward(self, x):
        with torch.no_grad():
            self.a += x.mean()
            self.b = self.b + x.std()
            self.c = x.mean() if self.c is None else self.c * 2
        return x * (1 + self.a + self.b + self.c) * self.wide.view(6, 1, 1)


def spectral(old):
    def changed(net):
        (nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm)(net.backbone[0])
        return net.double()

    return changed


def scripted(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of torch.jit
        net.backbone[2] = torch.jit.script(net.backbone[2])
    return net


def moved(net):
    net.backbone[2] = Moved()
    return net


def pairs(net):
    net.backbone[2] = nn.InstanceNorm2d(6, track_running_stats=True).double()
    return net


class Drawn(nn.Module):
    """Noise from a generator of Python's or numpy's."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x * (0.5 + torch.tensor(self.draw(), dtype=x.dtype))


def drawn(draw):
    def changed(net):
        net.backbone[2] = Drawn(draw)
        return net

    return changed


STATES = {
    "spectral norm": spectral(False),
    "spectral norm, as it was": spectral(True),
    "instance norm": pairs,
    "buffers": moved,
    "Python's generator": drawn(random.random),
    "numpy's generator": drawn(np.random.rand),
}


@pytest.mark.parametrize("name", STATES)
def test_what_a_forward_changes_or_draws_is_the_same_in_both_passes(name):
    given, criterion, found = batch("shared query", 12), JointEntropyLoss(), []
    for run in (by_chunks, functools.partial(two_pass, chunk=4)):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
        net = STATES[name](model(nn.Identity())).train()
        loss = run(net, given, criterion)
        after = torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002
        found.append((loss, gradients(net), {n: b.clone() for n, b in net.named_buffers()}, after))
    (loss, want, state, draws), (again, got, moved, drawn) = found
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    for n, w in want.items():
        torch.testing.assert_close(got[n], w, rtol=1e-9, atol=1e-12)
    for n, b in state.items():  # they move once
        torch.testing.assert_close(moved[n], b)
    assert draws == drawn


def test_buffers_are_as_before_where_a_pass_fails():
    net = model(Moved()).train()
    net.backbone[2].register_forward_hook(lambda *_: 1 / 0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ZeroDivisionError):
        two_pass(net, batch("shared query"), JointEntropyLoss(), chunk=4)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


class Own(nn.Module):
    """A generator of its own; one draw in `every`."""

    def __init__(self, every=1):
        super().__init__()
        self.generator, self.every, self.count = torch.Generator().manual_seed(0), every, 0

    def forward(self, x):
        self.count += 1
        again = self.count > 3
        noise = torch.rand(x.shape, generator=self.generator, dtype=x.dtype)
        return x * noise if self.every == 1 or (again and self.count % self.every == 0) else x


class Counted(nn.Module):
    """Changes by a little in every forward."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return x * (1 + 1e-2 * self.count)


@pytest.mark.parametrize("make", [Own, lambda: Own(5), Counted])
def test_passes_that_differ_are_refused(make):
    """In all chunks, in the second of the second pass alone, and by a little."""
    with pytest.raises(ValueError, match="same embeddings in both passes: got some of 'content' that differ by .* own"):
        two_pass(model(make()), batch("shared query"), JointEntropyLoss(), chunk=4)


class Rounded(nn.Module):
    """The second pass differs by a rounding of the dtype, or by a given fraction."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x * (1 + self.by) if torch.is_grad_enabled() else x


@pytest.mark.parametrize(
    "dtype,cast,scale,by,refused",
    [
        (torch.float64, False, 1, 1e-9, False),
        (torch.float64, False, 1, 1e-4, True),
        (torch.float32, False, 1, 1e-5, False),
        (torch.float32, False, 1, 1e-3, False),  # kernels with TF32, compiled graphs
        (torch.float32, False, 1, 0.03, True),
        (torch.float32, True, 1, 1e-2, False),
        (torch.bfloat16, False, 1, 1e-2, False),
        (torch.bfloat16, False, 1, 0.5, True),
        (torch.float16, False, 1e5, 0.5, True),
    ],
)
def test_a_difference_counts_from_the_rounding_of_the_dtype_on(dtype, cast, scale, by, refused):
    net, given = model(Rounded(by)).to(dtype), batch("shared query").to(torch.float32)
    if cast:  # embeddings of a wider type than they are computed in
        net.projections.register_forward_hook(lambda module, x, z: {n: t.float() for n, t in z.items()})
    for head in net.projections.children():  # the norm of all of them overflows in half precision
        head.linears[-1].weight.data *= scale
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        if refused:
            with pytest.raises(ValueError, match="same embeddings in both passes: got some of 'content'"):
                two_pass(net, given, lambda z: z["content"].float().square().sum(), chunk=11)
        else:
            two_pass(net, given, lambda z: z["content"].square().sum(), chunk=4)


def test_the_generator_goes_on_after_what_the_criterion_draws():
    given, net = batch("shared query"), model(nn.Dropout(0.5))
    torch.manual_seed(3)
    for i in range(0, 11, 4):
        net(given.rows(slice(i, i + 4)))
    torch.rand(7)
    want = torch.get_rng_state()
    torch.manual_seed(3)
    two_pass(net, given, lambda z: (z["content"].sum() * torch.rand(7)).sum(), chunk=4)
    assert torch.equal(torch.get_rng_state(), want)


def test_embeddings_that_are_zero_or_no_number_are_the_same():
    for value in (0.0, torch.nan):
        net = model()
        for p in net.projections.parameters():
            nn.init.constant_(p, value)
        two_pass(net, batch("shared query"), lambda z: z["content"].sum(), chunk=4)


def test_what_computes_in_less_than_it_returns_may_differ_by_more():
    """Fabric and accelerate run autocast inside, and give float32 back."""
    for name, refused in (("_FabricModule", False), ("Other", True)):
        net = model(type(name, (Rounded,), {})(0.03)).float()
        with pytest.raises(ValueError, match="same embeddings") if refused else contextlib.nullcontext():
            two_pass(net, batch("shared query").to(torch.float32), lambda z: z["content"].square().sum(), chunk=4)


class Table(nn.Module):
    """Buffers of other kinds: sparse, and none."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.eye(6, dtype=torch.float64).to_sparse())
        self.register_buffer("none", None)

    def forward(self, x):
        return x * self.table.to_dense().diagonal().view(1, 6, 1, 1)


def test_a_sparse_buffer():
    net, plain = model(Table()).double(), model(nn.Identity()).double()
    plain.load_state_dict(net.state_dict(), strict=False)
    for each in (net, plain):
        two_pass(each, batch("shared query"), JointEntropyLoss(), chunk=4)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class BatchNormReLU(nn.Sequential):
    """A block that is named after the norm in it."""


class Functional(nn.Module):
    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


NORMS = {  # whether it is warned of in training mode, and in evaluation mode
    "with statistics": (lambda: nn.BatchNorm2d(6), True, False),
    "without statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), True, True),
    "in a script": (lambda: scripted(model(nn.BatchNorm2d(6))).backbone[2], True, False),
    "in a script, without statistics": (
        lambda: scripted(model(nn.BatchNorm2d(6, track_running_stats=False))).backbone[2],
        True,
        True,
    ),
    "timm's EvoNorm": (lambda: EvoNorm2dB0(6), True, False),
    "of layers": (lambda: nn.GroupNorm(1, 6), False, False),
    "a block with one": (lambda: BatchNormReLU(nn.BatchNorm2d(6), nn.ReLU()), True, False),
    "a function": (Functional, False, False),  # which cannot be seen
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_every_norm_over_the_batch_is_warned_of(name, training):
    make, *expected = NORMS[name]
    net = model(make()).double().train(training)
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        two_pass(net, batch("shared query", 12), JointEntropyLoss(), chunk=4)
    assert [w.category for w in met] == [RuntimeWarning] * expected[not training]


def test_gradients_come_where_they_are_switched_off_around_it():
    given, net, other = batch("shared query"), model(), model()
    JointEntropyLoss()(other(given)).backward()
    with torch.no_grad():
        two_pass(net, given, JointEntropyLoss(), chunk=4)
    for n, w in gradients(other).items():
        torch.testing.assert_close(gradients(net)[n], w)


def test_a_criterion_of_one_space_alone():
    given, net, other = batch("shared query"), model(), model()
    other(given)["color"].square().sum().backward()
    two_pass(net, given, lambda z: z["color"].square().sum(), chunk=4)
    assert gradients(net).keys() == gradients(other).keys()
    for n, w in gradients(other).items():
        torch.testing.assert_close(gradients(net)[n], w)


def test_a_scaled_loss_in_half_precision():
    given, criterion = batch("shared query").to(torch.float32), JointEntropyLoss()
    scaler, found = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    for by_parts in (False, True):
        net = model().float()
        with torch.autocast("cpu", torch.float16):
            if by_parts:
                loss = two_pass(net, given, lambda z: scaler.scale(criterion(z)), chunk=4)
            else:
                loss = scaler.scale(criterion(net(given)))
                loss.backward()
        found.append((loss.detach(), gradients(net)))
    (loss, want), (again, got) = found
    torch.testing.assert_close(again, loss, rtol=1e-2, atol=0)
    for n, w in want.items():
        assert (got[n] - w).norm() < 0.02 * w.norm()


class Plain(nn.Module):
    def forward(self, batch):
        return batch.views.flatten(2)


def test_bad_arguments():
    given, net = batch("shared query"), model()
    with pytest.raises(TypeError, match="batch: expected a ViewBatch: got Tensor"):
        two_pass(net, given.views, JointEntropyLoss(), chunk=4)
    for chunk in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="chunk"):
            two_pass(net, given, JointEntropyLoss(), chunk=chunk)
    with pytest.raises(TypeError, match="expected Embeddings of views: got Tensor"):
        two_pass(Plain(), given, JointEntropyLoss(), chunk=4)
    with pytest.raises(ValueError, match="batch: expected at least one image on every rank: got none"):
        two_pass(net, given.rows(slice(0, 0)), JointEntropyLoss(), chunk=4)
    with pytest.raises(TypeError, match="model: expected an nn.Module: got partial; put the call into the forward"):
        two_pass(functools.partial(net, view_by_view=True), given, JointEntropyLoss(), chunk=4)
    with pytest.raises(ValueError, match="model: expected parameters to train: got embeddings that depend on none"):
        two_pass(model().requires_grad_(False), given, JointEntropyLoss(), chunk=4)


@pytest.mark.parametrize(
    "criterion,error,message",
    [
        (JointEntropyLoss().terms, TypeError, "expected a scalar tensor: got Terms; return its .loss"),
        (lambda z: 1.0, TypeError, "expected a scalar tensor: got float"),
        (lambda z: z["content"].mean(0), ValueError, r"expected a scalar: got \[11, 5\]"),
        (lambda z: z["content"].detach().sum(), ValueError, "depends on the embeddings: got one without a graph"),
        (lambda z: torch.zeros((), requires_grad=True), ValueError, "depends on the embeddings: got one that depends"),
    ],
)
def test_a_criterion_that_gives_no_loss(criterion, error, message):
    with pytest.raises(error, match=f"criterion: .*{message}"):
        two_pass(model(), batch("shared query"), criterion, chunk=4)


def test_the_cache_of_autocast_is_cleared_between_the_passes(monkeypatch):
    """Casts of weights that the pass without a graph left there would take the gradients of the second."""
    seen = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: seen.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        two_pass(model(), batch("shared query"), JointEntropyLoss(), chunk=4)
        assert seen == [1]
