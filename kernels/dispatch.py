"""Which backend runs: by device, type and size for "auto"; a named one runs or raises."""

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
"""Up to this size of the matrix that eager materializes, eager is the choice of "auto"."""
CPU_EAGER_BYTES = 256 * 2**10
"""The same for the log-sums on a CPU, where streaming is the faster one from about 256 rows on (docs/benchmarks.md)."""
KINDS = ("cuda",)
"""Kinds of devices on which "auto" considers triton; the tests add the interpreter's."""


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
        matrix_elements: entries of the matrix that eager would keep (N x N, or D x D).
        dtype: type that the arithmetic runs in.
        device: where the rows are; None checks the name alone.
        rows: N of the log-sums over all ranks (0: covariances), which "auto" streams from a smaller matrix on on a CPU.
        triton_from: from so many rows on "auto" takes triton: `rows_for_triton`, the largest of all ranks.

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
    """From how many rows on "auto" takes triton for the log-sums in this process; NEVER where it does not.

    It does where the kernels can run, are as precise as the embeddings that came (`choice.precise_enough`), are faster
    (`choice.decide`), and have passed their check, which this function runs where `rows` are enough. Ranks exchange
    what they get here and go by the largest, so that all of them take the same backend.

    Args:
        backend: what the caller asked for.
        device, width: of the rows, D.
        came_as: the type in which embeddings came, before they were promoted; the widest of several.
        prefix: columns of the first level, or 0.
        rows: N over all ranks, as far as this process can tell.
    """
    if backend != "auto" or device.type not in KINDS:
        return NEVER
    if torch.compiler.is_compiling():  # a compiler traces no files, and nothing may run: what was settled before holds
        settled: int = _settled(device, width, came_as, prefix)
        return settled
    return _rows_for_triton(device, width, came_as, prefix, rows)


def _rows_for_triton(device: torch.device, width: int, came_as: torch.dtype, prefix: int, rows: int) -> int:
    """rows 0: run no check."""
    tf32 = tf32_allowed()
    if not choice.precise_enough(came_as, tf32) or why_no_triton(device, torch.float32) is not None:
        return NEVER
    from ssd_addon.kernels import check

    measured, gpu = cache.of_device(device), choice.gpu_of(device)
    needed = choice.decide(gpu, width, tf32=tf32, measured=measured, packaged=table.table())
    right = check.known(device, width, prefix) or (rows >= needed and check.passed(device, width, prefix))
    return needed if right else NEVER


def _settled(device: torch.device, width: int, came_as: torch.dtype, prefix: int) -> int:
    """Called while a compiler traces, and not traced itself."""
    return _rows_for_triton(device, width, came_as, prefix, 0)


# What torch.compiler.assume_constant_result does, which would import the compiler with this file.
_settled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tf32_allowed() -> bool:
    """Whether the user lets CUDA compute float32 products in TF32: `torch.set_float32_matmul_precision("high")`,
    `torch.backends.cuda.matmul.allow_tf32 = True`, or `fp32_precision = "tf32"`."""
    matmul = torch.backends.cuda.matmul
    now = getattr(matmul, "fp32_precision", None)  # from torch 2.9 on; the older setting may then not be read
    if now in ("tf32", "ieee"):
        return bool(now == "tf32")
    return bool(matmul.allow_tf32)


def capturing(device: torch.device) -> bool:
    """Whether what runs now goes into a CUDA graph, so that nothing can be read back."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated, with what torch's allocator holds in reserve."""
    if device.type != "cuda":
        return 2**62
    free, _ = torch.cuda.mem_get_info(device)
    # Not memory_reserved() - memory_allocated(): each of them flattens all statistics, which costs the host 0.1 ms.
    held = torch.cuda.memory_stats_as_nested_dict(device)
    reserved, allocated = (held[kind]["all"]["current"] for kind in ("reserved_bytes", "allocated_bytes"))
    return int(free + reserved - allocated)


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
