"""out += a b for fp16 matrices with float32 sums, by the fastest function that the device's matrix library supports.

A trial product of 16 x 16 entries decides which function is used. The decision does not depend on errors of actual
products, which may have other causes, such as exhausted memory.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor], None]

COPY_ELEMENTS = 2**24
"""Entries of a that are converted to float32 at a time if no function takes fp16: 64 MiB."""


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, summed in float32: fp16 operands on CUDA, through float32 elsewhere."""
    if a.is_cuda and a.dtype == torch.float16:
        product(a.device)(out, a, b)
    else:
        out.addmm_(a.float(), b.float())


def product(device: torch.device) -> Product:
    """The function that adds fp16 products on this device; determined at the first call.

    torch 2.8 and 2.9 refuse a float32 `out`, older versions have neither operator, and all refuse float32 sums if the
    user allows fp16 accumulation, a setting that may change.
    """
    known = (str(device), bool(getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)))
    if known not in _found:
        _found[known] = next(f for f in (addmm_in_place, mm_and_add, through_float32) if _runs(f, device))
    return _found[known]


_found: dict[tuple[str, bool], Product] = {}


def _runs(f: Product, device: torch.device) -> bool:
    if f is through_float32:
        return True
    square = torch.zeros(16, 16, dtype=torch.float16, device=device)
    try:
        f(torch.zeros(16, 16, dtype=torch.float32, device=device), square, square)
    except torch.cuda.OutOfMemoryError:
        raise  # not caused by the function
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
    return True


def addmm_in_place(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)


def mm_and_add(out: Tensor, a: Tensor, b: Tensor) -> None:
    out += torch.ops.aten.mm.dtype(a, b, torch.float32)


def through_float32(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Multiply in TF32, which represents every fp16 number exactly, and in parts, so that no second W is allocated."""
    rows = max(COPY_ELEMENTS // max(a.shape[1], 1), 1)
    wide = b.float()
    with float32_products(True):
        for start in range(0, a.shape[0], rows):
            out[start : start + rows].addmm_(a[start : start + rows].float(), wide)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Run float32 products on CUDA in TF32, or never in TF32; restores the user's setting."""
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    setattr(matmul, name, ("tf32" if tf32 else "ieee") if name == "fp32_precision" else tf32)
    try:
        yield
    finally:
        setattr(matmul, name, before)
