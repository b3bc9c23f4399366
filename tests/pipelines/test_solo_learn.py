"""Style spaces with solo-learn: the page's scripts, and what its method returns.

solo-learn 1.0.6 is not on PyPI: `sh tests/environments/solo_learn.sh FOLDER` runs this file with its source.
"""

import math
import types

import pytest
import torch
from omegaconf import OmegaConf
from scripts import script

reason = "sh tests/environments/solo_learn.sh FOLDER runs it with the source of solo-learn"
pytest.importorskip("solo.methods.base", reason=reason)

from ssd_addon import JointEntropyLoss, ViewPlan  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

TINY = ["--images", "16", "--batch-size", "8", "--accelerator", "cpu"]


@pytest.mark.parametrize(
    "name,logged", [("before/solo_learn_simclr", "train_nce_loss"), ("solo_learn_simclr", "train_invariance/color")]
)
def test_the_scripts_train_and_log(name, logged, tmp_path):
    trainer = script(name).main([*TINY, "--out", str(tmp_path)])
    assert trainer.global_step == 2
    assert math.isfinite(trainer.callback_metrics[logged]) and "train_acc1" in trainer.callback_metrics


@pytest.fixture
def method():
    module = script("solo_learn_simclr")
    cfg = OmegaConf.create(module.CONFIG)
    cfg.max_epochs = 1
    torch.manual_seed(0)
    made = module.StyleSpaces(cfg, ViewPlan.shared_query(("content", "spatial", "color")))
    made.logged = {}
    made.log_dict = lambda values, **_: made.logged.update(values)
    return made


def test_a_step_is_the_loss_of_the_views_and_the_online_classifier(method):
    method.eval()  # the same statistics when it runs again
    views, labels = list(torch.rand(4, 6, 3, 32, 32)), torch.arange(6)
    total = method.training_step([torch.arange(6), views, labels], 0)
    outs = [method(view) for view in views]
    z = {name: torch.stack([out["z"][name] for out in outs]) for name in ("content", "spatial", "color")}
    assert {name: tuple(t.shape) for name, t in z.items()} == {
        "content": (4, 6, 128), "spatial": (4, 6, 32), "color": (4, 6, 32)
    }  # fmt: skip
    joint = JointEntropyLoss(temperature=0.15)(z).item()
    assert method.logged["train_loss"] == pytest.approx(joint)
    assert total.item() == pytest.approx(joint + method.logged["train_class_loss"].item())


def test_the_optimizer_has_every_parameter_and_each_has_a_gradient(method):
    method.trainer = types.SimpleNamespace(estimated_stepping_batches=2, sanity_checking=False)
    (optimizer,), _ = method.configure_optimizers()
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in method.parameters()}
    method.training_step([torch.arange(6), list(torch.rand(4, 6, 3, 32, 32)), torch.arange(6)], 0).backward()
    assert all(p.grad is not None for p in method.parameters())


def test_views_of_another_number_are_refused(method):
    with pytest.raises(AssertionError):
        method.training_step([torch.arange(6), list(torch.rand(2, 6, 3, 32, 32)), torch.arange(6)], 0)
