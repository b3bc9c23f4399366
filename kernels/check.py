"""Self-check of the triton backend, which "auto" requires: 512 rows against float64, in value and gradient.

It runs once per process, device and pair (columns, prefix), with the tiles for these columns, in both forms of the
log-sums (a constant shift, and maxima). If a kernel raises or differs, "auto" does not use it in this process: one
warning is issued, and the streaming backend runs instead. The check is postponed if the device is short of memory, and
does not run while a compiler traces, a CUDA graph is captured, or tensors are fake.
"""

import warnings

import torch
from torch import Tensor

from ssd_addon._autocast import autocast_off
from ssd_addon.kernels.dispatch import capturing, free_memory

ROWS = 512
ROOM = 256 * 2**20
"""Bytes that must be free; otherwise the check is postponed to a later call."""
TEMPERATURES = {"a constant shift": 0.1, "maxima": 0.01}
VALUE, GRADIENT = 2e-3, 2e-3
"""Largest error of a log-sum, and of the gradient relative to its norm; in the interpreter they are 6e-4 and 4e-4."""

_passed: set[tuple[str, int, int]] = set()
_failed: dict[str, str] = {}


def forget() -> None:
    """Check again on the next use."""
    _passed.clear()
    _failed.clear()


def passed(device: torch.device, width: int, prefix: int) -> bool:
    """Whether the kernels have passed the check on this device; runs the check now if that is possible.

    Args:
        device: a device for which `dispatch.why_no_triton` returns None.
        width, prefix: D, and the number of columns of the first level, or 0.
    """
    place = _name(device)
    if place not in _failed and not known(device, width, prefix) and possible_now(device):
        try:
            problem = run(device, width, prefix)
        except torch.cuda.OutOfMemoryError:
            return False  # undecided: checked again at the next call
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if problem is None:
            _passed.add((place, width, prefix))
        else:
            _failed[place] = problem
            warnings.warn(
                f"ssd_addon.kernels: the fused kernels failed their check on {place} ({problem}); backend='auto' uses "
                "'streaming' there, whose results are correct; backend='triton' would still use the kernels",
                RuntimeWarning,
                stacklevel=2,
            )
    return known(device, width, prefix)


def known(device: torch.device, width: int, prefix: int) -> bool:
    """Whether the check has passed already; does not run it."""
    place = _name(device)
    return place not in _failed and (place, width, prefix) in _passed


def possible_now(device: torch.device) -> bool:
    """Whether a check may run now: it computes, reads from the device, and needs memory."""
    if torch.compiler.is_compiling() or capturing(device):
        return False
    if type(torch.empty(0, device=device)) is not Tensor:  # a tracer's fake tensor
        return False
    return free_memory(device) >= ROOM


def run(device: torch.device, width: int, prefix: int = 0) -> str | None:
    """Compare the kernels with float64; returns None, or a description of the difference."""
    rows = ROWS
    with torch.inference_mode(False), torch.enable_grad(), autocast_off(device):
        g = torch.Generator(device).manual_seed(width + prefix)
        z = torch.randn(rows, width, generator=g, device=device, dtype=torch.float32)
        z = torch.nn.functional.normalize(z, dim=1).half()
        ids = torch.arange(rows, device=device, dtype=torch.int32) // 2
        weight = torch.rand(2 if prefix else 1, rows, generator=g, device=device, dtype=torch.float32) + 0.5
        for form, temperature in TEMPERATURES.items():
            want, dwant = _exact(z.double(), ids, temperature, prefix, weight.double())
            got, dgot = _kernels(z, ids, temperature, prefix, weight)
            value = (got.double() - want).abs().max().item()
            gradient = ((dgot.double() - dwant).norm() / dwant.norm()).item()
            if not value <= VALUE * 0.1 / temperature:  # not <=, so that NaN fails
                return f"with {form} a log-sum differs by {value:.3g}, N = {rows}, D = {width}"
            if not gradient <= GRADIENT:
                return f"with {form} the gradient differs by {gradient:.3g} of its norm, N = {rows}, D = {width}"
    return None


def _exact(z: Tensor, ids: Tensor, temperature: float, prefix: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sums [E, N] and the gradient [N, D] of their weighted sum, from the equation."""
    z = z.requires_grad_()
    same = ids[:, None] == ids[None, :]
    parts = [z[:, :prefix], z] if prefix else [z]
    lse = torch.stack([(p @ p.T / temperature).masked_fill(same, -torch.inf).logsumexp(1) for p in parts])
    (dz,) = torch.autograd.grad((lse * weight).sum(), z)
    return lse.detach(), dz


def _kernels(z: Tensor, ids: Tensor, temperature: float, prefix: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the triton backend."""
    from ssd_addon.kernels import similarity

    leaf = z.detach().requires_grad_()
    lse = similarity.negative_lse(leaf, ids, temperature, prefix=prefix or None, backend="triton", validate=False)
    lse = lse.T if prefix else lse[None]
    (dz,) = torch.autograd.grad((lse * weight).sum(), leaf)
    return lse.detach(), dz


def _name(device: torch.device) -> str:
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return device.type if index is None else f"{device.type}:{index}"
