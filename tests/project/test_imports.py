"""What `import ssd_addon` loads, what runs without which package, and what a missing package makes the library say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ssd_addon
from ssd_addon._optional import needs

ROOT = Path(__file__).parents[2]
OTHERS = (
    "PIL", "accelerate", "einops", "faiss", "kornia", "lightly", "lightning", "matplotlib", "numpy",
    "pytorch_lightning", "safetensors", "scipy", "sklearn", "tensorboard", "timm", "torchvision", "triton",
)  # fmt: skip
"""Everything beside torch that some part of the library or of its examples uses."""
LIGHT = (
    "CollapseAlarm", "CollapseWarning",
    "DualAscent", "Embeddings", "EquivarianceLoss", "IndependenceLoss", "JointEntropyLoss", "Monitor", "StyleHeads",
    "ViewBatch", "ViewPlan", "heads", "kernels", "losses", "metrics", "monitor", "two_pass",
)  # fmt: skip
"""Names that need torch alone."""
NEEDS_KORNIA = sorted(
    {*ssd_addon.__all__} - {*LIGHT, "StructuredCollate", "__version__", "collate", "lightning", "plots", "report"}
)
BLOCK = "import sys\nsys.modules.update(dict.fromkeys({names!r}))\n"


def run(code, blocked=()):
    """What a new interpreter prints, for which some packages are as if they were not installed."""
    command = [sys.executable, "-W", "ignore", "-c", BLOCK.format(names=blocked) + code]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_itself_loads_nothing():
    code = "before = {*sys.modules}\nimport ssd_addon\nprint(*sorted({*sys.modules} - before))"
    loaded = set(run("import importlib, typing\n" + code).split())
    assert loaded == {"ssd_addon"}


def test_names_that_need_torch_alone_load_nothing_else():
    """Nor torch's compiler, which takes longer to import than torch itself."""
    loaded = run(
        f"""
import torch
before = {{*sys.modules}}
import ssd_addon
for name in {LIGHT}:
    getattr(ssd_addon, name)
new = {{*sys.modules}} - before
print(*sorted({{name.partition(".")[0] for name in new}}), *sorted(new & {{"torch._dynamo", "torch._inductor"}}))
"""
    ).split()
    assert "ssd_addon" in loaded and not {*loaded} & {*OTHERS, "sympy", "torch._dynamo", "torch._inductor"}


def test_losses_heads_metrics_and_kernels_run_with_torch_and_numpy_alone():
    printed = run(
        """
import torch
from torch import nn
from ssd_addon import DualAscent, JointEntropyLoss, StyleHeads, ViewBatch, ViewPlan, metrics, two_pass
from ssd_addon.kernels import negative_lse

net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
model = StyleHeads(net, {"content": 4, "color": 3}, hidden=(8,), norm="layer")
batch = ViewBatch(torch.rand(3, 12, 3, 8, 8), ViewPlan.shared_query(("content", "color")))
for family in ("simclr", "vicreg", "barlow", "sigreg", "frossl", "mmcr"):
    JointEntropyLoss(family)(model(batch)).backward()
ascent = DualAscent(("content", "color"), tolerance=0.1, step_size=0.5)
ascent.step(JointEntropyLoss(weights=ascent).terms(model(batch)))
two_pass(model, batch, JointEntropyLoss(), chunk=4)
negative_lse(torch.eye(5), torch.arange(5), 0.1)

z = metrics.embed(model, torch.rand(60, 3, 8, 8))
table = metrics.r2_matrix(z, {"hue": torch.rand(60)}, bootstrap=0)
metrics.class_accuracy(z, torch.arange(60) % 2)
metrics.StyleIndex(z).search(7, {"color": 1})
metrics.space_geometry(model(batch))
print(len(z), table)
""",
        [name for name in OTHERS if name != "numpy"],
    )
    assert "hue" in printed


@pytest.mark.slow
def test_what_draws_views_says_that_it_needs_kornia():
    printed = run(
        f"""
import ssd_addon
for name in {NEEDS_KORNIA}:
    try:
        getattr(ssd_addon, name)
        print(name, "no error")
    except ImportError as error:
        print(error)
for module in ("augment", "operations", "recipes"):
    try:
        __import__(f"ssd_addon.{{module}}")
    except ImportError as error:
        print(error)
""",
        ["kornia"],
    ).splitlines()
    wanted = [*NEEDS_KORNIA, "augment", "operations", "recipes"]
    assert printed == [f"ssd_addon.{n} needs kornia, which is not installed: pip install kornia" for n in wanted]


MISSING = "which is not installed: pip install"
BUILD = "from ssd_addon.runs import build_backbone\nbuild_backbone({!r})"
INDEX = "import torch\nfrom ssd_addon.metrics import StyleIndex\nStyleIndex({'a': torch.rand(9, 4)}, backend='faiss')"


@pytest.mark.slow
@pytest.mark.parametrize(
    "package,code,message",
    [
        ("matplotlib", "from ssd_addon import plots", f"ssd_addon.plots needs matplotlib, {MISSING} matplotlib"),
        ("matplotlib", "import ssd_addon.plots", f"ssd_addon.plots needs matplotlib, {MISSING} matplotlib"),
        *((package, code.format(name), f"ssd_addon.{name} needs {package}, {MISSING} {wheel}")
          for package, wheel in (("PIL", "pillow"), ("numpy", "numpy"))
          for name in ("crops", "transform", "plots", "collate", "files")
          for code in ("from ssd_addon import {0}", "import ssd_addon.{0}")),
        ("PIL", "from ssd_addon import StructuredCollate", f"ssd_addon.StructuredCollate needs PIL, {MISSING} pillow"),
        ("timm", BUILD.format("timm:a"), f"backbone 'timm:a' needs timm, {MISSING} timm"),
        ("torchvision", BUILD.format("torchvision:a"),
         f"backbone 'torchvision:a' needs torchvision, {MISSING} torchvision"),
        ("faiss", INDEX, "backend='faiss' needs FAISS (pip install faiss-cpu); 'exact' needs nothing"),
        ("tensorboard", "from ssd_addon import Monitor\nMonitor(None, tensorboard='here')",
         "tensorboard: expected the package, to write to a folder: got none; pip install tensorboard"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_by_what_needs_it(package, code, message):
    indented = code.replace("\n", "\n    ")
    printed = run(f"try:\n    {indented}\nexcept ImportError as error:\n    print(error)", [package])
    assert printed.strip() == message


@pytest.mark.slow
@pytest.mark.parametrize("command", ["report", "audit"])
def test_the_command_line_names_a_missing_package_in_one_line(command):
    printed = run(
        f"""
import contextlib, io
from ssd_addon.__main__ import main
with contextlib.redirect_stderr(io.StringIO()) as said:
    status = main([{command!r}, "timm:a", "--data", "b", "--out", "c.html"])
print(status, said.getvalue())
""",
        ["PIL"],
    )
    assert printed.strip().endswith(f"needs PIL, {MISSING} pillow") and printed.startswith("1 error: ssd_addon.")


def test_errors_inside_a_package_are_left_as_they_are():
    with pytest.raises(ModuleNotFoundError, match="^No module named 'kornia_rs'$"), needs("ssd_addon.augment"):
        raise ModuleNotFoundError("No module named 'kornia_rs'", name="kornia_rs")
    with pytest.raises(ImportError, match="^cannot import name$"), needs("ssd_addon.augment"):
        raise ImportError("cannot import name")
