"""embed: a row per image whatever the batches, in evaluation mode that is put back; wrong models and images say so."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ssd_addon import StyleHeads
from ssd_addon.metrics import embed
from ssd_addon.metrics.evaluation import evaluation

SPACES = {"content": 4, "color": 3, "place": 2}


def images(n=7, seed=0):
    return torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


X = images()


def heads(hidden=None):
    """Heads of two depths, the other one in the middle; BatchNorm and Dropout tell the modes apart."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5))
    hidden = hidden or {"content": (6,), "color": (), "place": (6,)}
    model = StyleHeads(backbone, SPACES, in_features=5, hidden=hidden)
    with torch.no_grad():
        model(images(30, seed=1))  # running statistics that are not those of a batch
    return model


def one_by_one(model, x):
    with evaluation(model), torch.no_grad():
        rows = [model(row[None]) | {"backbone": model.features(row[None])} for row in x]
    return {name: torch.cat([r[name] for r in rows]) for name in rows[0]}


def close(got, expected):
    assert list(got) == list(expected)
    for name, z in expected.items():
        torch.testing.assert_close(got[name], z, msg=name)


class Wrapper(nn.Module):
    """Shaped like DistributedDataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


Wrapper.__name__ = "ModelEma"  # wrappers are known by the names of their classes


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("out of memory")


class Inspect(nn.Module):
    """Notes the types of what passes."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append(x.dtype)
        return x


def means(x):
    return {"content": x.mean((2, 3))}


# ---- what comes out


@pytest.mark.parametrize("batch_size", [10**30, 1, 3, 7, 100])
def test_a_row_per_image_whatever_the_batch_size(batch_size):
    model, x = heads(), images()
    z = embed(model, x, batch_size=batch_size)
    assert {name: tuple(t.shape) for name, t in z.items()} == {k: (7, d) for k, d in SPACES.items()} | {
        "backbone": (7, 5)
    }
    close(z, one_by_one(model, x))


def test_no_more_than_batch_size_images_at_a_time():
    seen = []
    embed(lambda x: (seen.append(len(x)), means(x))[1], images(), batch_size=3)
    assert seen == [3, 3, 1]


def test_the_backbone_is_left_out_when_not_asked_for_and_where_there_is_none():
    model, x = heads(), images()
    expected = one_by_one(model, x)
    expected.pop("backbone")
    close(embed(model, x, backbone=False), expected)
    assert list(embed(means, x)) == ["content"]


def test_a_model_that_has_features_and_no_heads_is_called_as_it_is():
    class Vgg(nn.Module):
        features = nn.Flatten()

        def forward(self, x):
            return means(x)

    assert list(embed(Vgg(), images())) == ["content"]


def test_the_backbone_runs_once():
    model, seen = heads(), []
    model.backbone.register_forward_hook(lambda *a: seen.append(len(a[1][0])))
    embed(model, images())
    assert seen == [7]


@pytest.mark.parametrize("backbone", [False, True])
def test_unit_rows_have_the_direction_and_length_one(backbone):
    free, unit = (embed(heads(), images(), backbone=backbone, on_sphere=u) for u in (False, True))
    assert list(free) == list(unit) and ("backbone" in unit) == backbone
    for name, z in free.items():
        torch.testing.assert_close(unit[name], z / z.pow(2).sum(1, keepdim=True).sqrt())
        assert not torch.allclose(unit[name], z)
    assert embed(lambda x: {"content": x.flatten(1) * 0}, images(), on_sphere=True)["content"].abs().max() == 0


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(s, torch.float32) for s in (1e30, 1e-13, 1e-30, 3e38)] + [(s, torch.float64) for s in (1e300, 1e-300)],
)
def test_unit_rows_have_length_one_at_any_scale(scale, dtype):
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tanh()
    got = embed(lambda x: {"color": (rows * scale).to(dtype)}, images(), on_sphere=True)["color"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, (rows / rows.norm(dim=1, keepdim=True)).float())


@pytest.mark.parametrize("said", [False, True, None])
def test_the_model_says_whether_its_embeddings_lie_on_the_sphere(said):
    """None asks the model, or what is inside its wrappers; an answer of the caller's goes before the model's."""
    model = heads()
    assert torch.equal(embed(model, X)["color"], embed(model, X, on_sphere=False)["color"])
    if said is not None:
        model.on_sphere = said
    for wrapped in (model, Wrapper(model), torch.compile(model, backend="eager"), Wrapper(Wrapper(model))):
        asked = embed(wrapped, X)["color"]
        assert torch.equal(asked, embed(model, X, on_sphere=bool(said))["color"])
        assert torch.equal(embed(wrapped, X, on_sphere=not said)["color"], embed(model, X, on_sphere=not said)["color"])


def test_a_plain_backbone_is_read_as_its_features():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        expected = net.eval()(X)
    net.train()
    for model in (net, lambda x: net(x), Wrapper(net), torch.compile(net, backend="eager")):
        for backbone in (True, False):
            z = embed(model, X, batch_size=3, backbone=backbone)
            assert list(z) == ["backbone"]
            torch.testing.assert_close(z["backbone"], expected)
    unit = embed(net, X, on_sphere=True)["backbone"]
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(7))
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda net: net, Wrapper, lambda net: torch.compile(net, backend="eager")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_have_the_type_of_a_plain_modules_weights(dtype, wrap):
    seen = []
    net = nn.Sequential(Inspect(seen), nn.Flatten(), nn.BatchNorm1d(108, affine=False), nn.Linear(108, 5)).to(dtype)
    with torch.no_grad():
        expected = net.eval()(X.to(dtype)).float()
    for given in (X, X.double()):
        got = embed(wrap(net), given)["backbone"]
        assert got.dtype == torch.float32 and set(seen) == {dtype}
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_embeddings_are_float32(dtype, unit):
    z = embed(lambda x: {"content": x.flatten(1).to(dtype)}, images(), on_sphere=unit)["content"]
    assert z.dtype == torch.float32
    if unit:
        torch.testing.assert_close(z.norm(dim=1), torch.ones(7))


@pytest.mark.parametrize("hidden", [None, (6, 5), ()], ids=["two depths", "deep", "linear"])
def test_project_is_what_each_head_makes_of_the_features(hidden):
    model, x = heads(hidden).eval(), images()
    with torch.no_grad():
        features = model.features(x)
        z = model.project(features)
        assert list(z) == list(SPACES)
        close(z, model(x))
        close(z, {name: model.head(name)(features) for name in SPACES})


def test_project_lets_the_gradient_through_and_keeps_the_mode():
    model = heads().train()
    (counted, *_) = (m for m in model.projections.modules() if isinstance(m, nn.BatchNorm1d))
    before = counted.num_batches_tracked.clone()
    features = torch.randn(7, 5, requires_grad=True)
    sum(z.sum() for z in model.project(features).values()).backward()
    assert features.grad.abs().sum() > 0 and counted.num_batches_tracked == before + 1


# ---- what goes in

LABELS = torch.arange(7)
LOADER = DataLoader(TensorDataset(X, LABELS), batch_size=3)


@pytest.mark.parametrize(
    "given",
    [
        lambda: list(X.split(3)),
        lambda: iter(X.split(2)),
        lambda: [(x, 0) for x in X.split(4)],
        lambda: [[x, 0] for x in X.split(4)],
        lambda: LOADER,
    ],
    ids=["list", "iterator", "tuples", "lists", "loader"],
)
def test_batches_in_every_form(given):
    close(embed(heads(), given()), embed(heads(), X))


def test_vectors_are_images_too():
    x = images().flatten(1)
    assert torch.equal(embed(lambda v: {"content": v}, x, batch_size=2)["content"], x)


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper], ids=["plain", "wrapped"])
def test_a_wrapped_model_is_embedded_alike_and_put_back(wrap):
    model = wrap(heads()).train()
    close(embed(model, X), one_by_one(heads(), X))
    assert all(m.training for m in model.modules())


def test_a_wrapped_model_runs_through_its_wrapper_without_the_backbone():
    model, seen = Wrapper(heads()), []
    model.register_forward_hook(lambda *a: seen.append(1))
    assert list(embed(model, X, backbone=False)) == list(SPACES) and seen == [1]


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def forward(self, x):
        return {"content": (x - self.mean).flatten(1)}


@pytest.mark.parametrize("model", [heads(), Wrapper(heads()), Buffered()], ids=["heads", "wrapped", "buffer alone"])
def test_images_are_copied_to_the_models_device(model):
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].device.type))
    z = embed(model.to("meta"), X, backbone=False, on_sphere=True)
    assert seen == ["meta"] and {t.device.type for t in z.values()} == {"meta"}


def test_a_model_without_weights_gets_the_images_where_they_are():
    class Weightless(nn.Module):
        def forward(self, x):
            return means(x)

    for model in (Weightless(), means):
        assert embed(model, X.to("meta"))["content"].device.type == "meta"


# ---- modes


def modes(model):
    return {name: m.training for name, m in model.named_modules()}


def states():
    """A model in training, one with a frozen part, one in evaluation but for a part."""
    training, frozen, sampling = heads().train(), heads().train(), heads().eval()
    frozen.backbone.eval()
    frozen.backbone[3].train()
    sampling.backbone[3].train()
    return [training, frozen, sampling, Wrapper(frozen)]


@pytest.mark.parametrize("model", states(), ids=["training", "frozen", "sampling", "wrapped"])
def test_every_part_is_in_evaluation_and_returns_to_its_mode(model):
    before, statistics, seen = modes(model), [b.clone() for b in model.buffers()], []
    for m in model.modules():
        m.register_forward_hook(lambda part, *_: seen.append(part.training))
    embed(model, X, batch_size=4)
    assert seen and not any(seen)
    assert modes(model) == before
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))


def broken_loader():
    yield X
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("where", ["model", "images", "output"])
def test_modes_and_gradients_return_after_an_error(where):
    model = states()[1]
    given = broken_loader() if where == "images" else X
    if where == "model":
        model.backbone.append(Fails())
    if where == "output":
        model.register_forward_hook(lambda *_: [])
    before = modes(model)
    with pytest.raises(RuntimeError if where != "output" else TypeError):
        embed(model, given, backbone=where != "output")
    assert modes(model) == before and torch.is_grad_enabled()


def test_no_gradient_and_the_callers_mode_stays():
    seen = []
    z = embed(lambda x: (seen.append(torch.is_grad_enabled()), means(x))[1], X.clone().requires_grad_())
    assert seen == [False] and not z["content"].requires_grad and torch.is_grad_enabled()
    assert not any(t.requires_grad for t in embed(heads(), X).values())


# ---- what is refused


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "images: expected at least one batch: got none"),
        (X[:0], ValueError, r"images: expected \[n, C, H, W\] with at least one image: got \[0, 3, 6, 6\]"),
        (torch.rand(3), ValueError, r"images: expected \[n, C, H, W\].*got \[3\]"),
        ([{"image": X}], TypeError, r"images: expected batches \[b, C, H, W\].*got dict"),
        ([("photo.png", X)], TypeError, "or tuples that start with one: got str"),
        ("photos", TypeError, "got str"),
    ],
)
def test_bad_images(given, error, message):
    with pytest.raises(error, match=message):
        embed(means, given)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda x: None, TypeError, r"expected images \[b, C, H, W\] -> space -> \[b, d\], or .*: got NoneType"),
        (
            lambda x: x,
            ValueError,
            r"features \[b, F\]: got \[7, 3, 6, 6\] for 7 images; pool it to one vector per image",
        ),
        (lambda x: x.mean((1, 2, 3)), ValueError, r"features \[b, F\]: got \[7\] for 7 images$"),
        (lambda x: x[:5].mean((2, 3)), ValueError, r"features \[b, F\]: got \[5, 3\] for 7 images$"),
        (lambda x: {"color": x.mean((2, 3))[None]}, ValueError, r"space 'color' as \[7, d\].*got \[1, 7, 3\]"),
        (lambda x: {"color": x.mean((1, 2, 3))}, ValueError, r"space 'color' as \[7, d\].*got \[7\]"),
        (lambda x: {"color": x[:5].mean((2, 3))}, ValueError, r"one vector per image: got \[5, 3\]"),
        (lambda x: {"content": x.mean((2, 3)), "color": math.pi}, ValueError, "space 'color'.*: got float"),
    ],
)
def test_bad_models(returned, error, message):
    with pytest.raises(error, match=message):
        embed(returned, X)


def test_a_module_with_one_part_is_no_wrapper():
    """Only known wrappers are looked into: another module's forward may do more than call its part."""
    torch.manual_seed(0)
    heads = StyleHeads(nn.Flatten(), {"content": 3}, in_features=12)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = heads

        def forward(self, x):
            return self.module((x - 0.5) / 0.2)

    x = torch.rand(10, 3, 2, 2)
    with torch.no_grad():
        expected = heads.eval()((x - 0.5) / 0.2)["content"]
    found = embed(Scaled(), x)
    assert list(found) == ["content"]
    torch.testing.assert_close(found["content"], expected)


def test_a_model_whose_project_returns_a_tensor_is_called_as_it_is():
    class SimCLR(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.project = nn.Flatten(), nn.Linear(12, 3)

        def forward(self, x):
            return self.project(self.features(x))

    net, x = SimCLR(), torch.rand(4, 3, 2, 2)
    torch.testing.assert_close(embed(net, x)["backbone"], net(x).detach())
