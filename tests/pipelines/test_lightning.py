"""`StructuredTraining` in both Lightning packages: the loss of a plain loop, ascent, exact resuming, refusals."""

import pytest
import torch
from lightning_modules import PACKAGES, SPACES, Images, ascent, differences, fit, heads, loader, module, state, views
from torch.utils.data import DataLoader

from ssd_addon import JointEntropyLoss, ViewBatch
from ssd_addon.losses import Family
from ssd_addon.lightning import StructuredTraining

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
]


def plain(epochs=1, accumulate=1, batch_size=4, equivariance=None):
    """The same training as a loop, with the lambda and the terms of every step."""
    made = module(equivariance=bool(equivariance))
    optimizer = made.configure_optimizers()
    seen = []
    for _ in range(epochs):
        data = loader(batch_size)
        pending, rows = [], []
        for k, (images, _) in enumerate(data):
            batch = made.views(images)
            z = made.model(batch)
            terms = made.criterion.terms(z, batch)
            loss = terms.loss + (made.equivariance(z, batch) if equivariance else 0)
            (loss / accumulate).backward()
            pending.append(terms)
            rows.append(len(images))
            if len(pending) == accumulate or k == len(data) - 1:
                optimizer.step()
                optimizer.zero_grad()
                total = sum(rows)
                for n in SPACES:
                    mean = sum(p.constraint[n].double() * r for p, r in zip(pending, rows, strict=True)) / total
                    pending[-1].constraint[n] = mean
                made.criterion.weights.step(pending[-1])
                pending, rows = [], []
            seen.append((float(loss.detach()), {n: float(v) for n, v in terms.invariance.items()}))
    return made, seen


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("batch_size", [4, 5])
def test_training_is_that_of_a_plain_loop(package, accumulate, batch_size):
    mine = module(package, equivariance=True)
    trainer = fit(mine, loader(batch_size), package=package, max_epochs=2, accumulate_grad_batches=accumulate)
    expected, seen = plain(2, accumulate, batch_size, equivariance=True)
    close = [k for k, v in state(expected).items() if not torch.allclose(v.double(), state(mine)[k].double(), rtol=1e-6)]
    assert not close
    assert int(mine.criterion.weights.steps) == trainer.global_step == 2 * -(-3 // accumulate)
    logged = trainer.callback_metrics
    assert float(logged["loss"]) == pytest.approx(seen[-1][0], rel=1e-5)
    assert float(logged["invariance/color"]) == pytest.approx(seen[-1][1]["color"], rel=1e-5)
    assert {"equivariance", "lambda/content", "effective_rank/color", "constraint/content"} <= logged.keys()
