"""Style spaces in a loop under accelerate: the scripts of the page, exact saves, accumulation, rebuilt outputs."""

import math
from collections import OrderedDict

import kornia.augmentation as K
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from scripts import script
from torch import nn

from ssd_addon import Embeddings, JointEntropyLoss, StructuredViews, StyleHeads

pytestmark = pytest.mark.slow

TINY = ["--images", "12", "--batch-size", "4"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def small():
    layers = {
        "conv": nn.Conv2d(3, 8, 3, 2),
        "norm": nn.BatchNorm2d(8),
        "act": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
    }
    return nn.Sequential(OrderedDict(layers | {"flat": nn.Flatten(), "fc": nn.Linear(8, 10)}))


@pytest.mark.parametrize("name", ["before/accelerate_simclr", "accelerate_simclr"])
def test_the_scripts_train_and_save(name, tmp_path, capsys):
    script(name).main([*TINY, "--out", str(tmp_path)])
    assert (tmp_path / "epoch-1" / "model.safetensors").exists()
    assert math.isfinite(float(capsys.readouterr().out.split()[-1]))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_continued_training_is_the_training_that_was_not_interrupted(precision, tmp_path):
    """12 images make 3 batches, so an epoch has 2 steps: one of two batches, one of the last."""
    module = script("accelerate_simclr")
    module.resnet18 = small

    def run(out, epochs):
        AcceleratorState._reset_state(True)
        options = ["--accumulate", "2", "--precision", precision, "--epochs", str(epochs), "--out", str(tmp_path / out)]
        return module.main([*TINY, *options])

    whole = run("whole", 2)
    run("halves", 1)
    halves = run("halves", 2)
    for one, other in zip(whole, halves, strict=True):
        a, b = one.state_dict(), other.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), type(one).__name__
    _, views, criterion = halves
    assert views.call == 6 and int(criterion.weights.steps) == 4
    assert criterion.weights.values.tolist() != [1.0, 1.0, 1.0] and criterion.weights.values.dtype == torch.float64


def test_mixed_precision_loses_the_plan_and_the_loss_asks_for_the_batch_instead_of_guessing():
    batch = StructuredViews({"flip": [K.RandomHorizontalFlip()]}, plan="interleaved", seed=0)(torch.rand(6, 3, 12, 12))
    model = Accelerator(mixed_precision="bf16").prepare(StyleHeads(small(), {"content": 6, "flip": 3}, hidden=()))
    z = model(batch)
    assert z["content"].dtype == torch.float32 and z.plan is None
    with pytest.raises(ValueError, match=r"pass the batch too, criterion\(z, batch\)"):
        JointEntropyLoss()(z)
    want = JointEntropyLoss()(Embeddings(dict(z), batch.plan, space_index=batch.space_index)).item()
    assert JointEntropyLoss()(z, batch).item() == want
