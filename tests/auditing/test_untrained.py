"""Untrained copies are initialized as their author does it, where that is possible, and any network can be copied."""

import itertools
import random
import threading

import numpy as np
import pages
import pytest
import timm
import torch
from torch import nn

from ssd_addon import audit, auditing
from ssd_addon.auditing import measure
from ssd_addon.auditing.named import named
from ssd_addon.auditing.untrained import COPIES, untrained, untrained_copies

IMAGES = torch.rand(8, 3, 8, 8)


class Own(nn.Module):
    """Draws its weights in a way of its own, by all three generators."""

    def __init__(self, width=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.scale, self.fc = nn.Parameter(torch.full((width, 1, 1), 1e-6)), nn.Linear(width, 2)
        self.ones = nn.Parameter(torch.ones(1000))
        nn.init.uniform_(self.conv.weight, 5.0, 6.0)
        nn.init.constant_(self.conv.bias, random.uniform(2, 3) + np.random.uniform(2, 3))  # noqa: NPY002

    def forward(self, x):
        return self.fc((self.scale * self.norm(self.conv(x))).mean((2, 3)))


def test_copies_are_drawn_by_what_builds_the_network():
    net = Own()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    copies = untrained_copies(net, IMAGES, 3, Own)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert len(copies) == COPIES and all(not t.training for t in copies)
    for a, b in itertools.pairwise(copies):
        assert not torch.equal(a.conv.weight, b.conv.weight) and a.conv.bias[0] != b.conv.bias[0]
    random.random(), np.random.rand()  # noqa: NPY002
    for twin, again in zip(copies, untrained_copies(net, IMAGES, 3, Own), strict=True):
        assert twin.conv.weight.min() >= 5 and twin.conv.bias.min() >= 4 and (twin.scale == 1e-6).all()
        assert twin.norm.running_mean.abs().min() > 0  # of the images
        assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), again.parameters(), strict=True))
    assert not torch.equal(untrained_copies(net, IMAGES, 4, Own)[0].conv.weight, copies[0].conv.weight)


def loads():
    """As a user's function that loads trained weights, and draws a classifier."""
    net = Own()
    nn.init.constant_(net.conv.weight, 5.5)
    net.conv.weight.data += torch.linspace(0, 1, 108).view(4, 3, 3, 3)
    return net


def fails():
    raise RuntimeError("only once")


@pytest.mark.parametrize("fresh", [None, loads, fails, lambda: Own(5), lambda: nn.Linear(3, 2)])
def test_what_does_not_draw_this_network_anew_is_left_aside(fresh):
    torch.manual_seed(0)
    net = Own()
    for twin, other in zip(untrained_copies(net, IMAGES, 0, fresh), untrained_copies(net, IMAGES, 0), strict=True):
        assert twin.conv.weight.abs().max() < 1  # torch's own initialization
        assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), other.parameters(), strict=True))


def prepared(net, fresh=None):
    model, _, _ = measure.prepared_for(
        net, torch.rand(12, 3, 32, 32), measure.views_of({}, 8), (), None, "auto", None, 64, 0, fresh
    )
    return model


def test_timms_models_are_drawn_as_timm_draws_them():
    net = timm.create_model("convnext_atto")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.rand_like(p))
    for twin in prepared(net).untrained:
        first = twin.model.stages[0].blocks[0]
        assert (first.gamma == 1e-6).all() and 0.01 < twin.model.stem[0].weight.std() < 0.025  # trunc_normal_(std=0.02)
    narrow = timm.create_model("resnet10t", in_chans=1)  # timm builds another by this name
    assert prepared(narrow).untrained[0].model.conv1[0].weight.shape[1] == 1
    own = prepared(Own(), Own).untrained[0]
    assert own.conv.weight.min() >= 5
    seen = []
    options = {"draws": 1, "bootstrap": 0, "layers": ()}
    audit(Own(), pages.squares(20).images, pages.views(), fresh=lambda: seen.append(1) or Own(), **options)
    assert len(seen) == COPIES


def test_backbones_by_name_come_with_what_builds_them(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Conv2d(3, 4, 3)\n\nready = nn.Conv2d(3, 4, 3)\n"
    )
    for spec in ("torchvision:resnet18", "timm:resnet10t", f"{tmp_path}/net.py:make"):
        (found,) = named([spec]).values()
        again = found.fresh()
        assert type(again) is type(found.net)
        assert [t.shape for t in again.parameters()] == [t.shape for t in found.net.parameters()]
        assert not torch.equal(next(again.parameters()), next(found.net.parameters()))
    (found,) = named([f"{tmp_path}/net.py:ready"]).values()
    assert found.fresh is None and not found.untrained


def test_the_page_draws_copies_by_what_builds_the_network_and_says_that_no_weights_were_given(tmp_path):
    data, seen = pages.squares(20), []

    def fresh():
        seen.append(1)
        return Own()

    options = {"layers": (), "draws": 1, "fresh": {"mine": fresh}}
    (found,) = auditing.write(tmp_path / "a.html", {"mine": Own()}, data.images, pages.views(), **options)
    assert len(seen) == COPIES and not found.untrained
    assert "untrained." not in auditing.sentences(found)[0] and "No weights were given" not in str(found.notes)
    (found,) = auditing.write(
        tmp_path / "a.html", {"mine": Own()}, data.images, pages.views(), untrained=["mine"], **options
    )
    assert auditing.sentences(found)[0] == "No weights were given: this network is untrained."
    assert "no weights were given: this network is untrained" in found.notes
    assert "<li>No weights were given: this network is untrained.</li>" in (tmp_path / "a.html").read_text()


# ---- networks that are hard to copy


class Locked(nn.Module):
    num_features = 4

    def __init__(self):
        super().__init__()
        self.conv, self.lock, self.held = nn.Conv2d(3, 4, 3), threading.Lock(), [threading.Lock()]
        self.kept = [1]

    def reset_parameters(self, gain):
        raise AssertionError("called without its argument")

    def forward(self, x):
        with self.lock:
            return self.conv(x).mean((2, 3))


def test_what_cannot_be_copied_is_shared_and_resets_that_need_arguments_are_skipped():
    net = Locked()
    twin = untrained(net, IMAGES, 0)
    assert twin.lock is net.lock and twin.held is net.held and twin.kept is not net.kept
    assert twin.conv.weight is not net.conv.weight and not torch.equal(twin.conv.weight, net.conv.weight)
    table = audit(net, pages.squares(20).images, pages.views(), draws=1, bootstrap=0)
    assert table.spaces == ("pixels", "backbone", "untrained") or "conv" in table.spaces


def test_a_network_that_cannot_be_copied_at_all_is_refused_in_words():
    class Never(Own):
        def __deepcopy__(self, memo):
            raise TypeError("not this one")

    with pytest.raises(
        ValueError, match=r"backbone: expected a network that copy\.deepcopy copies.*TypeError: not this"
    ):
        untrained(Never(), IMAGES, 0)
