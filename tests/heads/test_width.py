"""The width of features, read by a trial run where the backbone does not say it, and picked out of what it returns."""

from collections import OrderedDict, namedtuple

import pytest
import torch
import torchvision
from torch import nn

from ssd_addon import StyleHeads

SPACES = {"content": 4, "color": 3}


def without_last(name):
    return nn.Sequential(*list(getattr(torchvision.models, name)().children())[:-1])


def with_identity(name, classifier="fc", **options):
    net = getattr(torchvision.models, name)(**options)
    setattr(net, classifier, nn.Identity())
    return net


class Turned(nn.Module):
    """A convolution whose output is rearranged."""

    def __init__(self, turn, width=6):
        super().__init__()
        self.conv, self.turn = nn.Conv2d(3, width, 3, padding=1), turn

    def forward(self, x):
        return self.turn(self.conv(x))


CASES = {
    "lightly's Sequential of children": (lambda: without_last("resnet18"), 512, {}),
    "the same of a wider one": (lambda: without_last("resnet50"), 2048, {}),
    "fc = Identity": (lambda: with_identity("resnet18"), 512, {}),
    "classifier = Identity": (lambda: with_identity("mobilenet_v3_small", "classifier"), 576, {}),
    "heads = Identity, at one size alone": (lambda: with_identity("vit_b_16", "heads"), 768, {}),
    "a map": (lambda: Turned(lambda y: y), 6, {}),
    "a map, channels last": (lambda: Turned(lambda y: y.permute(0, 2, 3, 1)), 6, {}),
    "a map of 1 x 1": (lambda: Turned(lambda y: y.mean((2, 3), keepdim=True)), 6, {}),
    "tokens": (lambda: Turned(lambda y: y.flatten(2).transpose(1, 2)), 6, {}),
    "tokens with a class token": (lambda: Turned(lambda y: y.flatten(2).transpose(1, 2)), 6, {"pool": "cls"}),
    "flattened, whatever the size": (lambda: Turned(lambda y: y[..., :2, :2]), 24, {"pool": "flatten"}),
    "a series": (lambda: nn.Conv1d(2, 5, 3), 5, {"sample_ndim": 2}),
    "vectors": (lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5)), 5, {"sample_ndim": 1}),
    "video": (lambda: nn.Sequential(nn.Conv3d(3, 5, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()), 5, {"sample_ndim": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_width_is_read_by_a_trial_run(name):
    make, width, options = CASES[name]
    net = make()
    model = StyleHeads(net, SPACES, hidden=(), **options).eval()
    assert model.in_features == width and not model.changes
    size = {1: (7,), 2: (2, 40), 3: (3, 224, 224) if "one size" in name else (3, 64, 64), 4: (3, 8, 16, 16)}
    x = torch.rand(2, *size[model.sample_ndim])
    features = model.features(x)
    assert features.shape == (2, width)
    if features.shape == net(x).flatten(1).shape:
        assert torch.equal(features, net(x).flatten(1))


def test_a_trial_run_needs_no_memory_and_leaves_the_module_as_it_is():
    with torch.device("meta"):
        net = without_last("resnet50")
        assert StyleHeads(net, SPACES).in_features == 2048
    norm = nn.BatchNorm2d(3)
    StyleHeads(nn.Sequential(norm), SPACES)
    assert norm.training and norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    "turn,options,message",
    [
        (
            lambda y: y,
            {"pool": "flatten"},
            "expected in_features for pool='flatten', as the number of feat",
        ),
        (lambda y: y.flatten(2)[..., : y.shape[2]], {"pool": "cls"}, "in_features, the width of its output"),
        (lambda y: y.sum(), {}, "in_features, the width of its output"),
    ],
)
def test_a_width_that_does_not_show_is_not_guessed(turn, options, message):
    with pytest.raises(ValueError, match=message):
        StyleHeads(Turned(turn), SPACES, **options)


# ---- output


Pair = namedtuple("Pair", "features, mask")


class Output(OrderedDict):
    """As Hugging Face's ModelOutput: a mapping whose keys are attributes."""


def tokens(y):
    return y.flatten(2).transpose(1, 2)


RETURNS = {
    "dictionary": (lambda y: {"pooled": y.mean((2, 3)), "tokens": tokens(y)}, "tokens", "pooled"),
    "ModelOutput": (lambda y: Output(last_hidden_state=tokens(y), pooler_output=None), "last_hidden_state", None),
    "tuple": (lambda y: (tokens(y), y.mean((2, 3))), 0, 1),
    "named tuple": (lambda y: Pair(tokens(y), None), "features", None),
}


@pytest.mark.parametrize("name", RETURNS)
def test_output_picks_a_part(name, tmp_path):
    turn, key, other = RETURNS[name]
    net = Turned(turn).eval()
    model = StyleHeads(net, SPACES, hidden=(8,), output=key).eval()
    x = torch.rand(2, 3, 8, 8)
    assert model.in_features == 6
    torch.testing.assert_close(model.features(x), net.conv(x).mean((2, 3)))
    if other is not None:
        pooled = StyleHeads(net, SPACES, output=other).eval().features(x)
        torch.testing.assert_close(pooled, net.conv(x).mean((2, 3)))
    model.save(tmp_path / "m.pt")
    again = StyleHeads.load(tmp_path / "m.pt", Turned(turn)).eval()
    assert again.output == key and torch.equal(again(x)["color"], model(x)["color"])
    with pytest.raises(TypeError, match=r"expected one tensor of features: got .* choose one with output="):
        StyleHeads(net, SPACES)
    with pytest.raises(TypeError, match=r"output: expected a part of what Turned returns: got 'hidden', but it ret"):
        StyleHeads(net, SPACES, output="hidden")


def test_a_part_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"output: expected a tensor of features in 'mask' of Turned: got NoneType"):
        StyleHeads(Turned(RETURNS["named tuple"][0]), SPACES, output="mask")
    with pytest.raises(TypeError, match=r"output: expected a part of .* got 0, but it returned Tensor"):
        StyleHeads(Turned(lambda y: y), SPACES, output=0)
    with pytest.raises(TypeError, match=r"output: expected a key or an index .* got True"):
        StyleHeads(Turned(lambda y: (y, y)), SPACES, output=True)
    with pytest.raises(TypeError, match=r"with keys logits from Turned; wrap it in a module that returns the feat"):
        StyleHeads(Turned(lambda y: {"logits": y.mean((2, 3))}), SPACES)  # a classifier's output is no suggestion


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("size", [15, 16, 17])
def test_the_dimension_of_the_features_does_not_depend_on_the_length(first, size):
    """At a length of 16 both dimensions of [N, 16, 16] are as long as the features are many."""

    class Series(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 16, 1)

        def forward(self, x):
            return self.conv(x) if first else self.conv(x).transpose(1, 2)

    net = Series()
    model, x = StyleHeads(net, {"content": 4}, sample_ndim=2), torch.randn(3, 2, size)
    torch.testing.assert_close(model.features(x), net.conv(x).mean(2))


@pytest.mark.parametrize("first", [True, False])
def test_the_dimension_of_the_features_of_maps_does_not_depend_on_their_height(first):
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.conv(x) if first else self.conv(x).permute(0, 2, 3, 1)

    net = Maps()
    model, x = StyleHeads(net, {"content": 4}), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.features(x), net.conv(x).mean((2, 3)))
