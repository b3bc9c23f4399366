"""`Monitor` logs the terms of the loss and what each space encodes during training, as JSON lines and to TensorBoard.

    with Monitor("runs/mine/log.jsonl", tensorboard="runs/mine", views=views, images=held_out) as monitor:
        for epoch in range(epochs):
            for images, _, _ in loader:
                ...
                monitor.step(step, terms)                 writes numbers every `log_every` steps
            monitor.epoch(model, epoch, step)             writes the matrices every `every` epochs

    trainer = Trainer(callbacks=[monitor.lightning()])    the same under Lightning, either package

`python -m ssd_addon report RUN` plots its curves from this log.
"""

import importlib
import json
import warnings
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon._lines import entries, item, number, plain, ready
from ssd_addon.alarm import CollapseAlarm, CollapseWarning
from ssd_addon.callback import callback
from ssd_addon.metrics import Circular, Factor, Probe, ScoreTable, embed, parameter_matrix, r2_matrix
from ssd_addon.metrics.images import check_range, for_model, scaled
from ssd_addon.metrics.probe import Kind

Writer = Any  # anything with add_scalar(name, value, step), such as torch.utils.tensorboard.SummaryWriter


class Monitor:
    """Training monitor, used as a callback in plain loops and in Lightning.

    Every line of the log is a JSON object with "step". `step` writes the loss's terms under their own names ("loss",
    "constraint/content", ...); `epoch` writes "parameters/SPACE/GROUP" and "r2/SPACE/FACTOR" and, under "tables", both
    complete matrices with intervals. Numbers that are not finite become null. TensorBoard gets the same numbers under
    the same names, and the matrices as images if matplotlib is installed.

    When a space collapses or recovers, the monitor issues a `CollapseWarning`, adds "alarm" to the line of terms, and
    writes text to TensorBoard; see `CollapseAlarm`.

    Over ranks, rank 0 measures and writes, and the others return at once without communication. A model that FSDP2 has
    sharded is run on every rank.

    Args:
        log: the JSON-lines file, to which lines are appended; a missing folder is created. None writes no log.
        tensorboard: a folder (needs the package tensorboard), or a writer with add_scalar; None writes nothing.
        views: the `StructuredViews` used in training, for the label-free matrix.
        images: [n, C, H, W], uint8 or in [0, 1], not normalized: held-out images on which the matrices are measured,
            500 to 2,000 of them, with any number of channels. Gray images are converted to color, and color images to
            gray, if the model takes only the other kind.
        factors: name -> a value for each image, as in `metrics.r2_matrix`, if some are known.
        every: epochs between matrices.
        log_every: steps between lines of terms.
        on_sphere: True scores L2-normalized embeddings, as used by the SimCLR family's loss; None uses the model's
            attribute `on_sphere`, False if it has none.
        probe: probe of `r2_matrix`; the label-free matrix always uses the kernel probe.
        draws: pairs of views per image, as in `parameter_matrix`; with one pair, each matrix takes two passes over the
            images.
        batch_size: number of images at a time.
        alarm: a `CollapseAlarm` that was given the length of the run and the widths; True makes one without them; False
            uses none. It continues from the lines that are already in the log.

    Raises:
        ValueError: factors or views are given without images; images are outside [0, 1]; a count is below 1.
        TypeError: images have an integer dtype other than uint8; the writer has no add_scalar; alarm is not valid.
        OSError: the log cannot be written.
        ImportError: a TensorBoard folder is given but the package is missing.

    >>> monitor = Monitor(None, images=torch.rand(20, 3, 8, 8), factors={"light": torch.rand(20)})
    >>> record = monitor.epoch(lambda x: {"content": x.mean((2, 3))}, epoch=0, step=100)
    >>> sorted(record)
    ['epoch', 'r2/content/light', 'step', 'tables']
    """

    def __init__(
        self,
        log: str | Path | None,
        *,
        tensorboard: str | Path | Writer | None = None,
        views: Any = None,
        images: Tensor | None = None,
        factors: Mapping[str, Factor] | None = None,
        every: int = 1,
        log_every: int = 10,
        on_sphere: bool | None = None,
        probe: Kind | Probe = "ridge",
        draws: int | None = 1,
        batch_size: int = 256,
        alarm: CollapseAlarm | bool = True,
    ) -> None:
        if images is None and (views is not None or factors):
            raise ValueError("Monitor: expected images, on which views and factors are measured: got none")
        for what, value in (("every", every), ("log_every", log_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{what}: expected a whole number, 1 or more: got {value!r}")
        Probe.of(probe)
        if images is not None and (not isinstance(images, Tensor) or images.ndim < 2 or not len(images)):
            got = _checks.shape(images) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"Monitor: expected images [n, C, H, W], one or more: got {got}")
        if images is not None and images.ndim == 4:
            check_range(images)
        if views is not None and not callable(getattr(views, "independent", None)):
            raise TypeError(f"Monitor: expected views as StructuredViews: got {type(views).__name__}")
        for name, factor in (factors or {}).items():
            values = factor.angle if isinstance(factor, Circular) else factor
            if not isinstance(values, Tensor):
                raise TypeError(f"factor {name!r}: expected a tensor or Circular: got {type(values).__name__}")
            if images is not None and (values.ndim < 1 or len(values) != len(images)):
                got = _checks.shape(values)
                raise ValueError(f"factor {name!r}: expected a value for each of the {len(images)} images: got {got}")
        self.views, self.images, self.factors = views, images, dict(factors or {})
        self.every, self.log_every = every, log_every
        self.on_sphere, self.probe, self.draws, self.batch_size = on_sphere, probe, draws, batch_size
        self.path = None if log is None else Path(log)
        self.writer: Writer = tensorboard
        if isinstance(tensorboard, str | Path):
            self.writer = None
            if _first():
                try:
                    self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(tensorboard))
                except ImportError as error:
                    raise ImportError(
                        "tensorboard: expected the package, to write to a folder: got none; pip install tensorboard"
                    ) from error
        elif tensorboard is not None and not callable(getattr(tensorboard, "add_scalar", None)):
            raise TypeError(f"tensorboard: expected a folder or a writer: got {type(tensorboard).__name__}")
        self._own_writer = isinstance(tensorboard, str | Path)
        self._logged_elsewhere = False  # whether Lightning's own logger already logs the terms
        if not isinstance(alarm, CollapseAlarm | bool):
            raise TypeError(f"alarm: expected a CollapseAlarm, True or False: got {type(alarm).__name__}")
        self.alarm = CollapseAlarm() if alarm is True else alarm or None
        self._of_caller = None if self.alarm is None else (self.alarm.total_steps, self.alarm.widths)
        if self.path is not None and _first():
            ready(self.path)
            if self.alarm is not None:
                self.alarm.replay(entries(self.path))

    def step(self, step: int, terms: Any, **more: float) -> dict[str, Any]:
        """Write a line of terms on step 0 and then every `log_every` steps.

        Args:
            step: the training step.
            terms: `criterion.terms(z)`, or a mapping name -> number. They are not read on steps that are not written.
            more: further numbers, such as lr, or equivariance=, which the alarm's advice takes into account. None is
                written as null.

        Returns:
            The line that was written, with "alarm" if the alarm reports something; {} on other steps.

        Raises:
            TypeError: the step is not an integer, terms is neither of these, or a value is not a number.
        """
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"step: expected a whole number: got {step!r}")
        return {} if step % self.log_every else self._terms(step, terms, stacklevel=4, **more)

    def _terms(self, step: int, terms: Any, *, stacklevel: int = 3, **more: float) -> dict[str, Any]:
        """Write a line of terms now, as `step` does every `log_every` steps; its arguments, result and errors."""
        if not _first():
            return {}
        if not isinstance(terms, Mapping) and not callable(getattr(terms, "scalars", None)):
            raise TypeError(f"terms: expected criterion.terms(z), or a mapping name -> number: got {terms!r}")
        numbers: dict[str, Any] = dict(terms) if isinstance(terms, Mapping) else terms.scalars()
        record = {"step": int(step), **{k: number(k, v) for k, v in (numbers | more).items()}}
        return self.write(record, tensorboard=not self._logged_elsewhere, stacklevel=stacklevel)

    def epoch(self, model: Any, epoch: int, step: int) -> dict[str, Any]:
        """Measure what each space encodes and write it, on epoch 0 and then every `every` epochs.

        Args:
            model: `StyleHeads`, also inside DistributedDataParallel, or a callable that maps images to space -> [n, d]
                or to features [n, F], which are named "backbone". The model is left unchanged, see `metrics.embed`.
            epoch, step: the training epoch and step.

        Returns:
            The line that was written; {} on other epochs, or if there is nothing to measure (no groups, no factors).
        """
        sharded = isinstance(model, nn.Module) and any(hasattr(p, "full_tensor") for p in model.parameters())
        if epoch % self.every or self.images is None or not (_first() or sharded):
            return {}
        changed = ""
        try:
            tables = self._measured(model, self.images)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError):
            images, changed = for_model(self.images, model)
            if not changed:
                raise
            tables = self._measured(model, images)
        if not tables:
            return {}
        record: dict[str, Any] = {"step": int(step), "epoch": int(epoch)} | ({"note": changed} if changed else {})
        for kind, table in tables.items():
            record |= {f"{kind}/{s}/{f}": table[s, f] for s in table.spaces for f in table.factors}
        record["tables"] = {kind: table.to_json() for kind, table in tables.items()}
        self.write(record)
        self._pictures(tables, step)
        return record

    def _measured(self, model: Any, images: Tensor) -> dict[str, ScoreTable]:
        """The matrices that can be measured; {} if there are neither groups nor factors."""
        tables: dict[str, ScoreTable] = {}
        if self.views is not None and len(self.views.plan.spaces) > 1:
            tables["parameters"] = parameter_matrix(
                model,
                self.views,
                images,
                on_sphere=self.on_sphere,
                draws=self.draws,
                batch_size=self.batch_size,
                backbone=True,
            )
        if self.factors:
            if self.views is not None:
                ready = self.views.plain(images)
            else:
                ready = scaled(images) if images.ndim == 4 or images.dtype == torch.uint8 else images
            z = embed(model, ready, batch_size=self.batch_size, on_sphere=self.on_sphere)
            tables["r2"] = r2_matrix(z, self.factors, probe=self.probe)
        return tables

    def close(self) -> None:
        """Close the TensorBoard writer if this monitor created it; the log is closed after every line."""
        if self._own_writer and self.writer is not None:
            self.writer.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def lightning(self, base: type | None = None, *, model: Any = None) -> Any:
        """This monitor as a Lightning callback: `Trainer(callbacks=[monitor.lightning()])`.

        Every `log_every` steps it writes the values that the module logged (`self.log_dict(terms.scalars())`), and at
        the end of an epoch the matrices of the model. It does not measure in sanity checks or validation. If the
        monitor has no `tensorboard`, the callback writes to the trainer's logger if that is a TensorBoard logger.

        Args:
            base: the Callback class, if both packages are installed: lightning.pytorch.Callback or
                pytorch_lightning.Callback. None takes the one that is installed, lightning.pytorch first.
            model: the model to measure: a module, the dotted name of one in the LightningModule ("student.backbone"),
                or a callable LightningModule -> model. None takes the first `StyleHeads` in it.

        Raises:
            ImportError: neither package is installed.
            ValueError: at the start of training: there is no such module, or no `StyleHeads`.
        """
        return callback(self, base, model)

    def write(self, record: Mapping[str, Any], *, tensorboard: bool = True, stacklevel: int = 2) -> dict[str, Any]:
        """Write one line of numbers now, with its "step"; does nothing on ranks other than 0.

        Args:
            record: name -> number, with "step". Tensors and arrays of several numbers, and sets, become lists; strings,
                None, lists and mappings are allowed too.
            tensorboard: also send the numbers to the TensorBoard writer.
            stacklevel: stack level of warnings, as for `warnings.warn`.

        Returns:
            The line that was written, with "alarm" if the alarm reports something; {} on other ranks.

        Warns:
            CollapseWarning: a space collapses, or has recovered.

        Raises:
            TypeError: a value has another type; the message names it, and nothing is written.
        """
        if not _first():
            return {}
        line = {str(k): plain(v, str(k)) for k, v in record.items()}
        said = [] if self.alarm is None else self.alarm(line)
        if said:
            record = {**record, "alarm": [event.to_json() for event in said]}
            line["alarm"] = record["alarm"]
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        if tensorboard and self.writer is not None:
            for name, value in record.items():
                value = item(value) if isinstance(value, Tensor | np.ndarray) else value
                if isinstance(value, Real) and not isinstance(value, bool) and name not in ("step", "epoch"):
                    self.writer.add_scalar(name, value, record["step"])
        for event in said:
            if callable(getattr(self.writer, "add_text", None)):
                self.writer.add_text("alarm", event.text, event.step)
            warnings.warn(f"step {event.step}: {event.text}", CollapseWarning, stacklevel=stacklevel)
        return dict(record)

    def state_dict(self) -> dict[str, Any]:
        """The state of the alarm, for a checkpoint if there is no log to continue from."""
        return {} if self.alarm is None else {"alarm": self.alarm.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the alarm from a `state_dict`; no effect if the state or the monitor has no alarm."""
        if self.alarm is not None and "alarm" in state:
            self.alarm.load_state_dict(state["alarm"])

    def _key(self, model: Any = None) -> str:
        """The name under which a Lightning checkpoint holds the state of a monitor of this model."""
        name = f"ssd_addon.Monitor({self.path}"
        if self.path is not None and model is None:
            return f"{name})"
        measured = f"model={model if isinstance(model, str) else type(model).__name__}, factors={sorted(self.factors)}"
        return f"{name}, {measured}, views={self.views is not None}, every={self.every}, log_every={self.log_every})"

    def _pictures(self, tables: Mapping[str, ScoreTable], step: int) -> None:
        if not callable(getattr(self.writer, "add_figure", None)):
            return
        try:
            plots = importlib.import_module("ssd_addon.plots")
        except ImportError:  # matplotlib is optional; the numbers are written without it
            return
        for kind, table in tables.items():
            self.writer.add_figure(f"matrix/{kind}", plots.matrix_figure(table), step)


def _first() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
