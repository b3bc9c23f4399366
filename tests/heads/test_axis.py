"""The dimension of the features, where the shape of one output does not show it: found by trial runs, kept in files."""

import pytest
import torch
from torch import nn

from ssd_addon import StyleHeads

SPACES = {"content": 4, "color": 2}


class Net(nn.Module):
    """A convolution to 8 channels, rearranged."""

    def __init__(self, turn=lambda y: y, ndim=3, width=8):
        super().__init__()
        self.conv = (nn.Conv1d if ndim == 2 else nn.Conv2d)(3, width, 1)
        self.turn = turn

    def forward(self, x):
        return self.turn(self.conv(x))


class OfOneSize(Net):
    """Its last layer has other channels than its output."""

    def __init__(self, turn):
        super().__init__(turn, width=32)

    def forward(self, x):
        assert x.shape[-1] == 64
        return super().forward(x)


def last(y):
    return y.movedim(1, -1)


def pooled(size, ndim=3):
    return lambda y: (nn.functional.adaptive_avg_pool1d if ndim == 2 else nn.functional.adaptive_avg_pool2d)(y, size)


CASES = {
    "series": (lambda: Net(ndim=2), (3, 8)),
    "series, channels last": (lambda: Net(last, ndim=2), (3, 8)),
    "map": (Net, (3, 6, 8)),
    "map, channels last": (lambda: Net(last), (3, 8, 6)),
    "tokens": (lambda: Net(lambda y: y.flatten(2).transpose(1, 2)), (3, 4, 2)),
}


@pytest.mark.parametrize("given", [None, 8])
@pytest.mark.parametrize("name", CASES)
def test_a_loaded_model_averages_over_the_same_dimension(name, given, tmp_path):
    """Both dimensions of the outputs have 8 entries."""
    make, size = CASES[name]
    x = torch.randn(5, *size)
    model = StyleHeads(make(), SPACES, hidden=(), sample_ndim=len(size), in_features=given).eval()
    want = model.backbone.conv(x).flatten(2).mean(2)
    torch.testing.assert_close(model.features(x), want)
    model.save(tmp_path / "m.pt")
    again = StyleHeads.load(tmp_path / "m.pt", make()).eval()
    torch.testing.assert_close(again.features(x), want)
    copied = StyleHeads(make(), **model.config()).eval()
    assert copied.config() == again.config() == model.config() and model.config()["axis"] in (1, -1)


def test_the_dimension_in_a_file_goes_where_it_cannot_be_found():
    class Untried(Net):
        def forward(self, x):
            assert x.shape[-1] == 6
            return super().forward(x)

    made, net = StyleHeads(Net(last), SPACES, hidden=()), Untried(last)
    model, x = StyleHeads(net, SPACES, in_features=8, hidden=()), torch.randn(2, 3, 8, 6)
    assert "axis" not in model.config()
    model.restore(made.config(), made.state_dict())
    assert model.config()["axis"] == -1
    torch.testing.assert_close(model.features(x), net.conv(x).mean((2, 3)))
    told = StyleHeads(net, SPACES, in_features=8, hidden=(), axis=-1)
    torch.testing.assert_close(told.features(x), net.conv(x).mean((2, 3)))


def test_files_without_the_dimension_are_read_and_other_dimensions_are_refused(tmp_path):
    model = StyleHeads(Net(last), SPACES, hidden=())
    old = {k: v for k, v in model.config().items() if k != "axis"}
    torch.save({"config": old, "state_dict": model.state_dict()}, tmp_path / "old.pt")
    assert StyleHeads.load(tmp_path / "old.pt", Net(last)).config()["axis"] == -1
    model.restore(old, model.state_dict())
    with pytest.raises(ValueError, match="another configuration of StyleHeads: axis: 1 in the checkpoint, -1 here"):
        model.restore(old | {"axis": 1}, model.state_dict())
    with pytest.raises(ValueError, match="axis: expected -1, the dimension in which Net returned 8 features.*got 1"):
        StyleHeads(Net(last), SPACES, in_features=8, axis=1)
    model.save(tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"not valid for StyleHeads \(axis: expected 1, the dimension .* got -1\)"):
        StyleHeads.load(tmp_path / "m.pt", Net())
    with pytest.raises(ValueError, match="axis: expected one of None, 1, -1: got 0"):
        StyleHeads(Net(), SPACES, in_features=8, axis=0)


def test_no_other_dimension_is_taken_where_the_known_one_is_not_as_wide():
    model = StyleHeads(Net(), SPACES, hidden=(), axis=1)
    model.backbone.conv = nn.Conv2d(3, 5, 1)
    with pytest.raises(ValueError, match=r"expected 8 features per image .* got \[2, 5\]"):
        model.features(torch.rand(2, 3, 4, 8))


POOLED = {
    "series to 1": (lambda: Net(pooled(1, 2), 2), 1),
    "series to 4": (lambda: Net(pooled(4, 2), 2), 1),
    "series to 4, channels last": (lambda: Net(lambda y: last(pooled(4, 2)(y)), 2), -1),
    "map to 1, channels last": (lambda: Net(lambda y: last(pooled(1)(y))), -1),
    "map to 4": (lambda: Net(pooled(4)), 1),
    "map to 4, channels last": (lambda: Net(lambda y: last(pooled(4)(y))), -1),
    "map to 4 x 2, channels last": (lambda: Net(lambda y: last(pooled((4, 2))(y))), -1),
    "two maps side by side": (lambda: Net(lambda y: pooled(2)(torch.cat([y, y], 1)), width=4), 1),
    "two maps side by side, channels last": (
        lambda: Net(lambda y: last(pooled(2)(torch.cat([y, y], 1))), width=4),
        -1,
    ),
    "one size": (lambda: OfOneSize(lambda y: pooled(4)(y[:, :8])), 1),
    "one size, channels last": (lambda: OfOneSize(lambda y: last(pooled(4)(y[:, :8]))), -1),
}


@pytest.mark.parametrize("name", POOLED)
def test_a_dimension_of_positions_is_not_taken_for_that_of_the_features(name):
    make, axis = POOLED[name]
    net = make()
    ndim = 2 if isinstance(net.conv, nn.Conv1d) else 3
    model = StyleHeads(net, SPACES, hidden=(), sample_ndim=ndim)
    assert (model.in_features, model.config()["axis"]) == (8, axis)
    x = torch.rand(5, 3, *[64] * (ndim - 1))
    want = net(x) if axis == 1 else net(x).movedim(-1, 1)
    torch.testing.assert_close(model.features(x), want.flatten(2).mean(2))


@pytest.mark.parametrize(
    "layer,turn,width",
    [
        (nn.LayerNorm(8), lambda y: y, 8),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), lambda y: y, 6),
        (nn.MultiheadAttention(8, 2, batch_first=True), lambda y: y[0], 8),
        (nn.BatchNorm1d(12), lambda y: y, 12),
    ],
    ids=["LayerNorm", "weight_norm", "attention", "channels first"],
)
def test_the_last_layer_with_weights_says_which_of_two_dimensions_is_the_width(layer, turn, width):
    class Tokens(nn.Module):
        """12 tokens of 8, whatever the size."""

        def __init__(self):
            super().__init__()
            self.conv, self.layer, self.scale = nn.Conv2d(3, 8, 1), layer, nn.Parameter(torch.ones(()))

        def forward(self, x):
            y = pooled((3, 4))(self.conv(x)).flatten(2).transpose(1, 2)
            attends = isinstance(self.layer, nn.MultiheadAttention)
            return turn(self.layer(y, y, y) if attends else self.layer(y)) * self.scale

    assert StyleHeads(Tokens(), SPACES, hidden=()).in_features == width


@pytest.mark.parametrize(
    "turn,shape",
    [
        (lambda y: y.mean((2, 3)).view(-1, 2, 4), "2, 4"),
        (lambda y: y.mean(1, keepdim=True), "1, 64, 64"),
        (lambda y: y.movedim(1, -1)[..., :1], "64, 64, 1"),
        (pooled((8, 2)), "8, 8, 2"),  # the last layer has 8 channels, and 8 x 8 look like positions
    ],
)
def test_a_width_that_nothing_decides_is_asked_for(turn, shape):
    with pytest.raises(ValueError, match=rf"got an output of shape \[2, {shape}\]; give in_features"):
        StyleHeads(Net(turn), SPACES)


def test_a_given_width_decides_between_two_dimensions():
    for width, axis in ((2, 1), (4, -1)):
        model = StyleHeads(Net(lambda y: y.mean((2, 3)).view(-1, 2, 4)), SPACES, in_features=width, hidden=())
        assert model.config()["axis"] == axis
    assert "axis" not in StyleHeads(Net(pooled(8)), SPACES, hidden=()).config()  # maps [N, 8, 8, 8]


def test_a_backbone_that_returns_a_tensor_in_training_mode_alone():
    class Trained(Net):
        def forward(self, x):
            y = super().forward(x)
            return y if self.training else (y, y)

    net = Trained()
    model = StyleHeads(net, SPACES, in_features=8, hidden=())
    assert model.features(torch.rand(2, 3, 4, 4)).shape == (2, 8)
    with pytest.raises(TypeError, match="expected one tensor of features: got tuple"):
        StyleHeads(net, SPACES, hidden=())


class LikeTimm(Net):
    num_features = 8

    def __init__(self, turn=lambda y: y):
        super().__init__(turn)
        self.pretrained_cfg = {"input_size": (3, 64, 64)}

    def forward_features(self, x):
        return self.turn(self.conv(x))

    def forward_head(self, x, pre_logits=False):
        return x.mean((1, 2))


def test_maps_that_timm_does_not_pool():
    model, x = StyleHeads(LikeTimm(last), SPACES, hidden=(), pool="mean"), torch.randn(2, 3, 8, 6)
    torch.testing.assert_close(model.features(x), model.backbone.model.conv(x).mean((2, 3)))


def test_the_width_of_timms_flattened_features_is_read_or_asked_for():
    """As maps of 4 x 4, whatever the size of the images, and at the size of the images."""
    assert StyleHeads(LikeTimm(pooled(4)), SPACES, hidden=(), pool="flatten").in_features == 128
    with pytest.raises(ValueError, match="expected in_features for pool='flatten', as the number of features depends"):
        StyleHeads(LikeTimm(), SPACES, hidden=(), pool="flatten")


class Classified(Net):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(super().forward(x).mean((2, 3)))


@pytest.mark.parametrize("wrapped", ["", "module.backbone.", "backbone._orig_mod."])
@pytest.mark.parametrize("given", [None, 8])
def test_a_classifier_as_wide_as_the_features_is_on_or_off_as_it_was_when_it_was_saved(given, wrapped, tmp_path):
    model = StyleHeads(Classified(), SPACES, hidden=(), in_features=given).eval()
    assert hasattr(model.backbone.fc, "weight") == bool(given)
    state = {k.replace("backbone.", wrapped or "backbone."): t for k, t in model.state_dict().items()}
    torch.save({"config": model.config(), "state_dict": state}, tmp_path / "m.pt")
    again, x = StyleHeads.load(tmp_path / "m.pt", Classified()).eval(), torch.rand(2, 3, 8, 8)
    assert torch.equal(again(x)["content"], model(x)["content"])
    assert again.changes == (() if given else ("'fc' removed, as the file has no weights of it",))


def test_a_part_that_the_file_lacks_and_that_does_not_come_last_is_missed(tmp_path):
    class Middle(Classified):
        def forward(self, x):
            return super().forward(x).relu()

    StyleHeads(Classified(), SPACES, hidden=()).save(tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"(?s)another backbone than Middle.*backbone\.fc\.weight"):
        StyleHeads.load(tmp_path / "m.pt", Middle())
