"""Chooses the backend: by device, dtype and size for "auto"; a backend that is given by name runs or raises."""

import importlib.util
from typing import Literal, get_args

import torch

from ssd_addon.kernels import cache, choice, table
from ssd_addon.kernels.choice import NEVER

HAS_TRITON = importlib.util.find_spec("triton") is not None

Runnable = Literal["eager", "streaming", "triton"]
Backend = Literal["auto", Runnable]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

EAGER_BYTES = 64 * 2**20
""" "auto" chooses eager up to this size of the matrix that eager materializes, in bytes."""
CPU_EAGER_BYTES = 256 * 2**10
"""The same for log-sums on a CPU, where streaming is faster from about 256 rows on (docs/benchmarks.md)."""
KINDS = ("cuda",)
"""Device types on which "auto" considers triton; the tests add the interpreter's."""


def choose_backend(
    backend: Backend,
    *,
    matrix_elements: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    rows: int = 0,
    triton_from: int = NEVER,
) -> Runnable:
    """Resolve "auto" and refuse what cannot run.

    Args:
        backend: "auto", "eager", "streaming" or "triton".
        matrix_elements: number of entries of the matrix that eager would store (N x N, or D x D).
        dtype: dtype of the computation.
        device: device of the rows; None only checks the name.
        rows: N of the log-sums over all ranks (0 for covariances); on a CPU "auto" streams them from a smaller size.
        triton_from: number of rows from which "auto" uses triton: `rows_for_triton`, the largest over all ranks.

    Raises:
        ValueError: the name is unknown, or the named backend cannot run here; the message says which can.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}: got {backend!r}")
    if backend == "triton" and device is not None:
        reason = why_no_triton(device, dtype)
        if reason:
            raise ValueError(
                f"backend 'triton': {reason}; 'eager' and 'streaming' run on every device and in every dtype, and "
                "'auto' chooses one that runs"
            )
    if backend != "auto":
        return backend
    if rows >= triton_from:
        return "triton"
    log_sums_on_cpu = rows > 0 and device is not None and device.type == "cpu"
    limit = min(EAGER_BYTES, CPU_EAGER_BYTES) if log_sums_on_cpu else EAGER_BYTES
    if dtype == torch.float64 or matrix_elements * dtype.itemsize <= limit:
        return "eager"
    return "streaming"


def rows_for_triton(
    backend: Backend, device: torch.device, width: int, *, came_as: torch.dtype, prefix: int, rows: int
) -> int:
    """The number of rows from which "auto" uses triton for the log-sums in this process; NEVER if it does not.

    Triton is used if the kernels can run, are precise enough for the embeddings (`choice.precise_enough`), are faster
    (`choice.decide`), and have passed their check, which this function runs if there are enough `rows`. Ranks exchange
    the result and use the largest, so that all choose the same backend.

    Args:
        backend: the requested backend.
        device, width: device and width D of the rows.
        came_as: original dtype of the embeddings, before promotion; the widest of several.
        prefix: number of columns of the first level, or 0.
        rows: N over all ranks, estimated by this process.
    """
    if backend != "auto" or device.type not in KINDS:
        return NEVER
    if torch.compiler.is_compiling():  # files cannot be read and kernels cannot run: use earlier results
        settled: int = _settled(device, width, came_as, prefix)
        return settled
    return _rows_for_triton(device, width, came_as, prefix, rows)


def _rows_for_triton(device: torch.device, width: int, came_as: torch.dtype, prefix: int, rows: int) -> int:
    """As `rows_for_triton`; with rows 0 no check is run."""
    tf32 = tf32_allowed()
    if not choice.precise_enough(came_as, tf32) or why_no_triton(device, torch.float32) is not None:
        return NEVER
    from ssd_addon.kernels import check

    measured, gpu = cache.of_device(device), choice.gpu_of(device)
    needed = choice.decide(gpu, width, tf32=tf32, measured=measured, packaged=table.table())
    right = check.known(device, width, prefix) or (rows >= needed and check.passed(device, width, prefix))
    return needed if right else NEVER


def _settled(device: torch.device, width: int, came_as: torch.dtype, prefix: int) -> int:
    """The result from earlier checks; called while a compiler traces, but not traced itself."""
    return _rows_for_triton(device, width, came_as, prefix, 0)


# As torch.compiler.assume_constant_result does, which would import the compiler.
_settled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tf32_allowed() -> bool:
    """Whether the user allows CUDA to compute float32 products in TF32: `torch.set_float32_matmul_precision("high")`,
    `torch.backends.cuda.matmul.allow_tf32 = True`, or `fp32_precision = "tf32"`."""
    matmul = torch.backends.cuda.matmul
    now = getattr(matmul, "fp32_precision", None)  # since torch 2.9, where reading the older setting may raise
    if now in ("tf32", "ieee"):
        return bool(now == "tf32")
    return bool(matmul.allow_tf32)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that nothing can be read from the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated, including those that torch's allocator holds in reserve."""
    if device.type != "cuda":
        return 2**62
    free, _ = torch.cuda.mem_get_info(device)
    # Not memory_reserved() - memory_allocated(), each of which flattens all statistics and takes 0.1 ms of host time.
    held = torch.cuda.memory_stats_as_nested_dict(device)
    reserved, allocated = (held[kind]["all"]["current"] for kind in ("reserved_bytes", "allocated_bytes"))
    return int(free + reserved - allocated)


def why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the fused kernels cannot run on this device in this dtype, or None."""
    if dtype == torch.float64:
        return "it computes in float32 from fp16 products, and the rows are torch.float64"
    if not HAS_TRITON:
        return "it needs the package triton, which is not installed"
    from ssd_addon.kernels import launch

    return launch.why_not(device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """max(float32, dtype of the input)."""
    return torch.promote_types(torch.float32, dtype)


def checks_are_on(validate: bool | Literal["auto"]) -> bool:
    """Whether values are checked, which reads from the device; "auto" skips checks if that is impossible."""
    if validate == "auto":
        if torch.compiler.is_compiling():  # first, as the compiler cannot trace the next condition
            return False
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    if not isinstance(validate, bool):
        raise ValueError(f"validate: expected 'auto', True or False: got {validate!r}")
    return validate
