"""`StructuredTraining` in both Lightning packages: the loss of a plain loop, ascent, exact resuming, refusals."""

import importlib
from types import MappingProxyType
from typing import NamedTuple

import kornia.augmentation as K
import lightning.pytorch as pl
import pytest
import torch
from lightning_modules import ADVICE, PACKAGES, SPACES, Images, differences, fit, loader, module, state, trainer, views
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, default_collate

from ssd_addon import JointEntropyLoss, NativeCrops, StructuredTransform, StructuredViews, ViewBatch
from ssd_addon.lightning import StructuredTraining

pytestmark = ADVICE


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
    close = [
        k for k, v in state(expected).items() if not torch.allclose(v.double(), state(mine)[k].double(), rtol=1e-6)
    ]
    assert not close
    assert int(mine.criterion.weights.steps) == trainer.global_step == 2 * -(-3 // accumulate)
    logged = trainer.callback_metrics
    assert float(logged["loss"]) == pytest.approx(seen[-1][0], rel=1e-5)
    assert float(logged["invariance/color"]) == pytest.approx(seen[-1][1]["color"], rel=1e-5)
    assert {"equivariance", "lambda/content", "effective_rank/color", "constraint/content"} <= logged.keys()


# ---- batches


def seen_by(mine, data, **options):
    """The batches that the training step gets."""
    seen, step = [], mine.training_step
    mine.training_step = lambda batch, batch_idx: (seen.append(batch), step(batch, batch_idx))[1]
    fit(mine, data, **options)
    return seen


class Pair(NamedTuple):
    image: torch.Tensor
    label: int


def as_pair(samples):
    images, labels = default_collate(samples)
    return Pair(images, labels)


COLLATED = {
    "images": lambda samples: default_collate(samples)[0],
    "images, labels": default_collate,
    "images, labels, names": lambda samples: (*default_collate(samples), ["name"] * len(samples)),
    "a named tuple": as_pair,
    "a mapping": lambda samples: dict(zip(("image", "label"), default_collate(samples), strict=True)),
    "a mapping of tuples": lambda samples: {"image": default_collate(samples)},
    "a batch of views": lambda samples: (views()(default_collate(samples)[0]), *default_collate(samples)[1:]),
}


@pytest.mark.parametrize("kind", COLLATED)
def test_views_take_the_place_of_the_images_and_the_rest_is_kept(kind):
    collate = COLLATED[kind]
    given = next(iter(loader(collate_fn=collate)))
    mine = module(body={"image_key": "image"})
    batch, *_ = seen_by(mine, loader(collate_fn=collate))
    if kind == "images":
        batch, given = [batch], [given]
    elif kind == "a mapping of tuples":
        batch, given = batch["image"], given["image"]
    assert type(batch) is type(given)
    images, *rest = batch.values() if isinstance(batch, dict) else batch
    _, *expected = given.values() if isinstance(given, dict) else given
    assert torch.equal(images.views, views()(next(iter(loader()))[0]).views)
    assert [r.tolist() if isinstance(r, torch.Tensor) else r for r in rest] == [
        r.tolist() if isinstance(r, torch.Tensor) else r for r in expected
    ]


def test_of_several_loaders_one_trains_the_spaces():
    mine = module(body={"image_key": "plain"})
    batch, *_ = seen_by(mine, {"other": loader(6), "plain": loader()})
    assert batch["plain"][0].images == 4 and batch["other"][0].shape == (6, 3, 12, 12)


def test_of_several_loaders_with_views_the_named_one_trains_the_spaces():
    drawn = views()

    def collated(samples):
        images, labels = default_collate(samples)
        return drawn(images), labels

    taken = []

    def step(self, batch, index):
        made = self.structured_step(batch)
        taken.append((made.views.images, made.views is batch["plain"][0]))
        return made.loss

    for image_key, images in (("plain", 4), ("other", 6)):
        mine = module(body={"image_key": image_key, "training_step": step}, adapt=False)
        fit(mine, {"other": loader(6, collate_fn=collated), "plain": loader(collate_fn=collated)})
        assert {n for n, _ in taken} == {images} and all(plain == (image_key == "plain") for _, plain in taken)
        taken.clear()


class Rows(dict):
    """A class of mappings, as frameworks have them."""


def test_a_mapping_keeps_its_class():
    mine, batch = module(body={"image_key": "image"}), Rows(image=torch.rand(4, 3, 12, 12), label=torch.arange(4))
    drawn = mine._drawn(batch)
    assert type(drawn) is Rows and isinstance(drawn["image"], ViewBatch) and drawn["label"] is batch["label"]
    assert isinstance(batch["image"], torch.Tensor)  # the loader's own mapping is left as it was
    frozen = mine._drawn(MappingProxyType(batch))
    assert isinstance(frozen["image"], ViewBatch) and frozen["label"] is batch["label"]


class Viewed(Images):
    """(views, label) pairs, or views alone."""

    def __init__(self, transform, labels):
        super().__init__()
        self.transform, self.labels = transform, labels

    def __getitem__(self, index):
        views = self.transform(self.images[index])
        return (views, index) if self.labels else views


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("parameters", [False, True])
def test_views_of_workers_are_taken_with_their_parameters(labels, parameters):
    transform = StructuredTransform({"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0)]}, parameters=parameters)
    mine = module(equivariance=parameters)
    del mine.views
    mine.views = transform
    batch, *_ = seen_by(mine, DataLoader(Viewed(transform, labels), 4))
    made = batch[0] if labels else batch
    assert made.plan == transform.plan and made.views.shape == (3, 4, 3, 12, 12)
    assert len(made.parameters) == 3 * parameters and (not labels or batch[1].tolist() == [0, 1, 2, 3])


REFUSED = {
    "views of a transform that is not named": ([torch.rand(2, 3, 12, 12)] * 2, 1, "self.views to their Structured"),
    "another thing": ("name", 1, "images .*: got tuple of str, int"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_batch_without_images_in_their_place_is_refused(what):
    *batch, message = REFUSED[what]
    with pytest.raises(TypeError, match=message):
        module().structured_step(tuple(batch))
    with pytest.raises(TypeError, match=r"expected self.image_key to be one of the keys image, label: got None"):
        module().structured_step({"image": 1, "label": 2})
    mine = module()
    del mine.views
    mine.views = StructuredTransform({"color": [K.ColorJitter(0.4)]})
    with pytest.raises(TypeError, match=r"expected 3 views .* in a list: got tensor \[4, 3, 12, 12\]"):
        mine.structured_step((torch.rand(4, 3, 12, 12), 1))
    mine.views = nn.Identity()
    with pytest.raises(TypeError, match="expected StructuredViews, which return a ViewBatch"):
        mine.structured_step(torch.rand(4, 3, 12, 12))


def test_a_batch_on_another_device_is_refused():
    mine = module()
    batch = mine.views(torch.rand(4, 3, 12, 12)).to("meta")
    with pytest.raises(ValueError, match="expected it on the module's device, cpu: got views on meta"):
        mine.structured_step(batch)


def test_what_is_missing_is_said_before_the_training():
    for name in ("views", "model", "criterion"):
        mine = module()
        delattr(mine, name)
        with pytest.raises(AttributeError, match=f"Mine: expected self.{name}, a .*, set in __init__: got none"):
            fit(mine)
    mine = module()
    mine.criterion = nn.MSELoss()
    with pytest.raises(AttributeError, match="expected self.criterion, a JointEntropyLoss, .*: got MSELoss"):
        fit(mine)


def test_a_class_attribute_that_hides_the_equivariance_loss_is_said():
    with pytest.raises(AttributeError, match="expected no class attribute 'equivariance': got one that hides it"):
        fit(module(equivariance=True, body={"equivariance": None}))


def test_one_image_is_refused():
    with pytest.raises(ValueError, match="expected 2 images or more, .* got 1; a last batch .* drop_last=True"):
        fit(module(), loader(1))
    body = {"validation_step": lambda self, batch, index: self.structured_step(batch).loss}
    with pytest.raises(ValueError, match="expected 2 images or more, .* drop_last=True"):
        trainer().validate(module(body=body), loader(11), verbose=False)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_mixin_comes_before_the_lightning_module(package):
    base = importlib.import_module(package).LightningModule
    with pytest.raises(TypeError, match="expected StructuredTraining before the LightningModule"):
        type("Mine", (base, StructuredTraining), {})


# ---- hooks that are overridden


def test_ascent_that_an_override_cuts_off_is_said():
    body = {"on_before_optimizer_step": lambda self, optimizer: None}
    mine = module(body=body)
    with pytest.raises(RuntimeError, match=r"call super\(\).on_before_optimizer_step\(optimizer\)"):
        fit(mine)
    assert mine.views.call == 2  # at the next batch
    with pytest.raises(RuntimeError, match=r"call super\(\).on_before_optimizer_step\(optimizer\)"):
        fit(module(body=body), max_steps=1)  # no step after it
    fit(module(body=body, adapt=False))  # nothing is to be stepped


def silent(*_):
    """An override that calls nothing."""


def test_overrides_that_do_not_call_the_mixins_hooks_are_said():
    averaging = importlib.import_module("lightning.pytorch.callbacks").EMAWeightAveraging

    def run(body, **options):
        fit(module(body=body, **options), callbacks=[averaging()])

    for name in ("on_save_checkpoint", "on_train_end"):
        with pytest.warns(UserWarning, match=rf"expected overrides of {name} to call super\(\)"):
            run({name: silent})
        run({name: silent}, adapt=False)
        fit(module(body={name: silent}))  # nothing is averaged

    def nested(self):
        def rest():
            StructuredTraining.on_train_end(self)

        rest()

    @torch.no_grad()
    def decorated(self, checkpoint):
        StructuredTraining.on_save_checkpoint(self, checkpoint)

    run({"on_train_end": nested, "on_save_checkpoint": decorated, "on_fit_end": silent})

    class Before:
        def on_train_end(self):
            pass

    made = module()
    cls = type("Mine", (Before, type(made)), {})
    with pytest.warns(UserWarning, match="Mine: expected overrides of on_train_end"):
        fit(cls(), callbacks=[averaging()])


def test_a_module_can_be_saved_in_the_middle_of_a_training(tmp_path):
    def step(self, batch, index):
        state = self.__getstate__()
        assert "_counting" not in state and self._counting and state["_pending"] == ()
        return self.structured_step(batch).loss

    fit(module(body={"training_step": step}))


def test_a_batch_with_views_needs_no_views_of_the_module():
    mine = module(adapt=False)
    drawn, mine.log_dict = views(), lambda *_, **options: None
    del mine.views
    assert torch.isfinite(mine.structured_step(drawn(torch.rand(4, 3, 12, 12))).loss)


def test_a_test_of_a_loaded_checkpoint_uses_its_weights_of_the_spaces():
    def step(self, batch, index):
        return self.structured_step(batch).loss

    mine = module(body={"test_step": step})
    before = state(mine)
    made = fit(mine, max_epochs=2)
    assert float(mine.criterion.weights.values[0]) != 1
    mine.load_state_dict(before)
    (found,) = made.test(mine, loader(), verbose=False)
    assert found["test/lambda/content"] == found["test/lambda/color"] == 1


def raw_steps(self, batch, index):
    """Steps past Lightning, which no hook sees."""
    made = self.structured_step(batch)
    optimizer = self.optimizers(use_pl_optimizer=False)
    optimizer = optimizer[0] if isinstance(optimizer, list) else optimizer
    optimizer.zero_grad()
    self.manual_backward(made.loss)
    optimizer.step()


def test_ascent_is_said_to_stand_still_where_optimizers_step_past_lightning():
    body = {"training_step": raw_steps, "automatic_optimization": False}
    mine = module(body=body)
    with pytest.raises(RuntimeError, match="got an optimizer step without it"):
        fit(mine)
    assert mine.views.call == 2  # at the next batch
    with pytest.raises(RuntimeError, match="got an optimizer step without it"):
        fit(module(body=body), max_steps=-1, limit_train_batches=1)  # none comes after it
    fit(module(body=body, adapt=False))

    def others(self, batch, index):
        self.optimizers()[1].step()  # through Lightning, whose hook is for the other optimizer
        raw_steps(self, batch, index)

    def optimizers(self):
        both = [*self.model.parameters(), *self.criterion.parameters()], [self.extra]
        return [torch.optim.SGD(each, lr=0.01) for each in both]

    body |= {"training_step": others, "configure_optimizers": optimizers, "extra": nn.Parameter(torch.zeros(1))}
    with pytest.raises(RuntimeError, match="got an optimizer step without it"):
        fit(module(body=body))


def test_steps_of_other_optimizers_are_not_counted():
    def step(self, batch, index):
        made = self.structured_step(batch)
        self.optimizers(use_pl_optimizer=False)[1].step()
        if index == 2:
            self.manual_backward(made.loss)
            self.optimizers()[0].step()

    def optimizers(self):
        both = [*self.model.parameters(), *self.criterion.parameters()], [self.extra]
        return [torch.optim.SGD(each, lr=0.01) for each in both]

    body = {"training_step": step, "configure_optimizers": optimizers, "automatic_optimization": False}
    mine = module(body={**body, "extra": nn.Parameter(torch.zeros(1))})
    fit(mine)
    assert int(mine.criterion.weights.steps) == 1
    assert not mine._counting or not any(o._optimizer_step_post_hooks for o in mine.trainer.optimizers)


def test_without_a_trainer_ascent_is_the_callers():
    mine = module()
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)

    def steps(own, count=3):
        for _ in range(count):
            step = mine.structured_step((torch.rand(4, 3, 12, 12), torch.arange(4)))
            step.loss.backward()
            optimizer.step()
            if own:
                mine.criterion.weights.step(step.terms)

    mine.log_dict = lambda *_, **options: None
    steps(own=True)
    assert int(mine.criterion.weights.steps) == 3
    with torch.no_grad():
        mine.structured_step(torch.rand(4, 3, 12, 12))
    with pytest.warns(UserWarning, match=r"expected self.criterion.weights.step\(step.terms\) after every optimizer"):
        steps(own=False)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`.*")
def test_ascent_without_the_terms_of_a_step_is_said():
    def step(self, batch, batch_idx):
        return self.criterion(self.model(batch[0])) if batch_idx else None  # a batch that is left out has no terms

    with pytest.raises(RuntimeError, match=r"expected training_step to call self.structured_step\(batch\)"):
        fit(module(body={"training_step": step}))
    fit(module(body={"training_step": step}, adapt=False))

    def others(self, batch, batch_idx):
        return self.structured_step(batch).loss if batch_idx else None

    mine = module(body={"training_step": others})
    fit(mine)
    assert int(mine.criterion.weights.steps) == 2


def test_parameters_of_the_loss_that_no_optimizer_has_are_named():
    body = {"configure_optimizers": lambda self: torch.optim.SGD(self.model.parameters(), lr=0.1)}
    with pytest.raises(ValueError, match="got optimizers without criterion.objective.temperature"):
        fit(module(body=body))
    with pytest.raises(ValueError, match=r"got optimizers without equivariance.networks._color.0.weight, "):
        fit(module(body=body, temperature=0.2, equivariance=True))


def test_views_are_drawn_where_the_hook_after_the_transfer_is_cut_off():
    body = {"on_after_batch_transfer": lambda self, batch, index: batch}
    mine, expected = module(body=body), module()
    fit(mine), fit(expected)
    assert not differences(state(mine), state(expected))


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in both")
@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`")
@pytest.mark.parametrize("own", [False, True])
def test_a_data_module_with_a_hook_of_its_own(own):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

    if own:
        Data.on_after_batch_transfer = lambda self, batch, index: [1 - batch[0], batch[1]]
    mine = module()
    batch, *_ = seen_by(mine, Data())
    given = next(iter(loader()))[0]
    assert isinstance(batch[0], torch.Tensor) == own  # the data module's hook replaces the module's
    assert torch.equal(*((batch[0], 1 - given) if own else (batch[0].views, views()(given).views)))
    assert mine.views.call == int(mine.criterion.weights.steps) == 3


def test_manual_optimization_needs_a_training_step():
    def step(self, batch, index):
        made = self.structured_step(batch)
        main, other = self.optimizers()
        other.step()
        if index % 2:
            self.manual_backward(made.loss)
            main.step()
            main.zero_grad()

    def optimizers(self):
        trained = [*self.model.parameters(), *self.criterion.parameters()]
        return [torch.optim.SGD(trained, lr=0.1), torch.optim.SGD([self.extra], lr=0.1)]

    mine = module(
        body={
            "training_step": step,
            "configure_optimizers": optimizers,
            "automatic_optimization": False,
            "extra": nn.Parameter(torch.zeros(1)),
        }
    )
    fit(mine, loader(3))
    assert int(mine.criterion.weights.steps) == 2  # of the model's optimizer alone
    with pytest.raises(TypeError, match="expected one of your own under manual optimization"):
        fit(module(body={"automatic_optimization": False}))


def test_an_optimizer_that_evaluates_more_than_once_is_refused_where_weights_adapt():
    with pytest.raises(RuntimeError, match="evaluates the loss once per step: got LBFGS"):
        fit(module(optimizer=torch.optim.LBFGS))


# ---- validation


def test_validation_changes_nothing_of_the_training():
    kinds = []

    def validation_step(self, batch, index, dataloader_idx=0):
        kinds.append(type(batch[0]))
        return self.structured_step(batch).loss

    mine, expected = module(body={"validation_step": validation_step}), module()
    made = trainer(max_epochs=2)
    made.fit(mine, loader(), [loader(), loader(5)])
    fit(expected, max_epochs=2)
    assert not differences(state(mine), state(expected)) and set(kinds) == {torch.Tensor}
    assert {
        "loss",
        "val/loss/dataloader_idx_0",
        "val/invariance/color/dataloader_idx_1",
    } <= made.callback_metrics.keys()
    (found,) = trainer().validate(mine, loader(), verbose=False)
    assert "val/loss" in found and mine.views.call == 6
    made = trainer()
    assert "test/loss" in made.test(module(body={"test_step": validation_step}), loader(), verbose=False)[0]


def test_validation_draws_views_of_its_own_for_every_batch_and_the_same_each_time():
    seen = []

    def body(name):
        def step(self, batch, index):
            made = self.structured_step(batch)
            seen.append((name, made.views.parameters[0]["color"]["0.ColorJitter"]["brightness_factor"].tolist()))
            return made.loss

        return step

    mine = module(body={f"{name}_step": body(name) for name in ("training", "validation", "test")})
    made = trainer(max_epochs=2, num_sanity_val_steps=0)
    made.fit(mine, loader(), loader())
    made.test(mine, loader(), verbose=False)
    first, second = ([f for name, f in part if name == "validation"] for part in (seen[:6], seen[6:]))
    assert len(first) == 3 and first == second == [f for name, f in seen if name == "test"]
    mine.on_validation_epoch_start = lambda: None  # an override without super()
    made = trainer(max_epochs=2, num_sanity_val_steps=0)
    seen.clear()
    made.fit(mine, loader(), loader())
    again = [f for name, f in seen if name == "validation"]
    assert again[:3] == again[3:] == first
    each = [tuple(f) for f in (*first, *(f for name, f in seen if name == "training"))]
    assert len(set(each)) == len(each) == 9
    assert mine.views.call == 12


def test_the_model_gets_the_criterions_way_of_comparing():
    mine = module()
    mine.model = torch.compile(mine.model, backend="eager")
    fit(mine, max_steps=1)
    assert mine.model._orig_mod.on_sphere
    other = module()
    other.criterion, other.model.on_sphere = JointEntropyLoss("vicreg"), True
    fit(other, max_steps=1)
    assert not other.model.on_sphere
    torch._dynamo.reset()


def test_means_over_an_epoch_are_weighted_by_the_images():
    def validation_step(self, batch, index):
        losses.append((float(self.structured_step(batch).loss.detach()), len(batch[0])))

    losses = []
    mine = module(body={"validation_step": validation_step})
    (found,) = trainer().validate(mine, loader(5), verbose=False)
    expected = sum(loss * b for loss, b in losses) / sum(b for _, b in losses)
    assert [b for _, b in losses] == [5, 5, 2] and found["val/loss"] == pytest.approx(expected, rel=1e-5)


# ---- crops made by the loader


def test_crops_of_the_loader_become_views():
    kinds, crop = [], K.RandomResizedCrop((8, 8))

    def training_step(self, batch, index):
        kinds.append(type(batch[0]))
        return self.structured_step(batch).loss

    mine = module(body={"training_step": training_step})
    mine.views = StructuredViews({"color": [crop, K.ColorJitter(0.4)]}, seed=3)
    fit(mine, loader(collate_fn=NativeCrops(mine.views)))
    assert kinds == [ViewBatch] * 3 and mine.views.call == 3
    with pytest.raises(TypeError, match=r"views\(cropped\) makes a ViewBatch of crops"):
        mine.model(next(iter(loader(collate_fn=NativeCrops(mine.views))))[0])


# ---- the recipe


@pytest.fixture
def folder(tmp_path):
    for k in range(8):
        place = tmp_path / "images" / "ab"[k % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (24, 20 + k, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
        Image.fromarray(pixels.numpy()).save(place / f"{k}.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("script", ["before.lightning_simclr", "lightning_simclr"])
def test_the_recipe_runs(script, folder):
    main = importlib.import_module(f"examples.pipelines.{script}").main
    options = ["--size", "16", "--batch-size", "4", "--steps", "3", "--workers", "0"]
    made = main(["--data", str(folder / "images"), "--out", str(folder / "out"), *options])
    assert made.global_step == 3 and made.callback_metrics["loss"].isfinite()
    if not script.startswith("before"):
        assert {"invariance/spatial", "effective_rank/color"} <= made.callback_metrics.keys()
