"""StyleHeads: one batched product equals the loop over heads; any backbone; bad input."""

import pytest
import torch
from torch import nn

from ssd_addon import StyleHeads, ViewBatch, ViewPlan

SPACES = {"content": 7, "color": 3, "spatial": 5}


def model(hidden=(12, 10), **kw):
    torch.manual_seed(0)
    return StyleHeads(nn.Linear(6, 9), SPACES, in_features=9, hidden=hidden, sample_ndim=1, **kw)


@pytest.mark.parametrize("hidden", [(), (12,), (12, 10), {"content": (12, 10), "color": (), "spatial": (12, 10)}])
@pytest.mark.parametrize("training", [True, False])
def test_batched_heads_equal_the_loop(hidden, training):
    m = model(hidden).double()
    x = torch.randn(4, 8, 6, dtype=torch.float64)
    m.train()
    m(x)  # running statistics that are not the initial ones
    m.train(training)
    loops = {n: m.head(n) for n in SPACES}
    z = m(x)
    features = m.features(x).flatten(0, 1)
    for name, head in loops.items():
        torch.testing.assert_close(head(features).view(4, 8, -1), z[name], rtol=1e-10, atol=1e-10)
        assert z[name].shape == (4, 8, SPACES[name])


def test_view_by_view_has_statistics_per_view():
    m = model()
    x = torch.randn(4, 8, 6) + torch.arange(4).view(4, 1, 1)
    together, apart = m(x)["content"], m(x, view_by_view=True)["content"]
    assert not torch.allclose(together, apart)
    m.eval()
    torch.testing.assert_close(m(x)["content"], m(x, view_by_view=True)["content"])


def test_plain_batch_views_and_view_batch():
    m = model().eval()
    x = torch.randn(4, 8, 6)
    plan = ViewPlan.shared_query(("content", "spatial", "color"))
    z = m(ViewBatch(x, plan, image_ids=torch.arange(8).expand(4, 8)))
    assert z.plan is plan and tuple(z) == tuple(SPACES) and z.image_ids.shape == (4, 8)
    assert m(x[0])["color"].shape == (8, 3)
    assert m.features(x).shape == (4, 8, 9) and m.features(x[0]).shape == (8, 9)
    with pytest.raises(ValueError, match="heads: expected the spaces content, hue of the view plan"):
        m(ViewBatch(torch.randn(3, 8, 6), ViewPlan.shared_query(("content", "hue"))))


class Maps(nn.Module):
    def __init__(self, out, fc=True):
        super().__init__()
        self.out = out
        self.w = nn.Parameter(torch.ones(1))
        if fc:
            self.fc = nn.Linear(5, 10)

    def forward(self, x):
        y = self.out(x) * self.w
        return self.fc(y) if y.ndim == 2 and hasattr(self, "fc") else y


@pytest.mark.parametrize(
    "out", [lambda x: x.new_ones(len(x), 5), lambda x: x.new_ones(len(x), 5, 2, 3), lambda x: x.new_ones(len(x), 4, 5)]
)
def test_features_maps_and_tokens_and_the_backbone_is_not_altered(out):
    backbone = Maps(out)
    m = StyleHeads(backbone, {"content": 4}, hidden=())
    assert m.in_features == 5 and m(torch.rand(2, 3, 8, 8))["content"].shape == (2, 4)
    assert isinstance(backbone.fc, nn.Linear)
    assert any(p is backbone.w for p in m.parameters())  # shared, trained
    assert not any(p is backbone.fc.weight for p in m.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_and_timm(name):
    import timm
    import torchvision

    m = StyleHeads(getattr(torchvision.models, name)(), {"content": 4}, hidden=(8,))
    assert m(torch.rand(2, 3, 32, 32))["content"].shape == (2, 4)
    m = StyleHeads(timm.create_model("resnet10t"), {"content": 4}, hidden=(8,))
    assert m.in_features == 512 and m(torch.rand(2, 3, 32, 32))["content"].shape == (2, 4)


def test_save_and_load(tmp_path):
    m = model()
    m.save(tmp_path / "m.pt")
    again = StyleHeads.load(tmp_path / "m.pt", nn.Linear(6, 9))
    m.eval(), again.eval()
    x = torch.randn(2, 6)
    assert torch.equal(m(x)["spatial"], again(x)["spatial"])
    with pytest.raises(ValueError, match="another backbone"):
        StyleHeads.load(tmp_path / "m.pt", nn.Linear(7, 9))
    with pytest.raises(ValueError, match="another configuration.*hidden"):
        model((12,)).restore(m.config(), m.state_dict())
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"expected a file of StyleHeads\.save"):
        StyleHeads.load(tmp_path / "other.pt", nn.Linear(6, 9))
    torch.save({f"layer{k}.weight": torch.zeros(1) for k in range(150)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"layer4\.weight and 145 more\); .* model\.save\(path, card=\{'backbone'"):
        StyleHeads.load(tmp_path / "weights.pt", nn.Linear(6, 9))
    for content in (b"hello", b"", (tmp_path / "m.pt").read_bytes()[:300]):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.pt: expected a file of StyleHeads\.save: could not be read"):
            StyleHeads.load(tmp_path / "broken.pt", nn.Linear(6, 9))


class Wrong(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


class Refuses(nn.Module):
    def forward(self, x):
        raise ValueError("images of 37 pixels alone")


@pytest.mark.parametrize(
    "backbone,kwargs,error,message",
    [
        (Refuses(), {}, ValueError, "give in_features"),
        (Wrong((1, 2)), {"in_features": 9}, TypeError, "got tuple"),
        (Wrong({"features": 1}), {"in_features": 9}, TypeError, "got dict with keys features"),
        (nn.Linear(6, 9), {"in_features": 8}, ValueError, r"expected 8 features.*got \[2, 9\]"),
        (nn.Linear(6, 9), {"in_features": 0}, ValueError, "in_features: expected .* got 0"),
        (nn.Linear(6, 9), {"in_features": 9, "pool": "max"}, ValueError, "pool"),
        (nn.Linear(6, 9), {"in_features": 9, "hidden": (0,)}, ValueError, "hidden width"),
    ],
)
def test_bad_backbones(backbone, kwargs, error, message):
    with pytest.raises(error, match=message):
        StyleHeads(backbone, {"content": 4}, sample_ndim=1, **({"hidden": ()} | kwargs))(torch.rand(2, 6))


@pytest.mark.parametrize(
    "spaces,message",
    [
        ({"content": 0}, "width of space 'content'.*got 0"),
        ({"color": 3}, "expected the space .content.*got color"),
        ({"color": 3, "content": 3}, "first"),
    ],
)
def test_bad_spaces(spaces, message):
    with pytest.raises(ValueError, match=message):
        StyleHeads(nn.Linear(6, 9), spaces, in_features=9)


def test_bad_inputs():
    m = model()
    with pytest.raises(TypeError, match=r"got torch\.uint8"):
        m(torch.zeros(2, 6, dtype=torch.uint8))
    with pytest.raises(ValueError, match="got 1 dimensions"):
        m(torch.rand(6))


class Positions(nn.Module):
    """The same features with the channels last (a map) or as tokens: every position holds another number."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return torch.arange(6.0).view(*self.shape, 1).expand(len(x), *self.shape, 5)


def test_pooling_of_channels_last_and_tokens():
    def pooled(shape, pool, f=5):
        m = StyleHeads(Positions(shape), {"content": 2}, in_features=f, hidden=(), pool=pool)
        return m.features(torch.rand(2, 3, 4, 4))

    assert torch.equal(pooled((2, 3), "auto"), torch.full((2, 5), 2.5))  # [N, H, W, F]
    assert torch.equal(pooled((6,), "auto"), torch.full((2, 5), 2.5))
    assert torch.equal(pooled((6,), "cls"), torch.zeros(2, 5))
    assert pooled((6,), "flatten", 30).shape == (2, 30)
