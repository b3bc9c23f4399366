"""Backbones by name: each with weights of its own, names that tell them apart, and errors that say what is missing."""

import sys

import pytest
import torch
from torch import nn

from ssd_addon.__main__ import main
from ssd_addon.auditing import named_backbones
from ssd_addon.auditing.untrained import COPIES

CODE = """
import torch
from torch import nn

inst = nn.Conv2d(3, 4, 3)


def cached():
    return inst


def around():
    return nn.Sequential(inst)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        with open(__file__ + ".calls", "a") as calls:
            calls.write("x")

    def forward(self, x):
        y = self.conv(x)
        return {"last_hidden_state": y, "pooler_output": y.mean((2, 3))}


def default(width=4):
    return nn.Conv2d(3, width, 3)


def needs(width, *more, depth, **options):
    return nn.Conv2d(3, width, 3)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "one_module_for_both.py").write_text(CODE)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.save(nn.Conv2d(3, 4, 3).state_dict(), tmp_path / name / "last.ckpt")
    return tmp_path


@pytest.mark.parametrize("name", ["inst", "cached"])
def test_one_module_for_both_models_is_measured_with_both_weights(folder, name, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    files = [folder / f / "last.ckpt" for f in ("a", "b")]
    for weights in (files, [files[0], "-"], ["-", files[1]]):
        sys.modules.pop("one_module_for_both", None)
        spec = f"one_module_for_both:{name}"
        before = torch.load(files[0])["weight"] * 0 + 7
        import one_module_for_both

        with torch.no_grad():
            one_module_for_both.inst.weight.copy_(before)
        nets = list(named_backbones([spec, spec], weights=weights).values())
        assert nets[0] is not nets[1] and nets[0].weight is not nets[1].weight
        for net, file in zip(nets, weights, strict=True):
            assert torch.equal(net.weight, before if file == "-" else torch.load(file)["weight"])
    nets = list(named_backbones(["one_module_for_both:around", spec]).values())
    assert nets[0][0].weight is not nets[1].weight
    sys.modules.pop("one_module_for_both")


def test_files_of_one_name_are_told_apart_by_the_folders_around_them(folder):
    spec = f"{folder}/net.py:default"
    files = [folder / f / "last.ckpt" for f in ("a", "b")]
    assert list(named_backbones([spec, spec], weights=files)) == [f"{spec} ({f}/last.ckpt)" for f in ("a", "b")]
    assert list(named_backbones([spec, spec], weights=["-", files[1]])) == [spec, f"{spec} (last.ckpt)"]
    assert list(named_backbones([spec, spec], weights=[files[0]] * 2)) == [
        f"{spec} (last.ckpt)",
        f"{spec} (last.ckpt), again",
    ]


@pytest.mark.parametrize("name,missing", [("needs", "width, depth"), ("Net", "width")])
def test_a_function_that_needs_arguments_is_refused_with_their_names(folder, capsys, name, missing):
    assert main(["audit", f"{folder}/net.py:{name}", "--data", str(folder), "--out", str(folder / "a.html")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: MODEL: expected {folder}/net.py:{name} to be a module, or a function that needs no")
    assert err.endswith(f"got a function that needs {missing}\n")


def test_a_backbone_of_several_outputs_takes_weights(folder):
    torch.save({f"conv.{k}": t for k, t in nn.Conv2d(3, 4, 3).state_dict().items()}, folder / "two.pt")
    (net,) = named_backbones([f"{folder}/net.py:Two"], weights=[folder / "two.pt"], output="pooler_output").values()
    assert torch.equal(net.conv.weight, torch.load(folder / "two.pt")["conv.weight"])


def test_the_command_gives_the_audit_the_output_what_builds_a_network_and_whether_it_has_weights(folder, capsys):
    import pages
    from torchvision.utils import save_image

    (folder / "data").mkdir()
    for i, x in enumerate(pages.squares(20).images):
        save_image(x, folder / "data" / f"{i}.png")
    torch.save({f"conv.{k}": t for k, t in nn.Conv2d(3, 4, 3).state_dict().items()}, folder / "two.pt")
    options = ["--data", str(folder / "data"), "--out", str(folder / "a.html"), "--layers", "", "--draws", "1"]
    chosen = ["--weights", str(folder / "two.pt"), "--output", "pooler_output"]
    assert main(["audit", f"{folder}/net.py:Two", *options, "--size", "16", *chosen]) == 0, capsys.readouterr().err
    built = (folder / "net.py.calls").read_text()
    assert built == "x" * (1 + COPIES)  # the command gives the audit what builds the network
    assert "No weights were given" not in capsys.readouterr().out
    assert main(["audit", "torchvision:squeezenet1_1", *options, "--size", "32"]) == 0
    assert "No weights were given: this network is untrained." in capsys.readouterr().out
