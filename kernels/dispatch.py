"""Which backend runs: by device, type and size for "auto"; a named one runs or raises."""

import importlib.util
from typing import Literal, get_args

import torch

from ssd_addon.kernels import table

HAS_TRITON = importlib.util.find_spec("triton") is not None

Runnable = Literal["eager", "streaming", "triton"]
Backend = Literal["auto", Runnable]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

EAGER_BYTES = 64 * 2**20
"""Up to this size of the matrix that eager materializes, eager is the choice of "auto"."""
CPU_EAGER_BYTES = 256 * 2**10
"""The same for the log-sums on a CPU, where streaming is the faster one from about 256 rows on (docs/benchmarks.md)."""


def choose_backend(
    backend: Backend,
    *,
    matrix_elements: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    rows: int = 0,
    width: int = 0,
) -> Runnable:
    """Resolve "auto" and refuse what cannot run.

    Args:
        backend: "auto", "eager", "streaming" or "triton".
        matrix_elements: entries of the matrix that eager would keep (N x N, or D x D).
        dtype: type that the arithmetic runs in.
        device: where the rows are; None checks the name alone.
        rows, width: N and D of the log-sums (0 rows: covariances), by which "auto" picks triton on CUDA where
            table.json has it measured as faster, and streaming on a CPU from a smaller matrix on.

    Raises:
        ValueError: an unknown name, or a named backend that cannot run here; the message says what can.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}: got {backend!r}")
    if backend == "triton" and device is not None:
        reason = why_no_triton(device, dtype)
        if reason:
            raise ValueError(
                f"backend 'triton': {reason}; 'eager' and 'streaming' run on every device and in every type, and "
                "'auto' picks what runs"
            )
    if backend != "auto":
        return backend
    if (
        device is not None
        and device.type == "cuda"
        and rows >= table.smallest_rows(table.architecture(device), width)
        and why_no_triton(device, dtype) is None
    ):
        return "triton"
    log_sums_on_cpu = rows > 0 and device is not None and device.type == "cpu"
    limit = min(EAGER_BYTES, CPU_EAGER_BYTES) if log_sums_on_cpu else EAGER_BYTES
    if dtype == torch.float64 or matrix_elements * dtype.itemsize <= limit:
        return "eager"
    return "streaming"


def why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the fused kernels cannot run on this device in this type, or None."""
    if dtype == torch.float64:
        return "it computes in float32 from fp16 products, and the rows are torch.float64"
    if not HAS_TRITON:
        return "it needs the package triton, which is not installed"
    from ssd_addon.kernels import launch

    return launch.why_not(device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """max(float32, type of the input)."""
    return torch.promote_types(torch.float32, dtype)


def checks_are_on(validate: bool | Literal["auto"]) -> bool:
    """Checks on values read them back from the device: "auto" leaves them out where that is impossible."""
    if validate == "auto":
        if torch.compiler.is_compiling():  # first: the compiler cannot trace the question that follows
            return False
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    if not isinstance(validate, bool):
        raise ValueError(f"validate: expected 'auto', True or False: got {validate!r}")
    return validate
