"""A `Monitor` as a callback of lightning.pytorch or pytorch_lightning; neither is imported before it is used.

`Monitor.lightning` is the public name.
"""

import importlib
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ssd_addon.heads import StyleHeads


def callback(monitor: Any, base: type | None, model: Any) -> Any:
    """The callback, whose arguments are those of `Monitor.lightning`."""
    if base is None:
        for package in ("lightning.pytorch", "pytorch_lightning"):
            try:
                base = importlib.import_module(package).Callback
                break
            except ImportError:
                continue
        else:
            raise ImportError(
                "lightning() needs lightning or pytorch_lightning, and neither is installed: pip install lightning"
            )

    class MonitorCallback(base):  # type: ignore[misc, valid-type]
        """Writes `Monitor`'s lines from Lightning's hooks."""

        _last = -1  # the last step before this batch
        _borrowed = False  # whether the writer is that of the trainer's logger

        def __reduce__(self) -> Any:  # the class is local; a spawned process makes its own
            return callback, (monitor, base, model)

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # after setup and configure_model
            if monitor.images is not None:
                _chosen(pl_module, model)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._last = _steps(trainer, pl_module) - 1
            if monitor.alarm is not None:
                monitor.alarm.total_steps, monitor.alarm.widths = monitor._of_caller  # not those of a training before
                # Under manual optimization lines count batches, and max_steps optimizer steps.
                batches = getattr(pl_module, "automatic_optimization", True) or trainer.max_steps == -1
                steps, heads = trainer.estimated_stepping_batches if batches else math.inf, _heads(pl_module)
                monitor.alarm.told(steps, heads.spaces if heads is not None else {})

        @property
        def state_key(self) -> str:  # distinguishes several monitors in one trainer
            key: str = monitor._key(model)
            return key

        def state_dict(self) -> dict[str, Any]:
            state: dict[str, Any] = monitor.state_dict()
            return state

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            monitor.load_state_dict(state_dict)

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if monitor.writer is None:
                for logger in trainer.loggers:
                    if callable(getattr(logger.experiment, "add_scalar", None)):
                        monitor.writer, monitor._logged_elsewhere, self._borrowed = logger.experiment, True, True

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            # -1 while gradients are accumulated for the first step; one batch may make several steps.
            step, last, self._last = _steps(trainer, pl_module) - 1, self._last, _steps(trainer, pl_module) - 1
            if step // monitor.log_every == last // monitor.log_every:
                return
            logged = trainer.callback_metrics
            numbers = {k: float(v) for k, v in logged.items() if not _forked(k, logged)}
            if isinstance(outputs, Mapping) and "loss" in outputs:  # Lightning divides it under gradient accumulation
                numbers.setdefault("loss", float(outputs["loss"]) * trainer.accumulate_grad_batches)
            monitor._terms(step, numbers)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if monitor.images is not None:
                monitor.epoch(_chosen(pl_module, model), trainer.current_epoch, _steps(trainer, pl_module))

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            monitor.close()
            if self._borrowed:
                monitor.writer, monitor._logged_elsewhere, self._borrowed = None, False, False

    return MonitorCallback()


def _steps(trainer: Any, module: Any) -> int:
    """Optimizer steps so far; under manual optimization batches, as several optimizers may step in each."""
    if getattr(module, "automatic_optimization", True):
        return int(trainer.global_step)
    return int(trainer.fit_loop.epoch_loop.total_batch_idx) + 1


def _chosen(module: Any, model: Any) -> Any:
    """The model to measure in a LightningModule."""
    name = f"the LightningModule {type(module).__name__}"
    if model is None:
        found = _heads(module)
        if found is None:
            raise ValueError(f"Monitor: expected a StyleHeads inside {name}: got none; select a model with model=")
        return found
    if isinstance(model, str):
        try:
            return module.get_submodule(model)
        except AttributeError as error:
            raise ValueError(f"model: expected the name of a module in {name}: got {model!r}") from error
    return model if isinstance(model, nn.Module) else model(module)


def _forked(name: str, logged: Mapping[str, Any]) -> bool:
    """Whether Lightning made this name of another: "loss_step" and "loss_epoch" of "loss"."""
    base, _, kind = name.rpartition("_")
    if kind not in ("step", "epoch") or base not in logged:
        return False
    other = f"{base}_{'epoch' if kind == 'step' else 'step'}"  # "loss_epoch" comes at the end of the first
    return other in logged or float(logged[name]) == float(logged[base])


def _heads(module: Any) -> StyleHeads | None:
    return next((m for m in module.modules() if isinstance(m, StyleHeads)), None)
