"""checkpoints: a saved model opens again without its script; a card never names code; the rest says why."""

import json
import os
import re
import sys
from pathlib import Path

import kornia.augmentation as K
import pytest
import timm
import torch
import torchvision
from torch import nn

from ssd_addon import StructuredViews, StyleHeads, presets
from ssd_addon.checkpoints import build_backbone, build_views, load, read_log

SPACES = {"content": 6, "color": 4, "spatial": 3}
TINY = "timm:test_resnet"


def tiny():
    return timm.create_model("test_resnet", num_classes=0)


def heads(backbone=None, seed=0, **options):
    """Trained enough to have running statistics of its own."""
    torch.manual_seed(seed)
    model = StyleHeads(backbone or tiny(), SPACES, **({"hidden": (5,)} | options))
    with torch.no_grad():
        model(torch.rand(4, 3, 32, 32))
    return model


def plain(seed=0):
    """Around a layer of no library."""
    torch.manual_seed(seed)
    return StyleHeads(nn.Conv2d(3, 4, 3), SPACES, in_features=4, hidden=())


def content(model, **more):
    return {"config": model.config(), "state_dict": model.state_dict(), **more}


def equal(got, model):
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected, z = model.eval()(x), got(x)
    return list(z) == list(SPACES) and all(torch.equal(z[s], expected[s]) for s in SPACES)


def write(path, text):
    path.write_text(text)
    return path


# ---- what was saved opens again


@pytest.mark.parametrize(
    ("backbone", "make"),
    [
        ("torchvision:resnet18", torchvision.models.resnet18),
        ("torchvision:resnet18", lambda: torchvision.models.resnet18(num_classes=3)),
        ("timm:test_resnet", tiny),
        ("timm:test_vit", lambda: timm.create_model("test_vit", num_classes=0)),
    ],
    ids=["torchvision", "torchvision, three classes", "timm", "timm, tokens"],
)
def test_a_file_opens_again(tmp_path, backbone, make):
    torch.manual_seed(0)
    model = StyleHeads(make(), SPACES, hidden={"content": (5,), "color": (), "spatial": (5,)})
    x = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        model(x)
    card = {"backbone": backbone, "family": "vicreg", "size": 160}
    model.save(tmp_path / "mine.pt", card=card)
    opened = load(str(tmp_path / "mine.pt"))
    assert not any(m.training for m in opened.model.modules())
    with torch.no_grad():
        expected, got = model.eval()(x), opened.model(x)
    assert list(got) == list(SPACES) and all(torch.equal(got[s], expected[s]) for s in SPACES)
    assert opened.card == card and opened.path == tmp_path / "mine.pt" and opened.views is None and opened.log == []


@pytest.mark.parametrize("name", ["model.pt", "checkpoint.pt"])
def test_a_run_folder_opens_with_its_log(tmp_path, name):
    model = heads()
    model.save(tmp_path / name, card={"backbone": TINY, "views": {"preset": "color_spatial", "size": 16}})
    write(tmp_path / "log.jsonl", '{"step": 0, "loss": 2.5}\n{"step": 1, "loss": NaN, "note": "a"}\n{"st')
    for path in (tmp_path, tmp_path / name):
        opened = load(path)
        assert equal(opened.model, model) and opened.path == tmp_path / name
        assert opened.log[0] == {"step": 0, "loss": 2.5} and len(opened.log) == 2
        assert opened.views.plan.spaces == ("content", "spatial", "color")


def test_the_final_model_comes_before_the_checkpoint(tmp_path):
    first, last = heads(seed=0), heads(seed=1)
    last.save(tmp_path / "model.pt", card={"backbone": TINY})
    first.save(tmp_path / "checkpoint.pt", card={"backbone": TINY})
    assert equal(load(tmp_path).model, last)


@pytest.mark.parametrize(
    ("config", "state", "more"),
    [
        ("config", "state_dict", {}),
        ("heads", "model", {}),
        ("heads", "state_dict", {}),
        ("config", "model", {"step": 3}),
        ("heads", "model", {"config": {"lr": 0.1}, "optimizer": {"state": {}}}),
    ],
)
def test_files_of_the_callers_own(tmp_path, config, state, more):
    model = heads()
    stored = {config: model.config(), state: model.state_dict(), "card": {"backbone": TINY}}
    torch.save(stored | more, tmp_path / "m.pt")
    assert equal(load(tmp_path / "m.pt").model, model)


def test_every_part_of_the_configuration_is_kept(tmp_path):
    model = heads(pool="flatten", in_features=96, hidden={"content": (5, 4), "color": (), "spatial": (7,)})
    model.save(tmp_path / "m.pt", card={"backbone": TINY})
    opened = load(tmp_path / "m.pt").model
    assert opened.config() == model.config() and equal(opened, model)


# ---- views


def same(views, expected):
    """The same draws and pixels, call after call."""
    x = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        got, want = views(x), expected(x)
        assert got.plan == want.plan and torch.equal(got.views, want.views)
        if want.image_ids is None:
            assert got.image_ids is None
        else:
            assert torch.equal(got.image_ids, want.image_ids)
    return True


@pytest.mark.parametrize(
    ("card", "options"),
    [
        ({"preset": "color_spatial", "size": 16}, {}),
        ({"preset": "appearance_spatial", "size": 12, "normalize": False}, {}),
        ({"preset": "content_only", "size": 16}, {}),
        ({"preset": "color_spatial", "size": 16, "plan": "interleaved"}, {"plan": "interleaved"}),
        ({"preset": "color_spatial", "size": 16, "cross_image": ["color"]}, {"cross_image": ("color",)}),
        ({"preset": "color_spatial", "size": 16, "constrained_crop": 0.2}, {"constrained_crop": 0.2}),
    ],
)
def test_presets(card, options):
    arguments = {k: v for k, v in card.items() if k in ("size", "normalize")}
    made = build_views(card)
    assert same(made, StructuredViews(**presets(card["preset"], **arguments), **options, seed=0))


def test_a_preset_has_the_size_of_photographs_unless_told():
    assert build_views({"preset": "color_spatial"})(torch.rand(1, 3, 230, 230)).views.shape[-2:] == (224, 224)


CROP = ["RandomResizedCrop", {"size": [12, 12], "scale": [0.3, 1.0], "resample": "bicubic"}]
MEAN = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
GROUPS = {
    "groups": {
        "color": [["ColorJitter", {"brightness": 0.4, "hue": [-0.1, 0.2], "p": 0.8}], ["RandomGrayscale"]],
        "spatial": [CROP, ["RandomHorizontalFlip", {"p": 0.5}]],
    },
    "key_groups": {"color": [["RandomInvert", {"p": 0.5}]]},
    "then": [["RandomGaussianBlur", {"kernel_size": [3, 3], "sigma": [0.1, 2.0], "p": 1.0}], ["Normalize", MEAN]],
    "key_then": [["Normalize", MEAN]],
    "cross_image": ["color"],
    "constrained_crop": 0.2,
}


def by_hand(seed=0, plan="shared_query"):
    norm = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    color = [K.ColorJitter(brightness=0.4, hue=(-0.1, 0.2), p=0.8), K.RandomGrayscale()]
    crop = K.RandomResizedCrop((12, 12), scale=(0.3, 1.0), resample="bicubic")
    return StructuredViews(
        {"color": color, "spatial": [crop, K.RandomHorizontalFlip(p=0.5)]},
        key_groups={"color": [K.RandomInvert(p=0.5)]},
        then=[K.RandomGaussianBlur((3, 3), (0.1, 2.0), p=1.0), K.Normalize(**norm)],
        key_then=[K.Normalize(**norm)],
        cross_image=["color"],
        constrained_crop=0.2,
        plan=plan,
        seed=seed,
    )


@pytest.mark.parametrize("plan", ["shared_query", "interleaved"])
def test_groups_and_all_that_goes_with_them(tmp_path, plan):
    model, card = plain(), {"views": GROUPS | {"plan": plan}}
    model.save(tmp_path / "m.pt", card=card)
    opened = load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3))
    assert opened.card == card and same(opened.views, by_hand(plan=plan))


@pytest.mark.parametrize("part", ["key_groups", "then", "key_then", "cross_image", "constrained_crop"])
def test_every_part_of_the_views_counts(part):
    """The case above tells the parts apart: without any of them, other views are drawn."""
    x = torch.rand(6, 3, 20, 20)
    less = build_views({k: v for k, v in GROUPS.items() if k != part})
    whole = by_hand()(x)
    got = less(x)
    assert not torch.equal(got.views, whole.views)


def test_lists_are_kornias_tuples():
    made = build_views({"groups": {"color": [["RandomInvert"]]}, "then": [["CenterCrop", {"size": [8, 8]}]]})
    assert same(made, StructuredViews({"color": [K.RandomInvert()]}, then=[K.CenterCrop((8, 8))], seed=0))


def test_parts_of_the_views_may_be_null():
    assert same(
        build_views({"groups": {"color": [["RandomInvert"]]}, "key_groups": None, "key_then": None}),
        StructuredViews({"color": [K.RandomInvert()]}, seed=0),
    )
    assert build_views({"groups": {}}).plan.spaces == ("content",)


def test_the_seed_is_the_openers():
    assert same(build_views(GROUPS, seed=7), by_hand(seed=7))
    assert same(build_views({"preset": "content_only", "size": 8}, seed=7), preset_views(8, seed=7))
    assert not torch.equal(
        build_views(GROUPS)(torch.ones(4, 3, 20, 20))[0], by_hand(seed=7)(torch.ones(4, 3, 20, 20))[0]
    )


def preset_views(size, seed=0, name="content_only"):
    return StructuredViews(**presets(name, size=size), seed=seed)


def test_the_caller_may_name_other_views(tmp_path):
    plain().save(tmp_path / "m.pt", card={"views": {"preset": "content_only", "size": 8}})
    script = write(
        tmp_path / "mine.py",
        "import kornia.augmentation as K\nfrom ssd_addon import StructuredViews\n"
        "def views():\n    return StructuredViews({'tone': [K.RandomInvert()]}, seed=4)\n",
    )
    as_json = write(tmp_path / "views.json", json.dumps(GROUPS))
    with_mark = tmp_path / "marked.json"  # as some editors write UTF-8
    with_mark.write_text(json.dumps(GROUPS), encoding="utf-8-sig")
    given = by_hand(seed=5)

    def opened(views):
        return load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3), views=views).views

    assert opened(given) is given
    assert same(opened(GROUPS), by_hand())
    assert same(opened(str(as_json)), by_hand()) and same(opened(str(with_mark)), by_hand())
    assert same(opened("color_spatial"), preset_views(224, name="color_spatial"))
    assert same(opened(f"{script}:views"), StructuredViews({"tone": [K.RandomInvert()]}, seed=4))
    assert same(opened(None), preset_views(8))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "either 'preset' or 'groups': got {}"),
        ({"preset": "color_spatial", "groups": {}}, "either 'preset' or 'groups'"),
        ([["ColorJitter"]], "expected a mapping"),
        ({"preset": "colours"}, "preset: expected one of 'color_spatial'.*got 'colours'"),
        (
            {"preset": "color_spatial", "then": [], "seed": 1},
            "expected only preset, size, normalize, plan, cross_image, constrained_crop: got then, seed too",
        ),
        ({"preset": "color_spatial", "size": 8, "plan": "both"}, "plan: expected one of 'shared_query'.*got 'both'"),
        ({"groups": {}, "sede": 1}, "views: expected constrained_crop, cross_image, .*groups.*: got sede"),
        ({"groups": {}, "seed": 1, "rank": 0}, "got rank, seed"),
        ({"groups": {"color": "ColorJitter"}}, r"groups\['color'\] as a list of operations .*: got 'ColorJitter'"),
        ({"groups": {"color": ["ColorJitter"]}}, r"as \[name, arguments\]: got 'ColorJitter'"),
        ({"groups": {"color": [[]]}}, r"\[name, arguments\]: got \[\]"),
        ({"groups": {"color": [["ColorJitter", {}, {}]]}}, r"\[name, arguments\]: got"),
        ({"groups": {"color": [["ColourJitter"]]}}, "2-D operation of kornia.augmentation: got 'ColourJitter'"),
        ({"groups": {}, "then": [["Blur"]]}, "kornia.augmentation: got 'Blur'"),
        ({"groups": {"color": [["ColorJitter", {"hues": 0.1}]]}}, r"ColorJitter does not take {'hues': 0.1} \(.*hues"),
        ({"groups": {"color": [["ColorJitter", {"hue": 3.0}]]}}, "ColorJitter does not take {'hue': 3.0}"),
        ({"groups": {"color": [["RandomInvert"]]}, "cross_image": ["hue"]}, "cross_image: expected names of groups"),
    ],
)
def test_bad_views(spec, message):
    with pytest.raises(ValueError, match=message):
        build_views(spec)


# ---- code: the caller's choice, never the card's


def test_backbones_of_the_callers_own(tmp_path, monkeypatch):
    model = plain()
    model.save(tmp_path / "m.pt", card={"backbone": "torchvision:resnet18"})
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "beside_it.py", "WIDTH = 4\n")
    script = write(
        tmp_path / "mine" / "net.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "import beside_it\n@dataclass\nclass Options:\n    width: int = beside_it.WIDTH\n"
        "class Net(nn.Conv2d):\n    def __init__(self):\n        super().__init__(3, Options().width, 3)\n",
    )
    (tmp_path / "later").mkdir()
    write(tmp_path / "later" / "beside_it.py", "WIDTH = 9\n")  # what lies beside the script comes first
    monkeypatch.syspath_prepend(tmp_path / "later")
    before = list(sys.path)
    assert equal(load(tmp_path / "m.pt", backbone=f"{script}:Net").model, model)
    assert sys.path == before
    monkeypatch.delitem(sys.modules, "beside_it")
    monkeypatch.syspath_prepend(tmp_path / "mine")
    assert equal(load(tmp_path / "m.pt", backbone="net:Net").model, model)
    given = nn.Conv2d(3, 4, 3)
    opened = load(tmp_path / "m.pt", backbone=given).model
    assert opened.backbone is given and equal(opened, model)


def test_a_script_that_fails_leaves_no_path_behind(tmp_path):
    script = write(tmp_path / "net.py", "1 / 0\n")
    before = list(sys.path)
    with pytest.raises(ZeroDivisionError):
        build_backbone(f"{script}:Net", code=True)
    assert sys.path == before


def test_a_library_may_be_named_where_the_card_names_code(tmp_path):
    model = heads()
    model.save(tmp_path / "m.pt", card={"backbone": "train.py:Net"})
    assert equal(load(tmp_path / "m.pt", backbone=TINY).model, model)


@pytest.fixture
def trap(tmp_path):
    """A script that leaves a mark when it is run."""
    mark = tmp_path / "mark"
    script = write(tmp_path / "trap.py", f"open({str(mark)!r}, 'w')\nspring = lambda: open({str(mark)!r}, 'w')\n")
    yield script
    assert not mark.exists(), "code ran that the card had named"


@pytest.mark.parametrize("backbone", ["os:abort", "TRAP:spring", "builtins:exit", "torchvision.models:resnet18", "os"])
def test_a_card_may_not_choose_code(tmp_path, trap, backbone):
    backbone = backbone.replace("TRAP", str(trap))
    plain().save(tmp_path / "m.pt", card={"backbone": backbone})
    with pytest.raises(
        ValueError, match="as a checkpoint may not choose code to run: .*; if the code is yours, pass backbone="
    ):
        load(tmp_path / "m.pt")


@pytest.mark.parametrize("backbone", [3, ["os", "abort"], {"name": "resnet18"}, torch.ones(2)])
def test_a_card_names_its_backbone_by_a_string(tmp_path, backbone):
    plain().save(tmp_path / "m.pt", card={"backbone": backbone})
    with pytest.raises(ValueError, match="card's backbone as a string: got (int|list|dict|Tensor)"):
        load(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ("TRAP:spring", "expected a mapping with either 'preset' or 'groups': got '.*trap.py:spring'"),
        ("views.json", "expected a mapping .*got 'views.json'"),
        ({"groups": {"color": [["os.abort"]]}}, "kornia.augmentation: got 'os.abort'"),
        ({"groups": {"color": [["__import__", {"name": "os"}]]}}, "kornia.augmentation: got '__import__'"),
        ({"groups": {"color": [["__builtins__"]]}}, "kornia.augmentation: got '__builtins__'"),
        ({"groups": {"color": [["auto"]]}}, "kornia.augmentation: got 'auto'"),
        ({"groups": {}, "then": [["__loader__"]]}, "kornia.augmentation: got '__loader__'"),
    ],
)
def test_views_on_a_card_are_plain_data(tmp_path, trap, views, message):
    views = views.replace("TRAP", str(trap)) if isinstance(views, str) else views
    plain().save(tmp_path / "m.pt", card={"views": views})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3))


def test_the_caller_may_replace_views_that_are_refused(tmp_path):
    plain().save(tmp_path / "m.pt", card={"views": "train.py:views"})
    opened = load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3), views={"preset": "content_only", "size": 8})
    assert opened.views.plan.spaces == ("content",)


class Trap:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("place", ["card", "state_dict", "other"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, place):
    mark = tmp_path / "mark"
    torch.save(content(plain()) | {place: {"x": Trap(mark)}}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="m.pt: expected a checkpoint of tensors and plain data: could not be read"):
        load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3))
    assert not mark.exists()


# ---- what cannot be opened says why


def test_nothing_to_open(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nothing.pt: expected a run's folder or a checkpoint: got no such file"
    ):
        load(tmp_path / "nothing.pt")
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(FileNotFoundError, match="folder with model.pt or checkpoint.pt: got neither"):
        load(tmp_path)


@pytest.mark.parametrize("broken", [b"hello", b"\x00\x01", b"PK\x03\x04 no archive"])
def test_a_file_that_cannot_be_read(tmp_path, broken):
    (tmp_path / "m.pt").write_bytes(broken)
    with pytest.raises(
        ValueError, match=r"m\.pt: expected a checkpoint of tensors and plain data: could not be read \("
    ):
        load(tmp_path / "m.pt")


def test_a_file_that_was_cut_off(tmp_path):
    plain().save(tmp_path / "m.pt")
    (tmp_path / "m.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:-400])
    with pytest.raises(ValueError, match="could not be read") as error:
        load(tmp_path / "m.pt")
    assert "\n" not in str(error.value)


CONFIG = plain().config()
STATE = plain().state_dict()
LIGHTNING = {"epoch": 3, "global_step": 10, "pytorch-lightning_version": "2.6", "state_dict": STATE, "loops": {}}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (torch.ones(3), "with its configuration and its weights: got Tensor"),
        ([1, 2], "got list"),
        (STATE, r"no configuration of the heads \(keys: backbone\.weight, .*weights alone do not define"),
        ({}, r"no configuration of the heads \(keys: nothing\)"),
        (LIGHTNING, r"no configuration of the heads \(keys: epoch, .*'config': model\.config\(\)"),
        ({"config": {"lr": 0.1}, "state_dict": STATE}, "no configuration of the heads"),
        ({"config": {"spaces": SPACES, "hidden": {}}, "state_dict": STATE}, "no configuration of the heads"),
        ({"config": 3, "state_dict": STATE}, "no configuration of the heads"),
        ({"config": CONFIG}, r"got no 'state_dict' in it \(keys: config\)"),
        ({"config": CONFIG, "state_dict": 3}, "got no 'state_dict'"),
        ({"config": CONFIG, "state_dict": STATE, "card": [1]}, "expected the card as a mapping: got list"),
        ({"config": CONFIG | {"depth": 3}, "state_dict": STATE}, "is not valid for StyleHeads .*depth"),
        ({"config": CONFIG | {"spaces": [1]}, "state_dict": STATE}, "is not valid for StyleHeads .*spaces"),
        ({"config": CONFIG | {"in_features": 5}, "state_dict": STATE}, "another backbone than Conv2d: .*size mismatch"),
    ],
)
def test_a_file_that_says_too_little(tmp_path, stored, message):
    torch.save(stored, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("card", [None, {}, {"views": {"preset": "color_spatial"}}])
def test_a_card_that_names_no_backbone(tmp_path, card):
    plain().save(tmp_path / "m.pt", card=card)
    with pytest.raises(ValueError, match=r"m\.pt: expected the card to name the backbone: got none; pass backbone="):
        load(tmp_path / "m.pt")
    opened = load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3), views=by_hand())
    assert opened.card == (card or {})


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ([1], "expected the card as a mapping: got list"),
        ({"family": "simcrl"}, "family to be one of simclr, vicreg, barlow, .*L2-normalized for scores: got 'simcrl'"),
        ({"family": ["simclr"]}, "family to be one of"),
        ({"size": "32"}, "size in whole pixels, 1 or more: got '32'"),
        ({"size": True}, "size in whole pixels"),
        ({"size": 0}, "size in whole pixels"),
        ({"view": {"preset": "color_spatial"}}, "expected the card's key 'views': got 'view', which is not used"),
        ({"back_bone": TINY}, "expected the card's key 'backbone': got 'back_bone'"),
        ({"FAMILY": "vicreg"}, "expected the card's key 'family': got 'FAMILY'"),
        ({"sizes": 32}, "expected the card's key 'size': got 'sizes'"),
        ({"names": "a"}, "expected the card's key 'name': got 'names'"),
    ],
)
def test_a_card_that_would_be_read_wrongly(tmp_path, card, message):
    with pytest.raises(ValueError, match=f"card: .*{message}"):
        plain().save(tmp_path / "m.pt", card=card)
    assert not list(tmp_path.iterdir())
    torch.save({"config": CONFIG, "state_dict": STATE, "card": card}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=rf"m\.pt: .*{message}"):
        load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"out": Path("a")}, "expected plain data .*got PosixPath in 'out'"),
        ({"views": {"groups": {"color": [nn.Identity()]}}}, "got Identity in 'views'"),
        ({"notes": [1, {"a": ({3},)}]}, "got set in 'notes'"),
    ],
)
def test_a_card_that_would_not_open_again_is_not_saved(tmp_path, card, message):
    with pytest.raises(ValueError, match=message):
        plain().save(tmp_path / "m.pt", card=card)
    assert not list(tmp_path.iterdir())


def test_a_card_keeps_keys_of_ones_own(tmp_path):
    card = {"commit": "a1b2", "notes": ["long"], "seed": 3, 4: "four", "family": None, "size": None}
    card |= {"username": "me", "filename": "m", "resize": 8, "rename": 1, "viewer": "x", "game": 2}
    plain().save(tmp_path / "m.pt", card=card)
    assert load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3)).card == card


def test_weights_of_another_backbone(tmp_path):
    heads().save(tmp_path / "m.pt", card={"backbone": "timm:test_vit"})
    with pytest.raises(ValueError, match="belongs to another backbone than VisionTransformer"):
        load(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="belongs to another backbone than Conv2d"):
        load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("torchvision:resnet19", "backbone: expected a classification model of torchvision .*: got 'resnet19'"),
        ("timm:resnet19x", "backbone: expected a model of timm: got 'resnet19x'"),
        ("timm:test_resnet.no_such_weights", "expected a model of timm: got 'test_resnet.no_such_weights'"),
        ("torchvision:", "expected torchvision:NAME, timm:NAME or FILE.py:NAME: got 'torchvision:'"),
    ],
)
def test_unknown_models(tmp_path, backbone, message):
    plain().save(tmp_path / "m.pt", card={"backbone": backbone})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        build_backbone(backbone)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "backbone: expected torchvision:NAME, timm:NAME or FILE.py:NAME: got 'resnet18'"),
        ("HERE/none.py:Net", "backbone: expected a Python file: got .*none.py, which is not a file"),
        ("HERE/net.py:", "got '.*net.py:'"),
        ("HERE/net.py:Other", "backbone: .*net.py has no 'Other'"),
        ("HERE/net.py:make", "backbone: expected .*net.py:make to make an nn.Module: got int"),
        (":Net", "backbone: expected FILE.py:NAME or MODULE:NAME: got ':Net'"),
        (
            "no_such_module:Net",
            r"backbone: expected a module that can be imported: 'no_such_module' can not \(No module",
        ),
    ],
)
def test_bad_code(tmp_path, spec, message):
    write(tmp_path / "net.py", "def make():\n    return 3\n")
    with pytest.raises(ValueError, match=message):
        build_backbone(spec.replace("HERE", str(tmp_path)), code=True)


@pytest.mark.parametrize("spec", ["net.py:make", "./net.py:make", "../here/net.py:make", ".hidden/net.py:make"])
def test_code_lies_anywhere_below_or_above_the_folder_that_one_is_in(tmp_path, monkeypatch, spec):
    (tmp_path / "here" / ".hidden").mkdir(parents=True)
    text = "from torch import nn\n\ndef make():\n    return nn.Linear(3, 2)\n"
    for folder in ("here", "here/.hidden"):
        write(tmp_path / folder / "net.py", text)
    monkeypatch.chdir(tmp_path / "here")
    assert isinstance(build_backbone(spec, code=True), nn.Linear)
    with pytest.raises(ValueError, match=r"expected FILE.py:NAME or MODULE:NAME: got '\.here:make'"):
        build_backbone(".here:make", code=True)


def test_code_has_to_be_allowed(trap):
    with pytest.raises(ValueError, match="backbone: expected torchvision:NAME or timm:NAME: got '.*trap.py:spring'"):
        build_backbone(f"{trap}:spring")
    with pytest.raises(ValueError, match="views: expected a mapping"):
        build_views(f"{trap}:spring")


@pytest.mark.parametrize(
    ("spec", "text", "message"),
    [
        ("HERE/v.json", None, r"views: expected a JSON file: .*v\.json could not be read \(.*No such file"),
        ("HERE/v.json", '{"groups": ', r"views: expected a JSON file: .*v\.json could not be read \(Expecting value"),
        ("HERE/v.json", "[1, 2]", r"views: expected a mapping with either 'preset' or 'groups': got \[1, 2\]"),
        ("HERE/v.json", '"HERE/v.py:views"', "views: expected a mapping .*got '.*v.py:views'"),
        ("HERE/v.py:views", "views = dict", "views: expected .*v.py:views to make StructuredViews: got dict"),
        ("HERE/v.py:other", "views = dict", "views: .*v.py has no 'other'"),
        ("no_such_preset", None, "preset: expected one of .*got 'no_such_preset'"),
    ],
)
def test_bad_views_of_the_caller(tmp_path, spec, text, message):
    spec = spec.replace("HERE", str(tmp_path))
    if text is not None:
        write(Path(spec.split(":")[0]), text)
    plain().save(tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3), views=spec)


# ---- the log


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ('{"step": 0}\n{"step": 1}\n', [0, 1]),
        ('{"step": 0}\n{"step": 1}', [0, 1]),
        ('{"step": 0}\n\n  \n{"step": 1}\n\n', [0, 1]),
        ('{"step": 0}\n{"step": 1, "loss"', [0]),
        ('{"st', []),
    ],
)
def test_a_log_is_read_up_to_where_it_was_cut_off(tmp_path, text, steps):
    assert [e["step"] for e in read_log(write(tmp_path / "log.jsonl", text))] == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 0}\n{"step": 1, "lo\n{"step": 2}\n', 'log.jsonl, line 2: expected a JSON object: got \'{"step": 1'),
        ('\n{"step": 0}\nhello\n{"st', "line 3: expected a JSON object: got 'hello'"),
        ('{"step": 0}\n[1, 2]\n', r"line 2: expected a JSON object: got '\[1, 2\]'"),
        ("3\n" + '{"step": 0}\n', "line 1: expected a JSON object: got '3'"),
    ],
)
def test_a_broken_log_says_where(tmp_path, text, message):
    log = write(tmp_path / "log.jsonl", text)
    with pytest.raises(ValueError, match=message):
        read_log(log)
    plain().save(tmp_path / "model.pt")
    run = load(tmp_path, backbone=nn.Conv2d(3, 4, 3))  # the model opens all the same
    assert run.log == [] and re.search(message, run.log_problem)


# ---- what a review found


def test_timm_with_its_classifier_opens(tmp_path):
    StyleHeads(timm.create_model("test_resnet"), {"content": 2}, hidden=()).save(
        tmp_path / "m.pt", card={"backbone": "timm:test_resnet"}
    )
    load(tmp_path / "m.pt")


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_a_timm_file_of_0_1_0_opens(tmp_path, model):
    """There the classifier stayed in the backbone, and in the file."""
    net = timm.create_model(model)
    saved = StyleHeads(net, SPACES, hidden=())
    classifier = {f"backbone.model.{k}": v for k, v in net.state_dict().items() if k.startswith(("fc.", "head."))}
    stored = content(saved, card={"backbone": f"timm:{model}"})
    stored["state_dict"] |= classifier
    assert len(classifier) == 2 and stored["state_dict"].keys() - saved.state_dict().keys() == classifier.keys()
    torch.save(stored, tmp_path / "old.pt")
    opened, x = load(tmp_path / "old.pt").model, torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        assert all(torch.equal(z, saved.eval()(x)[s]) for s, z in opened(x).items())


@pytest.mark.parametrize("content", [b"", b".hello world", b"Ghello"])
def test_no_checkpoint(tmp_path, content):
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.pt: expected a checkpoint"):
        load(tmp_path / "m.pt")


def test_a_card_starts_no_download(monkeypatch):
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("asked the network"))
    for name in ("torchvision:fasterrcnn_resnet50_fpn",):  # and timm:hf-hub:a/b, which tries for 30 s
        with pytest.raises(ValueError):
            build_backbone(name)


@pytest.mark.parametrize(
    "spec",
    [
        {"groups": [1]},
        {"groups": {"color": 3}},
        {"groups": {"color": [["ColorJitter", 0.4]]}},
        {"groups": {"color": [["ColorJitter", [0.4]]]}},
        {"groups": {"color": [["AugmentationSequential"]]}},
        {"preset": "color_spatial", "size": "x"},
        {"preset": "content_only", "size": 0},
        {"preset": "color_spatial", "size": 8, "cross_image": 3},
        {"preset": "color_spatial", "size": 8, "cross_image": "color"},
        {"preset": "color_spatial", "size": 8, "constrained_crop": "x"},
    ],
)
def test_broken_views_on_a_card(spec):
    with pytest.raises(ValueError, match="views"):
        build_views(spec)


def test_state_of_other_keys(tmp_path):
    torch.save({"config": plain().config(), "state_dict": {1: torch.ones(2)}}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="m.pt"):
        load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3))


def test_what_cannot_be_called():
    with pytest.raises(ValueError, match="os:sep"):
        build_backbone("os:sep", code=True)


def test_a_preset_without_a_size_takes_the_cards(tmp_path):
    def made(views, given=None):
        plain().save(tmp_path / "m.pt", card={"views": views, "size": 24})
        return load(tmp_path / "m.pt", backbone=nn.Conv2d(3, 4, 3), views=given).views(torch.rand(1, 3, 30, 30))

    for views in ({"preset": "color_spatial"}, "color_spatial"):
        assert made(views).views.shape[-2:] == (24, 24)
    assert made({"preset": "color_spatial", "size": 16}).views.shape[-2:] == (16, 16)
    (tmp_path / "v.json").write_text('{"preset": "color_spatial"}')
    assert made(None, str(tmp_path / "v.json")).views.shape[-2:] == (24, 24)
    assert made(None, {"preset": "color_spatial"}).views.shape[-2:] == (24, 24)


def test_a_card_with_an_empty_backbone(tmp_path):
    plain().save(tmp_path / "m.pt", card={"backbone": " "})
    with pytest.raises(ValueError, match="expected the card to name the backbone, such as .*: got ' '"):
        load(tmp_path / "m.pt")


def test_a_log_of_another_system_is_read(tmp_path):
    text = '\ufeff{"step": 0, "note": "a\u2028b"}\r\n{"step": 1}\r\n'
    (tmp_path / "log.jsonl").write_bytes(text.encode())
    assert [e["step"] for e in read_log(tmp_path / "log.jsonl")] == [0, 1]


def test_two_scripts_have_helpers_of_the_same_name(tmp_path):
    for k, folder in enumerate(("a", "b"), 1):
        (tmp_path / folder / "parts").mkdir(parents=True)
        (tmp_path / folder / "blocks.py").write_text(f"W = {k}\n")
        (tmp_path / folder / "parts" / "__init__.py").write_text("")
        (tmp_path / folder / "parts" / "deep.py").write_text(f"V = {10 * k}\n")
        (tmp_path / folder / "net.py").write_text(
            "from blocks import W\nfrom parts.deep import V\nfrom torch import nn\n"
            "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(W, V)\n"
        )
    for k, folder in ((1, "a"), (2, "b"), (1, "a")):
        net = build_backbone(f"{tmp_path / folder / 'net.py'}:Net", code=True)
        assert (net.in_features, net.out_features) == (k, 10 * k)
