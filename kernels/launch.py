"""Launches the Triton kernels of `tiles` over strips and block pairs.

    sums       log-sums over the other images' rows
    gradient   sum_j W_ij x_j, from the same similarities
    products   <a_i, b_j> of all rows, and the sums of its squares

Every element of every output is written by one program, and sums run in a fixed order: results are deterministic.
Legend: n local rows, N rows over all ranks, E levels (1, or 2 with a prefix), D columns. Rows are those of `operands`.
"""

import os
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ssd_addon.kernels import around, choice, launch_around, resident, tiles
from ssd_addon.kernels.dispatch import capturing, free_memory
from ssd_addon.kernels.fast_product import add_product
from ssd_addon.kernels.launch_around import ROWS, configuration, on_device_of, with_bounds
from ssd_addon.kernels.operands import LONGEST, Columns, Layout, Scaled, cdiv, pointer, round_up
from ssd_addon.kernels.table import Configuration

WEIGHT_SCALE = 2.0**14
"""Scale of W in fp16: |W| <= 2 per level, and the largest fp16 number is 65504."""

PRODUCT_SCALE = LONGEST**2 / WEIGHT_SCALE
"""Divisor of the matrices of `products`, whose entries are at most LONGEST^2."""

STRIP_ELEMENTS = 2**23
"""Number of partial sums of a strip, slots x rows: 32 MiB; twice that with the columns after it."""

WEIGHT_BYTES = 512 * 2**20
"""Largest size of W: both levels, in fp16 or float32."""

SMALLEST_BLOCK = 1024
"""Smallest number of rows of a block of W, however little memory is free: 2 to 8 MiB."""

_ASKED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else _ASKED  # older ones have no knobs


def why_not(device: torch.device) -> str | None:
    """The reason why the kernels cannot run on this device, or None."""
    if device.type == "cuda":
        return choice.why_not(choice.gpu_of(device), str(device))
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"it needs a CUDA device, or TRITON_INTERPRET=1 in the environment on a CPU: the rows are on {str(device)!r}"


def block_rows(d: int, unit: int) -> int:
    """Rows C of a block of W: C x C entries of fp16, 8 to 512 MiB."""
    return aligned(max(min(int(8.6e6 / max(d, 1)), 16384), 2048), unit)


def aligned(rows: int, unit: int) -> int:
    """At most this many rows, in whole tiles of `unit` and, if possible, a multiple of 512: then all data of a block,
    including its tiles' bounds of ids, starts at an aligned address, and one compiled variant serves all blocks.
    """
    return max(rows // 512 * 512 or rows // unit * unit, unit)


def affordable_rows(rows: int, entry: int, free: int) -> int:
    """The number of rows of a block of W, reduced so that W takes at most WEIGHT_BYTES and a quarter of free memory.

    Args:
        rows: wanted number of rows.
        entry: bytes per entry of W, over all levels.
        free: bytes that can be allocated.
    """
    while rows > SMALLEST_BLOCK and rows * rows * entry > min(WEIGHT_BYTES, free // 4):
        rows //= 2
    return rows


def _free_memory(x: Tensor) -> int:
    """Bytes that can be allocated; does not query the driver while a graph is captured."""
    if not x.is_cuda or capturing(x.device):
        return 4 * WEIGHT_BYTES
    return free_memory(x.device)


# ------------------------------------------------------------------------------------------------ log-sums


def sums(a: Scaled, b: Scaled | None, how: Layout, maximum: bool) -> Tensor:
    """Log-sums over the other images' rows, [E, n]; NaN for rows without a negative.

    Args:
        a: the n local rows.
        b: all N rows; None means a, and only the upper triangle is computed.
        how: the layout of both.
        maximum: use the maximum of each tile's rows instead of the constant shift.
    """
    symmetric = b is None
    c, ends = how.sums, how.columns.operand_ends
    b_, n, e, unit = a if b is None else b, a.n, len(ends), c.block_n // c.block_m
    tiles_m, tiles_n = cdiv(n, c.block_m), cdiv(b_.n, c.block_n)
    strip = max(STRIP_ELEMENTS // max(b_.n * e, 1) // unit, 1) * unit
    total, top, lse = (launch_around.empty(a.x, (e, n)) for _ in range(3))
    with on_device_of(a.x):
        for first in range(0, tiles_m, strip):
            count = min(strip, tiles_m - first)
            start, stop = first * c.block_m, min((first + count) * c.block_m, n)
            slots = cdiv(b_.n, c.block_m) - (first if symmetric else 0)
            behind = b_.n - stop if symmetric else 0
            near, far = launch_around.empty(a.x, (e, slots, stop - start)), launch_around.empty(a.x, (e, count, behind))
            near_top = launch_around.empty(a.x, (e, slots, stop - start)) if maximum else None
            far_top = launch_around.empty(a.x, (e, count, behind)) if maximum else None
            wide = tiles_n - (first // unit if symmetric else 0)
            tiles.sums_kernel[(count * wide,)](
                pointer(a.x, c, c.block_m), pointer(b_.second, c, c.block_n), a.ids, b_.ids, *a.bounds, *b_.bounds,
                a.scale, a.shift, near, near if near_top is None else near_top,
                far, far if far_top is None else far_top,
                n, b_.n, first, count, wide, a.x.stride(0), b_.second.stride(0), ends[0], ends[-1],
                LEVELS=e, SYMMETRIC=symmetric, MAXIMUM=maximum, DESCRIPTOR=c.descriptor, GROUP=c.group,
                b_M=c.block_m, b_N=c.block_n, b_K=c.block_k, **c.options(),
            )  # fmt: skip
            end = n if symmetric else stop
            around.fold_kernel[(cdiv(end - start, ROWS), e)](
                near, near_top, far, far_top, total, top, lse, a.shift, n, start, stop, end, slots,
                count if behind else 0, FIRST=not (symmetric and first), b_T=16, b_N=ROWS,
            )  # fmt: skip
    return lse


def gradient(
    a: Scaled, b: Scaled | None, log: Tensor | None, every_log: Tensor | None, g: Tensor, every_g: Tensor,
    how: Layout,
) -> Tensor:  # fmt: skip
    """sum_j W_ij x_j for the local rows, [n, padded D] float32; divided by `weight_scale` and multiplied by a / tau it
    is the gradient.

    Args:
        a, b, how: as in `sums`.
        log, every_log: [E, n], [E, N] lse in units of log 2; None: g and every_g include the factor 2^(shift - lse).
        g, every_g: [E, n], [E, N] from `coefficients`.
    """
    maximum, symmetric, columns, c = log is not None, b is None, how.columns, how.weights
    n, d = a.n, columns.ends[-1]
    own, bounds = a.bounds, (a if b is None else b).bounds
    if c.block_m != how.block_m:  # the tiles of the sums have a different height
        own = bounds = _bounds(a, c)
        if b is not None:
            bounds = _bounds(b, c)
    b_, levels, ends = a if b is None else b, columns.levels, columns.operand_ends
    e, w_scale = len(levels), weight_scale(columns)
    log, every_log = (g, every_g) if log is None or every_log is None else (log, every_log)
    if c.resident:
        if columns.prefix:
            raise ValueError("configuration: expected no prefix, as it keeps the gradient in registers: got a prefix")
        if c.block_n != c.block_m:  # row tiles and column tiles differ in height
            bounds = with_bounds(b_.x, b_.ids, c.block_n, cdiv(b_.n, c.block_n)).bounds
        out = launch_around.empty(a.x, (n, d))
        with on_device_of(a.x):
            resident.gradient(a, b_, own, bounds, log, every_log, g, every_g, maximum, w_scale, c, out)
        return out
    entry = e * (4 if columns.exact else 2)
    wanted = min(block_rows(columns.d, c.block_n), round_up(max(n, b_.n), c.block_n))
    small = wanted * wanted * entry <= WEIGHT_BYTES // 8  # too small for a query of the driver
    free = 4 * WEIGHT_BYTES if small else _free_memory(a.x)
    size = affordable_rows(wanted, entry, free)
    size = wanted if size == wanted else aligned(size, c.block_n)
    # Whole tiles, so that stores need no mask.
    room_size = round_up(min(size, n), c.block_n) * round_up(min(size, b_.n), c.block_n)
    room = [launch_around.empty(a.x, (room_size,), torch.float32 if columns.exact else torch.float16) for _ in levels]
    dx = a.x.new_zeros((n, d), dtype=torch.float32)
    with on_device_of(a.x):
        for i, j in _block_pairs(n, b_.n, size, symmetric):
            h, w = i.stop - i.start, j.stop - j.start
            pitch = round_up(w, c.block_n)
            blocks = [r[: h * pitch].view(h, pitch)[:, :w] for r in room]
            across = symmetric and i == j
            t_m, t_n = cdiv(h, c.block_m), cdiv(w, c.block_n)
            t_i, t_j = i.start // c.block_m, j.start // c.block_m
            tiles.weights_kernel[(t_m * t_n,)](
                pointer(a.x[i], c, c.block_m), pointer(b_.second[j], c, c.block_n), a.ids[i], b_.ids[j],
                own[0, t_i:], own[1, t_i:], bounds[0, t_j:], bounds[1, t_j:], a.scale, a.shift,
                log[:, i], every_log[:, j], g[:, i], every_g[:, j], blocks[-1], blocks[0],
                h, w, t_m, t_n, a.x.stride(0), b_.second.stride(0), pitch, g.stride(0), every_g.stride(0),
                ends[0], ends[-1], w_scale,
                LEVELS=e, SYMMETRIC=across, MAXIMUM=maximum, DESCRIPTOR=c.descriptor, GROUP=c.group,
                b_M=c.block_m, b_N=c.block_n, b_K=c.block_k, **c.options(),
            )  # fmt: skip
            for (k, end), weights in zip(levels, blocks, strict=True):
                add_product(dx[i, k:end], weights, b_.summed[j, k:end])
                if symmetric and not across:
                    add_product(dx[j, k:end], weights.T, a.summed[i, k:end])
    return dx


def _bounds(rows: Scaled, c: Configuration) -> Tensor:
    """The smallest and the largest id of tiles whose height differs from that of the sums."""
    tiles_ = round_up(cdiv(rows.n, c.block_m) + max(c.block_n // c.block_m, 1), 4)  # aligned, as in `Layout`
    return with_bounds(rows.x, rows.ids, c.block_m, tiles_).bounds


def weight_scale(columns: Columns) -> float:
    """The scale of the weights, so that a sum of levels fits in fp16."""
    return 1.0 if columns.exact else WEIGHT_SCALE / len(columns.ends)


def _block_pairs(n: int, n_all: int, size: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Row and column blocks of W; if it is symmetric, those on and above the diagonal."""
    for start in range(0, n, size):
        for j_start in range(start if symmetric else 0, n_all, size):
            yield slice(start, min(start + size, n)), slice(j_start, min(j_start + size, n_all))


# ------------------------------------------------------------------------------------------------ products


def product_shape(device: torch.device, m: int, n: int, k: int) -> tuple[tuple[int, int], int]:
    """Shape in whole tiles of the matrix <a_i, b_j> for m and n rows of k columns, and the number of tiles."""
    f = configuration(device, "products", k)
    tiles_ = cdiv(m, f.block_m) * cdiv(n, f.block_n)
    return (round_up(m, f.block_n), round_up(n, f.block_n)), tiles_


def products(
    a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, skip_diagonal: bool, half: bool, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of squares of <a_i, b_j> by tile, the products in whole tiles over PRODUCT_SCALE, and a second matrix.

    Args:
        a, b: [M, K], [N, K] operands from `prepare`; b None means a, and the upper triangle is computed.
        c, d: a second pair of operands of these shapes (d None means c). The sums are then of <a_i, b_j> <c_i, d_j>,
            and the second matrix holds <c_i, d_j>; without them it is empty.
        skip_diagonal: set entries i = j to 0.
        half: matrices in fp16, else float32.
        k: number of columns before padding.
    """
    symmetric, pair = b is None, c is not None
    f = configuration(a.device, "products", k)
    b_ = a if b is None else b
    c_ = a if c is None else c
    d_ = d if d is not None else (c_ if pair else b_)
    m, n = a.shape[0], b_.shape[0]
    t_m, t_n = cdiv(m, f.block_m), cdiv(n, f.block_n)
    kind = torch.float16 if half else torch.float32
    size, programs = product_shape(a.device, m, n, k)
    w = launch_around.empty(a, size, kind)
    second = launch_around.empty(a, size if pair else (0, 0), kind)
    total = launch_around.empty(a, (programs,))
    with on_device_of(a):
        tiles.products_kernel[(t_m * t_n,)](
            pointer(a, f, f.block_m), pointer(b_, f, f.block_n), pointer(c_, f, f.block_m), pointer(d_, f, f.block_n),
            total, w, second if pair else w, m, n, t_m, t_n, a.stride(0), b_.stride(0), w.stride(0), a.shape[1],
            1 / PRODUCT_SCALE,
            PAIR=pair, SYMMETRIC=symmetric, SKIP_DIAGONAL=skip_diagonal, DESCRIPTOR=f.descriptor, GROUP=f.group,
            b_M=f.block_m, b_N=f.block_n, b_K=f.block_k, **f.options(),
        )  # fmt: skip
    return total, w, second
