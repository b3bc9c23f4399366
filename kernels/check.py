"""The self-check of the triton backend: 512 rows against float64, in value and gradient, before "auto" takes it.

It runs once for each process, device and pair (columns, prefix), with the tiles that these columns get, in both forms
of the log-sums (a constant shift, and maxima). A kernel that raises or computes something else is never used by "auto"
in this process: one warning says so, and the streaming backend runs. Nothing is settled where the device is short of
memory, and nothing runs while a compiler traces, a CUDA graph is captured, or tensors are fake.
"""

import warnings

import torch
from torch import Tensor

from ssd_addon._autocast import autocast_off
from ssd_addon.kernels.dispatch import capturing, free_memory

ROWS = 512
ROOM = 256 * 2**20
"""Bytes that must be free: below that the check waits for a later call."""
TEMPERATURES = {"a constant shift": 0.1, "maxima": 0.01}
VALUE, GRADIENT = 2e-3, 2e-3
"""Allowed error of a log-sum, and of the gradient relative to its norm; in the interpreter they are 6e-4 and 4e-4."""

_passed: set[tuple[str, int, int]] = set()
_failed: dict[str, str] = {}


def forget() -> None:
    """Check again at the next question."""
    _passed.clear()
    _failed.clear()


def passed(device: torch.device, width: int, prefix: int) -> bool:
    """Whether the kernels have computed the right numbers on this device, which is found out where it can be now.

    Args:
        device: one that `dispatch.why_no_triton` does not refuse.
        width, prefix: D, and columns of the first level, or 0.
    """
    place = _name(device)
    if place not in _failed and not known(device, width, prefix) and possible_now(device):
        try:
            problem = run(device, width, prefix)
        except torch.cuda.OutOfMemoryError:
            return False  # of no consequence: asked again at the next call
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if problem is None:
            _passed.add((place, width, prefix))
        else:
            _failed[place] = problem
            warnings.warn(
                f"ssd_addon.kernels: the fused kernels failed their check on {place} ({problem}); backend='auto' uses "
                "'streaming' there, whose numbers are right, and backend='triton' would use the kernels all the same",
                RuntimeWarning,
                stacklevel=2,
            )
    return known(device, width, prefix)


def known(device: torch.device, width: int, prefix: int) -> bool:
    """Whether they have passed already; nothing runs."""
    place = _name(device)
    return place not in _failed and (place, width, prefix) in _passed


def possible_now(device: torch.device) -> bool:
    """Whether a check may run: it computes, reads back, and needs memory."""
    if torch.compiler.is_compiling() or capturing(device):
        return False
    if type(torch.empty(0, device=device)) is not Tensor:  # a fake one, of a tracer
        return False
    return free_memory(device) >= ROOM


def run(device: torch.device, width: int, prefix: int = 0) -> str | None:
    """Compare the kernels with float64: None, or what differed."""
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
    """Log-sums [E, N] and their weighted sum's gradient [N, D], from the equation."""
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
