"""Style spaces with stable-pretraining: the page's scripts, and both of its forms of several views.

Installing it gives every lightning.pytorch.Trainer of an environment callbacks of its own, so it has one for itself:
tests/environments/stable_pretraining.sh makes it and runs this file.
"""

import math
import types

import pytest
import torch
from lightning.pytorch import Trainer
from scripts import script
from torch import nn

reason = "sh tests/environments/stable_pretraining.sh installs stable-pretraining"
spt = pytest.importorskip("stable_pretraining", reason=reason)

from ssd_addon import JointEntropyLoss, StyleHeads, ViewPlan  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

TINY = ["--images", "16", "--batch-size", "8", "--accelerator", "cpu"]
SPACES = {"content": 6, "spatial": 3, "color": 4}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name,probes",
    [
        ("before/stable_pretraining_simclr", ["embedding"]),
        ("stable_pretraining_simclr", ["embedding", "z_content", "z_spatial", "z_color"]),
    ],
)
def test_the_scripts_train_with_a_probe_on_every_output(name, probes, tmp_path):
    trainer = script(name).main([*TINY, "--out", str(tmp_path)])
    numbers = trainer.callback_metrics
    assert trainer.global_step == 2 and math.isfinite(numbers["fit/loss"])
    for probe in probes:
        assert math.isfinite(numbers[f"train/probe_{probe}_loss"])
        assert 0 <= numbers[f"eval/probe_{probe}_accuracy"] <= 1


@pytest.fixture
def module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    heads = StyleHeads(net, SPACES, in_features=8, hidden=())
    logged = {}
    return types.SimpleNamespace(
        heads=heads,
        criterion=JointEntropyLoss(),
        plan=ViewPlan.shared_query(SPACES),
        log=lambda name, value, **_: logged.update({name: value}),
        logged=logged,
    )


def views():
    images = torch.rand(4, 5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return [{"image": x, "label": torch.arange(5)} for x in images]


@pytest.mark.parametrize(
    "batch",
    [
        {"views": views()},
        {"views": dict(zip("abcd", views(), strict=True))},
        dict(zip(("view1", "view2", "view3", "view4"), views(), strict=True)),
        {"views": views(), **views()[0]},
        {"views": [{"image": view["image"]} for view in views()], "label": torch.arange(5)},
    ],
    ids=["a list", "named views", "named views at the top", "beside the image", "with one label"],
)
def test_views_come_as_a_list_or_named(module, batch):
    out = script("stable_pretraining_simclr").forward(module, {**batch, "batch_idx": 3}, "fit")
    z = module.heads([view["image"] for view in views()])
    assert out["loss"].item() == module.criterion(z).item() == module.logged["fit/loss"].item()
    assert out["label"].tolist() == list(range(5)) * 4 and out["embedding"].shape == (20, 8)
    for name, width in SPACES.items():
        assert out[f"z_{name}"].shape == (20, width) and torch.equal(out[f"z_{name}"], z[name].flatten(0, 1))


def test_a_plain_image_has_outputs_and_no_loss(module):
    out = script("stable_pretraining_simclr").forward(module, views()[0] | {"batch_idx": 0}, "validate")
    assert sorted(out) == ["embedding", "label", "z_color", "z_content", "z_spatial"]
    assert out["z_color"].shape == (5, 4)


@pytest.mark.parametrize("made", [True, False])
def test_labels_are_optional(module, made):
    unlabeled = [{"image": view["image"]} for view in views()]
    out = script("stable_pretraining_simclr").forward(module, {"views": unlabeled} if made else unlabeled[0], "fit")
    assert "label" not in out and len(out["embedding"]) == (20 if made else 5) and ("loss" in out) == made


def test_what_the_page_says_about_the_package():
    """Its own forward counts the number of the batch as a view; its installation adds callbacks to every Trainer."""
    from stable_pretraining.forward import simclr

    two = dict(zip(("view1", "view2"), views()[:2], strict=True))
    with pytest.raises(ValueError, match="exactly 2 views, got 3"):
        simclr(None, {**two, "batch_idx": 0}, "fit")
    from stable_pretraining.callbacks.factories import default

    assert len(default()) == 14
    added = {type(c).__name__ for c in default()}
    assert added <= {type(c).__name__ for c in Trainer(accelerator="cpu", logger=False).callbacks}
