"""Which backend runs: by device, type and size for "auto"; a named one runs or raises."""

import torch

BACKENDS = ("auto", "eager", "streaming", "triton")

EAGER_BYTES = 64 * 2**20
"""Up to this size of the matrix that eager materialises, eager is the choice of "auto"."""


def choose_backend(backend: str, *, matrix_elements: int, dtype: torch.dtype) -> str:
    """Resolve "auto" and refuse what cannot run.

    Args:
        backend: "auto", "eager", "streaming" or "triton".
        matrix_elements: entries of the matrix that eager would keep (N x N, or D x D).
        dtype: type that the arithmetic runs in.

    Raises:
        ValueError: an unknown name, or a named backend that cannot run here; the message says what can.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}: got {backend!r}")
    if backend == "triton":
        raise ValueError(
            "backend 'triton': the fused kernels are not part of this version; 'eager' and 'streaming' run on every "
            "device, and 'auto' picks between them"
        )
    if backend != "auto":
        return backend
    if dtype == torch.float64 or matrix_elements * dtype.itemsize <= EAGER_BYTES:
        return "eager"
    return "streaming"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """max(float32, type of the input)."""
    return torch.promote_types(torch.float32, dtype)


def checks_are_on(validate: bool | str) -> bool:
    """Checks on values read them back from the device: "auto" leaves them out where that is impossible."""
    if validate == "auto":
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        return not (torch.compiler.is_compiling() or capturing)
    if not isinstance(validate, bool):
        raise ValueError(f"validate: expected 'auto', True or False: got {validate!r}")
    return validate
