"""Style spaces in a LightningModule of lightning.pytorch or pytorch_lightning; neither package is imported here.

class Mine(StructuredTraining, LightningModule):
    def __init__(self):
        super().__init__()
        self.views = StructuredViews(...)
        self.model = StyleHeads(backbone, {"content": 128, "color": 64})
        self.criterion = JointEntropyLoss("simclr", gather_distributed=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon._lightning_batch import drawn, views_in
from ssd_addon._lightning_checks import calls, check_shards, versions
from ssd_addon.batch import ViewBatch
from ssd_addon.heads import StyleHeads
from ssd_addon.losses.terms import Terms
from ssd_addon.losses.weights import FixedWeights
from ssd_addon.stacked import is_stacked

_Base: Any = nn.Module if TYPE_CHECKING else object
HOOKS = ("on_save_checkpoint", "on_train_end")
"""Hooks that keep lambda where Lightning averages weights, if their overrides call super()."""
OUTSIDE_TRAINING = 2**40
"""Call number from which views are drawn for validation and tests, so that training draws others."""


@dataclass(frozen=True)
class StructuredStep:
    """The result of `structured_step` for a batch.

    Attributes:
        loss: scalar with its graph: the criterion plus, if there is one, the equivariance loss.
        terms: terms of the criterion.
        embeddings: space -> [V, B, d], the model's output.
        views: the `ViewBatch` that was embedded.
    """

    loss: Tensor
    terms: Terms
    embeddings: Mapping[str, Tensor]
    views: ViewBatch


class StructuredTraining(_Base):  # type: ignore[misc]
    """A mixin for a LightningModule that adds views, loss, logging and dual ascent to the training step.

    Views are drawn after the transfer to the device, for training batches only. `training_step` computes the loss and
    logs its terms, averaged over ranks; the criterion's weights (`DualAscent`) are updated once per optimizer step. All
    state is in the module's state_dict, and so in Lightning's checkpoints.

        class Mine(StructuredTraining, LightningModule): ...        the mixin comes first

    Set these in `__init__` (or in `configure_model`):

    Attributes:
        views: the `StructuredViews`, or the `StructuredTransform` with which the data set's workers draw views.
        model: a `StyleHeads`, also compiled or wrapped.
        criterion: a `JointEntropyLoss`. Over ranks give it `gather_distributed=True`.
        equivariance: an `EquivarianceLoss` to add, or None.
        image_key: key of the images if batches are mappings.

    A batch is images [B, C, H, W], a tuple or list that starts with them (labels, names and other entries are kept), a
    mapping that holds either under `image_key`, or a `ViewBatch`; with a `StructuredTransform`, the images are replaced
    by a list of V views. The training step gets the same batch, with a `ViewBatch` in the place of the images.

    Warns:
        UserWarning: an override of a hook does not call super() where Lightning averages weights; a checkpoint is saved
            between the batches of one optimizer step; without a Trainer the model is trained and adaptive weights are
            not.

    Raises:
        TypeError: the mixin comes after LightningModule in the bases; a batch has no images; the default
            `training_step` is used with manual optimization.
        AttributeError: views, model or criterion are missing.
        ValueError: parameters of the criterion or the equivariance loss are in no optimizer, or are not sharded by
            FSDP2 like the others; a batch is on another device.
        RuntimeError: optimizers step and adaptive weights do not, because an override does not call a hook of the
            mixin, or an optimizer is stepped past Lightning; LBFGS is used with adaptive weights.
    """

    views: Any
    model: Any
    criterion: Any
    equivariance: Any  # no default: a class attribute would hide the submodule of that name
    image_key: str | None = None

    _pending: tuple[Terms, ...] = ()  # terms of the batches since the last optimizer step
    _pending_step = (0, 0)  # trainer.global_step and _unseen at the first of them
    _unseen = 0  # steps of the model's optimizers without on_before_optimizer_step
    _counting: tuple[Any, ...] = ()  # handles of the hooks that count them
    _alone: tuple[int, int] | None = None  # versions of the model's and the weights' tensors without a trainer
    _validated = 0  # batches that were drawn for this validation
    _validation: tuple[str, int] | None = None  # stage and global_step of this validation
    _overrides_checked = False
    _hook_ran = False  # whether on_before_optimizer_step ran since then
    _trained: Mapping[str, Tensor] | None = None  # state of the criterion's weights after their last step

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        before = cls.__mro__[: cls.__mro__.index(StructuredTraining)]
        if any(c.__name__ == "LightningModule" for c in before):
            raise TypeError(
                f"class {cls.__name__}: expected StructuredTraining before the LightningModule in the bases, as it "
                f"extends its hooks: got {_checks.names(c.__name__ for c in cls.__bases__)}"
            )

    def __getstate__(self) -> Any:
        """Without handles of hooks, which cannot be pickled during a training."""
        return {k: v for k, v in super().__getstate__().items() if k != "_counting"}

    # ------------------------------------------------------------------------------------------------ a step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch; to do more, override it and call `self.structured_step(batch)`."""
        if not self.automatic_optimization:
            raise TypeError(
                "training_step: expected one of your own under manual optimization, which calls "
                "self.structured_step(batch), self.manual_backward(step.loss) and the optimizer's step(): got the "
                "default, which returns the loss to Lightning"
            )
        return self.structured_step(batch).loss

    def structured_step(self, batch: Any) -> StructuredStep:
        """Embed a batch, compute its loss and log the terms; for your own `training_step` or `validation_step`.

        Logged names are those of `Terms.scalars()`, "equivariance" and, with adaptive weights, "lambda/content", ...;
        outside training they start with "val/" or "test/". There views are drawn too, without affecting the draws for
        training, and weights are not updated.

        Args:
            batch: a batch from the data loader, or the argument of `training_step`.
        """
        stage = self._stage()
        with self._draws_apart(stage):
            views = views_in(self._drawn(batch), self.image_key)
        if views.device.type != self.device.type:
            raise ValueError(
                f"batch: expected it on the module's device, {self.device}: got views on {views.device}; "
                "move it in transfer_batch_to_device"
            )
        if views.images < 2 and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError(
                f"batch: expected 2 images or more, as the loss compares images: got {views.images}; a last batch of "
                "one image is left out with drop_last=True in its DataLoader, or avoided by another batch size"
            )
        z = self._needed("model")(views)
        with self._trained_weights(stage):
            terms: Terms = self._needed("criterion").terms(z, views)
        loss, own = terms.loss, {}
        equivariance = getattr(self, "equivariance", None)
        if equivariance is not None:
            own["equivariance"] = equivariance(z, views)
            loss = loss + own["equivariance"]
        if not stage:
            self._record(terms)
        self._log(stage, terms, {"loss": loss, **own}, views.images)
        return StructuredStep(loss, terms, z, views)

    @contextmanager
    def _draws_apart(self, stage: str) -> Iterator[None]:
        """Outside training, draw from call numbers of their own, the same in each validation."""
        views = getattr(self, "views", None)
        call = getattr(views, "call", None)
        if not stage or views is None or call is None:
            yield
            return
        now = stage, self._trainer.global_step
        self._validated, self._validation = (self._validated if now == self._validation else 0), now
        views.call = OUTSIDE_TRAINING + self._validated
        self._validated += 1
        try:
            yield
        finally:
            views.call = call

    @contextmanager
    def _trained_weights(self, stage: str) -> Iterator[None]:
        """Outside training, use lambda as trained, where Lightning's WeightAveraging has put averages in its place."""
        fits = stage and self._trainer.state.fn == "fit"
        if not fits or self._trained is None or not self._adapts():
            yield
            return
        weights = self.criterion.weights
        kept = {k: v.clone() for k, v in weights.state_dict().items()}
        weights.load_state_dict(self._trained)
        try:
            yield
        finally:
            weights.load_state_dict(kept)

    def on_validation_epoch_start(self) -> None:
        """Draw the same views in each validation."""
        super().on_validation_epoch_start()
        self._validated = 0

    def on_test_epoch_start(self) -> None:
        """Draw the same views in each test."""
        super().on_test_epoch_start()
        self._validated = 0

    def _log(self, stage: str, terms: Terms, own: Mapping[str, Tensor], images: int) -> None:
        """Log terms, which are equal on every rank, and losses, whose mean over ranks is the global loss."""
        numbers = {k: t for k, t in terms.tensors().items() if k != "loss"}
        for values, reduced in ((numbers, False), (own, True)):
            # As 32-bit tensors, because under bf16-true Lightning converts numbers to 16-bit tensors.
            as_floats = {stage + k: t.detach().float().clone() for k, t in values.items()}
            # Outside training Lightning reduces at the end of the epoch, and warns without sync_dist.
            self.log_dict(as_floats, sync_dist=reduced or bool(stage), batch_size=images)

    def _stage(self) -> str:
        """Prefix of logged names: "" in training, else such as "val/"."""
        trainer = getattr(self, "_trainer", None)
        if trainer is None or trainer.training:
            return ""
        return "test/" if trainer.testing else "val/"

    def _needed(self, name: str) -> Any:
        kinds = {
            "views": "a StructuredViews or StructuredTransform",
            "model": "a StyleHeads",
            "criterion": "a JointEntropyLoss",
        }
        found = getattr(self, name, None)
        if found is None or (name == "criterion" and not callable(getattr(found, "terms", None))):
            got = "none" if found is None else type(found).__name__
            raise AttributeError(
                f"{type(self).__name__}: expected self.{name}, {kinds[name]}, set in __init__: got {got}"
            )
        return found

    # ------------------------------------------------------------------------------------------------ views

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Draw views of a training batch; other batches are left unchanged."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        trainer = getattr(self, "_trainer", None)
        return self._drawn(batch) if trainer is not None and trainer.training else batch

    def _drawn(self, batch: Any) -> Any:
        """The batch with views in the place of the images."""
        return batch if isinstance(batch, ViewBatch) else drawn(batch, self._needed("views"), self.image_key)

    # ------------------------------------------------------------------------------------------------ weights

    def _adapts(self) -> bool:
        weights = getattr(self.criterion, "weights", None)
        return weights is not None and not isinstance(weights, FixedWeights)

    def _record(self, terms: Terms) -> None:
        """Store the terms until the optimizer's step."""
        trainer = getattr(self, "_trainer", None)
        if not self._adapts():
            return
        if trainer is None:
            self._check_alone()
            return
        self._check_hook()
        self._check_overrides(trainer)
        if not self._pending:
            self._pending_step, self._hook_ran = (trainer.global_step, self._unseen), False
        self._pending = (*self._pending, replace(terms, loss=terms.loss.detach()))

    def _check_overrides(self, trainer: Any) -> None:
        """Warn once of overrides that leave averaged weights of the spaces where trained ones should be."""
        if self._overrides_checked:
            return
        self._overrides_checked = True
        if not any("WeightAveraging" in type(c).__name__ for c in trainer.callbacks):
            return
        before = type(self).__mro__[: type(self).__mro__.index(StructuredTraining)]
        if silent := [n for n in HOOKS if any(n in c.__dict__ and not calls(c.__dict__[n], n) for c in before)]:
            warnings.warn(
                f"{type(self).__name__}: expected overrides of {_checks.names(silent)} to call super(), as the hooks "
                "of StructuredTraining keep the trained weights of the spaces apart from averaged ones: got overrides "
                "that do not",
                stacklevel=4,
            )

    def _check_alone(self) -> None:
        """Without a trainer, warn of optimizer steps that no step of the criterion's weights goes with."""
        if not self.training or not torch.is_grad_enabled():
            return
        now = versions(self.model.parameters()), versions(self.criterion.weights.buffers())
        before, self._alone = self._alone, now
        if before is not None and now[0] > before[0] and now[1] == before[1]:
            warnings.warn(
                f"{type(self).__name__}: expected self.criterion.weights.step(step.terms) after every optimizer step, "
                "as no Trainer runs this module: got a changed model without it, so these weights stand still",
                stacklevel=4,
            )

    def _check_hook(self) -> None:
        step, unseen = self._pending_step
        missed = not self._hook_ran and self.trainer.global_step > step
        if self._pending and (missed or self._unseen > unseen):
            raise RuntimeError(
                f"{type(self).__name__}: expected on_before_optimizer_step of StructuredTraining to run, which updates "
                "criterion.weights: got an optimizer step without it; call super().on_before_optimizer_step(optimizer) "
                "in your override, and step optimizers through Lightning (self.optimizers())"
            )

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Update the criterion's weights with the mean terms of the batches since the last step."""
        super().on_before_optimizer_step(optimizer)
        self._hook_ran = True
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        of_model = [p for p in self.model.parameters() if id(p) in trained]
        if not self._adapts() or not of_model:
            return
        self._unseen -= 1  # the step that follows adds 1
        if getattr(self.trainer.fit_loop, "_skip_backward", False):  # StochasticWeightAveraging's batch statistics
            self._pending = ()
            return
        if not self._pending:
            if self._trained is None and any(p.grad is not None for p in of_model):
                raise RuntimeError(
                    f"{type(self).__name__}: expected training_step to call self.structured_step(batch), whose terms "
                    "update criterion.weights: got gradients without that call; to update them yourself, override "
                    "on_before_optimizer_step"
                )
            return
        if isinstance(optimizer, torch.optim.LBFGS):
            raise RuntimeError("DualAscent: expected an optimizer that evaluates the loss once per step: got LBFGS")
        terms, self._pending = Terms.mean(self._pending), ()
        self.criterion.weights.step(terms)
        self._trained = {k: v.clone() for k, v in self.criterion.weights.state_dict().items()}

    # ------------------------------------------------------------------------------------------------ begin, save, end

    def on_fit_start(self) -> None:
        """Check that views, model and criterion are set; the model gets the criterion's `on_sphere`."""
        super().on_fit_start()
        for name in ("views", "model", "criterion"):
            self._needed(name)
        added = self._modules.get("equivariance")
        if added is not None and getattr(self, "equivariance", None) is not added:
            raise AttributeError(
                f"{type(self).__name__}: expected no class attribute 'equivariance': got one that hides it"
            )
        heads = next((m for m in self.model.modules() if isinstance(m, StyleHeads)), None)
        if heads is not None:  # measures and reports compare embeddings as the loss does
            heads.on_sphere = bool(getattr(self.criterion, "on_sphere", heads.on_sphere))
        check_shards({n: getattr(self, n, None) for n in ("model", "criterion", "equivariance")})
        self._pending, self._trained, self._overrides_checked = (), None, False

    def on_train_start(self) -> None:
        """Check that the optimizers have all parameters of the loss."""
        super().on_train_start()
        self._count_steps(self.trainer.optimizers)
        groups = [g for o in self.trainer.optimizers for g in o.param_groups]
        trained = {id(p) for group in groups for p in group["params"]}
        for name in ("criterion", "equivariance"):
            part = getattr(self, name, None)
            named = part.named_parameters() if isinstance(part, nn.Module) else ()
            if left := [f"{name}.{k}" for k, p in named if p.requires_grad and id(p) not in trained]:
                raise ValueError(
                    "configure_optimizers: expected all trained parameters, such as self.parameters(): got optimizers "
                    f"without {_checks.names(left)}; set requires_grad to False on parameters that you do not train"
                )

    def _count_steps(self, optimizers: Sequence[Any]) -> None:
        """Count the steps of the model's optimizers, also those that Lightning does not see; without any, stop."""
        for handle in self._counting:
            handle.remove()

        def count(*_: Any) -> None:
            self._unseen += 1

        self._unseen, mine = 0, {id(p) for p in self.model.parameters()}
        of_model = [o for o in optimizers if any(id(p) in mine for g in o.param_groups for p in g["params"])]
        hooked = [o for o in of_model if self._adapts() and callable(getattr(o, "register_step_post_hook", None))]
        self._counting = tuple(o.register_step_post_hook(count) for o in hooked)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep lambda and draws as in training, not averaged, in checkpoints of Lightning's WeightAveraging."""
        super().on_save_checkpoint(checkpoint)
        if self._pending:
            warnings.warn(
                f"checkpoint: expected a checkpoint after an optimizer step: got one after {len(self._pending)} of the "
                "batches whose gradients are accumulated for the next step; these gradients, and the terms that update "
                "the weights of the spaces, are not saved, so a run resumed from it differs",
                stacklevel=2,
            )
        if "current_model_state" not in checkpoint:
            return
        own = self._named_state(self.criterion.weights, self._trained) if self._trained else {}
        if isinstance(self.views, nn.Module):
            own |= self._named_state(self.views, self.views.state_dict())
        for state in (checkpoint["state_dict"], checkpoint["current_model_state"]):
            state.update({k: v for k, v in own.items() if k in state})

    def _named_state(self, part: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        """A part's state under the names that it has in the state of this module, whatever wraps it."""
        prefixes = [name for name, m in self.named_modules(remove_duplicate=False) if m is part]
        return {f"{prefix}.{k}": v for prefix in prefixes for k, v in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume from optimizer states of heads whose weights were stored stacked."""
        super().on_load_checkpoint(checkpoint)
        trainer = getattr(self, "_trainer", None)
        fits = trainer is not None and trainer.state.fn == "fit"
        if fits and checkpoint.get("optimizer_states") and is_stacked(checkpoint["state_dict"]):
            raise ValueError(
                "ckpt_path: expected optimizer states for the weights of each head: got a checkpoint of an older "
                "version, with stacked weights, whose optimizer states cannot be converted; load only its weights, "
                "module.load_state_dict(torch.load(path)['state_dict']), and fit without ckpt_path"
            )

    def on_train_end(self) -> None:
        """Restore lambda as it was trained, after callbacks that load averaged weights."""
        super().on_train_end()
        if self._adapts():
            self._check_hook()
            if self._trained is not None:
                self.criterion.weights.load_state_dict(self._trained)
        self._count_steps(())
