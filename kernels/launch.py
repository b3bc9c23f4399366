"""The Triton kernels of `tiles`, launched over strips and block pairs.

    sums       log2 of the sums over the other images' rows
    gradient   sum_j W_ij x_j, from the same similarities
    products   <a_i, b_j> of all rows, and the sum of its squares

Every slot of every output is written by one program, and sums run in a fixed order: the same input gives the same bits.
Legend: n local rows, N rows over all ranks, E levels (1, or 2 with a prefix), D columns. Rows are those of `operands`.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from ssd_addon.kernels import cache, choice, resident, table, tiles
from ssd_addon.kernels.dispatch import capturing
from ssd_addon.kernels.fast_product import add_product
from ssd_addon.kernels.operands import LONGEST, Operand, column_levels, pointer, round_up, stacked
from ssd_addon.kernels.table import Configuration

WEIGHT_SCALE = 2.0**14
"""|W| <= 2 per level, and fp16 ends at 65504."""

PRODUCT_SCALE = LONGEST**2 / WEIGHT_SCALE
"""What `products` divides its matrices by: their entries are LONGEST^2 at most."""

STRIP_ELEMENTS = 2**23
"""Partial sums of a strip: slots x rows, so 32 MiB; twice that with the columns behind it."""

WEIGHT_BYTES = 512 * 2**20
"""All of W: both levels, in fp16 or float32."""

SMALLEST_BLOCK = 1024
"""Rows of a block of W that are not halved again, however little memory is free: 2 to 8 MiB."""

INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None."""
    if device.type == "cuda":
        return choice.why_not(choice.gpu_of(device), str(device))
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"it needs a CUDA device, or TRITON_INTERPRET=1 in the environment on a CPU: the rows are on {str(device)!r}"


def block_rows(d: int, unit: int) -> int:
    """Rows C of a block of W: C x C entries of fp16, 8 to 512 MiB."""
    return max(min(int(8.6e6 / max(d, 1)), 16384), 2048) // unit * unit


def affordable_rows(rows: int, entry: int, free: int) -> int:
    """At most so many rows of a block of W that all of W takes WEIGHT_BYTES, and a quarter of the memory that is free.

    Args:
        rows: wanted.
        entry: bytes of an entry of W, of all levels together.
        free: bytes that can be allocated.
    """
    while rows > SMALLEST_BLOCK and rows * rows * entry > min(WEIGHT_BYTES, free // 4):
        rows //= 2
    return rows


def _free_memory(x: Tensor) -> int:
    """Bytes that can be allocated; where a graph is captured nobody asks the driver."""
    if not x.is_cuda or capturing(x.device):
        return 4 * WEIGHT_BYTES
    free, _ = torch.cuda.mem_get_info(x.device)
    return int(free + torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device))


def empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Where a kernel writes, on the device of x; the tests fill it with NaN."""
    return x.new_empty(shape, dtype=dtype)


def _configuration(x: Tensor, mode: str, width: int | None = None) -> Configuration:
    own = cache.of_device(x.device)
    tiles_here = None if own is None else own["configurations"]
    return table.configuration(table.architecture(x.device), mode, x.shape[1] if width is None else width, tiles_here)


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else torch.autograd.profiler.record_function("ssd_addon::tiles")


# ------------------------------------------------------------------------------------------------ log-sums


def sums(x: Tensor, every: Tensor | None, ids: Tensor, every_ids: Tensor, scale: Tensor, shift: Tensor, prefix: int,
         maximum: bool) -> Tensor:  # fmt: skip
    """log2 of the sums over the other images' rows, [E, n], NaN where there is none.

    Args:
        x: [n, D] scaled rows, fp16 or (exact) float32.
        every: [N, D] all rows; None means x, and only the upper triangle is computed.
        ids, every_ids: [n], [N] integers.
        scale: 0-dim float32, times <x_i, x_j> it is s_ij / log 2.
        shift: 0-dim float32, subtracted from s_ij / log 2 (read only without `maximum`).
        prefix: 0, or columns of the first level.
        maximum: take the maximum of each tile's rows instead of the shift.
    """
    symmetric = every is None
    n, d = x.shape
    levels = column_levels(prefix, d)
    c = _configuration(x, ("sums_two" if prefix else "sums") + ("_maximum" if maximum else ""))
    a, b = _operands(x, every, ids, every_ids, levels, c)
    e, unit = len(levels), c.block_n // c.block_m
    tiles_m, tiles_n = triton.cdiv(n, c.block_m), triton.cdiv(b.n, c.block_n)
    strip = max(STRIP_ELEMENTS // max(b.n * e, 1) // unit, 1) * unit
    top = x.new_full((e, n), -math.inf, dtype=torch.float32)
    total = x.new_zeros((e, n), dtype=torch.float32)

    def add(rows: slice, part: Tensor, part_top: Tensor | None) -> None:
        if part_top is None:
            total[:, rows] += part.sum(dim=1)
            return
        new = torch.maximum(top[:, rows], part_top.amax(dim=1))
        safe = new.masked_fill(new == -math.inf, 0.0)
        old = total[:, rows] * torch.exp2(top[:, rows] - safe)
        total[:, rows] = old + (part * torch.exp2(part_top - safe[:, None])).sum(dim=1)
        top[:, rows] = new

    with _on_device_of(x):
        for first in range(0, tiles_m, strip):
            count = min(strip, tiles_m - first)
            start, stop = first * c.block_m, min((first + count) * c.block_m, n)
            slots = triton.cdiv(b.n, c.block_m) - (first if symmetric else 0)
            behind = b.n - stop if symmetric else 0
            near = empty(x, (e, slots, stop - start))
            far = empty(x, (e, count, behind))
            near_top = empty(x, (e, slots, stop - start)) if maximum else None
            far_top = empty(x, (e, count, behind)) if maximum else None
            columns = tiles_n - (first // unit if symmetric else 0)
            tiles.sums_kernel[(count * columns,)](
                pointer(a.x, c, c.block_m), pointer(b.x, c, c.block_n), a.ids, b.ids, a.low, a.high, b.low, b.high,
                scale, shift, near, near if near_top is None else near_top, far, far if far_top is None else far_top,
                n, b.n, first, count, columns, a.x.stride(0), b.x.stride(0), a.ends[0], a.ends[-1],
                LEVELS=e, SYMMETRIC=symmetric, MAXIMUM=maximum, DESCRIPTOR=c.descriptor, GROUP=c.group,
                b_M=c.block_m, b_N=c.block_n, b_K=c.block_k, **c.options(),
            )  # fmt: skip
            add(slice(start, stop), near, near_top)
            if behind:
                add(slice(stop, b.n), far, far_top)
    log = torch.log2(total) + (top if maximum else shift)
    # A sum of 0: no negative. NaN stays.
    return log.masked_fill(total == 0, math.nan)


def gradient(
    x: Tensor, every: Tensor | None, ids: Tensor, every_ids: Tensor, scale: Tensor, shift: Tensor, lse: Tensor,
    every_lse: Tensor, g: Tensor, every_g: Tensor, prefix: int, maximum: bool,
) -> Tensor:  # fmt: skip
    """sum_j W_ij x_j of the local rows, [n, D] float32; times 1/tau it is the gradient.

    Args:
        x, every, ids, every_ids, scale, shift, prefix, maximum: as in `sums`.
        lse, every_lse: [E, n], [E, N] in units of log 2.
        g, every_g: [E, n], [E, N] upstream gradients, at most 1 in size.
    """
    if not maximum:  # one exponential for both rows: exp(shift - lse) stays inside float32 where the shift does
        g, every_g = g * torch.exp2(shift - lse), every_g * torch.exp2(shift - every_lse)
    symmetric = every is None
    n, d = x.shape
    levels = column_levels(prefix, d)
    exact = x.dtype == torch.float32
    mode = ("weights_two" if prefix else "weights") + ("_maximum" if maximum else "")
    c = _configuration(x, mode)
    if c.resident and exact:
        c = _configuration(x, mode, c.block_k + 1)  # two fp16 parts: as for rows that are too wide to be resident
    if c.resident:
        return _resident(x, every, ids, every_ids, scale, shift, lse, every_lse, g, every_g, prefix, maximum, c)
    a, b = _operands(x, every, ids, every_ids, levels, c)
    if every is None:
        every, every_lse, every_g = x, lse, g
    e = len(levels)
    w_scale = 1.0 if exact else WEIGHT_SCALE / e
    wanted = min(block_rows(d, c.block_n), round_up(max(n, b.n), c.block_n))
    small = wanted * wanted * e * (4 if exact else 2) <= WEIGHT_BYTES // 8  # too little to ask the driver about
    free = 4 * WEIGHT_BYTES if small else _free_memory(x)
    size = max(affordable_rows(wanted, e * (4 if exact else 2), free) // c.block_n, 1) * c.block_n
    # Whole tiles, so that nothing is masked where it is stored.
    room_size = round_up(min(size, n), c.block_n) * round_up(min(size, b.n), c.block_n)
    room = [empty(x, (room_size,), torch.float32 if exact else torch.float16) for _ in levels]
    dx = x.new_zeros((n, d), dtype=torch.float32)
    with _on_device_of(x):
        for i, j in _block_pairs(n, b.n, size, symmetric):
            h, w = i.stop - i.start, j.stop - j.start
            pitch = round_up(w, c.block_n)
            blocks = [r[: h * pitch].view(h, pitch)[:, :w] for r in room]
            across = symmetric and i == j
            t_m, t_n = triton.cdiv(h, c.block_m), triton.cdiv(w, c.block_n)
            t_i, t_j = i.start // c.block_m, j.start // c.block_m
            tiles.weights_kernel[(t_m * t_n,)](
                pointer(a.x[i], c, c.block_m), pointer(b.x[j], c, c.block_n),
                a.ids[i], b.ids[j], a.low[t_i:], a.high[t_i:], b.low[t_j:], b.high[t_j:], scale, shift,
                lse[:, i], every_lse[:, j], g[:, i], every_g[:, j], blocks[-1], blocks[0],
                h, w, t_m, t_n, a.x.stride(0), b.x.stride(0), pitch, lse.stride(0), every_lse.stride(0),
                a.ends[0], a.ends[-1], w_scale,
                LEVELS=e, SYMMETRIC=across, MAXIMUM=maximum, DESCRIPTOR=c.descriptor, GROUP=c.group,
                b_M=c.block_m, b_N=c.block_n, b_K=c.block_k, **c.options(),
            )  # fmt: skip
            for (k, stop), weights in zip(levels, blocks, strict=True):
                add_product(dx[i, k:stop], weights, every[j, k:stop])
                if symmetric and not across:
                    add_product(dx[j, k:stop], weights.T, x[i, k:stop])
    return dx.div_(w_scale)


def _resident(
    x: Tensor, every: Tensor | None, ids: Tensor, every_ids: Tensor, scale: Tensor, shift: Tensor, lse: Tensor,
    every_lse: Tensor, g: Tensor, every_g: Tensor, prefix: int, maximum: bool, c: Configuration,
) -> Tensor:  # fmt: skip
    """`gradient` without W in memory."""
    if prefix:
        raise ValueError("a configuration that keeps the gradient in registers: expected one space: got a prefix")
    if every is None:
        every, every_lse, every_g = x, lse, g
    out = empty(x, (x.shape[0], x.shape[1]))
    with _on_device_of(x):
        resident.gradient(
            x, every, ids.contiguous(), every_ids.contiguous(), scale, shift, lse, every_lse, g, every_g, maximum,
            WEIGHT_SCALE, c, out,
        )  # fmt: skip
    return out.div_(WEIGHT_SCALE)


def _operands(
    x: Tensor, every: Tensor | None, ids: Tensor, every_ids: Tensor, levels: list[tuple[int, int]], c: Configuration
) -> tuple[Operand, Operand]:
    """Both sides of the similarities; one and the same where every is None and rows are not split in two parts."""
    a = Operand(x, ids, levels, c, second=False)
    if every is not None:
        return a, Operand(every, every_ids, levels, c, second=True)
    return a, a if x.dtype == torch.float16 else Operand(x, ids, levels, c, second=True)


def _block_pairs(n: int, n_all: int, size: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Row and column blocks of W; of a symmetric one those on and above the diagonal."""
    for start in range(0, n, size):
        for j_start in range(start if symmetric else 0, n_all, size):
            yield slice(start, min(start + size, n)), slice(j_start, min(j_start + size, n_all))


# ------------------------------------------------------------------------------------------------ products


def products(
    a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, skip_diagonal: bool, half: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of squares of <a_i, b_j> (0-dim float64), these products [M, N] over PRODUCT_SCALE, and a second matrix.

    Args:
        a, b: [M, K], [N, K] scaled rows in fp16; b None means a, and the upper triangle is computed.
        c, d: a second pair of operands of these shapes (d None means c): the sum is then that of
            <a_i, b_j> <c_i, d_j>, and the second matrix holds <c_i, d_j>; without them it has no entries.
        skip_diagonal: entries i = j are 0.
        half: matrices in fp16, else float32.
    """
    symmetric, pair = b is None, c is not None
    f = _configuration(a, "products")
    operands = [stacked(t, [(0, t.shape[1])], f.block_k, False) for t in (a, b, c, d) if t is not None]
    rest = iter(t for t, _ in operands)
    k1 = operands[0][1][0]
    a_ = next(rest)
    b_ = a_ if b is None else next(rest)
    c_ = next(rest) if pair else a_
    d_ = next(rest) if d is not None else (c_ if pair else b_)
    m, n = a_.shape[0], b_.shape[0]
    t_m, t_n = triton.cdiv(m, f.block_m), triton.cdiv(n, f.block_n)
    kind = torch.float16 if half else torch.float32
    size = (round_up(m, f.block_n), round_up(n, f.block_n))
    w = empty(a, size, kind)
    second = empty(a, size if pair else (0, 0), kind)
    total = empty(a, (t_m * t_n,))
    with _on_device_of(a):
        tiles.products_kernel[(t_m * t_n,)](
            pointer(a_, f, f.block_m), pointer(b_, f, f.block_n), pointer(c_, f, f.block_m), pointer(d_, f, f.block_n),
            total, w, second if pair else w, m, n, t_m, t_n, a_.stride(0), b_.stride(0), w.stride(0), k1,
            1 / PRODUCT_SCALE,
            PAIR=pair, SYMMETRIC=symmetric, SKIP_DIAGONAL=skip_diagonal, DESCRIPTOR=f.descriptor, GROUP=f.group,
            b_M=f.block_m, b_N=f.block_n, b_K=f.block_k, **f.options(),
        )  # fmt: skip
    return total.sum(dtype=torch.float64), w[:m, :n].contiguous(), second[:m, :n].contiguous() if pair else second
