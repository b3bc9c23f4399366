"""Steps that are not finite are skipped as if they had not been; too many end the run; signals stop it."""

import os
import signal

import pytest
import torch
from torch import nn

from ssd_addon import JointEntropyLoss, runs
from ssd_addon.losses import Diverged


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def step(net, guard, number, x):
    guard.begin()
    loss = net(x).square().mean()
    loss.backward()
    return guard.fine(number, loss, net.parameters())


def test_a_step_that_is_not_finite_leaves_nothing_behind():
    net = network()
    guard = runs.Guard([net], max_skipped=2)
    assert step(net, guard, 0, torch.rand(8, 3)) and net[0].weight.grad is not None
    before = {k: t.clone() for k, t in net.state_dict().items()}
    for number, value in enumerate((float("nan"), float("inf")), 1):
        net.zero_grad()
        assert not step(net, guard, number, torch.full((8, 3), value))
        assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters()) and guard.skipped == number
    net.zero_grad()
    assert step(net, guard, 3, torch.rand(8, 3)) and guard.skipped == 0 and guard.total == 2
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


def test_a_gradient_alone_is_enough():
    net = network()
    guard = runs.Guard([net])
    guard.begin()
    loss = net(torch.rand(8, 3)).square().mean()
    loss.backward()
    net[0].weight.grad[0, 0] = float("nan")
    assert not guard.fine(0, loss, net.parameters())


def test_too_many_in_a_row_end_the_run_and_say_where():
    net = network()
    guard = runs.Guard([net], max_skipped=1)
    z = {"content": torch.rand(3, 4, 5), "color": torch.full((3, 4, 2), float("nan"))}
    with pytest.raises(Diverged, match="in the space color") as raised:
        JointEntropyLoss()(z)
    guard.begin()
    assert not guard.fine(7, raised.value, net.parameters())
    with pytest.raises(
        runs.TooManySkipped, match=r"step 8: .* got 2 consecutive steps that are not finite in the"
    ) as end:
        guard.fine(8, raised.value, net.parameters())
    assert end.value.step == 8 and end.value.spaces == ("color",)


def test_max_skipped_0_ends_at_the_first():
    net = network()
    with pytest.raises(runs.TooManySkipped, match="got 1 consecutive steps"):
        step(net, runs.Guard([net], max_skipped=0), 0, torch.full((8, 3), float("nan")))


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_at_the_next_step(number, code):
    net = network()
    before = signal.getsignal(number)
    with runs.Guard([net]) as guard:
        assert step(net, guard, 0, torch.rand(8, 3)) and not guard.stopping and guard.exit_code == 0
        os.kill(os.getpid(), number)
        assert step(net, guard, 1, torch.rand(8, 3)) and guard.stopping == number and guard.exit_code == code
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_state_that_is_not_finite_is_found_by_its_place():
    good = {"model": {"w": torch.ones(2), "n": torch.tensor(3)}, "lr": 0.1, "rng": [torch.zeros(1)]}
    assert runs.not_finite(good) == ""
    bad = {"model": {"w": torch.ones(2)}, "optimizer": {"state": {0: {"momentum": torch.tensor([1.0, float("inf")])}}}}
    assert runs.not_finite(bad) == "optimizer.state.0.momentum"
    assert runs.not_finite([torch.tensor(float("nan"))]) == "0"


def test_a_buffer_that_the_module_assigns_anew_is_put_back():
    class Centered(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("center", torch.zeros(2))

        def forward(self, x):
            y = self.layer(x)
            self.center = 0.9 * self.center + 0.1 * y.detach().mean(0)
            return y - self.center

    net, guard = Centered(), None
    guard = runs.Guard([net])
    assert step(net, guard, 0, torch.rand(4, 3))
    before = net.center.clone()
    net.zero_grad()
    assert not step(net, guard, 1, torch.full((4, 3), float("nan"))) and torch.equal(net.center, before)
    assert step(net, guard, 2, torch.rand(4, 3)) and not torch.equal(net.center, before)
    assert "center" in dict(net.named_buffers())


def test_gradients_outside_the_modules_are_cleared_too():
    net, scale = network(), nn.Parameter(torch.ones(()))
    guard, done = runs.Guard([net]), []
    for number, value in enumerate((1.0, float("nan"), 1.0, 1.0)):
        guard.begin()
        loss = scale * value * net(torch.rand(8, 3)).square().mean()
        loss.backward()
        done.append(guard.fine(number, loss, [*net.parameters(), scale]))
        if done[-1]:
            net.zero_grad()
            scale.grad = None
    assert done == [True, False, True, True]


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1000.0), (torch.float32, 1e30)])
def test_large_finite_gradients_are_finite(dtype, value):
    p = nn.Parameter(torch.zeros(10_000, dtype=dtype))
    p.grad = torch.full_like(p, value)
    empty = nn.Parameter(torch.zeros(0))
    empty.grad = torch.zeros(0)
    assert runs.Guard([]).fine(0, torch.zeros(()), [p, empty])
    p.grad[3] = float("inf")
    assert not runs.Guard([]).fine(1, torch.zeros(()), [p])
