"""Measuring changes nothing, whatever a network hides in: modes, buffers, images, generators and draws stay."""

import contextlib
import functools
import random
import threading
import types
import warnings
import weakref

import kornia.augmentation as K
import numpy as np
import pages
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ssd_addon import Monitor, StructuredViews, report
from ssd_addon.metrics import embed, parameter_matrix
from ssd_addon.metrics.evaluation import evaluation, reachable


def network():
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(*parts, nn.BatchNorm1d(4, momentum=None))
    net[5].eval()  # part by part
    return net


GLOBAL = network()
REGISTRY = {"models": [("first", {"net": network()})]}


class Holder:
    """Attributes, also behind a property."""

    def __init__(self, net):
        self._net = net

    @property
    def net(self):
        return self._net

    def __call__(self, x):
        return self.net(x)

    def method(self, x):
        return self.net(x)


class Slots:
    __slots__ = ("empty", "net")

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)


class OfTheClass:
    net = network()

    def __call__(self, x):
        return self.helper(x)

    def helper(self, x):
        return type(self).net(x)


class InAList(nn.Module):
    """A network that the module does not know of."""

    def __init__(self, net):
        super().__init__()
        self.hidden = [net]

    def forward(self, x):
        return self.hidden[0](x)


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


def cell(net):
    def inner(x):
        def innermost():
            return net(x)

        return innermost()

    return inner


def module_of_the_users():
    settings = types.ModuleType("settings_of_a_user")
    settings.net = network()
    return eval("lambda x: settings.net(x)", {"settings": settings}), settings.net


def hidden():
    net = network()
    return eval("lambda x: globals()['HID' + 'DEN'](x)", {"HIDDEN": net}), net


def of(make):
    """A callable around a new network, and that network."""
    net = network()
    return make(net), net


CALLABLES = {
    "module": lambda: of(lambda net: net),
    "lambda": lambda: of(lambda net: lambda x: net(x)),
    "nested functions": lambda: of(cell),
    "default": lambda: of(lambda net: lambda x, net=net: net(x)),
    "keyword default": lambda: of(lambda net: lambda x, *, net=net: net(x)),
    "global": lambda: ((lambda x: GLOBAL(x)), GLOBAL),
    "global containers": lambda: (
        (lambda x: REGISTRY["models"][0][1]["net"](x)),
        REGISTRY["models"][0][1]["net"],
    ),
    "module of the user's": module_of_the_users,
    "bound method": lambda: of(lambda net: net.forward),
    "object's method": lambda: of(lambda net: Holder(net).method),
    "partial": lambda: of(lambda net: functools.partial(lambda f, x: f(x), net)),
    "partial by keyword": lambda: of(lambda net: functools.partial(lambda x, f: f(x), f=net)),
    "object": lambda: of(Holder),
    "slots": lambda: of(Slots),
    "class": lambda: (OfTheClass(), OfTheClass.net),
    "list in a module": lambda: of(InAList),
    "containers": lambda: of(lambda net: lambda x, d=({"a": [(net,)]},): d[0]["a"][0][0](x)),
    "decorated": lambda: of(lambda net: decorated(lambda x: net(x))),
    "no_grad": lambda: of(lambda net: torch.no_grad()(lambda x: net(x))),
    "weak reference": lambda: of(lambda net: functools.partial(lambda ref, x: ref()(x), weakref.ref(net))),
    "weak proxy": lambda: of(lambda net: cell(weakref.proxy(net))),
    "cache": lambda: of(lambda net: functools.lru_cache(lambda x: net(x))),
    "compiled": lambda: of(lambda net: torch.compile(net, backend="eager")),
    "compiled in a function": lambda: of(lambda net: cell(torch.compile(net, backend="eager"))),
    "compiled function": lambda: of(lambda net: torch.compile(lambda x: net(x), backend="eager")),
    "parts": lambda: of(lambda net: lambda x: net[5](net[4](net[3](net[2](net[1](net[0](x))))))),
    "found only when it is called": hidden,
    "set to training by the function": lambda: of(lambda net: lambda x: net.train()(x)),
    "functional": lambda: of(lambda net: functional(net)),
}


def functional(net):
    def run(x):
        y = nn.functional.batch_norm(net[0](x), net[1].running_mean, net[1].running_var, training=True)
        return nn.functional.dropout(y, 0.5).mean((2, 3))

    return run


X = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def state(net):
    flags = [p.requires_grad for p in net.parameters()]
    return [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}, flags


def generators():
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]


def same(a, b):
    return a[0] == b[0] and a[2] == b[2] and all(torch.equal(v, b[1][k]) for k, v in a[1].items())


@pytest.mark.parametrize("convert", ["script", "frozen", "trace", "export", "fx", "DataParallel", "AveragedModel"])
def test_networks_in_every_form_are_measured(convert):
    net = network().eval()
    with torch.no_grad():
        expected = net(X)
    forms = {
        "script": lambda: torch.jit.script(net.train()),
        "frozen": lambda: torch.jit.freeze(torch.jit.script(net)),
        "trace": lambda: torch.jit.trace(net, X),
        "export": lambda: torch.export.export(net, (X,)).module(),
        "fx": lambda: torch.fx.symbolic_trace(net.train()),
        "DataParallel": lambda: nn.DataParallel(net.train()),
        "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(net.train()),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's on the scripts' future
        model = forms[convert]()
    mode, before = getattr(model, "training", None), {k: v.clone() for k, v in model.state_dict().items()}
    for each in (model, lambda x: model(x)):
        torch.testing.assert_close(embed(each, X, batch_size=24)["backbone"], expected)
    assert getattr(model, "training", None) == mode
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", CALLABLES)
def test_a_network_is_in_evaluation_and_put_back_whatever_it_hides_in(kind):
    model, net = CALLABLES[kind]()
    net[0].weight.requires_grad_(False)
    before, drawn = state(net), generators()
    assert any(before[0]) and not all(before[0])
    z = embed(model, X, batch_size=5)["backbone"]
    if kind != "functional":
        again = embed(model, X, batch_size=24)["backbone"]
        torch.testing.assert_close(z, again)  # else statistics of the batch, or Dropout
        with torch.no_grad(), evaluation(net):
            torch.testing.assert_close(z, net(X))
    assert same(state(net), before) and generators() == drawn


def test_what_is_found_before_it_is_called():
    for kind, make in CALLABLES.items():
        model, net = make()
        found = [m for each in reachable(model) for m in each.modules()]
        assert (net[1] in found) == (kind != "found only when it is called"), kind


def test_the_search_ends_in_circles_and_stays_out_of_libraries():
    net = network()
    circle = [net]
    circle.append({"self": circle})

    class Node:
        def __call__(self, x):
            return torch.nn.functional.normalize(circle[0](x))

    node = Node()
    node.me = node
    found = reachable(node)
    assert net in found and all(m in list(net.modules()) for m in found)
    assert reachable(torch.nn.functional.normalize) == reachable(3) == []


def test_a_proxy_of_what_is_no_more_is_passed_over():
    net, dead = network(), weakref.proxy(network())
    assert net in reachable(lambda x, dead=dead: (dead, net))


@pytest.mark.parametrize("where", ["function", "inside", "images"])
def test_all_is_put_back_after_an_error(where):
    net = network()
    before, drawn, hooks = state(net), generators(), dict(nn.modules.module._global_forward_pre_hooks)

    def model(x):
        net.train()
        y = net(x)
        torch.rand(3)
        if where == "function":
            raise RuntimeError("out of memory")
        return y

    if where == "inside":
        net[3].register_forward_hook(lambda *_: 1 / 0)
    given = (x for x in [X, None]) if where == "images" else X
    with pytest.raises((RuntimeError, ZeroDivisionError, TypeError)):
        embed(model, given)
    assert same(state(net), before) and generators() == drawn
    assert dict(nn.modules.module._global_forward_pre_hooks) == hooks


def test_modes_are_set_by_their_flags_alone():
    """A module's own train() may merge its weights, or refuse."""

    class Merges(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("train() was called")

    net = nn.Sequential(nn.Flatten(), Merges(192, 4))
    embed(net, X)
    assert net.training and net[1].training


def test_buffers_that_a_model_changes_or_replaces_are_put_back():
    class Queue(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("queue", torch.full((4,), float("nan")))
            self.register_buffer("seen", torch.zeros(1), persistent=False)

        def forward(self, x):
            self.queue[:] = x.flatten(1)[0, :4]
            self.seen = self.seen + len(x)
            return x.flatten(1)

    net = Queue().eval()
    held = net.queue, net.seen
    embed(net, X, batch_size=6)
    assert net.queue is held[0] and net.seen is held[1] and net.queue.isnan().all() and net.seen == 0


def test_other_threads_train_on():
    """The hook is one for all threads; only the thread that measures is changed by it."""
    net, started, done, modes = network(), threading.Event(), threading.Event(), []

    def train():
        started.wait()
        net(X)
        modes.append(net[1].training)
        done.set()

    def model(x):
        started.set()
        done.wait()
        return x.flatten(1)

    thread = threading.Thread(target=train)
    thread.start()
    embed(model, X)
    thread.join()
    assert modes == [True] and net[1].num_batches_tracked == 1


def test_images_are_not_changed_by_a_model_that_works_in_place():
    x = X.clone()
    z = embed(lambda x: x.sub_(0.5).flatten(1), x, batch_size=7)["backbone"]
    assert torch.equal(x, X) and torch.equal(z, (X - 0.5).flatten(1))
    parameter_matrix(lambda x: x.mul_(0.5).flatten(1)[:, :4], pages.views(), x, draws=1, bootstrap=0)
    assert torch.equal(x, X)


def test_a_loader_that_shuffles_draws_from_a_generator_that_is_put_back():
    loader = DataLoader(TensorDataset(X), batch_size=6, shuffle=True)
    drawn = generators()
    embed(lambda x: x.flatten(1), loader)
    parameter_matrix(lambda x: x.flatten(1)[:, :4], pages.views(), loader, draws=1, bootstrap=0)
    assert generators() == drawn


@pytest.mark.parametrize(
    "kind", ["lambda", "object", "found only when it is called", "set to training by the function"]
)
def test_matrix_monitor_and_report_change_nothing(tmp_path, kind):
    model, net = CALLABLES[kind]()
    views, fresh = (StructuredViews({"color": [K.ColorJitter(brightness=0.4, p=1.0)]}, seed=0) for _ in range(2))
    views(X)
    before, drawn, call, modes = state(net), generators(), views.call, [m.training for m in views.modules()]

    def unchanged():
        return same(state(net), before) and generators() == drawn and views.call == call

    parameter_matrix(model, views, X, draws=1, bootstrap=0)
    assert unchanged()
    Monitor(None, views=views, images=X, factors={"x": torch.rand(24, generator=torch.Generator())}).epoch(model, 0, 0)
    assert unchanged()
    report.write(tmp_path / "r.html", model, X, views=views)
    assert unchanged() and [m.training for m in views.modules()] == modes
    fresh(X)
    assert torch.equal(fresh(X).views, views(X).views), "the draws of the training have moved"


def test_distributed_and_compiled_models_are_measured_as_what_is_inside():
    """World of one: a forward of the wrapper would wait for the other ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = network()
        expected, before = embed(net, X)["backbone"], state(net)
        wrapped = nn.parallel.DistributedDataParallel(net)
        for model in (wrapped, torch.compile(wrapped, backend="eager"), lambda x: wrapped.module(x)):
            torch.testing.assert_close(embed(model, X)["backbone"], expected)
            assert same(state(net), before)
    finally:
        dist.destroy_process_group()


class Counting:
    """A backend of torch.compile that counts what it compiles."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


def fails(x):
    raise RuntimeError("no")


@pytest.mark.parametrize("order", ["after", "before", "after an error"])
def test_networks_beside_a_compiled_one_are_protected(order):
    """The second is made inside a cache, where no search finds it."""
    teacher = functools.lru_cache(network)
    net, backend = network(), Counting()
    student = torch.compile(net, backend=backend)
    with evaluation(student), torch.no_grad():
        student(X)
    graphs, before = backend.graphs, (state(net), state(teacher()))
    broken = torch.compile(Lambda(fails), backend=backend)

    def model(x):
        if order == "after an error":
            with contextlib.suppress(Exception):
                broken(x)
        return teacher()(x) + student(x) if order == "before" else student(x) + teacher()(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = embed(model, X)["backbone"]
    torch.testing.assert_close(got, 2 * embed(network(), X)["backbone"])
    assert same(state(net), before[0]) and same(state(teacher()), before[1])
    assert teacher().training and not student._forward_hooks and not nn.modules.module._global_forward_pre_hooks
    assert backend.graphs == graphs, "measuring has compiled anew"


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("compiled", ["function", "in place"])
def test_other_compiled_code_is_measured(compiled):
    net = network()
    expected, before = embed(network(), X)["backbone"], state(net)
    if compiled == "function":
        model = torch.compile(lambda x: net(x), backend="eager")
    else:
        net.compile(backend="eager")
        model = net
    torch.testing.assert_close(embed(model, X)["backbone"], expected)
    assert same(state(net), before) and net.training
