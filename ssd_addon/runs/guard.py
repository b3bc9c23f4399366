"""Handles non-finite steps and signals in a training loop, with one decision for all ranks per step."""

import math
import signal
from collections.abc import Iterable, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssd_addon import _checks

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TooManySkipped(RuntimeError):
    """Raised when more consecutive steps were not finite than allowed.

    Attributes:
        step: the last of these steps.
        spaces: the spaces whose embeddings were not finite, if known.
    """

    def __init__(self, message: str, step: int, spaces: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.step, self.spaces = step, tuple(spaces)


class Guard:
    """Decides at every step, jointly over ranks, whether the optimizer may step and whether the run should stop.

        with Guard([model, probes], max_skipped=3) as guard:
            for step in ...:
                guard.begin()
                try:
                    loss = ...
                    loss.backward()
                except Diverged as error:                the loss raises for embeddings that are not finite
                    loss = error
                if guard.fine(step, loss, parameters):
                    optimizer.step()
                if guard.stopping:                       SIGTERM or SIGINT on any rank
                    save(); sys.exit(guard.exit_code)

    A step that is not finite is skipped on every rank: buffers (statistics of batch norms) are restored to their values
    at `begin`, and the gradients of the modules and of `parameters` are set to None. Weights are not touched.

    With a GradScaler (float16), give no parameters, `guard.fine(step, loss, ())`: the scaler itself skips steps whose
    gradients overflow, and lowers its scale in `update()`.

    Args:
        modules: modules whose buffers are restored.
        max_skipped: number of consecutive steps that may be skipped; one more raises `TooManySkipped`.
        signals: signals that stop the run at the next step; a second SIGINT interrupts at once. () for none.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        *,
        max_skipped: int = 3,
        signals: Sequence[signal.Signals] = SIGNALS,
    ) -> None:
        self.modules = list(modules)
        self.max_skipped = _checks.count(max_skipped, "max_skipped")
        self.skipped = 0
        self.total = 0
        self.stopping = 0
        self._received = 0
        self._signals, self._before = tuple(signals), {}  # type: ignore[var-annotated]
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    # ---- signals

    def __enter__(self) -> "Guard":
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as in shells: 143 after SIGTERM, 130 after SIGINT; 0 if there was none."""
        return 128 + self.stopping if self.stopping else 0

    # ---- steps

    def begin(self) -> None:
        """Store the buffers, which a failed step would change."""
        places = {(id(m), n): (m, n) for module in self.modules for m in module.modules() for n in m._buffers}
        before = {(id(m), n): value for m, n, _, value in self._kept}
        self._kept = []
        for place, (m, n) in places.items():
            if (buffer := m._buffers[n]) is None:
                continue
            value = before.get(place)
            if value is not None and value.shape == buffer.shape and value.dtype == buffer.dtype:
                value.copy_(buffer.detach())
            else:
                value = buffer.detach().clone()
            self._kept.append((m, n, buffer, value))

    def fine(self, step: int, loss: Tensor | BaseException, parameters: Iterable[Tensor]) -> bool:
        """Whether loss and gradients are finite on every rank. Collective: call it on every rank.

        Args:
            step: the step, for messages.
            loss: the loss of this rank, or the error that it raised, which must then be raised on every rank.
            parameters: parameters whose gradients are checked.

        Raises:
            TooManySkipped: more than `max_skipped` consecutive steps were not finite.
        """
        checked = list(parameters)
        grads = [g for p in checked if p.grad is not None and (g := _local(p.grad)).numel()]
        spaces: tuple[str, ...] = ()
        if isinstance(loss, BaseException):
            spaces = tuple(getattr(loss, "spaces", ()))
            device = grads[0].device if grads else self._device()
            bad = torch.ones((), device=device)
        else:
            # The largest entry of each: sums of squares of finite gradients may overflow.
            tops = torch._foreach_norm(grads, math.inf) if grads else ()
            norms = torch.stack([n.float().to(loss.device) for n in tops]) if grads else None
            total = loss.detach().float() if norms is None else loss.detach().float() + 0 * norms.sum()
            bad = 1 - total.isfinite().float()
        state = torch.stack([bad.float(), torch.full_like(bad, float(self._received))])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(state, op=dist.ReduceOp.MAX)
        failed, received = state.tolist()
        self.stopping = int(received)
        if not failed:
            self.skipped = 0
            return True
        self._put_back()
        for p in (*parameters_of(self.modules), *checked):
            p.grad = None
        self.skipped += 1
        self.total += 1
        if self.skipped > self.max_skipped:
            whose = f" in the space {_checks.names(spaces)}" if spaces else ""
            reason = f": {loss}" if isinstance(loss, BaseException) else ""
            raise TooManySkipped(
                f"step {step}: expected a finite loss and finite gradients: got {self.skipped} consecutive steps that "
                f"are not finite{whose}{reason}",
                step,
                spaces,
            )
        return False

    def _put_back(self) -> None:
        with torch.no_grad():
            for m, name, buffer, value in self._kept:
                buffer.copy_(value)
                m._buffers[name] = buffer  # a forward pass may have assigned another tensor

    def _device(self) -> torch.device:
        return next((p.device for p in parameters_of(self.modules)), torch.device("cpu"))


def _local(grad: Any) -> Tensor:
    """The local part of a gradient, if it is sharded (FSDP2)."""
    local: Tensor = grad.to_local() if hasattr(grad, "to_local") else grad
    return local


def parameters_of(modules: Iterable[nn.Module]) -> list[Any]:
    """All parameters of these modules, each once."""
    return list({id(p): p for m in modules for p in m.parameters()}.values())


def not_finite(state: Any, path: str = "") -> str:
    """The path of the first floating-point tensor in a state that contains NaN or infinity; "" if all are finite."""
    if isinstance(state, Tensor):
        if state.is_floating_point() and not bool(state.isfinite().all()):
            return path or "it"
        return ""
    items: Iterable[Any] = ()
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    return next((bad for key, value in items if (bad := not_finite(value, f"{path}.{key}" if path else str(key)))), "")
