"""Any backbone: out of its wrappers, without its classifier, cast and pooled right, and never altered."""

import copy
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

from ssd_addon import StyleHeads, ViewBatch, ViewPlan

SPACES = {"content": 8, "color": 4}


def fingerprint(net):
    """Names, identities and bits of everything that a network holds, modes and hooks too."""
    modules = [(n, id(m), m.training, list(m._modules), len(m._forward_hooks)) for n, m in net.named_modules()]
    return modules, [(n, id(t), t.sum().item()) for n, t in (*net.named_parameters(), *net.named_buffers())]


def parameters(net):
    return sum(p.numel() for p in net.parameters())


class Encoder(nn.Module):
    """One whose own layer is called fc."""

    def __init__(self, out=16):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, out)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


# ---- wrappers


def compiled(net):
    return torch.compile(net, backend="eager")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_a_compiled_backbone_is_taken_out_and_stays_whole(name):
    net = torchvision.models.get_model(name, **({"image_size": 32} if name == "vit_b_16" else {}))
    wrapped, before = compiled(net), fingerprint(net)
    model = StyleHeads(wrapped, SPACES, hidden=(16,))
    assert model(torch.rand(3, 2, 3, 32, 32))["content"].shape == (3, 2, 8)
    assert fingerprint(net)[0] == before[0] and parameters(net) == sum(p.numel() for p in wrapped.parameters())
    assert "unwrapped from OptimizedModule" in model.changes[0]


@pytest.mark.parametrize(
    "wrap", [compiled, DataParallel, AveragedModel, lambda net: compiled(DataParallel(net)), timm.utils.ModelEmaV3]
)
def test_other_wrappers_are_taken_off(wrap):
    net = torchvision.models.resnet18().eval()
    wrapped = wrap(net).eval()
    before = fingerprint(net)
    model = StyleHeads(wrapped, SPACES, hidden=()).eval()
    inner = wrapped.module if hasattr(wrapped, "module") else net
    plain = StyleHeads(inner, SPACES, hidden=()).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.features(x), plain.features(x)) and model.in_features == 512
    assert fingerprint(net) == before


def test_a_module_of_ones_own_that_holds_a_module_is_no_wrapper():
    class Centered(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x - 0.5)

    net = Centered(Encoder()).eval()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(StyleHeads(net, SPACES, in_features=16, hidden=()).eval().features(x), net(x))


def test_a_script_module_is_used_as_it_is_or_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of torch.jit
        script = torch.jit.script(Encoder().eval())
    with pytest.raises(ValueError, match="expected in_features for a script module"):
        StyleHeads(script, SPACES)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(StyleHeads(script, SPACES, in_features=16, hidden=()).eval().features(x), script(x))


# ---- classifiers


TORCHVISION = {
    "alexnet": 9216, "convnext_tiny": 768, "densenet121": 1024, "efficientnet_b0": 1280, "googlenet": 1024,
    "inception_v3": 2048, "mnasnet0_5": 1280, "mobilenet_v2": 1280, "resnext50_32x4d": 2048, "resnet18": 512,
    "shufflenet_v2_x0_5": 1024, "squeezenet1_1": 512, "swin_t": 768, "vgg11": 25088,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_torchvisions_classifiers_are_taken_off_a_copy(name):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        net = torchvision.models.get_model(name, **options)
        model = StyleHeads(net, {"content": 4}, hidden=())
        assert model.in_features == TORCHVISION[name]
        size = 299 if name == "inception_v3" else 64
        assert model.train()(torch.rand(3, 2, 3, size, size))["content"].shape == (3, 2, 4)
    assert parameters(net) == parameters(torchvision.models.get_model(name, **options).to("meta"))
    idle = {"fc", "classifier", "head", "heads", "AuxLogits", "aux1", "aux2"}
    assert not [n for n, _ in model.backbone.named_parameters() if n.split(".")[0] in idle]


SWIN = "swin_tiny_patch4_window7_224"


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto", SWIN, "mobilenetv3_small_050"])
@pytest.mark.parametrize("pool", ["auto", "mean", "flatten"])
def test_timms_parameters_all_get_a_gradient(name, pool):
    """What heads and pooling do not run is taken off a copy: DDP fails on parameters without a gradient."""
    net = timm.create_model(name)
    before = fingerprint(net)
    size = net.pretrained_cfg["input_size"][-1]
    x = torch.rand(2, 3, size, size)
    width = net.forward_features(x).flatten(1).shape[1] if pool == "flatten" else None
    model = StyleHeads(net, {"content": 4}, hidden=(), pool=pool, in_features=width)
    model(x)["content"].sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert fingerprint(net)[0] == before[0]
    assert any("removed" in change for change in model.changes)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_timms_transformers_are_averaged_as_timm_does(name):
    net = timm.create_model(name, num_classes=0, **({"img_size": 56} if "reg4" in name else {})).eval()
    size = net.patch_embed.img_size[0]
    x = torch.rand(2, 3, size, size)
    tokens = net.forward_features(x)
    model = StyleHeads(net, {"content": 4}, hidden=(), pool="mean").eval()
    got = model.features(x)
    assert net.num_prefix_tokens > 0 and net.global_pool == "token"
    torch.testing.assert_close(got, tokens[:, net.num_prefix_tokens :].mean(1))
    assert torch.equal(StyleHeads(net, {"content": 4}, hidden=(), pool="cls").eval().features(x), tokens[:, 0])
    assert not torch.allclose(got, tokens.mean(1), atol=1e-4)


def test_a_class_token_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="expected a model with a class token for 'cls': got ResNet"):
        StyleHeads(timm.create_model("resnet10t"), SPACES, pool="cls")


@pytest.mark.parametrize("given", [None, 16])
def test_a_layer_called_fc_that_says_what_comes_out_is_kept(given):
    net = Encoder(16).eval()
    model = StyleHeads(net, SPACES, hidden=(), in_features=given).eval()
    x = torch.rand(2, 3, 8, 8)
    if given:
        assert torch.equal(model.features(x), net(x)) and model.changes == ()
    else:  # without a width the last layer of that name is a classifier, and it is said
        assert torch.equal(model.features(x), net.conv(x).mean((2, 3)))
        assert model.changes == ("'fc' removed, a classifier (16 to 16), as it comes last",)
        assert "'fc' removed" in repr(model)


def test_a_classifier_at_the_end_goes_where_the_width_is_that_before_it():
    net = Encoder(10).eval()
    model = StyleHeads(net, SPACES, hidden=(), in_features=16).eval()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.features(x), net.conv(x).mean((2, 3)))


class Stem(nn.Module):
    """`head` comes first; in the order of registration it may be last."""

    def __init__(self, n, width=32, late=False):
        super().__init__()
        parts = {"head": nn.Linear(n, width), "body": nn.Linear(width, 32)}
        for name in sorted(parts, reverse=not late):
            setattr(self, name, parts[name])

    def forward(self, x):
        return self.body(self.head(x).relu())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("n,width", [(10, 32), (32, 32), (32, 64), (64, 32)])
def test_a_stem_called_head_is_kept(n, width, late):
    net = Stem(n, width, late).eval()
    model = StyleHeads(net, SPACES, hidden=(), sample_ndim=1, in_features=32).eval()
    x = torch.rand(2, n)
    assert torch.equal(model.features(x), net(x)) and not model.changes


def test_a_stem_called_head_says_nothing_of_the_width():
    model = StyleHeads(Stem(10), SPACES, sample_ndim=1)
    assert model.in_features == Stem(10)(torch.rand(1, 10)).shape[1] and not model.changes  # by a trial run


def test_num_features_of_a_module_without_a_classifier():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    net.num_features = 8
    assert StyleHeads(net, SPACES, hidden=()).in_features == 8


def test_a_module_with_hooks_of_the_users_is_not_run_to_find_out():
    net, seen = Encoder(10), []
    net.conv.register_forward_hook(lambda *_: seen.append(1))
    StyleHeads(net, SPACES, hidden=(), in_features=16)
    assert not seen


def test_a_subclass_of_torchvisions_is_torchvisions():
    class Mine(torchvision.models.ResNet):
        pass

    net = Mine(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    assert StyleHeads(net, SPACES, hidden=()).in_features == 512 and isinstance(net.fc, nn.Linear)


class Reused(nn.Module):
    """Modules under two names, a cache and a counter: what a run leaves behind."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.again = self.conv2 = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
        self.head = self.fc = nn.Linear(16, 10)
        self.cache, self.count = None, 0

    def forward(self, x):
        self.count += 1
        x = self.again(self.conv2(self.norm(self.conv(x)))).flatten(2)
        if self.cache is None or len(self.cache) != x.shape[-1]:
            self.cache = torch.linspace(0, 1, x.shape[-1], device=x.device)
        return self.fc((x * self.cache).mean(2))


def test_a_trial_run_leaves_nothing_behind():
    net = Reused()
    before = fingerprint(net)
    model = StyleHeads(net, SPACES, hidden=())
    assert fingerprint(net) == before and net.cache is None and net.count == 0
    assert model.in_features == 16 and "'fc' removed" in model.changes[0]
    assert model(torch.rand(3, 2, 3, 12, 12))["content"].shape == (3, 2, 8)
    assert net(torch.rand(2, 3, 9, 9)).shape == (2, 10)


def test_models_whose_blocks_are_shared_stay_whole():
    net = timm.create_model("coat_tiny")
    before = fingerprint(net)
    StyleHeads(net, SPACES, hidden=())
    assert fingerprint(net) == before and not any(t.is_meta for t in net.parameters())


class Middle(Encoder):
    """fc in the middle, and as wide as what comes out."""

    num_features = 16

    def __init__(self):
        super().__init__(16)
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        return self.out(super().forward(x).relu())


def hooked(net):
    net.conv.register_forward_hook(lambda module, args, out: out)


def normed(net):
    net.conv = nn.utils.spectral_norm(net.conv)


def weighed(net):
    net.conv = nn.utils.parametrizations.weight_norm(net.conv)


class NeedsData(Middle):
    def forward(self, x):
        return super().forward(x) * (1 if x.sum().item() > 0 else 2)


class Digits(Middle):
    """28 x 28 pixels and no others."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 26 * 26, 16), nn.Unflatten(1, (16, 1, 1))
        )


@pytest.mark.parametrize(
    "make,change",
    [(Middle, None), (Middle, hooked), (Middle, normed), (Middle, weighed), (NeedsData, None), (Digits, None)],
)
def test_a_layer_called_fc_in_the_middle_is_kept_whatever_stands_in_the_way_of_a_trial(make, change):
    net = make().eval()
    if change:
        change(net)
    model = StyleHeads(net, SPACES, hidden=()).eval()
    x = torch.rand(2, 3, 28, 28)
    assert model.changes == () and torch.equal(model.features(x), net(x))


def test_what_cannot_be_tried_is_not_guessed():
    class Odd(Encoder):
        def forward(self, x):
            assert x.shape[-1] == 37
            return super().forward(x)

    with pytest.raises(ValueError, match="whether 'fc' is a classifier at its end.*give in_features"):
        StyleHeads(Odd(10), SPACES)
    model = StyleHeads(Odd(10), SPACES, in_features=10, hidden=())
    assert model.features(torch.rand(2, 3, 37, 37)).shape == (2, 10)


class Last(nn.Module):
    """What comes last, in several ways."""

    def __init__(self, how, width=16, num_features=None):
        super().__init__()
        self.conv, self.fc, self.how = nn.Conv2d(3, 16, 3), nn.Linear(16, width), how
        self.relu = nn.ReLU(inplace=True)
        if num_features:
            self.num_features = num_features

    def forward(self, x):
        x = self.fc(self.conv(x).mean((2, 3)))
        return {"last": lambda: x, "twice": lambda: self.fc(x), "in place": lambda: self.relu(x)}[self.how]()


@pytest.mark.parametrize("how", ["twice", "in place"])
def test_a_layer_that_runs_twice_or_whose_output_is_changed_is_no_classifier(how):
    net = Last(how, num_features=16).eval()
    model, x = StyleHeads(net, SPACES, hidden=()).eval(), torch.rand(2, 3, 8, 8)
    assert model.changes == () and torch.equal(model.features(x), net(x))


def test_a_module_that_says_how_wide_its_output_is_keeps_it():
    net = Last("last", 8, num_features=8).eval()
    model, x = StyleHeads(net, SPACES, hidden=()).eval(), torch.rand(2, 3, 8, 8)
    assert model.in_features == 8 and torch.equal(model.features(x), net(x))
    assert StyleHeads(Last("last", 10, num_features=16), SPACES, hidden=()).in_features == 16


def test_a_forward_that_was_bound_anew_moves_to_the_copy_and_any_other_is_refused():
    import types

    net = Encoder(16).eval()
    net.forward = types.MethodType(lambda self, x: Encoder.forward(self, x) + 0, net)
    model, x = StyleHeads(net, SPACES, in_features=16, hidden=()).eval(), torch.rand(2, 3, 8, 8)
    assert torch.equal(model.features(x), net(x))
    resnet = torchvision.models.resnet18().eval()
    resnet.forward = types.MethodType(type(resnet).forward, resnet)
    assert StyleHeads(resnet, SPACES, hidden=()).eval().features(torch.rand(2, 3, 32, 32)).shape == (2, 512)
    plain = torchvision.models.resnet18()
    plain.forward = lambda x, inner=plain.forward: inner(x)
    with pytest.raises(ValueError, match="forward was replaced on the instance"):
        StyleHeads(plain, SPACES)


def test_a_network_that_accelerate_has_prepared():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    net = Accelerator(mixed_precision="bf16", cpu=True).prepare(torchvision.models.resnet18())
    model = StyleHeads(net, SPACES, hidden=())
    assert model(torch.rand(3, 2, 3, 32, 32))["content"].shape == (3, 2, 8)
    AcceleratorState._reset_state(True)


def test_subclasses_of_wrappers_are_taken_off():
    class Mine(DataParallel):
        pass

    assert StyleHeads(Mine(torchvision.models.resnet18()), SPACES, hidden=()).in_features == 512


def test_lazy_parameters_are_refused():
    net = nn.Sequential(nn.LazyConv2d(16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"lazy ones, 0\.weight, 0\.bias; run the backbone on one batch first"):
        StyleHeads(net, SPACES, in_features=16)


def test_a_subclass_of_torchvisions_with_a_forward_of_its_own_is_the_users():
    class Mine(torchvision.models.ResNet):
        def __init__(self):
            super().__init__(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
            self.head = nn.Linear(1000, 7)

        def forward(self, x):
            return self.head(super().forward(x))

    model = StyleHeads(Mine(), SPACES, hidden=())
    assert model.in_features == 1000 and "'head' removed" in model.changes[0]
    assert model(torch.rand(3, 2, 3, 32, 32))["content"].shape == (3, 2, 8)


def test_a_pooling_that_the_backbone_does_not_have_is_refused():
    vit = torchvision.models.vit_b_16(image_size=32)
    x = torch.rand(2, 3, 32, 32)
    cls = StyleHeads(vit, SPACES, hidden=(), pool="cls").eval()
    assert torch.equal(cls.features(x), StyleHeads(vit, SPACES, hidden=()).eval().features(x))
    with pytest.raises(ValueError, match="VisionTransformer, which returns its class token alone: got 'mean'"):
        StyleHeads(vit, SPACES, pool="mean")
    with pytest.raises(ValueError, match=r"returns tokens \[N, T, F\] for 'cls': got \[2, 512\] from ResNet"):
        StyleHeads(torchvision.models.resnet18(), SPACES, pool="cls").features(x)


class Named(nn.Module):
    """A last layer of any name."""

    def __init__(self, name, width=10, num_features=None):
        super().__init__()
        self.conv, self.name = nn.Conv2d(3, 16, 3), name
        self.add_module(name, nn.Linear(16, width))
        if num_features:
            self.num_features = num_features

    def forward(self, x):
        return self._modules[self.name](self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("name", ["linear", "last_linear", "fc"])
def test_a_classifier_of_a_common_name_is_taken_off(name):
    model = StyleHeads(Named(name), SPACES, hidden=())
    assert model.in_features == 16 and model.changes == (
        f"{name!r} removed, a classifier (16 to 10), as it comes last",
    )


def test_a_last_layer_of_another_name_may_be_a_classifier_and_it_is_said():
    with pytest.warns(UserWarning, match=r"Named: 'classif', a Linear layer \(16 to 10\), comes last.*in_feat") as met:
        assert StyleHeads(Named("classif"), SPACES, hidden=()).in_features == 10
    assert len(met) == 1 and met[0].filename == __file__
    StyleHeads(Named("classif"), SPACES, hidden=(), in_features=10)  # and here nothing
    StyleHeads(Named("classif", num_features=10), SPACES, hidden=())
    flat = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    assert StyleHeads(flat, SPACES, hidden=()).in_features == 10


class Vectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_an_encoder_of_vectors_ends_in_a_linear_layer_without_a_warning():
    assert StyleHeads(Vectors(), SPACES, hidden=(), sample_ndim=1).in_features == 6
    named = nn.Sequential()
    named.first, named.linear = nn.Linear(4, 8), nn.Linear(8, 6)
    model = StyleHeads(named, SPACES, hidden=(), sample_ndim=1)
    assert model.in_features == 6 and not model.changes


def test_torchvisions_classifier_of_videos_is_taken_off():
    with torch.device("meta"):
        net = torchvision.models.video.s3d()
        model = StyleHeads(net, {"content": 4}, hidden=(), sample_ndim=4).eval()
        assert model.in_features == 1024 and model.changes == ("'classifier' removed, the classifier",)
        x = torch.rand(1, 3, 14, 224, 224)
        assert model.features(x).shape == (1, 1024)
    with torch.no_grad():
        y = torch.rand(2, 1024, 3, 4, 4)
        torch.testing.assert_close(model.backbone.classifier(y).mean((2, 3, 4)), y.mean((2, 3, 4)))


@pytest.mark.parametrize(
    "kind,name",
    [("segmentation", "fcn_resnet50"), ("segmentation", "lraspp_mobilenet_v3_large"), ("detection", "ssd300_vgg16")],
)
def test_torchvisions_detectors_and_segmenters_are_refused(kind, name):
    net = getattr(getattr(torchvision.models, kind), name)(weights=None, weights_backbone=None)
    with pytest.raises(
        ValueError, match=r"a network that returns features: got torchvision's .* model\.backbone, with"
    ):
        StyleHeads(net, SPACES, in_features=512)
    if name == "fcn_resnet50":
        assert StyleHeads(net.backbone, SPACES, hidden=(), output="out").in_features == 2048
    if kind == "detection":  # its forward lies in the same module
        assert StyleHeads(net.backbone, SPACES, hidden=(), output="0").in_features == 512


def test_the_pyramid_of_a_detector_gives_features():
    with torch.device("meta"):
        net = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).backbone
        assert StyleHeads(net, SPACES, hidden=(), output="pool").in_features == 256


def test_networks_that_torch_fx_has_made():
    from torchvision.models.feature_extraction import create_feature_extractor

    net, x = torchvision.models.resnet18().eval(), torch.rand(2, 3, 32, 32)
    plain = StyleHeads(net, SPACES, hidden=()).eval().features(x)
    cut = StyleHeads(create_feature_extractor(net, {"layer4": "map"}), SPACES, hidden=(), output="map").eval()
    torch.testing.assert_close(cut.features(x), plain)
    traced = StyleHeads(torch.fx.symbolic_trace(net), SPACES, hidden=()).eval()
    assert "'fc' removed" in traced.changes[0]
    torch.testing.assert_close(traced.features(x), plain)
    exported = torch.export.export(nn.Sequential(nn.Conv2d(3, 8, 3)), (x,)).module()
    with pytest.raises(ValueError, match="got one of torch.export, whose mode is fixed"):
        StyleHeads(exported, SPACES, in_features=8)


# ---- types


class Small(nn.Module):
    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)

    def forward(self, x):
        return self.conv(x).relu()


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("views", [torch.float32, torch.float16])
def test_views_are_cast_to_the_type_of_the_weights(weights, views):
    model = StyleHeads(Small(), SPACES, hidden=(4,)).to(weights)
    x = torch.rand(3, 4, 3, 8, 8).to(views)
    plan = ViewPlan.shared_query(tuple(SPACES))
    for given in (x, ViewBatch(x, plan), x[0]):
        assert model(given)["color"].dtype == weights
    assert model.features(x).dtype == weights
    with torch.autocast("cpu", torch.bfloat16):
        assert StyleHeads(Small(), SPACES, hidden=(4,))(x.float())["content"].dtype == torch.bfloat16


def test_a_position_of_another_type_than_the_layers():
    class Positioned(Small):
        def __init__(self):
            super().__init__()
            self.bfloat16()
            self.position = nn.Parameter(torch.zeros(()))

    net = Positioned()
    assert next(net.parameters()).dtype == torch.float32
    assert StyleHeads(net, SPACES, hidden=()).features(torch.rand(2, 3, 8, 8)).dtype == torch.bfloat16


def test_heads_of_another_type_than_the_backbone():
    model = StyleHeads(Small().bfloat16(), SPACES, hidden=(4,))
    assert model(torch.rand(3, 4, 3, 8, 8))["content"].dtype == torch.float32


# ---- weights under other keys


def states(model):
    inner = copy.deepcopy(model)
    inner.backbone = compiled(inner.backbone)
    lightning = {f"model.{k}": t for k, t in model.state_dict().items()} | {"criterion.temperature": torch.ones(())}
    return {
        "DataParallel": DataParallel(model).state_dict(),
        "compiled": compiled(model).state_dict(),
        "compiled inside": DataParallel(compiled(model)).state_dict(),
        "average": AveragedModel(model).state_dict(),
        "compiled backbone": inner.state_dict(),
        "Lightning": lightning,
        "nested": {f"model.module._orig_mod.{k}": t for k, t in model.state_dict().items()},
        "deep": {f"net.student.{k}": t for k, t in model.state_dict().items()},
    }


KINDS = ["DataParallel", "compiled", "compiled inside", "average", "compiled backbone", "Lightning", "nested", "deep"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_found_under_the_names_of_wrappers(kind):
    for make in (Small, lambda: timm.create_model("resnet10t"), torchvision.models.resnet18):
        model = StyleHeads(make(), SPACES, hidden=(4,))
        other = StyleHeads(make(), SPACES, hidden=(4,))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.restore(model.config(), states(model)[kind])
        for (n, t), u in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(t, u), n


def test_weights_of_two_models_in_one_file_are_not_guessed():
    model = StyleHeads(Small(), SPACES, hidden=())
    both = {f"{who}.{k}": t for who in ("student", "teacher") for k, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"got several, with prefixes student\., teacher\.; keep the keys of the one"):
        model.restore(model.config(), both)


def test_a_classifier_in_an_older_file_is_left_out_under_any_prefix():
    net = timm.create_model("resnet10t")
    model = StyleHeads(net, SPACES, hidden=())
    old = model.state_dict() | {"backbone.model.fc.weight": net.fc.weight, "backbone.model.fc.bias": net.fc.bias}
    for prefix in ("", "module.", "model."):
        model.restore(model.config(), {prefix + k: t for k, t in old.items()})


def test_weights_under_activation_checkpointing():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = StyleHeads(nn.Sequential(Small()), SPACES, in_features=8, hidden=())
    state = {
        k.replace("backbone.0.", "backbone.0._checkpoint_wrapped_module."): t for k, t in model.state_dict().items()
    }
    assert "_checkpoint_wrapped_module" in str(checkpoint_wrapper(Small()))  # what it is called
    other = StyleHeads(nn.Sequential(Small()), SPACES, in_features=8, hidden=())
    other.restore(model.config(), state)
    assert torch.equal(other.state_dict()["backbone.0.conv.weight"], model.state_dict()["backbone.0.conv.weight"])


def test_weights_that_are_missing_are_named():
    model = StyleHeads(Small(), SPACES, hidden=())
    state = {f"module.{k}": t for k, t in model.state_dict().items() if not k.endswith("conv.bias")}
    with pytest.raises(ValueError, match=r"(?s)another backbone than Small.*conv\.bias"):
        model.restore(model.config(), state)


# ---- Hugging Face: models as transformers has them, without the package


class Tokens(nn.Module):
    """Patches of 48 x 48 images, as a model of transformers that takes no other size."""

    __module__ = "transformers.models.invented"

    def __init__(self, token="cls_token", **config):
        super().__init__()
        self.config = SimpleNamespace(**{"image_size": 48, "num_channels": 3} | config)
        self.patches = nn.Conv2d(3, 6, 16, 16)
        self.embeddings = nn.ParameterDict({token: torch.rand(1, 1, 6)} if token else {})

    def forward(self, x):
        if x.shape[-1] != 48:
            raise ValueError(f"input image size {tuple(x.shape)} does not match the model")
        y = self.patches(x).flatten(2).mT
        return torch.cat([*(t.expand(len(y), -1, -1) for t in self.embeddings.values()), y], dim=1)


class Output(OrderedDict):
    """As a ModelOutput: a mapping, and a tuple of what is in it."""

    def to_tuple(self):
        return tuple(self.values())


@pytest.mark.parametrize("size", [48, (48, 48), [48, 48]])
def test_the_size_of_images_is_that_of_the_configuration(size):
    net = Tokens(image_size=size)
    assert StyleHeads(net, SPACES, hidden=()).in_features == 6
    net.config = SimpleNamespace(image_size=None)
    with pytest.raises(ValueError, match="give in_features"):
        StyleHeads(net, SPACES, hidden=())


def test_a_class_token_is_a_parameter_of_that_name():
    x = torch.rand(2, 3, 48, 48)
    for token in ("cls_token", "class_embedding"):
        net = Tokens(token)
        features = StyleHeads(net, SPACES, hidden=(), pool="cls").features(x)
        assert torch.equal(features, net.embeddings[token][0].expand(2, -1))
    for token in ("", "subclass_scale", "mask_token"):
        with pytest.raises(ValueError, match="expected a backbone with a class token for 'cls': got Tokens"):
            StyleHeads(Tokens(token), SPACES, hidden=(), pool="cls")
        assert StyleHeads(Tokens(token), SPACES, hidden=()).in_features == 6


def test_a_model_that_leaves_out_patches_is_refused():
    masked = type("ViTMAEModel", (Tokens,), {"__module__": "transformers.models.invented"})
    with pytest.raises(ValueError, match="leaves out 75% of the patches at random.* set model.config.mask_ratio = 0.0"):
        StyleHeads(masked(mask_ratio=0.75), SPACES, hidden=())
    assert StyleHeads(masked(mask_ratio=0.0), SPACES, hidden=()).in_features == 6
    assert StyleHeads(Tokens(mask_ratio=0.75), SPACES, hidden=()).in_features == 6  # of the training alone


@pytest.mark.parametrize(("output", "expected"), [(0, "a"), (1, "b"), (-1, "b"), (-2, "a"), ("b", "b")])
@pytest.mark.parametrize("kind", [Output, tuple])
def test_an_index_counts_the_parts_of_an_output_also_from_the_end(kind, output, expected):
    class Two(nn.Module):
        def forward(self, x):
            parts = {"a": x.mean((2, 3)), "b": x.amax((2, 3))}
            return Output(parts) if kind is Output else tuple(parts.values())

    if kind is tuple and isinstance(output, str):
        return
    x = torch.rand(2, 3, 8, 8)
    features = StyleHeads(Two(), SPACES, in_features=3, hidden=(), output=output).features(x)
    assert torch.equal(features, x.mean((2, 3)) if expected == "a" else x.amax((2, 3)))
    for wrong in (2, -3):
        with pytest.raises(TypeError, match=f"output: expected a part of what Two returns: got {wrong}"):
            StyleHeads(Two(), SPACES, in_features=3, hidden=(), output=wrong).features(x)
