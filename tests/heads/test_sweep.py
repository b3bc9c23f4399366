"""Families of timm and torchvision, without data: widths, gradients, keys. benchmarks/sweep.py has all of them."""

import copy
import warnings

import pytest
import timm
import torch
import torchvision
from timm.models.crossvit import CrossVit
from timm.models.volo import VOLO
from torch import nn
from torch.nn.parallel import DataParallel

from benchmarks.sweep import check, check_numbers, timm_case, torchvision_case
from ssd_addon import StyleHeads

TIMM = {
    "test_byobnet": 256, "test_convnext": 64, "cs3darknet_focus_s": 512, "dla46x_c": 256, "edgenext_xx_small": 168,
    "test_efficientnet": 256, "efficientvim_m1": 960, "iformer_t": 256, "levit_128s": 384,
    "mobilenetv3_small_050": 1024, "mobilevit_xxs": 320, "nest_tiny": 384, "test_nfnet": 192, "test_resnet": 96,
    "starnet_s050": 128, "swin_tiny_patch4_window7_224": 768, "vgg11": 4096, "ese_vovnet19b_slim_dw": 512,
}  # fmt: skip
"""Families that have no class token: the width."""
TOKENS = {
    "coat_lite_tiny": ("320", "320"), "deit_tiny_distilled_patch16_224": ("refused", "192"), "test_vit": ("64", "64"),
    "pit_ti_distilled_224": ("refused", "256"), "test_vit3": ("96", "refused"), "hiera_tiny_224": ("768", "refused"),
}  # fmt: skip
"""Transformers: the widths with pool="mean" and pool="cls", or refused."""
TORCHVISION = ["alexnet", "convnext_tiny", "efficientnet_b0", "googlenet", "mnasnet0_5", "regnet_y_400mf", "vit_b_16"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_a_family_of_timm_is_read_trained_and_exported(name):
    result = check(timm_case(name), ("auto",))
    assert result.faults == [] and result.pools["auto"] == str(TIMM[name]) and result.keys == "same"


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENS)
def test_a_transformer_of_timm_is_pooled_in_every_way_that_it_has(name):
    result = check(timm_case(name))
    assert result.faults == [] and (result.pools["mean"], result.pools["cls"]) == TOKENS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_a_family_of_torchvision_is_read_trained_and_exported(name):
    result = check(torchvision_case(name), ("auto",))
    assert result.faults == [] and result.keys == "same"


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "efficientvim_m1"])
def test_features_are_what_timm_returns_without_a_classifier(name):
    assert check_numbers(timm_case(name)) == "same"


def volo():
    """One of few layers."""
    widths, heads = (16, 32, 32, 32), (2, 2, 2, 2)
    return VOLO(
        (1, 1, 1, 1), img_size=32, num_classes=2, embed_dims=widths, num_heads=heads, mlp_ratio=(2, 2, 2, 2)
    ).eval()


def crossvit():
    depths = ([1, 1, 0], [1, 1, 0], [1, 1, 0])
    return CrossVit(img_size=48, img_scale=(1.0, 1.0), embed_dim=(16, 32), depth=depths, num_heads=(2, 2)).eval()


TOKENS_OF = {
    "coat": (lambda: timm.create_model("coat_lite_tiny", img_size=32).eval(), 32),
    "crossvit": (crossvit, 48),
    "volo": (volo, 32),
    "vit": (lambda: timm.create_model("test_vit", img_size=32).eval(), 32),
}


@pytest.mark.parametrize("name", TOKENS_OF)
def test_the_class_token_is_the_one_of_timm(name):
    make, size = TOKENS_OF[name]
    net, x = make(), torch.rand(2, 3, size, size)
    with torch.no_grad():
        found = StyleHeads(net, {"content": 4}, hidden=(), pool="cls").eval().features(x)
        torch.testing.assert_close(found, net.forward_head(net.forward_features(x), pre_logits=True))


def test_the_class_token_of_a_model_that_is_averaged_otherwise():
    net, x = volo(), torch.rand(2, 3, 32, 32)
    tokens = net.forward_features(x)
    net.global_pool = "avg"
    for pool, want in (("cls", tokens[:, 0]), ("auto", tokens.mean(1)), ("mean", tokens.mean(1))):
        torch.testing.assert_close(StyleHeads(net, {"content": 4}, hidden=(), pool=pool).eval().features(x), want)
    assert net.global_pool == "avg"


def test_the_class_tokens_of_all_scales_of_a_model_that_is_averaged_otherwise():
    net, x = crossvit(), torch.rand(2, 3, 48, 48)
    want = net.forward_head(net.forward_features(x), pre_logits=True)
    net.global_pool = "avg"
    torch.testing.assert_close(StyleHeads(net, {"content": 4}, hidden=(), pool="cls").eval().features(x), want)


def test_the_class_token_of_a_distilled_model_is_the_first_of_two():
    net, x = timm.create_model("pit_ti_distilled_224").eval(), torch.rand(2, 3, 224, 224)
    model = StyleHeads(net, {"content": 4}, hidden=(), pool="cls").eval()
    torch.testing.assert_close(model.features(x), net.forward_features(x)[:, 0])


@pytest.mark.parametrize("name", ["test_vit3", "vit_medium_patch16_reg4_gap_256", "naflexvit_base_patch16_gap"])
def test_registers_are_no_class_token(name):
    with torch.device("meta"):
        net = timm.create_model(name)
    assert net.num_prefix_tokens > 0
    with pytest.raises(ValueError, match="expected a model with a class token for 'cls': got .* without one"):
        StyleHeads(net, {"content": 4}, hidden=(), pool="cls")


@pytest.mark.parametrize("name", ["pit_ti_224", "deit_tiny_distilled_patch16_224"])
def test_an_average_that_timm_does_not_take_is_refused(name):
    with torch.device("meta"):
        net = timm.create_model(name)
    with pytest.raises(ValueError, match="pool: expected 'auto' or 'cls' for timm's .*does not average: got 'mean'"):
        StyleHeads(net, {"content": 4}, hidden=(), pool="mean")


OTHERWISE = {  # pooled in another way than timm does by itself: what timm needs to be told
    "vit": (lambda: timm.create_model("test_vit", num_classes=0, img_size=32).eval(), "mean", "avg", 32),
    "registers": (
        lambda: timm.create_model("test_vit", num_classes=0, img_size=32, reg_tokens=2).eval(),
        "mean",
        "avg",
        32,
    ),
    "map": (
        lambda: timm.create_model("test_vit", num_classes=0, img_size=32, global_pool="map").eval(),
        "mean",
        "avg",
        32,
    ),
    "volo": (volo, "mean", "avg", 32),
    "crossvit": (crossvit, "mean", "avg", 48),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_weights_of_another_pooling_go_back_into_a_model_that_is_told_of_it(name):
    make, pool, how, size = OTHERWISE[name]
    model = StyleHeads(make(), {"content": 4}, hidden=(), pool=pool).eval()
    assert any(f"pooled by 'avg', not '{make().global_pool}'; on a model of" in change for change in model.changes)
    fresh, x = make(), torch.rand(2, 3, size, size)
    fresh.reset_classifier(0, how)
    fresh.load_state_dict(model.export_backbone())
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), model.features(x))
        assert fresh(x).shape != make()(x).shape or not torch.allclose(fresh(x), make()(x))


def test_a_pooling_that_is_timms_own_is_no_change():
    assert StyleHeads(timm.create_model("test_vit", num_classes=0), {"content": 4}, pool="cls").changes == ()
    net = timm.create_model("test_vit", num_classes=0, global_pool="avg", fc_norm=False)
    assert StyleHeads(net, {"content": 4}, pool="mean").changes == ()


def test_a_pooling_by_attention_that_the_average_replaces_is_said_to_be_removed():
    net = timm.create_model("test_vit", num_classes=0, global_pool="map")
    model = StyleHeads(net, {"content": 4}, hidden=(), pool="mean")
    assert "'model.attn_pool' removed, as this pooling does not run it" in model.changes
    assert net.attn_pool is not None and net.global_pool == "map"
    by_hand = copy.deepcopy(net)
    by_hand.global_pool = "avg"
    StyleHeads(by_hand, {"content": 4}, hidden=(), pool="mean")
    assert by_hand.attn_pool is not None
    old = {f"backbone.{k}": t for k, t in model.backbone.state_dict().items()}
    old |= {k: t for k, t in model.state_dict().items() if k.startswith("projections.")}
    old |= {f"backbone.model.{k}": t for k, t in net.state_dict().items() if k.startswith("attn_pool.")}
    model.restore(model.config(), old)  # of a file that holds it


@pytest.mark.parametrize("how", ["avgmax", "catavgmax"])
def test_a_pooling_that_is_more_than_an_average_is_not_taken_for_one(how):
    net = timm.create_model("test_resnet", num_classes=0, global_pool=how)
    with pytest.raises(ValueError, match=f"'auto' for timm's ResNet with global_pool='{how}', which is more than an"):
        StyleHeads(net, {"content": 4}, pool="mean")
    net = timm.create_model("test_resnet", num_classes=0, global_pool="max").eval()
    x = torch.rand(2, 3, 96, 96)
    found = StyleHeads(net, {"content": 4}, hidden=(), pool="mean").eval().features(x)
    torch.testing.assert_close(found, net.forward_features(x).mean((2, 3)))


def test_a_parameter_that_only_the_classifier_uses_is_frozen_on_a_copy():
    net = timm.create_model("efficientvim_m1")
    model = StyleHeads(net, {"content": 4}, hidden=())
    assert "'model.weights' frozen, as only the classifier uses it" in model.changes
    assert net.weights.requires_grad and not model.backbone.model.weights.requires_grad
    assert model.backbone.model.weights.data_ptr() == net.weights.data_ptr()
    frozen = timm.create_model("efficientvim_m1").requires_grad_(False)
    assert not any("frozen" in change for change in StyleHeads(frozen, {"content": 4}, hidden=()).changes)


def test_an_idle_parameter_of_a_model_without_a_classifier_is_frozen_on_a_copy():
    class LikeTimm(nn.Module):
        num_features = 8

        def __init__(self):
            super().__init__()
            self.conv, self.idle = nn.Conv2d(3, 8, 3), nn.Parameter(torch.ones(2))

        def forward_features(self, x):
            return self.conv(x)

        def forward_head(self, x, pre_logits=False):
            return x.mean((2, 3))

    net = LikeTimm()
    model = StyleHeads(net, {"content": 4}, hidden=())
    assert net.idle.requires_grad and not model.backbone.model.idle.requires_grad
    assert model.backbone.model.conv.weight is net.conv.weight


class Inside(nn.Module):
    """A part that its library calls "module"."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.module, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(self.module(x))


def test_a_part_called_module_keeps_its_key_and_wrappers_do_not():
    net = Inside()
    model = StyleHeads(net, {"content": 4}, hidden=())
    Inside().load_state_dict(model.export_backbone())
    other = StyleHeads(Inside(), {"content": 4}, hidden=())
    other.restore(model.config(), DataParallel(model).state_dict())
    assert torch.equal(other.backbone.module.weight, net.module.weight)
    net = nn.Sequential(torch.compile(Inside(), backend="eager"))
    keys = StyleHeads(net, {"content": 4}, in_features=8, hidden=()).export_backbone().keys()
    assert keys == nn.Sequential(Inside()).state_dict().keys()


def test_a_module_that_checks_the_version_of_its_weights_takes_them_back(tmp_path):
    """torchvision's MNASNet refuses a state dict without the notes that torch keeps beside it."""
    net = torchvision.models.mnasnet0_5()
    model = StyleHeads(net, {"content": 4}, hidden=())
    fresh = copy.deepcopy(net)
    fresh.classifier = nn.Identity()
    fresh.load_state_dict(model.export_backbone())
    model.save(tmp_path / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = StyleHeads.load(tmp_path / "model.pt", torchvision.models.mnasnet0_5())
    assert all(
        torch.equal(t, again.state_dict()[k]) for k, t in model.state_dict().items() if isinstance(t, torch.Tensor)
    )
    for make in (net.__class__, lambda: timm.create_model("test_resnet")):  # the root's note stays at the root
        inner = make(0.5) if make is net.__class__ else make()
        notes = StyleHeads(inner, {"content": 4}, hidden=()).export_backbone()._metadata
        assert notes[""] == inner.state_dict()._metadata[""] and notes.keys() <= inner.state_dict()._metadata.keys()
