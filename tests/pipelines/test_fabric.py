"""Style spaces in a loop under Lightning Fabric: the scripts of the page, exact saves, two ranks that equal one."""

import math
import traceback
import warnings
from collections import OrderedDict

import kornia.augmentation as K
import pytest
import torch
from lightning.fabric import Fabric
from scripts import script
from torch import nn

from ssd_addon import DualAscent, JointEntropyLoss, StructuredViews, StyleHeads, ViewBatch

pytestmark = pytest.mark.slow

TINY = ["--images", "12", "--batch-size", "4", "--size", "16", "--accelerator", "cpu"]
SPACES = {"content": 6, "color": 3}
WORLD, IMAGES, MICRO = 2, 4, 2


@pytest.mark.parametrize("name", ["before/fabric_simclr", "fabric_simclr"])
def test_the_scripts_train_and_save(name, tmp_path, capsys):
    state = script(name).main([*TINY, "--out", str(tmp_path / "a.ckpt")])
    assert state["epoch"] == 1 and (tmp_path / "a.ckpt").exists()
    assert math.isfinite(float(capsys.readouterr().out.split()[-1]))


def small():
    layers = {
        "conv": nn.Conv2d(3, 8, 3, 2),
        "norm": nn.BatchNorm2d(8),
        "act": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
    }
    return nn.Sequential(OrderedDict(layers | {"flat": nn.Flatten(), "fc": nn.Linear(8, 10)}))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_continued_training_is_the_training_that_was_not_interrupted(precision, tmp_path):
    """12 images make 3 batches, so an epoch has 2 steps: one of two batches, one of the last."""
    module = script("fabric_simclr")
    module.resnet18 = small
    main = module.main
    options = [*TINY, "--accumulate", "2", "--precision", precision]
    whole = main([*options, "--epochs", "2", "--out", str(tmp_path / "whole.ckpt")])
    main([*options, "--epochs", "1", "--out", str(tmp_path / "halves.ckpt")])
    halves = main([*options, "--epochs", "2", "--out", str(tmp_path / "halves.ckpt")])
    for part in ("model", "criterion", "views"):
        a, b = whole[part].state_dict(), halves[part].state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
    ascent = halves["criterion"].weights
    assert halves["views"].call == 6 and int(ascent.steps) == 4
    assert ascent.values.tolist() != [1.0, 1.0, 1.0] and ascent.values.dtype == torch.float64


class Backbone(nn.Module):
    """Without batch statistics, which would be of the rank."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)

    def forward(self, x):
        return self.conv(x).relu()


def made():
    torch.manual_seed(0)
    ascent = DualAscent(SPACES, tolerance=0.1, step_size=0.5)
    return StyleHeads(Backbone(), SPACES, hidden=()), JointEntropyLoss(weights=ascent, gather_distributed=True)


def drawn(rank):
    return StructuredViews({"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0)]}, seed=3, rank=rank)


def images():
    return torch.rand(WORLD, MICRO, IMAGES, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def alone():
    """One process on the batches of all ranks: gradients and lambda of a step of two batches."""
    model, criterion = made()
    criterion.gather_distributed = False
    views = [drawn(rank) for rank in range(WORLD)]
    for micro in range(MICRO):
        batch = ViewBatch.cat([views[rank](images()[rank, micro]) for rank in range(WORLD)])
        terms = criterion.terms(model(batch))
        (terms.loss / MICRO).backward()
    criterion.weights.step(terms)
    return {n: p.grad for n, p in model.named_parameters()}, criterion.weights.values


def job(fabric, folder):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="The given NumPy array|.*barrier.*")
    try:
        _job(fabric, folder)
    except Exception:
        (folder / f"{fabric.global_rank}.txt").write_text(traceback.format_exc())
        raise


def _job(fabric, folder):
    torch.set_num_threads(1)
    rank = fabric.global_rank
    want, lambdas = alone()
    net, criterion = made()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    views = drawn(None)
    for micro in range(MICRO):
        with fabric.no_backward_sync(model, enabled=micro < MICRO - 1):
            batch = views(images()[rank, micro])
            terms = criterion.terms(model(batch), batch)
            fabric.backward(terms.loss / MICRO)
    criterion.weights.step(terms)
    torch.testing.assert_close({n: p.grad for n, p in net.named_parameters()}, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(criterion.weights.values, lambdas)
    optimizer.step()

    state = {"model": model, "optimizer": optimizer, "views": views, "criterion": criterion}
    fabric.save(folder / "state.ckpt", state)
    fabric.barrier()
    other, criterion_b = made()
    model_b, optimizer_b = fabric.setup(other, torch.optim.SGD(other.parameters(), lr=0.1))
    views_b = StructuredViews({"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0)]})
    fabric.load(
        folder / "state.ckpt",
        {"model": model_b, "optimizer": optimizer_b, "views": views_b, "criterion": criterion_b},
    )
    a, b = (v(images()[rank, 0]) for v in (views, views_b))
    assert torch.equal(a.views, b.views), "the views go on as they would have"
    assert torch.equal(criterion(model(a), a), criterion_b(model_b(b), b))
    torch.save(drawn(None)(images()[0, 0]).views, folder / f"{rank}.pt")


@pytest.mark.distributed
def test_two_ranks_equal_one_process_under_accumulation_and_go_on_from_their_file(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=WORLD, strategy="ddp_spawn")
    try:
        fabric.launch(job, tmp_path)
    finally:
        seen = [file.read_text() for file in tmp_path.glob("*.txt")]
        assert not seen, seen[0]
    assert not torch.equal(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))), "each draws its own"


def test_mixed_precision_rebuilds_the_output_and_the_loss_takes_the_batch_beside_it():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    net, criterion = made()
    model = fabric.setup(net)
    batch = drawn(0)(images()[0, 0])
    z = model(batch)
    assert z["content"].dtype == torch.float32 and z.plan == batch.plan
    want, got = JointEntropyLoss()(net(batch)).item(), criterion(z, batch).item()
    assert 0 < abs(got - want) < 0.05 * want, "the network ran in bfloat16"
    assert got == criterion(dict(z), batch).item() == criterion(z).item()
