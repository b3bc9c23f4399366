"""The weights of a backbone out of any file that a training left, never of another network and never in part."""

import argparse
import copy
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from ssd_addon.auditing import load_weights, named_backbones
from ssd_addon.auditing.holders import state_dicts_of


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu, self.layer1 = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3),
        )

    def forward(self, x):
        return self.layer1(self.relu(self.bn1(self.conv1(x)))).mean((2, 3))


def trained():
    torch.manual_seed(1)
    net = Small()
    net(torch.rand(4, 3, 8, 8))
    return net


def under(prefix, state):
    return {f"{prefix}{k}": t for k, t in state.items()}


def lightly(state):
    """As a lightly module of Sequential(*list(net.children())) saves it under Lightning."""
    names = {"conv1": "0", "bn1": "1", "relu": "2", "layer1": "3"}
    numbered = {f"backbone.{names[k.split('.')[0]]}.{k.split('.')[1]}": t for k, t in state.items()}
    return {"state_dict": numbered | {"projection_head.layers.0.weight": torch.rand(2, 6)}, "epoch": 3}


FORMS = {
    "a state dict": lambda s: s,
    "a training script's": lambda s: {"model": under("module.", s), "optimizer": {"state": {}}, "epoch": 3},
    "Lightning": lambda s: {"state_dict": under("model.backbone.", s) | {"criterion.temperature": torch.ones(())}},
    "lightly": lightly,
    "lightly, not under Lightning": lambda s: lightly(s)["state_dict"],
    "compiled and averaged": lambda s: {"state_dict": under("_orig_mod.module.", s)},
    "a teacher's": lambda s: {"teacher": under("backbone.", s), "student": under("other.", {"x": torch.ones(1)})},
    "without counters": lambda s: {k: t for k, t in s.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_in_every_form(form, tmp_path):
    source, net = trained(), Small()
    torch.save(FORMS[form](source.state_dict()), tmp_path / "w.pt")
    said = load_weights(net, tmp_path / "w.pt")
    assert all(torch.equal(t, net.state_dict()[k]) for k, t in source.state_dict().items() if "num_batches" not in k)
    assert said.startswith(f"{len(source.state_dict()) - ('counters' in form)} tensors")


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    source, net = trained(), Small()
    save_file(under("backbone.", source.state_dict()), tmp_path / "w.safetensors")
    load_weights(net, tmp_path / "w.safetensors")
    assert torch.equal(net.conv1.weight, source.conv1.weight)


def test_several_networks_in_a_file_are_told_apart_by_the_prefix(tmp_path):
    one, two, net = trained(), Small(), Small()
    torch.save(under("backbone.", one.state_dict()) | under("backbone_momentum.", two.state_dict()), tmp_path / "w.pt")
    several = r"several that fit, under 'backbone', 'backbone_momentum'; choose one with prefix='backbone_momentum'"
    with pytest.raises(ValueError, match=several):
        load_weights(net, tmp_path / "w.pt")
    for prefix in ("backbone_momentum", "backbone_momentum."):
        load_weights(net, tmp_path / "w.pt", prefix=prefix)
        assert torch.equal(net.conv1.weight, two.conv1.weight)
    with pytest.raises(ValueError, match=r"under the prefix 'teacher': got them under 'backbone', "):
        load_weights(net, tmp_path / "w.pt", prefix="teacher")


HELD = {
    "an average beside it": lambda a, b: {"epoch": 1, "state_dict": a, "state_dict_ema": b},
    "DINO": lambda a, b: {"student": under("module.backbone.", a), "teacher": under("backbone.", b)},
    "MoCo": lambda a, b: {"state_dict": under("module.encoder_q.", a) | under("module.encoder_k.", b)},
    "a compiled block": lambda a, b: {
        "model": a,
        "ema": {k.replace("layer1", "_orig_mod.layer1"): b[k] for k in b},
    },
}


@pytest.mark.parametrize(
    "form,first,second",
    [
        ("an average beside it", ["state_dict", "state_dict."], ["state_dict_ema", "state_dict_ema."]),
        ("DINO", ["student", "student.module.backbone.", "module.backbone"], ["teacher", "teacher.backbone"]),
        ("MoCo", ["module.encoder_q.", "encoder_q"], ["module.encoder_k", "state_dict.module.encoder_k."]),
        ("a compiled block", ["model"], ["ema"]),
    ],
)
def test_a_prefix_names_a_network_by_what_leads_to_it_by_its_keys_or_by_both(form, first, second, tmp_path):
    one, two, net = trained(), Small(), Small()
    torch.save(HELD[form](one.state_dict(), two.state_dict()), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="got several that fit, under '.*', '.*'; choose one with prefix="):
        load_weights(net, tmp_path / "w.pt")
    for prefixes, source in ((first, one), (second, two)):
        for prefix in prefixes:
            load_weights(net, tmp_path / "w.pt", prefix=prefix)
            assert all(torch.equal(t, source.state_dict()[k]) for k, t in net.state_dict().items()), prefix


def test_of_two_networks_that_a_prefix_names_the_one_that_lies_just_there_is_taken(tmp_path):
    one, two, net = trained(), Small(), Small()
    torch.save({"model": under("backbone.", two.state_dict()), "backbone": one.state_dict()}, tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt", prefix="backbone")
    assert torch.equal(net.conv1.weight, one.conv1.weight)
    torch.save({k: {"backbone": x.state_dict()} for k, x in {"a": one, "b": two}.items()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="prefix 'backbone': got them under 'a.backbone', 'b.backbone'"):
        load_weights(net, tmp_path / "w.pt", prefix="backbone")


@pytest.mark.parametrize(
    "holder",
    ["module", "state_dict_ema", "model_ema", "encoder", "teacher", "classy_state_dict.base_model.model.trunk"],
)
def test_a_state_dict_is_found_wherever_it_lies(holder, tmp_path):
    source, net = trained(), Small()
    content = under("_feature_blocks.", source.state_dict())
    for name in reversed(holder.split(".")):
        content = {name: content, "step": 1, "scale": torch.ones(())}
    torch.save(content, tmp_path / "w.pt")
    assert f"'{holder}._feature_blocks'" in load_weights(net, tmp_path / "w.pt")
    assert torch.equal(net.conv1.weight, source.conv1.weight)
    torch.save({"a": {"b": {"c": {"d": {"e": source.state_dict()}}}}}, tmp_path / "deep.pt")
    with pytest.raises(ValueError, match="expected a mapping of weights: got none in it"):
        load_weights(net, tmp_path / "deep.pt")


def test_a_networks_own_state_dict_is_taken_whatever_its_parts_are_called(tmp_path):
    inside = nn.Module()
    inside.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    partly = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    partly[1] = torch.compile(partly[1])
    alike = nn.Linear(2, 3)
    alike.module = nn.Linear(3, 2)  # without the names of wrappers, its keys are those of the other
    for net in (inside, partly, alike):
        state = {k: torch.rand_like(t) for k, t in net.state_dict().items()}
        for saved in (state, under("module.", state)):
            torch.save(saved, tmp_path / "w.pt")
            load_weights(net, tmp_path / "w.pt")
            assert all(torch.equal(t, state[k]) for k, t in net.state_dict().items())
    plain = {k.replace("_orig_mod.", ""): t for k, t in partly.state_dict().items()}
    torch.save(under("backbone.", {k: t + 1 for k, t in plain.items()}), tmp_path / "w.pt")
    load_weights(partly, tmp_path / "w.pt")
    assert torch.equal(partly[1].weight, plain["1.weight"])  # its own tensors were filled


def numbered(net):
    """Its state dict as `nn.Sequential(*net.children())` has it."""
    return nn.Sequential(*net.children()).state_dict()


def deeper(width=None):
    """As torchvision's resnet34 holds every key of resnet18."""
    net = Small()
    net.layer1 = nn.Sequential(nn.Conv2d(4, 6, 3), *([] if width is None else [nn.Conv2d(6, 6, 1)]))
    return net


def test_weights_of_a_deeper_network_are_refused(tmp_path):
    net, source = deeper(), deeper(1)
    before = copy.deepcopy(net.state_dict())
    message = (
        r"w\.pt: expected the weights of Small, all of them: got 2 more inside its parts \(layer1\.1\.weight, .*deeper"
    )
    for prefix in ("", "backbone."):
        torch.save(under(prefix, source.state_dict()), tmp_path / "w.pt")
        with pytest.raises(ValueError, match=message):
            load_weights(net, tmp_path / "w.pt")
    torch.save(numbered(source), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"2 more inside its parts \(3\.1\.weight"):
        load_weights(net, tmp_path / "w.pt")
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    with pytest.raises(ValueError, match="expected the weights of ResNet, all of them: got .*deeper or wider network"):
        torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pt")
        named_backbones(["torchvision:resnet18"], weights=[tmp_path / "r34.pt"])
    state = deeper().state_dict()
    beside = under("momentum.", source.state_dict()) | {"layer2.0.weight": torch.ones(2)}  # other networks and parts
    inside = {"layer1.0.attn_mask": torch.ones(2), "layer1.0.index": torch.ones(2, dtype=torch.long)}  # constants
    torch.save(
        state | beside | inside | {"relu.fc.weight": torch.ones(2), "conv1.fc.bias": torch.ones(2)}, tmp_path / "w.pt"
    )
    load_weights(net, tmp_path / "w.pt", prefix="")
    assert torch.equal(net.conv1.weight, state["conv1.weight"])


def test_weights_of_what_a_network_left_out_are_refused_and_those_of_masks_are_not(tmp_path):
    net = deeper()
    net.layer1[0].scale, net.fc_norm = nn.Identity(), nn.Identity()
    state = deeper().state_dict()
    torch.save(state | {"layer1.0.scale.gamma": torch.ones(2)}, tmp_path / "w.pt")  # LayerScale
    with pytest.raises(ValueError, match=r"1 more inside its parts \(layer1\.0\.scale\.gamma"):
        load_weights(net, tmp_path / "w.pt")
    known = ("layer1.0.mask_token", "layer1.0.activation_post_process.min_val", "fc_norm.weight")
    torch.save(state | {k: torch.ones(2) for k in known}, tmp_path / "w.pt")
    assert "3 others" in load_weights(net, tmp_path / "w.pt")


def test_of_several_networks_the_one_that_fits_without_remainder_is_taken(tmp_path):
    net, small, large = deeper(), deeper(), deeper(1)
    torch.save({"student": large.state_dict(), "teacher": small.state_dict()}, tmp_path / "w.pt")
    assert "under 'teacher'" in load_weights(net, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="deeper"):
        load_weights(net, tmp_path / "w.pt", prefix="student")


def narrower(state):
    return {k: t for k, t in state.items() if not k.startswith("layer1")}


@pytest.mark.parametrize(
    "content,message",
    [
        (lambda s: narrower(s), r"got 7 of its 9 tensors; missing are layer1\.weight, layer1\.bias$"),
        (
            lambda s: {"other.weight": torch.ones(2), "b": torch.ones(1)},
            r"got none of its keys \(conv1\.weight.*but keys",
        ),
        (lambda s: s | {"conv1.weight": torch.rand(4, 1, 3, 3)}, r"conv1\.weight \[4, 3, 3, 3\].*got \[4, 1, 3, 3\]"),
        (lambda s: {"epoch": 3}, "expected a mapping of weights: got none in it"),
        (lambda s: [1, 2], "expected a mapping of weights: got list"),
    ],
)
def test_other_weights_are_refused_and_nothing_is_loaded(content, message, tmp_path):
    net = Small()
    before = copy.deepcopy(net.state_dict())
    torch.save(content(trained().state_dict()), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        load_weights(net, tmp_path / "w.pt")
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"w\.pt: expected a file of weights: could not be read"):
        state_dicts_of(tmp_path / "w.pt")
    from safetensors.torch import save_file

    save_file(trained().state_dict(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "TEXT.SAFETENSORS").write_bytes(b"hello")
    for name in ("cut.safetensors", "TEXT.SAFETENSORS"):
        with pytest.raises(ValueError, match=rf"{name}: expected a file of weights: could not be read \(Safe"):
            state_dicts_of(tmp_path / name)
    for name in ("w.sft", "W.SAFETENSORS", "w.bin"):
        (tmp_path / name).write_bytes(whole)
        assert set(state_dicts_of(tmp_path / name)[""]) == set(Small().state_dict())
    with pytest.raises(FileNotFoundError, match="got no such file"):
        state_dicts_of(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="got a folder"):
        state_dicts_of(tmp_path)


class Code:
    """Runs when it is unpickled."""

    ran = 0

    def __reduce__(self):
        return type(self)._run, ("now",)

    @classmethod
    def _run(cls, *_):
        cls.ran += 1
        return cls()


def test_a_pickled_module_is_refused_with_what_to_save(tmp_path):
    for old in (False, True):
        for content, what in ((Small(), "an object"), ({"model": Small(), "epoch": 2}, "model")):
            torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
            with pytest.raises(ValueError, match=rf"{what}, pickled with its class .*save module\.state_dict\(\)"):
                state_dicts_of(tmp_path / "w.pt")


def test_other_objects_are_left_out_of_files_in_the_old_format_too(tmp_path):
    source, net = trained(), Small()
    content = {"state_dict": source.state_dict(), "args": argparse.Namespace(a=1), "code": Code()}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    load_weights(net, tmp_path / "w.pt")
    assert torch.equal(net.conv1.weight, source.conv1.weight) and Code.ran == 0


class Settings(dict):
    """As omegaconf's and argparse's containers of hyperparameters."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.flags = [Path("x"), {1, 2}]


def test_hyperparameters_of_any_kind_are_left_out_and_nothing_is_run(tmp_path):
    source, net = trained(), Small()
    beside = {"hyper_parameters": Settings(path=Path("x"), layer=nn.ReLU), "code": Code(), "epoch": 3}
    torch.save(beside | {"state_dict": under("backbone.", source.state_dict())}, tmp_path / "w.ckpt")
    assert load_weights(net, tmp_path / "w.ckpt").startswith("9 tensors under 'state_dict.backbone'")
    assert torch.equal(net.conv1.weight, source.conv1.weight) and Code.ran == 0
    torch.save(
        {k: nn.Parameter(t) if t.is_floating_point() else t for k, t in source.state_dict().items()}, tmp_path / "p.pt"
    )
    load_weights(net, tmp_path / "p.pt")
    torch.save({"state_dict": Code()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="expected a mapping of weights: got none in it"):
        load_weights(net, tmp_path / "code.pt")
    assert Code.ran == 0
    torch.save(under("backbone.", source.half().state_dict()), tmp_path / "half.pt")
    load_weights(net, tmp_path / "half.pt")
    assert net.conv1.weight.dtype == torch.float32


def test_a_torchscript_archive_is_refused_as_torch_would_run_its_code(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    torch.save(Small().state_dict(), path)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/constants.pkl", b"")  # by which torch.load recognizes one
    run = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **options: run.append(args))
    with pytest.raises(ValueError, match="it is a TorchScript archive, which holds code: save the module's state_dict"):
        load_weights(Small(), path)
    assert run == []


# ---- backbones by name


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet10t"])
def test_a_librarys_model_takes_weights_with_and_without_its_classifier(spec, tmp_path):
    home, name = spec.split(":")
    source = torchvision.models.get_model(name) if home == "torchvision" else timm.create_model(name)
    with torch.no_grad():
        source.layer1[0].conv1.weight.fill_(0.25)
    whole = source.state_dict()
    for state in (whole, {k: t for k, t in whole.items() if not k.startswith("fc.")}, under("backbone.", whole)):
        torch.save(state, tmp_path / "w.pt")
        said: list[str] = []
        (found,) = named_backbones([spec], weights=[tmp_path / "w.pt"], say=said.append).values()
        assert torch.equal(found.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
        assert "tensors" in said[0] and "others there" not in said[0]


def test_two_backbones_have_names_that_tell_them_apart(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Conv2d(3, 4, 3)\n\nready = nn.Conv2d(3, 4, 3)\n"
    )
    torch.save(nn.Conv2d(3, 4, 3).state_dict(), tmp_path / "w.pt")
    spec = f"{tmp_path}/net.py:make"
    assert list(named_backbones([spec, spec], weights=["-", tmp_path / "w.pt"])) == [spec, f"{spec} (w.pt)"]
    assert list(named_backbones([spec, spec])) == [spec, f"{spec}, again"]
    assert isinstance(next(iter(named_backbones([f"{tmp_path}/net.py:ready"]).values())), nn.Conv2d)
    with pytest.raises(
        ValueError, match="weights: expected a file for each of 2 models, in their order, - for none: got 1"
    ):
        named_backbones([spec, spec], weights=[tmp_path / "w.pt"])
    with pytest.raises(ValueError, match="model: expected one or two: got 3"):
        named_backbones([spec] * 3)
    with pytest.raises(ValueError, match="pretrained: expected only with torchvision:NAME or timm:NAME"):
        named_backbones([spec], pretrained=True)


def test_a_network_without_weights_says_so():
    said: list[str] = []
    named_backbones(["torchvision:resnet18"], say=said.append)
    assert "untrained network" in said[0]


def test_weights_that_cannot_be_downloaded_are_an_error_in_words(monkeypatch):
    def offline(*_, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(
        OSError, match=r"pretrained: expected weights of 'torchvision:resnet18' that can be loaded.*no route"
    ):
        named_backbones(["torchvision:resnet18"], pretrained=True)
