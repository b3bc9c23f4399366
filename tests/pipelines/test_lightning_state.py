"""`StructuredTraining`: ascent over batches, resuming, averages of weights, precision."""

import importlib

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning_modules import (
    ADVICE,
    PACKAGES,
    SPACES,
    Backbone,
    Images,
    checkpoints,
    differences,
    fit,
    heads,
    loader,
    module,
    resumable,
    state,
    trained,
    trainer,
    views,
)
from old_heads import stacked
from torch import nn
from torch.utils.data import DataLoader

from ssd_addon import JointEntropyLoss, StyleHeads
from ssd_addon.lightning import StructuredTraining
from ssd_addon.losses import Terms
from ssd_addon.losses.weights import Weights

pytestmark = ADVICE


# ---- ascent


def test_terms_of_several_batches_are_means_over_their_rows():
    drawn = views(plan="interleaved")
    criterion, model = JointEntropyLoss("vicreg", content_entropy=True), heads()
    parts = [criterion.terms(model(drawn(Images().images[rows]))) for rows in (slice(0, 5), slice(5, 7), slice(7, 12))]
    mean = Terms.mean(parts)
    for n in SPACES:
        rows = [float(p.rows[n]) for p in parts]
        expected = sum(float(p.constraint[n]) * r for p, r in zip(parts, rows, strict=True)) / sum(rows)
        assert float(mean.constraint[n]) == pytest.approx(expected, rel=1e-6) and float(mean.rows[n]) == sum(rows)
    images = [5, 2, 5]
    expected = sum(float(p.entropy) * b for p, b in zip(parts, images, strict=True)) / 12
    assert float(mean.entropy) == pytest.approx(expected, rel=1e-6)
    assert set(mean.scalars()) == set(parts[0].scalars())


def test_a_space_without_a_row_in_one_batch_is_the_mean_of_the_others():
    drawn = views(plan="interleaved")
    terms = [JointEntropyLoss("vicreg").terms(heads()(drawn(Images().images[:4]))) for _ in range(2)]
    terms[0].rows["color"], terms[0].constraint["color"] = torch.tensor(0), torch.tensor(torch.nan)
    assert float(Terms.mean(terms).constraint["color"]) == pytest.approx(float(terms[1].constraint["color"]))


def test_weights_of_a_kind_of_its_own_are_stepped_too():
    class Counted(Weights):
        steps = 0

        def start_at(self, weight):
            pass

        def lambdas(self, spaces, order=None):
            return dict.fromkeys(spaces, 1.0)

        def step(self, terms):
            self.steps += 1

    mine = module()
    mine.criterion = JointEntropyLoss(weights=Counted())
    fit(mine)
    assert mine.criterion.weights.steps == 3


def test_terms_of_an_interrupted_step_are_forgotten():
    class Cut(Images):
        def __getitem__(self, index):
            if index == 5:
                raise InterruptedError
            return super().__getitem__(index)

    mine, expected = module(), module()
    with pytest.raises(InterruptedError):
        fit(mine, DataLoader(Cut(), 4), accumulate_grad_batches=2)
    assert len(mine._pending) == 1 and not mine._pending[0].loss.requires_grad  # no graph is kept
    expected.load_state_dict(mine.state_dict())
    fit(mine), fit(expected)
    assert not differences(state(mine), state(expected))


# ---- resuming and averages


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:checkpoint. expected a checkpoint after an optimizer step")  # Lightning saves again
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_training_ends_with_the_same_bits(package, accumulate, tmp_path):
    options = {"package": package, "accumulate_grad_batches": accumulate}
    whole = trained(tmp_path / "a", resumable(), **options)
    per_epoch = 4 // accumulate
    for step in sorted({1, per_epoch - 1 or 1, per_epoch, per_epoch + 1, 3 * per_epoch - 1}):
        again = trained(tmp_path / f"b{step}", resumable(), tmp_path / "a" / f"step={step}.ckpt", **options)
        assert not differences(whole, again), step
    assert int(whole["criterion.weights.steps"]) == 3 * per_epoch and whole["views._extra_state"].tolist() == [3, 12]


def test_optimizer_states_of_stacked_heads_are_refused_and_the_weights_are_read(tmp_path):
    class Alone(StructuredTraining, importlib.import_module(PACKAGES[0]).LightningModule):
        def __init__(self):
            super().__init__()
            self.views, self.criterion = views(), JointEntropyLoss("vicreg")
            self.model = StyleHeads(Backbone(), SPACES, hidden=(5,))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    made = Alone()
    fit(made).save_checkpoint(tmp_path / "new.ckpt")
    old = torch.load(tmp_path / "new.ckpt", weights_only=True)
    kept = {k: t for k, t in old["state_dict"].items() if not k.startswith("model.")}
    old["state_dict"] = kept | stacked(made.model, "model.")
    torch.save(old, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="optimizer states for the weights of each head: got a checkpoint of an older"):
        fit(Alone(), ckpt_path=tmp_path / "old.ckpt", max_epochs=2)
    fit(Alone(), ckpt_path=tmp_path / "new.ckpt", max_epochs=2)
    fresh = Alone()
    fresh.load_state_dict(old["state_dict"])
    assert not differences(state(fresh), state(made))


@pytest.mark.slow
def test_workers_and_their_views_go_on_in_mid_epoch(tmp_path):
    whole = trained(tmp_path / "a", resumable(workers=2))
    assert not differences(whole, trained(tmp_path / "b", resumable(workers=2), tmp_path / "a" / "step=6.ckpt"))


def test_torchs_own_loader_resumes_at_the_end_of_an_epoch_alone(tmp_path):
    whole = trained(tmp_path / "a", loader(3))
    assert not differences(whole, trained(tmp_path / "b", loader(3), tmp_path / "a" / "step=4.ckpt"))
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        again = trained(tmp_path / "c", loader(3), tmp_path / "a" / "step=3.ckpt")
    assert differences(whole, again)


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "WeightAveraging"])
def test_averaged_weights_leave_lambda_and_the_draws_alone(name, tmp_path):
    def averaging():
        kind = getattr(importlib.import_module("lightning.pytorch.callbacks"), name)
        return [kind(decay=0.5) if "EMA" in name else kind()]

    raw = trained(tmp_path / "raw", resumable())
    whole = trained(tmp_path / "a", resumable(), callbacks=averaging())
    own = ["criterion.weights.steps", "criterion.weights.values", "views._extra_state"]
    assert not set(own) & set(differences(raw, whole))
    weight = "model.backbone.conv.weight"
    steps = [torch.load(tmp_path / "raw" / f"step={k}.ckpt")["state_dict"] for k in range(1, 13)]
    mean = steps[0][weight]
    for k, s in enumerate(steps[1:], start=1):
        mean = torch.lerp(mean, s[weight], 0.5 if "EMA" in name else 1 / (k + 1))
    torch.testing.assert_close(whole[weight], mean)
    saved = torch.load(tmp_path / "a" / "step=5.ckpt")
    for found in (saved["state_dict"], saved["current_model_state"]):
        assert not set(own) & set(differences(found, steps[4]))
    again = trained(tmp_path / "b", resumable(), tmp_path / "a" / "step=5.ckpt", callbacks=averaging())
    assert not differences(whole, again)


def test_averages_leave_lambda_alone_where_the_criterion_is_compiled(tmp_path):
    averaging = importlib.import_module("lightning.pytorch.callbacks").EMAWeightAveraging
    mine = module()
    mine.criterion = torch.compile(mine.criterion, backend="eager")
    fit(mine, callbacks=[averaging(decay=0.5), checkpoints(tmp_path)], enable_checkpointing=True)
    saved = torch.load(tmp_path / "step=3.ckpt")["state_dict"]
    for name in ("steps", "values"):
        assert torch.equal(saved[f"criterion._orig_mod.weights.{name}"], getattr(mine.criterion.weights, name))
    assert int(mine.criterion.weights.steps) == 3
    torch._dynamo.reset()


def test_validation_uses_lambda_as_trained_and_not_its_average():
    averaging = importlib.import_module("lightning.pytorch.callbacks").EMAWeightAveraging
    mine = module(body={"validation_step": lambda self, batch, index: self.structured_step(batch).loss})
    made = trainer(callbacks=[averaging(decay=0.99)], num_sanity_val_steps=0)
    made.fit(mine, loader(), loader())
    for space, value in zip(SPACES, mine.criterion.weights.values, strict=True):
        assert float(made.callback_metrics[f"val/lambda/{space}"]) == pytest.approx(float(value), abs=1e-7)
        assert abs(float(value) - 1) > 1e-3


def test_a_checkpoint_within_an_optimizer_step_is_said(tmp_path):
    def save(self, batch, index):
        loss = self.structured_step(batch).loss
        if index == 0:
            self.trainer.save_checkpoint(tmp_path / "mid.ckpt")
        return loss

    with pytest.warns(UserWarning, match="got one after 1 of the batches whose gradients are accumulated"):
        fit(module(body={"training_step": save}), accumulate_grad_batches=2)
    fit(module(body={"training_step": save}, adapt=False), accumulate_grad_batches=2)  # Lightning's own matter


def test_a_pass_without_gradients_is_no_step_of_the_weights():
    """StochasticWeightAveraging passes the data once more, for batch statistics."""
    averaging = importlib.import_module("lightning.pytorch.callbacks").StochasticWeightAveraging

    class Normed(Backbone):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(super().forward(x))

    mine = module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05), temperature=0.2)
    mine.model = StyleHeads(Normed(), SPACES, hidden=())
    fit(mine, callbacks=[averaging(0.01, swa_epoch_start=1)], max_epochs=3)
    assert int(mine.criterion.weights.steps) == 9


# ---- precision and compiling


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU.*")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true"])
def test_precision(precision):
    mine, expected = module(equivariance=True), module(equivariance=True)
    found = fit(mine, precision=precision).callback_metrics
    wanted = fit(expected).callback_metrics
    assert mine.criterion.weights.values.dtype == torch.float64 and int(mine.criterion.weights.steps) == 3
    assert mine.criterion.objective.temperature.dtype.itemsize >= 4
    assert next(mine.equivariance.parameters()).dtype.itemsize >= 4
    assert set(found) == set(wanted)
    for name in ("loss", "entropy", "invariance/content"):
        assert found[name].dtype == torch.float32
        assert float(found[name]) == pytest.approx(float(wanted[name]), rel=0.02)
    assert float(found["lambda/color"]) != float(found["lambda/color"].bfloat16())  # not rounded by Lightning
    assert float(found["lambda/color"]) == pytest.approx(float(wanted["lambda/color"]), abs=1e-4)


def test_half_precision_with_a_scaled_loss():
    mine = module()
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    made = fit(mine, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert int(mine.criterion.weights.steps) == made.global_step == 3
    expected = fit(module()).callback_metrics
    assert float(made.callback_metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=0.05)


@pytest.mark.slow
def test_a_compiled_model():
    mine, expected = module(), module()
    mine.model = torch.compile(mine.model, backend="aot_eager")
    fit(mine), fit(expected)
    assert not differences({k.replace("_orig_mod.", ""): v for k, v in state(mine).items()}, state(expected))
    torch._dynamo.reset()


def test_clipped_gradients():
    mine = module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    before = state(mine)["model.backbone.conv.weight"]
    fit(mine, gradient_clip_val=1e-3, max_steps=1)
    assert 0 < float((state(mine)["model.backbone.conv.weight"] - before).norm()) <= 1e-3
    assert int(mine.criterion.weights.steps) == 1
