"""Parts of StyleHeads: heads alone, one space as a module, features beside embeddings, norms, a frozen backbone, and
the backbone's weights under the keys of its own library."""

import copy
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

from ssd_addon import JointEntropyLoss, StyleHeads, ViewBatch, ViewPlan

SPACES = {"content": 7, "color": 3, "spatial": 5}


class Small(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.conv(x)))


def model(**options):
    torch.manual_seed(0)
    return StyleHeads(Small(), SPACES, **({"hidden": (12, 10)} | options))


# ---- norms


@pytest.mark.parametrize("norm,kind", [("batch", nn.BatchNorm1d), ("layer", nn.LayerNorm), (None, None)])
@pytest.mark.parametrize("hidden", [(12,), (12, 10), {"content": (12, 10), "color": (), "spatial": (12, 10)}])
@pytest.mark.parametrize("training", [True, False])
def test_norms_equal_the_loop_over_heads(norm, kind, hidden, training):
    m = model(norm=norm, hidden=hidden).double()
    for p in m.projections.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(16, 6, dtype=torch.float64)
    m.project(x)
    m.train(training)
    heads = {n: m.head(n) for n in SPACES}
    z = m.project(x)
    for name, head in heads.items():
        torch.testing.assert_close(head(x), z[name], rtol=1e-10, atol=1e-10)
    assert {type(layer) for layer in heads["content"]} == {nn.Linear, nn.ReLU, *([kind] if kind else [])}
    assert (heads["content"][0].bias is None) == (norm is not None)


@pytest.mark.parametrize("norm", ["layer", None])
def test_without_batch_norm_no_image_depends_on_the_others(norm):
    m = model(norm=norm)
    x = torch.randn(8, 6)
    torch.testing.assert_close(m.project(x)["color"][:2], m.project(x[:2])["color"])


def test_norms_are_saved_and_old_files_have_batch_norm(tmp_path):
    m = model(norm="layer")
    m.save(tmp_path / "m.pt")
    assert StyleHeads.load(tmp_path / "m.pt", Small()).norm == "layer"
    with pytest.raises(ValueError, match=r"another configuration.*norm: layer in the checkpoint, batch here"):
        model().restore(m.config(), m.state_dict())
    old = model()
    config = {k: v for k, v in old.config().items() if k not in ("norm", "output")}
    model().restore(config, old.state_dict())
    with pytest.raises(ValueError, match="norm: expected one of 'batch', 'layer', None: got 'group'"):
        model(norm="group")


# ---- features beside embeddings


@pytest.mark.parametrize("view_by_view", [False, True])
@pytest.mark.parametrize("given", ["batch", "tensor", "list", "plain"])
def test_features_come_beside_embeddings(given, view_by_view):
    m = model().eval()
    x = torch.rand(4, 5, 3, 8, 8)
    x = {
        "batch": ViewBatch(x, ViewPlan.shared_query(tuple(SPACES))),
        "tensor": x,
        "list": list(x),
        "plain": x[0],
    }[given]
    z, features = m(x, features=True, view_by_view=view_by_view)
    assert torch.equal(features, m.features(x)) and features.shape[-1] == 6
    for name, expected in m(x).items():
        torch.testing.assert_close(z[name], expected)
    assert type(z) is type(m(x))


# ---- heads alone


def test_heads_alone_are_those_of_the_model():
    torch.manual_seed(0)
    heads = StyleHeads.heads(6, SPACES, hidden=(12, 10)).eval()
    m = model().eval()
    m.projections.load_state_dict(heads.projections.state_dict())
    x = torch.rand(4, 5, 3, 8, 8)
    features = m.features(x)
    z = heads(features)
    for name, expected in m(x).items():
        assert torch.equal(z[name], expected)
        torch.testing.assert_close(heads.head(name)(features[0]), expected[0])
    rows = heads(features.flatten(0, 1))
    assert type(rows) is dict and rows["color"].shape == (20, 3)
    criterion, plan = JointEntropyLoss(), ViewPlan.shared_query(tuple(SPACES))
    torch.testing.assert_close(criterion(rows, plan), criterion(z))


@pytest.mark.parametrize(
    "features,error,message",
    [
        (torch.rand(2, 5), ValueError, r"expected \[N, F\] or \[V, B, F\] with F = 6.*got \[2, 5\]"),
        (torch.rand(2, 6, 1, 1), ValueError, r"got \[2, 6, 1, 1\]; flatten\(1\) first"),
        ({"features": 1}, TypeError, "got dict"),
        (torch.ones(2, 6, dtype=torch.int64), TypeError, r"features: expected float16, .* got torch\.int64"),
    ],
)
def test_heads_alone_refuse_other_features(features, error, message):
    with pytest.raises(error, match=message):
        StyleHeads.heads(6, SPACES)(features)


@pytest.mark.parametrize("given", ["heads", "plain", "views"])
def test_one_image_has_no_batch_statistics(given):
    heads, m = StyleHeads.heads(6, SPACES, hidden=(12,)), model(hidden=(12,))
    one = {"heads": torch.rand(1, 6), "plain": torch.rand(1, 3, 8, 8), "views": torch.rand(3, 1, 3, 8, 8)}[given]
    module = heads if given == "heads" else m
    options = {"view_by_view": True} if given == "views" else {}
    with pytest.raises(ValueError, match="features: expected at least two images in training mode .* use norm='layer'"):
        module(one, **options)
    module.eval()(one, **options)
    model(hidden=(12,), norm="layer")(torch.rand(1, 3, 8, 8))
    model(hidden=())(torch.rand(1, 3, 8, 8))  # without a hidden layer there is no norm
    for head in m.train().projections.children():
        head.norms.eval()
    m(torch.rand(1, 3, 8, 8))


def test_a_model_without_weights_is_not_saved(tmp_path):
    with torch.device("meta"):
        m = StyleHeads(Small(), SPACES)
    with pytest.raises(ValueError, match=r"got one on the meta device, .* \(backbone\.conv\.weight, .*to_empty"):
        m.save(tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())


# ---- one space


@pytest.mark.parametrize("space", [*SPACES, "backbone"])
def test_one_space_as_a_module(space):
    m = model().eval()
    encoder, x = m.encoder(space), torch.rand(2, 3, 8, 8)
    expected = m.features(x) if space == "backbone" else m(x)[space]
    torch.testing.assert_close(encoder(x), expected)
    assert not encoder.training and model().encoder(space).training
    with pytest.raises(ValueError, match=r"expected a batch with 4 dimensions.*got \[1, 2, 3, 8, 8\]"):
        encoder(x[None])
    with pytest.raises(KeyError, match="got 'hue'"):
        m.encoder("hue")


@pytest.mark.slow
def test_torch_export_keeps_every_space_and_any_batch_size():
    m, x = model().eval(), torch.rand(3, 3, 8, 8)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    whole = torch.export.export(m, (x,), dynamic_shapes={"x": batch}).module()
    other = torch.rand(5, 3, 8, 8)
    z = whole(other)
    assert list(z) == list(SPACES)
    for name, expected in m(other).items():
        torch.testing.assert_close(z[name], expected)
    one = torch.export.export(m.encoder("color"), (x,), dynamic_shapes={"x": batch}).module()
    torch.testing.assert_close(one(other), m(other)["color"])


@pytest.mark.slow
@pytest.mark.parametrize("space", ["color", "backbone"])
def test_onnx_gives_the_same_numbers(space, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    m, x = model().eval(), torch.rand(3, 3, 8, 8)
    file = tmp_path / "m.onnx"
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    torch.onnx.export(m.encoder(space), (x,), file, dynamo=True, dynamic_shapes=batch, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    other = torch.rand(5, 3, 8, 8)
    (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), m.encoder(space)(other), rtol=1e-4, atol=1e-5)


def test_safetensors_keep_one_space(tmp_path):
    from safetensors.torch import load_file, save_file

    m = model().eval()
    save_file(m.encoder("color").state_dict(), tmp_path / "color.safetensors")
    save_file(m.export_backbone(), tmp_path / "backbone.safetensors")
    again = model()
    for p in again.parameters():
        nn.init.zeros_(p)
    encoder = again.encoder("color").eval()
    encoder.load_state_dict(load_file(tmp_path / "color.safetensors"))
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(encoder(x), m(x)["color"])
    Small().load_state_dict(load_file(tmp_path / "backbone.safetensors"))


# ---- frozen


def test_a_frozen_backbone_keeps_weights_statistics_and_dropout():
    m = model()
    before = copy.deepcopy(m.backbone.state_dict())
    assert m.freeze() is m and m.frozen and m.train() is m
    optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
    x = torch.rand(4, 5, 3, 8, 8)
    assert torch.equal(m.features(x), m.features(x)) and m.training and m.projections.training
    JointEntropyLoss()(m(x)).backward()
    heads = copy.deepcopy(m.projections.state_dict())
    optimizer.step()
    assert all(torch.equal(t, before[k]) for k, t in m.backbone.state_dict().items())
    assert any(not torch.equal(t, heads[k]) for k, t in m.projections.state_dict().items())
    assert not m.features(x).requires_grad and m(x)["color"].requires_grad
    assert copy.deepcopy(m).train().backbone.training is False
    m.unfreeze()
    assert m.backbone.training and m.features(x).requires_grad and not m.eval().backbone.training


# ---- the backbone's weights


def wrapped_inside(net):
    net.layer1 = torch.compile(net.layer1, backend="eager")
    return net


BACK = {
    "torchvision": (torchvision.models.resnet18, {"fc.weight", "fc.bias"}),
    "torchvision, a head of layers": (
        torchvision.models.mobilenet_v3_small,
        {f"classifier.{k}.{p}" for k in (0, 3) for p in ("weight", "bias")},
    ),
    "timm": (lambda: timm.create_model("resnet10t"), {"fc.weight", "fc.bias"}),
    "timm, a head with a norm": (lambda: timm.create_model("convnext_atto"), {"head.fc.weight", "head.fc.bias"}),
    "timm without a classifier": (lambda: timm.create_model("resnet10t", num_classes=0), set()),
    "compiled": (lambda: torch.compile(torchvision.models.resnet18(), backend="eager"), {"fc.weight", "fc.bias"}),
    "compiled inside": (lambda: wrapped_inside(torchvision.models.resnet18()), {"fc.weight", "fc.bias"}),
    "of your own": (Small, set()),
}


@pytest.mark.parametrize("name", BACK)
def test_the_weights_go_back_under_their_own_keys(name):
    make, classifier = BACK[name]
    net = make()
    weights = StyleHeads(net, {"content": 4}, hidden=()).export_backbone()
    fresh = {"compiled": torchvision.models.resnet18, "compiled inside": torchvision.models.resnet18}.get(name, make)()
    missing, unexpected = fresh.load_state_dict(weights, strict=False)
    assert set(missing) == classifier and not unexpected
    assert not any(t.requires_grad for t in weights.values())
    own = getattr(net, "_orig_mod", net).state_dict()
    assert all(
        torch.equal(t, own[k] if k in own else own[k.replace("layer1.", "layer1._orig_mod.")])
        for k, t in weights.items()
    )


@pytest.mark.parametrize("name", ["torchvision", "timm"])
@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel])
def test_wrappers_that_came_later_are_not_in_the_keys(name, wrap):
    net = BACK[name][0]()
    m = StyleHeads(net, {"content": 4}, hidden=())
    keys = list(m.export_backbone())
    m.backbone = wrap(m.backbone)
    weights = m.export_backbone()
    assert list(weights) == keys and keys[0].startswith("conv1.")
    assert weights._metadata.keys() <= net.state_dict()._metadata.keys()


def test_exported_weights_are_contiguous_and_tied_ones_stay_tied(tmp_path):
    from safetensors.torch import load_file, save_file

    net = torchvision.models.resnet18().to(memory_format=torch.channels_last)
    save_file(StyleHeads(net, {"content": 4}, hidden=()).export_backbone(), tmp_path / "m.safetensors")
    assert all(torch.equal(t, net.state_dict()[k]) for k, t in load_file(tmp_path / "m.safetensors").items())
    net = Small()
    net.again = net.conv
    weights = StyleHeads(net, {"content": 4}, hidden=()).export_backbone()
    assert weights["again.weight"].data_ptr() == weights["conv.weight"].data_ptr()


def test_an_encoder_leaves_the_modes_of_the_model_alone():
    m = model().freeze().train()
    before = [x.training for x in m.modules()]
    made = m.encoder("content")
    assert [x.training for x in m.modules()] == before and made.training and made.head.training
    assert not made.backbone.training and not model().eval().encoder("color").head.training


def test_what_was_not_trained_before_a_freeze_is_not_trained_after_it():
    net = Small()
    net.conv.bias.requires_grad_(False)
    m = StyleHeads(net, SPACES)
    before = {n: p.requires_grad for n, p in m.named_parameters()}
    m.unfreeze()
    assert {n: p.requires_grad for n, p in m.named_parameters()} == before
    m.freeze().freeze()
    assert not any(p.requires_grad for p in m.backbone.parameters())
    m.unfreeze()
    assert {n: p.requires_grad for n, p in m.named_parameters()} == before and not m.frozen


@pytest.mark.parametrize("flags", [(), ("on_sphere",), ("frozen",), ("on_sphere", "frozen")])
def test_a_file_holds_how_embeddings_are_compared_and_whether_the_backbone_is_frozen(tmp_path, flags):
    m = model()
    m.on_sphere = "on_sphere" in flags
    if "frozen" in flags:
        m.freeze()
    m.save(tmp_path / "m.pt")
    found = StyleHeads.load(tmp_path / "m.pt", Small())
    assert (found.on_sphere, found.frozen) == ("on_sphere" in flags, "frozen" in flags)
    assert any(p.requires_grad for p in found.backbone.parameters()) == ("frozen" not in flags)


def test_a_frozen_backbone_stays_still_whoever_trains_its_parts():
    net = nn.Sequential()  # the model has a copy of it, without fc
    net.body, net.pool, net.flat, net.fc = Small(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 9)
    m = StyleHeads(net, SPACES, hidden=()).freeze().train()
    assert m.changes and m.backbone is not net
    before, x = copy.deepcopy(net.state_dict()), torch.rand(4, 3, 8, 8)
    encoder, features = m.encoder("content"), m.encoder()
    assert encoder.train() is encoder and encoder.training and encoder.head.training
    assert not any(part.training for part in m.backbone.modules())  # by `train` alone
    for spoil in (net.train, StyleHeads(net, SPACES, hidden=()).train):
        for run in (m, m.features, encoder, features):
            spoil()
            assert net.body.norm.training  # the parts are shared
            run(x)
            assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
            assert not net.body.norm.training
    m.unfreeze()
    assert m.encoder("content").train().backbone.training
    m.train()
    features(x)  # an encoder of the time before does not hold the backbone still
    assert m.backbone.training and features.train().backbone.training


def test_a_frozen_model_compiles_in_one_graph():
    m = model(norm="layer").freeze().train()
    x = torch.rand(4, 3, 8, 8)
    whole = torch.compile(m, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x)["color"], m(x)["color"])


# ---- layers that are not plain


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.a = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.a(x)


def each_linear(change):
    def changed(m):
        for head in m.projections.children():
            for k, layer in enumerate(head.linears):
                head.linears[k] = change(layer) or layer
        return m

    return changed


def quantized(m):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves it elsewhere
        return torch.ao.quantization.quantize_dynamic(m.eval(), {nn.Linear})


def in_groups(m):
    for head in m.projections.children():
        head.norms[0], head.norms[1] = nn.GroupNorm(2, 12), nn.BatchNorm1d(10, affine=False)
    return m


LAYERS = {
    "weight_norm": each_linear(nn.utils.parametrizations.weight_norm),
    "weight_norm, as it was": each_linear(nn.utils.weight_norm),
    "spectral_norm": each_linear(nn.utils.parametrizations.spectral_norm),
    "spectral_norm, as it was": each_linear(nn.utils.spectral_norm),
    "pruned": each_linear(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "LoRA": each_linear(LoRA),
    "quantized": quantized,
    "other norms": in_groups,
    "norms without statistics": lambda m: (
        [
            setattr(head.norms, str(k), nn.BatchNorm1d(n, track_running_stats=False))
            for head in m.projections.children()
            for k, n in enumerate((12, 10))
        ]
        and m
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_not_plain_are_copied_as_they_are(name):
    m = LAYERS[name](model())
    m(torch.rand(8, 3, 8, 8))  # hooks leave tensors of a graph
    encoder, x = m.encoder("color").eval(), torch.rand(4, 3, 8, 8)
    m.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), m(x)["color"])
        own = {p.data_ptr() for p in m.projections.parameters()}
        for p in encoder.head.parameters():
            assert p.data_ptr() not in own
            p.zero_()
        assert m(x)["color"].abs().sum() > 0


def test_a_sharded_layer_that_is_not_plain_is_refused():
    m = model()
    m.projections.color_head.linears[0] = LoRA(m.projections.color_head.linears[0])

    class Sharded(nn.Parameter):
        def full_tensor(self):
            return self

    m.projections.color_head.linears[0].a.weight = Sharded(torch.zeros(12, 6))
    with pytest.raises(TypeError, match="head: expected Linear and norm layers, if they are sharded: got LoRA"):
        m.head("color")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_space_of_a_backbone_of_another_type_than_the_heads(dtype):
    m = StyleHeads(Small().to(dtype), SPACES, hidden=(12,)).eval()
    x = torch.rand(2, 3, 8, 8)
    assert m.encoder("color")(x).dtype == torch.float32 and m.encoder()(x).dtype == dtype
    torch.testing.assert_close(m.encoder("color")(x), m(x)["color"])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_a_hook_computes_may_be_of_another_type_until_it_runs(change, dtype):
    net = Small()
    change(net.conv)
    m = StyleHeads(net, SPACES, hidden=()).to(dtype)
    assert m(torch.rand(2, 3, 8, 8))["color"].dtype == dtype
