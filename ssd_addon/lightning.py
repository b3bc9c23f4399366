"""Style spaces in a LightningModule, of lightning.pytorch or pytorch_lightning: neither is imported here.

class Mine(StructuredTraining, LightningModule):
    def __init__(self):
        super().__init__()
        self.views = StructuredViews(...)
        self.model = StyleHeads(backbone, {"content": 128, "color": 64})
        self.criterion = JointEntropyLoss("simclr", gather_distributed=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon.augment.native import Cropped
from ssd_addon.batch import ViewBatch, ViewParameters
from ssd_addon.losses.terms import Terms
from ssd_addon.losses.weights import FixedWeights
from ssd_addon.stacked import is_stacked
from ssd_addon.transform import StructuredTransform

_Base: Any = nn.Module if TYPE_CHECKING else object


@dataclass(frozen=True)
class StructuredStep:
    """What `structured_step` made of a batch.

    Attributes:
        loss: scalar with its graph, the criterion's and, where there is one, the equivariance loss.
        terms: of the criterion.
        embeddings: space -> [V, B, d], what the model returned.
        views: the `ViewBatch` that they are of.
    """

    loss: Tensor
    terms: Terms
    embeddings: Mapping[str, Tensor]
    views: ViewBatch


class StructuredTraining(_Base):  # type: ignore[misc]
    """A mixin for a LightningModule: views, loss, logging and dual ascent of a training step.

    Views are drawn after the transfer to the device, from batches of training alone. `training_step` computes the loss
    and logs its terms, as means over ranks; the weights of the criterion (`DualAscent`) are stepped once per optimizer
    step. All state is in the module's state_dict, and so in Lightning's checkpoints.

        class Mine(StructuredTraining, LightningModule): ...        in this order

    Set in `__init__` (or in `configure_model`):

    Attributes:
        views: the `StructuredViews`, or the `StructuredTransform` by which the data set's workers draw views.
        model: a `StyleHeads`, also compiled or wrapped.
        criterion: a `JointEntropyLoss`. Over ranks give it `gather_distributed=True`.
        equivariance: an `EquivarianceLoss` to add, or None.
        image_key: the images' name where batches are mappings.

    A batch is images [B, C, H, W], or a tuple or list that begins with them (labels, names and anything else are kept),
    or a mapping that holds either under `image_key`, or a `ViewBatch`; with a `StructuredTransform`, a list of V views
    takes the images' place. A training step sees the same batch with a `ViewBatch` in that place.

    Raises:
        TypeError: the mixin behind LightningModule in the bases; a batch without images in their place; manual
            optimization with the default `training_step`.
        AttributeError: views, model or criterion are missing.
        ValueError: parameters of the criterion or the equivariance loss that no optimizer has, or that FSDP2 leaves
            apart; a batch on another device.
        RuntimeError: a hook of the mixin that an override does not call; LBFGS with weights that adapt.
    """

    views: Any
    model: Any
    criterion: Any
    equivariance: Any  # no default: a class attribute would hide the submodule of that name
    image_key: str | None = None

    _pending: tuple[Terms, ...] = ()  # of the batches since the last optimizer step
    _pending_step = 0  # trainer.global_step when the first of them came
    _hook_ran = False  # since then
    _trained: Mapping[str, Tensor] | None = None  # the weights' state after their last step

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        before = cls.__mro__[: cls.__mro__.index(StructuredTraining)]
        if any(c.__name__ == "LightningModule" for c in before):
            raise TypeError(
                f"class {cls.__name__}: expected StructuredTraining before the LightningModule, whose hooks it "
                f"extends: got {_checks.names(c.__name__ for c in cls.__bases__)}"
            )

    # ------------------------------------------------------------------------------------------------ a step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch; override it with `self.structured_step(batch)` to do more."""
        if not self.automatic_optimization:
            raise TypeError(
                "training_step: expected one of your own under manual optimization, which calls "
                "self.structured_step(batch), self.manual_backward(step.loss) and the optimizer's step(): got the "
                "default, which returns the loss to Lightning"
            )
        return self.structured_step(batch).loss

    def structured_step(self, batch: Any) -> StructuredStep:
        """Embeddings and loss of a batch, its terms logged: for a `training_step` or `validation_step` of your own.

        Names in the log are those of `Terms.scalars()`, "equivariance" and, where weights adapt, "lambda/content", ...;
        outside the training they begin with "val/" or "test/". There the views are drawn too, the draws of the
        training go on as if nothing had happened, and weights are not stepped.

        Args:
            batch: as the data loader gives it, or as the `training_step` gets it.
        """
        stage, counted = self._stage(), self._needed("views")
        call = getattr(counted, "call", None)
        views = _views_in(self._drawn(batch))
        if stage and call is not None:
            counted.call = call
        if views.device.type != self.device.type:
            raise ValueError(
                f"batch: expected it on the module's device, {self.device}: got views on {views.device}; "
                "transfer_batch_to_device moves it"
            )
        z = self._needed("model")(views)
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

    def _log(self, stage: str, terms: Terms, own: Mapping[str, Tensor], images: int) -> None:
        """Terms are equal on every rank; the losses are of this rank, and their mean over ranks is the global one."""
        numbers = {k: t for k, t in terms.tensors().items() if k != "loss"}
        if self._adapts():
            weights = self.criterion.weights.lambdas(tuple(terms.invariance))
            numbers |= {f"lambda/{n}": torch.as_tensor(w, device=terms.loss.device) for n, w in weights.items()}
        for values, reduced in ((numbers, False), (own, True)):
            # In 32 bits, and as tensors: under bf16-true Lightning makes 16-bit tensors of numbers.
            as_floats = {stage + k: t.detach().float().clone() for k, t in values.items()}
            self.log_dict(as_floats, sync_dist=reduced, batch_size=images)

    def _stage(self) -> str:
        """ "" in training, else what names in the log begin with."""
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
        """Draws views of a training batch; others are left as they are."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        trainer = getattr(self, "_trainer", None)
        return self._drawn(batch) if trainer is not None and trainer.training else batch

    def _drawn(self, batch: Any) -> Any:
        """The batch with views in the images' place."""
        if isinstance(batch, ViewBatch):
            return batch
        if isinstance(batch, Mapping):
            if self.image_key is None or self.image_key not in batch:
                raise TypeError(
                    f"batch: expected self.image_key to name the images among {_checks.names(batch)}: got "
                    f"{self.image_key!r}"
                )
            return {**batch, self.image_key: self._drawn(batch[self.image_key])}
        views = self._needed("views")
        made = isinstance(views, StructuredTransform)
        whole = isinstance(batch, Tensor | Cropped) or (made and _is_views(batch, views))
        images = batch if whole or not isinstance(batch, list | tuple) or not batch else batch[0]
        if isinstance(images, ViewBatch):
            return batch
        if made:
            drawn = _of_workers(images, views)
        elif isinstance(images, Tensor | Cropped):
            drawn = views(images)
        else:
            raise TypeError(
                f"batch: expected images [B, C, H, W], or a tuple that begins with them: got {_named(batch)}"
                + ("; with views made in workers, self.views is their StructuredTransform" if _lists(images) else "")
            )
        if not isinstance(drawn, ViewBatch):
            raise TypeError(f"self.views: expected StructuredViews, which return a ViewBatch: got {_named(drawn)}")
        if images is batch:
            return drawn
        if hasattr(batch, "_replace"):  # a named tuple
            return batch._replace(**{batch._fields[0]: drawn})
        return type(batch)([drawn, *batch[1:]])

    # ------------------------------------------------------------------------------------------------ weights

    def _adapts(self) -> bool:
        weights = getattr(self.criterion, "weights", None)
        return weights is not None and not isinstance(weights, FixedWeights)

    def _record(self, terms: Terms) -> None:
        """Keep the terms until the optimizer's step."""
        trainer = getattr(self, "_trainer", None)
        if trainer is None or not self._adapts():
            return
        self._check_hook()
        if not self._pending:
            self._pending_step, self._hook_ran = trainer.global_step, False
        self._pending = (*self._pending, replace(terms, loss=terms.loss.detach()))

    def _check_hook(self) -> None:
        if self._pending and not self._hook_ran and self.trainer.global_step > self._pending_step:
            raise RuntimeError(
                f"{type(self).__name__}: expected on_before_optimizer_step of StructuredTraining to run, which steps "
                "criterion.weights: got an optimizer step without; call super().on_before_optimizer_step(optimizer) in "
                "your override, and step optimizers through Lightning (self.optimizers())"
            )

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Steps the criterion's weights with the mean terms of the batches since the last step."""
        super().on_before_optimizer_step(optimizer)
        self._hook_ran = True
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        of_model = [p for p in self.model.parameters() if id(p) in trained]
        if not self._adapts() or not of_model:
            return
        if not self._pending:
            if self._trained is None and any(p.grad is not None for p in of_model):
                raise RuntimeError(
                    f"{type(self).__name__}: expected training_step to call self.structured_step(batch), whose terms "
                    "step criterion.weights: got gradients without; to step them yourself, override "
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
        """Says at once what is missing."""
        super().on_fit_start()
        for name in ("views", "model", "criterion"):
            self._needed(name)
        added = self._modules.get("equivariance")
        if added is not None and getattr(self, "equivariance", None) is not added:
            raise AttributeError(
                f"{type(self).__name__}: expected no class attribute 'equivariance': got one that hides it"
            )
        _check_shards({n: getattr(self, n, None) for n in ("model", "criterion", "equivariance")})
        self._pending, self._trained = (), None

    def on_train_start(self) -> None:
        """Says which parameters of the loss no optimizer trains."""
        super().on_train_start()
        groups = [g for o in self.trainer.optimizers for g in o.param_groups]
        trained = {id(p) for group in groups for p in group["params"]}
        for name in ("criterion", "equivariance"):
            part = getattr(self, name, None)
            named = part.named_parameters() if isinstance(part, nn.Module) else ()
            if left := [f"{name}.{k}" for k, p in named if p.requires_grad and id(p) not in trained]:
                raise ValueError(
                    "configure_optimizers: expected all trained parameters, such as self.parameters(): got optimizers "
                    f"without {_checks.names(left)}; set requires_grad to False on what is not to be trained"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """In a checkpoint of averaged weights (Lightning's WeightAveraging), lambda and draws stay the training's."""
        super().on_save_checkpoint(checkpoint)
        if "current_model_state" not in checkpoint:
            return
        own = {f"criterion.weights.{k}": v for k, v in (self._trained or {}).items()}
        if isinstance(self.views, nn.Module):
            own |= {f"views.{k}": v for k, v in self.views.state_dict().items()}
        for state in (checkpoint["state_dict"], checkpoint["current_model_state"]):
            state.update({k: v for k, v in own.items() if k in state})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says where a fit cannot be continued: optimizer states of heads whose weights were stacked."""
        super().on_load_checkpoint(checkpoint)
        trainer = getattr(self, "_trainer", None)
        fits = trainer is not None and trainer.state.fn == "fit"
        if fits and checkpoint.get("optimizer_states") and is_stacked(checkpoint["state_dict"]):
            raise ValueError(
                "ckpt_path: expected optimizer states for the weights of each head: got a checkpoint from when all "
                "heads shared stacked weights, whose optimizer states cannot be carried over; load its weights alone, "
                "module.load_state_dict(torch.load(path)['state_dict']), and fit without ckpt_path"
            )

    def on_train_end(self) -> None:
        """After the callbacks': averaged weights leave lambda as it was trained."""
        super().on_train_end()
        if self._adapts():
            self._check_hook()
            if self._trained is not None:
                self.criterion.weights.load_state_dict(self._trained)


def _check_shards(parts: Mapping[str, Any]) -> None:
    """FSDP2 averages the gradients of what it has sharded alone: ranks would train the rest apart."""
    whole: dict[bool, list[str]] = {True: [], False: []}
    for name, part in parts.items():
        for key, p in part.named_parameters() if isinstance(part, nn.Module) else ():
            whole[not hasattr(p, "full_tensor")] += [f"{name}.{key}"] * p.requires_grad
    if whole[False] and whole[True]:
        raise ValueError(
            "configure_model: expected all trained parameters to be sharded, or none: got fully_shard without "
            f"{_checks.names(whole[True])}, whose gradients no one averages over ranks"
        )


def _views_in(batch: Any) -> ViewBatch:
    """The views of a batch in which they were drawn."""
    if isinstance(batch, ViewBatch):
        return batch
    return _views_in(next(v for v in batch.values() if _holds_views(v)) if isinstance(batch, Mapping) else batch[0])


def _holds_views(value: Any) -> bool:
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, ViewBatch)


def _lists(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, Tensor) for v in value)


def _with_parameters(value: Any) -> bool:
    """(views, parameters), as a transform with `parameters=True` returns them."""
    pair = isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], list | tuple)
    return pair and all(isinstance(p, Mapping) for p in value[1])


def _is_views(value: Any, transform: StructuredTransform) -> bool:
    """A list of V views [B, ...], as `default_collate` makes of the lists that a transform returns."""
    if _with_parameters(value):
        return _is_views(value[0], transform)
    return _lists(value) and all(v.ndim == transform.views.samples.ndim + 1 for v in value)


def _of_workers(images: Any, transform: StructuredTransform) -> ViewBatch:
    """Views that `default_collate` has put together, with their parameters where the transform returns them."""
    drawn: Sequence[Any] = ()
    if _with_parameters(images):
        images, drawn = images
    if not _is_views(images, transform):
        raise TypeError(
            f"batch: expected {transform.plan.num_views} views made by the data set's StructuredTransform, in a list: "
            f"got {_named(images)}"
        )
    return ViewBatch(list(images), transform.plan, parameters=[ViewParameters(p) for p in drawn])


def _named(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {_checks.names(dict.fromkeys(type(v).__name__ for v in value))}"
    return f"tensor {_checks.shape(value)}" if isinstance(value, Tensor) else type(value).__name__
