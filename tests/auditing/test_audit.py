"""The audit: what is known to be in a network is found there, layer by layer, and nothing else is touched."""

import copy
import itertools
import json
import math
import re
from dataclasses import replace

import kornia.augmentation as K
import pages
import pytest
import torch
from torch import nn

import ssd_addon
from ssd_addon import StructuredViews, StyleHeads, audit, auditing, metrics
from ssd_addon.auditing import layers, measure
from ssd_addon.auditing.untrained import untrained
from ssd_addon.pooling import Pooling

GROUPS = {
    "color": [K.ColorJitter(brightness=(0.5, 1.5), p=1.0)],
    "spatial": [K.RandomAffine(0.0, translate=(0.3, 0.3), p=1.0)],
}


class Stages(nn.Module):
    """Keeps the pixels, then their light alone, then nothing of the images."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Identity(), nn.Identity(), nn.Identity()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = self.first(x * self.weight.view(-1, 1, 1))
        x = self.second(x.amax((2, 3), keepdim=True).expand(-1, -1, 2, 2))
        return self.third((x * 1e4).sin()).mean((2, 3))


@pytest.fixture(scope="module")
def images():
    return pages.squares(160).images


def test_each_layer_says_what_it_holds(images):
    table = audit(Stages(), images, GROUPS, layers=("first", "second", "third"), normalize=None, draws=2)
    assert table.spaces == ("pixels", "first", "second", "third", "backbone", "untrained")
    assert table.factors == ("color", "spatial") and table.unit == "pairs of views"
    light = "color/0.ColorJitter/brightness_factor"
    assert table["first", light] > 0.5 and table["second", light] > 0.9 and table["backbone", light] < 0.1
    assert table["pixels", "spatial"] > 0.3 and table["second", "spatial"] < 0.15 and table["backbone", "spatial"] < 0.1
    low, high = table.intervals["second", "color"]
    assert low < table["second", "color"] < high


def test_pairs_differ_in_one_group_alone(images):
    views = StructuredViews(GROUPS, then=[K.RandomGaussianBlur((3, 3), (0.1, 2.0), p=1.0)], seed=0)
    x = images[:20]
    for group in GROUPS:
        pair = measure.OneGroup(views, group).independent(x, seed=(0, 1))
        whole = views.independent(x, seed=(0, 1))
        assert torch.equal(pair.views[0], whole.views[0])
        a, b = pair.parameters
        changed = {g for g in a for op in a[g] for name, t in a[g][op].items() if not torch.equal(t, b[g][op][name])}
        assert changed == {group}
        first, second = (p["then"]["0.RandomGaussianBlur"]["sigma"] for p in pair.parameters)
        assert torch.equal(first, second)
        assert torch.equal(pair.views[1], views.replay(x, pair.parameters[1])) and not torch.equal(*pair.views)


def test_auditing_changes_nothing(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)).train()
    before, kept = copy.deepcopy(net.state_dict()), images.clone()
    state = torch.get_rng_state()
    first = audit(net, images, GROUPS, draws=1, bootstrap=0)
    again = audit(net, images, GROUPS, draws=1, bootstrap=0)
    assert net.training and net[1].training and torch.equal(images, kept)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not any(len(m._forward_hooks) for m in net.modules())
    assert first.scores == again.scores and not first.intervals
    assert audit(net, images, GROUPS, draws=1, bootstrap=0, seed=1).scores != first.scores


def test_images_of_any_form_give_the_same(images):
    net = nn.Conv2d(3, 4, 3)
    whole = audit(net, images, GROUPS, draws=1, bootstrap=0, batch_size=40)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=40)
    assert audit(net, loader, GROUPS, draws=1, bootstrap=0).scores == whole.scores
    assert (
        audit(StyleHeads(net, {"content": 2}), images, GROUPS, draws=1, bootstrap=0, batch_size=40).scores
        == whole.scores
    )
    gray = images.mean(1, keepdim=True)
    assert audit(net, gray, GROUPS, draws=1, bootstrap=0).spaces == whole.spaces


def test_the_preset_and_the_public_name(images):
    assert ssd_addon.audit is measure.audit is auditing.audit
    table = ssd_addon.audit(nn.Conv2d(3, 4, 3), images[:40], size=16, draws=2)
    assert table.factors == ("spatial", "color") and table["backbone", "color/0.ColorJitter/hue_factor"] <= 1
    assert table.spaces[0] == "pixels" and table.spaces[-2:] == ("backbone", "untrained")


def test_views_larger_than_the_images_are_not_silent(images, tmp_path):
    net, sentence = nn.Conv2d(3, 4, 3), r"images \(16 x 16 pixels\) are smaller than the views \(24 x 24\)"
    with pytest.warns(UserWarning, match=sentence):
        audit(net, images[:20], size=24, draws=1, bootstrap=0)
    (found,) = auditing.write(tmp_path / "a.html", {"net": net}, images[:20], size=24, layers=(), draws=1)
    assert re.search(sentence, found.notes[-1]) and "smaller than the views" in (tmp_path / "a.html").read_text()
    (found,) = auditing.write(tmp_path / "a.html", {"net": net}, images[:20], size=16, layers=(), draws=1)
    assert not found.notes  # a smaller size, and groups of one's own, are no surprise
    audit(net, images[:20], GROUPS, size=24, draws=1, bootstrap=0)


def test_the_views_own_size_decides_whether_images_are_enlarged(images, tmp_path):
    crop = {"crop": [K.RandomResizedCrop((24, 20), p=1.0)]}
    sentence = r"images \(16 x 16 pixels\) are smaller than the views \(24 x 20\)"
    for groups in (crop, StructuredViews(crop, seed=0)):
        with pytest.warns(UserWarning, match=sentence):
            audit(nn.Conv2d(3, 4, 3), images[:20], groups, size=16, layers=(), draws=1, bootstrap=0)
    (found,) = auditing.write(tmp_path / "a.html", {"n": nn.Conv2d(3, 4, 3)}, images[:20], crop, layers=(), draws=1)
    assert re.search(sentence, found.notes[-1])


def test_a_preset_in_a_file_has_the_audits_size_and_normalization(tmp_path):
    file, x = tmp_path / "groups.json", torch.rand(2, 3, 16, 16)
    for content, edge, own in (
        ({"preset": "color_spatial"}, 16, False),
        ({"preset": "color_spatial", "size": 24, "normalize": True}, 24, True),
    ):
        file.write_text(json.dumps(content))
        for spec in (str(file), file, content):
            views = auditing.views_for(spec, 16)
            assert views.independent(x, seed=(0,)).views.shape[-2:] == (edge, edge)
            assert (measure._normalization(nn.Conv2d(3, 4, 3), views) is None) == own
    file.write_text(json.dumps(pages.CARD))
    assert auditing.views_for(str(file), 24).independent(x, seed=(0,)).views.shape[-2:] == (16, 16)


@pytest.mark.parametrize("n", [15, 16, 17])
def test_few_images_are_enough(images, n):
    assert "backbone" in audit(nn.Conv2d(3, 4, 3), images[:n], GROUPS, layers=(), draws=2, bootstrap=0).spaces


class Sees(nn.Module):
    """Keeps what it was given."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        return x.mean((2, 3))


@pytest.mark.parametrize("normalize,expected", [(None, (0.5, 1.0)), (((0.5,) * 3, (0.25,) * 3), (0.0, 2.0))])
def test_images_are_normalized_as_asked(normalize, expected):
    net = Sees()
    x = torch.full((12, 3, 8, 8), 0.5)
    x[:, :, 0] = 1.0
    model, each, _ = measure.prepared_for(net, x, measure.views_of({}, 8), (), normalize, "auto", None, 64, 0)
    out = model(each[0])
    assert net.seen[-1][0, 0, -1, -1] == expected[0] and net.seen[-1][0, 0, 0, 0] == expected[1]
    assert torch.equal(out["pixels"], layers.pixels(x))  # before normalization


def test_auto_takes_timms_numbers_imagenets_or_those_of_the_views():
    import timm

    views = measure.views_of(GROUPS, 8)
    net = timm.create_model("resnet10t")
    net.pretrained_cfg = dict(net.pretrained_cfg, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    heads = StyleHeads(net, {"content": 2})
    assert measure._normalization(heads.backbone, views) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert measure._normalization(nn.Conv2d(3, 2, 1), views)[0][0] == 0.485
    normalizing = StructuredViews(GROUPS, then=[K.Normalize(torch.zeros(3), torch.ones(3))])
    assert measure._normalization(heads.backbone, normalizing) is None


# ---- other dtypes and channels


@pytest.mark.parametrize("kind,near", [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-3)])
def test_backbones_of_any_dtype_are_measured(images, kind, near):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3))
    options = {"layers": ("0",), "draws": 1, "bootstrap": 0}
    whole = audit(net, images[:60], GROUPS, **options)
    for same in (net.to(kind), StyleHeads(net.to(kind), {"content": 2})):
        found = audit(same, images[:60], GROUPS, **options)
        assert all(abs(found[row, f] - whole[row, f]) < near for row in ("pixels", "0", "backbone") for f in GROUPS)
    assert next(net.parameters()).dtype == kind


def test_maps_of_low_precision_are_averaged_in_float32():
    class Ramp(nn.Module):
        def forward(self, x):
            return (256 + torch.arange(64 * 64).view(1, 1, 64, 64) % 2 * 2).to(torch.bfloat16).expand(len(x), 1, 64, 64)

    net, pooling = Ramp(), Pooling(1, "auto", None, False, "net")
    out = layers.Layers(net, pooling, {"map": net}, None)(torch.rand(2, 3, 8, 8))
    assert (out["map"].float() == 257).all() and (out["backbone"].float() == 257).all()  # bfloat16 has 256 and 258


def test_a_backbone_of_one_channel_is_measured_on_views_in_color(images, tmp_path):
    net = nn.Conv2d(1, 8, 3, stride=2)
    (found,) = auditing.write(tmp_path / "a.html", {"net": net}, images[:40], size=16, layers=(), draws=1)
    assert found.table.factors == ("spatial", "color") and "made gray" in str(found.notes)
    model, each, _ = measure.prepared_for(net, images, measure.views_of({}, 8), (), None, "auto", None, 64, 0)
    assert each[0].shape[1] == 3 and model.normalized(each[0]).shape[1] == 1
    share = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    gray = (each[0] * share).sum(1, keepdim=True)
    with torch.no_grad():
        torch.testing.assert_close(model(each[0])["backbone"], net(gray).mean((2, 3)))
    assert model(each[0])["pixels"].shape[1] == 3 * 64


# ---- layers


def chosen(net, size=64):
    model, _, _ = measure.prepared_for(
        net, torch.rand(12, 3, size, size), measure.views_of({}, 8), None, "auto", "auto", None, 64, 0
    )
    return list(model._layers)


def test_a_backbones_own_stages_are_its_layers():
    import timm
    import torchvision.models as models

    resnet = [f"layer{k}" for k in range(1, 5)]
    assert chosen(models.resnet18()) == resnet
    assert chosen(timm.create_model("resnet10t")) == resnet
    assert chosen(nn.Sequential(*list(models.resnet18().children())[:-1])) == ["4", "5", "6", "7"]
    assert len(chosen(models.mobilenet_v3_small())) == 4
    vit = chosen(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=8), 32)
    assert vit == ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]
    convnext = chosen(timm.create_model("convnext_atto"))
    assert convnext == [f"stages.{k}" for k in range(4)]
    with torch.no_grad():
        plain = models.VisionTransformer(32, 8, 8, 2, 16, 32)
    names = chosen(plain, 32)
    assert names == [f"encoder.layers.encoder_layer_{k}" for k in (1, 3, 5, 7)]
    assert chosen(nn.Conv2d(3, 4, 3)) == []


@pytest.mark.parametrize(
    "y,expected",
    [
        (torch.arange(32.0).view(1, 2, 4, 4), [2.5, 4.5, 10.5, 12.5, 18.5, 20.5, 26.5, 28.5]),
        (torch.arange(32.0).view(1, 2, 4, 4).permute(0, 2, 3, 1), [2.5, 4.5, 10.5, 12.5, 18.5, 20.5, 26.5, 28.5]),
        (torch.tensor([[[9.0], [0.0], [1.0], [2.0], [3.0]]]), [0.0, 1.0, 2.0, 3.0]),  # a class token and 2 x 2
        (torch.tensor([[[1.0], [3.0]]]), [2.0]),
        (torch.tensor([[1.0, 3.0]]), [1.0, 3.0]),
        (torch.ones(1, 2, 3, 2, 2), [1.0, 1.0]),
    ],
)
def test_any_output_becomes_a_row(y, expected):
    assert layers.row(y)[0].tolist() == expected


def test_layers_that_change_in_place_are_read_when_they_run(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
    model, each, _ = measure.prepared_for(net, images, measure.views_of({}, 8), ("0",), None, "auto", None, 64, 0)
    with torch.no_grad():
        assert model(each[0])["0"].min() < 0


@pytest.mark.parametrize(
    "names,error,message",
    [
        (
            ("fourth",),
            ValueError,
            "layers: expected names of modules inside the backbone, such as first, second, third",
        ),
        (("first", "first"), ValueError, "expected every layer once"),
        ("first", TypeError, "expected a sequence of names"),
        (("idle",), ValueError, "expected modules that run when the backbone does: got idle"),
    ],
)
def test_layers_that_are_not_there_are_refused(images, names, error, message):
    net = Stages()
    net.idle = nn.Conv2d(3, 3, 1)
    with pytest.raises(error, match=message):
        audit(net, images, GROUPS, layers=names)


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        ({"groups": {}}, ValueError, "groups: expected groups of augmentations"),
        ({"groups": ["color"]}, TypeError, "groups: expected a preset's name or a mapping"),
        ({"groups": "hue"}, ValueError, "preset: expected one of"),
        ({"draws": 0}, ValueError, "draws: expected an integer of 1 or more"),
        ({"bootstrap": -1}, ValueError, "bootstrap"),
        ({"images": torch.rand(14, 3, 16, 16)}, ValueError, "images: expected at least 15, .*: got 14"),
        (
            {"images": torch.rand(40, 3, 16, 16) * 255},
            ValueError,
            r"images: expected uint8, or floating point in \[0, 1\]",
        ),
        (
            {"images": torch.rand(40, 5, 16, 16)},
            ValueError,
            "images: expected images that the backbone takes.*RuntimeError",
        ),
        ({"backbone": lambda x: x}, TypeError, "backbone: expected an nn.Module: got function"),
    ],
)
def test_bad_input_is_refused(images, arguments, error, message):
    given = {"backbone": Stages(), "images": images, "groups": GROUPS, "layers": ()} | arguments
    with pytest.raises(error, match=message):
        audit(given.pop("backbone"), given.pop("images"), given.pop("groups"), **given)


# ---- untrained copies


def test_the_untrained_row_is_the_mean_of_copies_and_spans_their_intervals(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2))
    views = measure.views_of(GROUPS, 16)
    model, each, _ = measure.prepared_for(net, images, views, (), None, "auto", None, 64, 0)
    weights = [twin[0].weight for twin in model.untrained]
    assert len(weights) == 3 and not any(torch.equal(a, b) for a, b in itertools.pairwise(weights))
    probe = {"probe": measure.PROBE, "draws": 2, "on_sphere": False, "seed": 0}
    alone = metrics.parameter_matrix(model, measure.OneGroup(views, "color"), each, **probe)
    table = audit(net, images, GROUPS, layers=(), normalize=None, draws=2)
    copies = [f"untrained {k}" for k in range(3)]
    for found, own in ((table, alone), (table.parts, alone.parts)):
        for f in own.factors:
            scores = [own[c, f] for c in copies]
            assert max(scores) - min(scores) > 1e-4
            assert found["untrained", f] == pytest.approx(sum(scores) / 3)
            lows, highs = zip(*(own.intervals[c, f] for c in copies), strict=True)
            assert found.intervals["untrained", f] == (min(lows), max(highs))
    assert not any(cell[0] in copies for cell in (*table.scores, *table.intervals, *table.parts.scores))


def test_a_row_of_copies_has_a_score_only_where_all_have_one():
    cells = {("untrained 0", "a"): 0.2, ("untrained 1", "a"): float("nan"), ("backbone", "a"): 0.3}
    t = metrics.ScoreTable(
        ("backbone", "untrained 0", "untrained 1"), ("a",), cells, {("untrained 0", "a"): (0, 1)}, {}, "ridge", (), 1, 1
    )
    t = replace(t, notes={("untrained 1", "a"): "why"})
    found = layers.over_copies(t)
    assert math.isnan(found["untrained", "a"]) and found.notes == {("untrained", "a"): "why"}
    assert found.intervals == {} and found.spaces == ("backbone", "untrained") and found["backbone", "a"] == 0.3
    assert layers.over_copies(found) is not t and layers.over_copies(found).scores == found.scores


def test_the_untrained_copy_holds_none_of_the_weights():
    import timm
    import torchvision

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.arange(12.0).view(3, 4))
            self.norm = torchvision.ops.FrozenBatchNorm2d(4)
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))

        def forward(self, x):
            return self.norm(self.conv(x)).mean((2, 3)) + self.token.mean()

    for net in (torchvision.models.resnet18(), timm.create_model("vit_tiny_patch16_224", img_size=32), Own()):
        with torch.no_grad():
            for t in (*net.parameters(), *net.buffers()):
                if t.is_floating_point():
                    t.copy_(torch.rand_like(t) + 0.5)
        images, state = torch.rand(8, 3, 32, 32), torch.get_rng_state()
        twin = untrained(net, images, seed=0)
        assert torch.equal(torch.get_rng_state(), state) and not twin.training
        theirs = dict(net.named_parameters())
        assert not [n for n, p in twin.named_parameters() if torch.equal(p, theirs[n])]
        buffers = {n: b for n, b in net.named_buffers() if n.split(".")[-1] in ("running_mean", "running_var")}
        assert not [n for n, b in twin.named_buffers() if n in buffers and torch.equal(b, buffers[n])]
        again = untrained(net, images, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), again.parameters(), strict=True))
        assert twin(images).isfinite().all()


def test_batch_norms_of_the_copy_have_the_statistics_of_the_images():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    images = torch.rand(32, 3, 8, 8) + 3
    y = untrained(net, images, seed=0)(images)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    assert net[1].num_batches_tracked == 0


def test_a_whole_module_with_a_projection_head_is_noted(images, tmp_path):
    class SimCLR(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.add_module(name, nn.Sequential(nn.Linear(4, 3), nn.ReLU()))

        def forward(self, x):
            return list(self.children())[1](self.backbone(x))

    for name, noted in (("projection_head", True), ("neck", False)):
        (found,) = auditing.write(tmp_path / "a.html", {"net": SimCLR(name)}, images[:20], GROUPS, layers=(), draws=1)
        assert any(f"a part {name!r}, so the features may be a projection head's" in n for n in found.notes) is noted
