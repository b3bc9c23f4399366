"""Launches the Triton kernels of `around`, which prepare the inputs of the tiles and process their outputs.

    prepare        converts rows of any dtype and strides to operands of the tiles
    coefficients   converts upstream gradients to inputs of the weights kernel
    finish         converts gradients to the dtype of the rows
    energy         adds up the tiles' sums of squares

Legend: n local rows, N rows over all ranks, E levels (1, or 2 with a prefix), D columns.
"""

import functools
import importlib.util
import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from ssd_addon.kernels import around, cache, table
from ssd_addon.kernels.operands import Columns, Layout, Scaled, cdiv
from ssd_addon.kernels.table import Configuration

WIDE = 64
"""Columns at a time in kernels that process whole rows."""

ROWS = 64
"""Rows per program in kernels that read one or two numbers per row."""

HAS_DESCRIPTORS = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
"""Whether Triton has tensor descriptors (since 3.4)."""


def empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """An output buffer on the device of x; the tests fill it with NaN."""
    return x.new_empty(shape, dtype=dtype)


def configuration(device: torch.device, mode: str, width: int) -> Configuration:
    """The tile configuration for rows of `width` columns, from the user's cache or the table.

    If Triton has no tensor descriptors, the same tiles use pointers.
    """
    own = cache.of_device(device)
    found = table.configuration(table.architecture(device), mode, width, None if own is None else own["configurations"])
    return found if HAS_DESCRIPTORS or not found.descriptor else found._replace(descriptor=False)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.get_device()) if x.is_cuda else nullcontext()


def layout(device: torch.device, d: int, prefix: int, maximum: bool, exact: bool) -> Layout:
    """The layout for log-sums over rows of d columns."""
    form = ("_two" if prefix else "") + ("_maximum" if maximum else "")
    sums, weights = configuration(device, "sums" + form, d), configuration(device, "weights" + form, d)
    if weights.resident and exact:  # rows in two fp16 parts are too wide for registers
        weights = configuration(device, "weights" + form, weights.block_k + 1)
    make = _layout if type(d) is int and type(prefix) is int else _layout.__wrapped__  # symbolic sizes cannot be hashed
    return make(d, prefix, exact, sums, weights)


@functools.lru_cache(maxsize=256)
def _layout(d: int, prefix: int, exact: bool, sums: Configuration, weights: Configuration) -> Layout:
    """Cached, so that properties of the layout are computed once, not at every step."""
    wide = max(triton.next_power_of_2(d), 16) if weights.resident else weights.block_k
    return Layout(Columns(d, prefix, max(sums.block_k, wide), exact), sums, weights)


def new_scaled(z: Tensor, n: int, how: Layout) -> Scaled:
    """Uninitialized rows with this layout, on the device of z."""
    columns = how.columns
    k, exact = columns.operand_ends[-1], columns.exact
    return Scaled(
        x=z.new_zeros((n, k), dtype=torch.float16) if exact else empty(z, (n, k), torch.float16),
        other=z.new_zeros((n if exact else 0, k), dtype=torch.float16) if exact else empty(z, (0,), torch.float16),
        rows=empty(z, (n, columns.ends[-1]) if exact else (0,)),
        ids=empty(z, (n,), torch.int32),
        bounds=empty(z, (2, how.tiles(n)), torch.int32),
        numbers=empty(z, (16,)),
    )


def prepare(
    z: Tensor, ids: Tensor | None, how: Layout, *, tau: Tensor | float = 1.0, longest: Tensor | float,
    limit: float = math.inf, total: int = 1,
) -> Scaled:  # fmt: skip
    """Convert the rows z [n, D], of any floating dtype and strides, to the form that the tiles read.

    Args:
        ids: [n] integers that fit in int32; None for products, which do not compare ids.
        how: the layout.
        tau: temperature, for scale and shift.
        longest: length of the longest row; everything becomes NaN if it is above `limit`.
        total: number of rows over all ranks, for the shift.
    """
    n = z.shape[0]
    out = new_scaled(z, n, how)
    if n:
        _prepare(z, ids, out, how.columns, how.block_m, tau, longest, limit, total)
    return out


def check_layout(a: Scaled, how: Layout, block_m: int) -> None:
    """Refuse operands that were prepared for other tiles, as they would be read beyond their end.

    Raises:
        RuntimeError: the tiles have changed since the forward pass.
    """
    k, tiles = how.columns.operand_ends[-1], how.tiles(a.n)
    if (a.x.shape[1], a.bounds.shape[1], block_m) != (k, tiles, how.block_m):
        raise RuntimeError(
            "negative_lse, backward: expected the tiles of the forward pass, which a measurement or another table has "
            f"changed since then: got operands of {a.x.shape[1]} columns instead of {k}, and {a.bounds.shape[1]} tiles "
            f"of {block_m} rows instead of {tiles} of {how.block_m}"
        )


def with_bounds(x: Tensor, ids: Tensor, block_m: int, tiles: int) -> Scaled:
    """Add ids and the bounds of `tiles` tiles of block_m rows to rows x that were prepared already."""
    n, none = x.shape[0], x.new_empty(0)
    out = Scaled(x, none, none, empty(x, (n,), torch.int32), empty(x, (2, tiles), torch.int32), none)
    if n:
        _prepare(None, ids, out, None, block_m, 1.0, 1.0, math.inf, 1)
    return out


def _prepare(
    z: Tensor | None, ids: Tensor | None, out: Scaled, columns: Columns | None, block_m: int,
    tau: Tensor | float, longest: Tensor | float, limit: float, total: int,
) -> None:  # fmt: skip
    n = out.n
    tiles_m = cdiv(n, block_m) if ids is None else out.bounds.shape[1]
    ends = (1,) if columns is None else columns.ends
    block, first, d = (1, 1, 1) if columns is None else (min(columns.block, WIDE), columns.first, columns.d)
    blocks = ends[-1] // block
    low, high = out.bounds
    exact = out.rows if columns is not None and columns.exact else None
    with on_device_of(out.x):
        around.prepare_kernel[(tiles_m * blocks,)](
            z, ids, tau if isinstance(tau, Tensor) else None, longest if isinstance(longest, Tensor) else None,
            out.x, None if exact is None else out.other, exact, out.ids, low, high, out.numbers,
            0.0 if isinstance(tau, Tensor) else tau, 0.0 if isinstance(longest, Tensor) else longest,
            limit, math.log(total), n, first, d, ends[0], 0 if columns is None else columns.operand_ends[0],
            *((0, 0) if z is None else z.stride()), 0 if ids is None else ids.stride(0), out.x.stride(0),
            0 if exact is None else exact.stride(0), blocks,
            EXACT=exact is not None, b_M=block_m, b_R=min(block_m, 16), b_K=block,
        )  # fmt: skip


def coefficients(grad: Tensor, lse: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Upstream gradients [E, N] scaled to at most 1 (a loss scaler's 65536 would overflow fp16), lse in units of log 2,
    and the divisor of the gradients. With a shift, gradients are multiplied by 2^(shift - lse), and lse is None.
    """
    e, n = grad.shape
    g, log = empty(grad, (e, n)), None if shift is not None else empty(grad, (e, n))
    unit = empty(grad, (1,))
    with on_device_of(grad):
        around.coefficients_kernel[(cdiv(n, ROWS), e)](
            grad, lse, torch.linalg.vector_norm(grad, math.inf), shift, g, log, unit, n, *grad.stride(), lse.stride(0),
            b_N=ROWS,
        )  # fmt: skip
    return g, log, unit


def finish(
    dx: Tensor, columns: Columns, shape: tuple[int, int], dtype: torch.dtype, constant: float, *factors: Tensor,
    across: bool = False, rows: Tensor | None = None, sums: bool = False,
    term: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dz with this shape [n, D] and dtype: dx (padded as `columns`) times a constant and up to four device numbers.

    Args:
        across: dx is [D, padded n].
        rows, sums: if `sums`, also return -(1/2) times the first factor times the sum of rows * dz.
        term: (diagonal [D], constant c): subtract c * first * fourth factor * rows * diagonal.
    """
    (n, d), block = shape, min(columns.block, WIDE)
    blocks = columns.ends[-1] // block
    dz, block_m = empty(dx, shape, dtype), 32
    programs = cdiv(n, block_m) * blocks
    part = empty(dx, (programs,)) if sums else None
    padded = (*factors, *(None,) * (4 - len(factors)))
    stride, stride_c = reversed(dx.stride()) if across else dx.stride()
    with on_device_of(dx):
        around.finish_kernel[(programs,)](
            dx, dz, *padded, rows, part, rows if term else None, term[0] if term else None,
            constant, term[1] if term else 0.0, n, columns.first, d, columns.ends[0], stride, stride_c,
            0 if rows is None else rows.stride(0), blocks, b_M=block_m, b_K=block,
        )  # fmt: skip
    return dz, None if part is None else part.sum()


def product_layout(device: torch.device, k: int) -> Layout:
    """The layout for products of rows of k columns."""
    f = configuration(device, "products", k)
    return Layout(Columns(k, 0, f.block_k), f, f)


def plain(d: int) -> Columns:
    """Columns without padding, for `finish`."""
    return Columns(d, 0, 64)


def energy(total: Tensor, diagonal: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a^2 b^2 times the sum of `total`, minus the squares of the diagonal: 0-dim float32, added up in float64."""
    out = empty(total, ())
    with on_device_of(total):
        around.energy_kernel[(1,)](
            total, diagonal, a, b, out, total.shape[0], 0 if diagonal is None else diagonal.shape[0], b_N=1024
        )
    return out
