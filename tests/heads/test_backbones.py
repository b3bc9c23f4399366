"""Any backbone: out of its wrappers, without its classifier, cast and pooled right, and never altered."""

import copy
import warnings

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
    assert "taken out of OptimizedModule" in model.changes[0]


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
    assert any("taken off" in change for change in model.changes)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224"]
)
def test_timms_transformers_are_averaged_as_timm_does(name):
    net = timm.create_model(name, num_classes=0, **({"img_size": 56} if "reg4" in name else {})).eval()
    size = net.patch_embed.img_size[0]
    x = torch.rand(2, 3, size, size)
    tokens = net.forward_features(x)
    model = StyleHeads(net, {"content": 4}, hidden=(), pool="mean").eval()
    got = model.features(x)
    assert net.num_prefix_tokens > 0 and net.global_pool == "token"
    if "distilled" not in name:
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
        assert model.changes == ("'fc' taken off, a classifier (16 to 16), as it comes last",)
        assert "'fc' taken off" in repr(model)


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
    with pytest.raises(ValueError, match="a classifier fc, heads, head or classifier at its end.*give in_features"):
        StyleHeads(Stem(10), SPACES, sample_ndim=1)


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
    with pytest.raises(ValueError, match="belongs to another backbone than Small"):
        model.restore(model.config(), both)


def test_weights_that_are_missing_are_named():
    model = StyleHeads(Small(), SPACES, hidden=())
    state = {f"module.{k}": t for k, t in model.state_dict().items() if not k.endswith("conv.bias")}
    with pytest.raises(ValueError, match=r"(?s)another backbone than Small.*conv\.bias"):
        model.restore(model.config(), state)
