"""lightly's loops, before and after, with every method: plain, in Lightning, on two processes, as its benchmark."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from lightly.data import LightlyDataset
from lightly.loss import BarlowTwinsLoss, DCLLoss, VICRegLoss
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.modules.heads import BarlowTwinsProjectionHead, SimCLRProjectionHead, VICRegProjectionHead
from lightly.models.utils import get_weight_decay_parameters
from lightly.utils.lars import LARS
from PIL import Image
from scripts import script
from torch import nn

from ssd_addon import DualAscent, JointEntropyLoss, StructuredTransform, StyleHeads, presets, recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
]

ROOT = Path(__file__).parents[2]
METHODS = ("simclr", "vicreg", "barlow")
SPACES = {"content": 8, "spatial": 4, "color": 4}
TINY = ["--images", "8", "--batch-size", "4", "--epochs", "1"]
TEN_EPOCHS = ["--batch-size", "4", "--epochs", "10"]  # lightly warms up for ten


class Small(nn.Module):
    """A network with the classifier `fc`, as a ResNet has it."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.wide = nn.Conv2d(8, width, 1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        return self.fc(self.wide(self.conv(x)).flatten(1))


class Heads:
    """`StyleHeads.heads` with hidden layers of 16."""

    @staticmethod
    def heads(in_features, spaces):
        return StyleHeads.heads(in_features, spaces, hidden=(16, 16))


def small(name, width=512):
    """A script around a small network and small heads."""
    module = script(name)
    made = functools.partial(Small, width)
    setattr(module, "resnet50" if width == 2048 else "resnet18", made)
    if hasattr(module, "SPACES"):
        module.SPACES = SPACES
        module.StyleHeads = Heads
    else:
        module.HEADS = {
            "simclr": lambda: SimCLRProjectionHead(width, 16, 8),
            "vicreg": lambda: VICRegProjectionHead(width, 16, 8, num_layers=2),
            "barlow": lambda: BarlowTwinsProjectionHead(width, 16, 8),
        }
    torch.manual_seed(0)
    return module, made


def moved(model, made):
    """Whether training changed the backbone. Not every weight: LARS moves a few by less than their rounding."""
    torch.manual_seed(0)
    start = made().conv[0].weight
    now = next(p for p in model.backbone.parameters())
    return now.shape == start.shape and bool((now != start).any()) and bool(now.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["before/lightly_plain", "lightly_plain", "lightly_gpu"])
def test_the_plain_loop_trains(name, method, capsys):
    module, made = small(name)
    model = module.main([*TINY, "--method", method, "--size", "16"])
    assert moved(model, made)
    assert np.isfinite(float(capsys.readouterr().out.split()[-1]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["before/lightly_lightning", "lightly_lightning"])
def test_the_lightning_loop_trains(name, method, tmp_path):
    module, made = small(name)
    options = ["--method", method, "--size", "16", "--accelerator", "cpu", "--out", str(tmp_path)]
    model = module.main([*TINY, *options])
    assert moved(model, made) and model.trainer.global_step == 2
    assert np.isfinite(float(model.trainer.callback_metrics["train_loss"]))
    assert list(tmp_path.glob("**/*.ckpt"))


@pytest.fixture
def folder(tmp_path):
    """Photographs of several sizes, one gray, in class folders of train and val."""
    rng = np.random.default_rng(0)
    for k, split in enumerate(("train", "val") * 4):
        shape = (20 + k, 24) if k == 2 else (20 + k, 24, 3)
        at = tmp_path / "data" / split / f"class{k % 3}"
        at.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(at / f"{k}.png")
    return tmp_path / "data"


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("name", ["before/lightly_plain", "lightly_plain", "lightly_gpu"])
def test_images_of_a_folder_are_read_by_lightlys_dataset(name, workers, folder, capsys):
    module, made = small(name)
    options = ["--size", "16", "--data", str(folder), "--workers", workers]
    assert moved(module.main([*TINY, *options]), made)
    assert np.isfinite(float(capsys.readouterr().out.split()[-1]))


def test_the_recommended_settings_as_they_are_written_down(folder):
    page = ROOT / "docs" / "pipelines" / "lightly.md"
    block, _ = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    backbone = Small(512)
    before = backbone.conv[0].weight.detach().clone()
    names = {"torch": torch, "backbone": backbone, "device": "cpu", "loading": {"batch_size": 4}}
    names |= {"LightlyDataset": LightlyDataset, "DataLoader": torch.utils.data.DataLoader}
    names |= {"args": SimpleNamespace(size=16, data=str(folder), epochs=1)}
    exec(compile(block, str(page), "exec"), names)
    assert torch.isfinite(names["loss"]) and (backbone.conv[0].weight != before).any()
    defaults = recipe("color_spatial", size=16)
    assert str(names["criterion"]) == str(JointEntropyLoss(**defaults.loss))


def test_lightlys_classifiers_as_the_page_gives_them_one_space():
    page = ROOT / "docs" / "pipelines" / "lightly.md"
    _, block = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    names = {"model": StyleHeads(Small(12), SPACES, hidden=())}
    exec(compile(block, str(page), "exec"), names)
    loader = torch.utils.data.DataLoader([(torch.rand(3, 16, 16), i % 10) for i in range(24)], batch_size=8)
    options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False}
    knn, linear = (pl.Trainer(**options, enable_checkpointing=False) for _ in range(2))
    knn.validate(names["knn"], [loader, loader], verbose=False)
    assert 0 <= knn.callback_metrics["val_knn_top1/dataloader_idx_1"] <= 1
    linear.fit(names["linear"], loader, loader)
    assert linear.callback_metrics["train_loss"].isfinite()


def test_a_masked_vit_has_no_parameter_without_a_gradient_after_what_the_page_says():
    backbone = MaskedVisionTransformerTIMM(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1))
    idle = {"mask_token", "vit.head.weight", "vit.head.bias"}
    for left in (idle, set()):
        model = StyleHeads(backbone, {"content": 4}, hidden=())
        model(torch.rand(2, 3, 32, 32))["content"].sum().backward()
        assert {n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None} == left
        backbone.vit.reset_classifier(0)
        backbone.mask_token.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- two processes


@pytest.mark.distributed
def test_two_processes_train_and_equal_one(tmp_path):
    """tests/support/lightly_ranks.py: both scripts with every method, then the numbers of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "tests/support/lightly_ranks.py", str(tmp_path)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text().split() == [
            *(f"{name}/{method}" for method in METHODS for name in ("before", "after", "equal"))
        ]


# ---------------------------------------------------------------------------------------------------- the benchmark


def benchmark(name, method, out, images="4"):
    module, made = small(name, 2048)
    if hasattr(module, "TRANSFORM"):
        module.TRANSFORM = StructuredTransform(**presets("color_spatial", size=16))
    more = ["--method", method, "--accelerator", "cpu", "--classes", "10", "--out", str(out)]
    return module, module.main([*TEN_EPOCHS, "--images", images, *more]), made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["before/lightly_benchmark", "lightly_benchmark"])
def test_the_benchmark_trains_and_can_be_opened_again(name, method, tmp_path):
    module, model, made = benchmark(name, method, tmp_path)
    numbers = model.trainer.callback_metrics
    assert moved(model, made) and model.trainer.global_step == 10
    for key in ("train_loss", "train_online_cls_loss", "train_online_cls_top1", "val_online_cls_top5"):
        assert np.isfinite(float(numbers[key])), key
    (saved,) = tmp_path.glob("**/*.ckpt")
    again = module.Benchmark.load_from_checkpoint(saved, weights_only=True)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rate_follows_lightlys_schedule_step_by_step(tmp_path, monkeypatch):
    """A warm-up of ten epochs, of two steps each, to the rate of batches of 4 images."""
    rates = []

    def step(optimizer, closure=None):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return original(optimizer, closure)

    original = LARS.step
    monkeypatch.setattr(LARS, "step", step)
    benchmark("lightly_benchmark", "vicreg", tmp_path, images="8")
    assert len(rates) == 20
    for k, seen in enumerate(rates, 1):
        assert seen == pytest.approx([0.3 * 4 / 256 * k / 20] * 3)


def test_the_classifier_sees_each_views_features_with_its_images_label(tmp_path):
    _, model, _ = benchmark("lightly_benchmark", "simclr", tmp_path)
    views, targets = [torch.rand(4, 3, 16, 16) for _ in range(4)], torch.tensor([3, 1, 4, 5])
    seen = []
    model.online_classifier.training_step = lambda labelled, _: (seen.append(labelled), (torch.zeros(()), {}))[1]
    model.log = model.log_dict = lambda *_, **__: None
    model.train()
    model.training_step((views, targets, None), 0)
    ((features, labels),) = seen
    assert not features.requires_grad
    whole = model(torch.cat(views)).detach()
    torch.testing.assert_close(features, whole)
    for v in range(4):
        for b in range(4):
            row = v * 4 + b
            assert labels[row] == targets[b], "view by view, images within"


def test_features_beside_embeddings_are_those_that_the_classifier_sees():
    """`model(views, features=True)` in the place of a backbone and heads of one's own."""
    torch.manual_seed(0)
    model = StyleHeads(Small(32), SPACES, hidden=())
    views = [torch.rand(4, 3, 16, 16) for _ in range(4)]
    z, features = model(views, features=True)
    assert features.shape == (4, 4, 32)
    model.backbone.fc = nn.Identity()
    torch.testing.assert_close(features.flatten(0, 1), model.backbone(torch.cat(views)))
    heads = StyleHeads.heads(32, SPACES, hidden=())
    heads.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith("projections")})
    plan = StructuredTransform(**presets("color_spatial", size=16)).plan
    criterion = JointEntropyLoss("vicreg")
    torch.testing.assert_close(criterion(heads(features.flatten(0, 1)), plan), criterion(z, plan))


@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_lightlys_groups_decay_the_weights_of_heads_alone(norm):
    heads = StyleHeads.heads(6, SPACES, hidden=(5, 5, 5), norm=norm)
    decayed, rest = ({id(p) for p in group} for group in get_weight_decay_parameters([heads]))
    names = {id(p): name for name, p in heads.named_parameters()}
    assert len(decayed) + len(rest) == len(names) and not decayed & rest
    shapes = dict(heads.named_parameters())
    assert {shapes[names[i]].ndim for i in decayed} == {2}, "weights"
    assert {shapes[names[i]].ndim for i in rest} == {1}, "biases and norms"


def test_what_the_loss_holds_is_not_decayed(tmp_path):
    _, model, _ = benchmark("lightly_benchmark", "simclr", tmp_path)
    temperature = nn.Parameter(torch.tensor(0.2))
    ascent = DualAscent(SPACES, tolerance=0.1, step_size=0.01)
    model.criterion = JointEntropyLoss("simclr", temperature=temperature, weights=ascent)
    (optimizer,), _ = model.configure_optimizers()
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert [id(p) for p in model.criterion.parameters()] == [id(temperature)], "lambda is no parameter"
    assert id(temperature) not in given
    inside = get_weight_decay_parameters([model.criterion])
    assert [len(group) for group in inside] == [1, 0], "lightly would decay it: give it a group of its own"
    optimizer.add_param_group({"params": model.criterion.parameters(), "weight_decay": 0.0})
    assert optimizer.param_groups[-1]["params"] == [temperature]


# ---------------------------------------------------------------------------------------------------- the page


def test_the_page_says_how_many_lines_change():
    spec = importlib.util.spec_from_file_location("diffs", ROOT / "docs" / "diffs.py")
    diffs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diffs)
    page = (ROOT / "docs" / "pipelines" / "lightly.md").read_text()
    for name in ("plain", "lightning", "distributed", "gpu", "benchmark"):
        _, new, gone = diffs.changes(f"lightly_{name}")
        assert f"| `lightly_{name}` | {new} | {gone} |\n" in page


def test_lightlys_arguments_have_the_meaning_that_the_page_says():
    z0, z1 = torch.randn(2, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = {"content": torch.stack([z0, z1])}
    pairs = [
        (DCLLoss(temperature=0.3), JointEntropyLoss("simclr", temperature=0.3)),
        (VICRegLoss(7.0, 3.0, 2.0), JointEntropyLoss("vicreg", weights=7.0, variance=3.0, covariance=4.0)),
        (BarlowTwinsLoss(lambda_param=0.02), JointEntropyLoss("barlow", redundancy=0.02)),
    ]
    for theirs, ours in pairs:
        torch.testing.assert_close(ours(z), theirs(z0, z1))
