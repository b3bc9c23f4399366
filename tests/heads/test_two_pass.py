"""Gradients of a large batch part by part: those of the whole batch at once."""

import kornia.augmentation as K
import pytest
import torch
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
    with pytest.warns(RuntimeWarning, match="batch norm in training mode uses the statistics of 4 images at a time"):
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


def test_the_cache_of_autocast_is_cleared_between_the_passes(monkeypatch):
    """Casts of weights that the pass without a graph left there would take the gradients of the second."""
    seen = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: seen.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        two_pass(model(), batch("shared query"), JointEntropyLoss(), chunk=4)
        assert seen == [1]
