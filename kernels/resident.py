"""The gradient of the log-sums with that of a row tile in registers: an alternative to blocks of W for narrow rows.

    dx_i = sum_j W_ij x_j,    W_ij = 2^(s_ij - shift) (g_i + g_j)    or with both log-sums, as in `tiles`

One program computes all of its rows' gradient: for every tile of columns the similarities, their weights, and the
product of these with the columns' rows. W never leaves the registers, so nothing but x, the ids and two numbers a row
is read, and nothing but dx is written. It computes 2u, as it cannot use that W is symmetric, where block pairs compute
1.5u and move W, 2 N^2 bytes or so, to memory and back: which is faster is for a measurement to say.
Legend: u = 2 N^2 D, b_K columns of x, padded; otherwise as in `tiles`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_addon.kernels.operands import pointer, round_up
from ssd_addon.kernels.table import Configuration
from ssd_addon.kernels.tiles import _same_image


@triton.jit(do_not_specialize=["n_m", "n_n", "columns"])
def resident_kernel(
    a,
    b,
    p_id_a,
    p_id_b,
    p_low_a,
    p_high_a,
    p_low_b,
    p_high_b,
    p_scale,
    p_shift,
    p_lse_a,
    p_lse_b,
    p_g_a,
    p_g_b,
    p_dx,
    n_m,
    n_n,
    stride_a,
    stride_b,
    stride_dx,
    columns,
    w_scale,
    MAXIMUM: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    b_M: tl.constexpr,
    b_N: tl.constexpr,
    b_K: tl.constexpr,
):
    """w_scale dx [n_m, columns] float32; lse (in units of log 2) and g as in `tiles.weights_kernel`."""
    i = tl.program_id(0)
    o_m, o_k = i * b_M + tl.arange(0, b_M), tl.arange(0, b_K)
    m_m = o_m < n_m
    scale, shift = tl.load(p_scale), tl.load(p_shift)
    id_m = tl.load(p_id_a + o_m, mask=m_m, other=0)
    g_m = tl.load(p_g_a + o_m, mask=m_m, other=0.0) * w_scale
    lse_m = g_m
    if MAXIMUM:
        lse_m = tl.load(p_lse_a + o_m, mask=m_m, other=0.0)
    if DESCRIPTOR:
        x = a.load([i * b_M, 0])
    else:
        x = tl.load(a + tl.minimum(o_m, n_m - 1).to(tl.int64)[:, None] * stride_a + o_k[None, :])
    dx = tl.zeros((b_M, b_K), tl.float32)
    for j in range(tl.cdiv(n_n, b_N)):
        o_n = j * b_N + tl.arange(0, b_N)
        m_n = o_n < n_n
        if DESCRIPTOR:
            y = b.load([j * b_N, 0])
        else:
            y = tl.load(b + tl.minimum(o_n, n_n - 1).to(tl.int64)[:, None] * stride_b + o_k[None, :])
        s = tl.dot(x, y.T) * scale
        g_n = tl.load(p_g_b + o_n, mask=m_n, other=0.0) * w_scale
        if MAXIMUM:
            lse_n = tl.load(p_lse_b + o_n, mask=m_n, other=0.0)
            w = tl.exp2(s - lse_m[:, None]) * g_m[:, None] + tl.exp2(s - lse_n[None, :]) * g_n[None, :]
        else:
            w = tl.exp2(s - shift) * (g_m[:, None] + g_n[None, :])
        # Rows beyond the last are read as the last: the tile that has them compares too.
        if _same_image(p_low_a, p_high_a, p_low_b, p_high_b, i, j, 1) | ((j + 1) * b_N > n_n):
            id_n = tl.load(p_id_b + o_n, mask=m_n, other=0)
            w = tl.where((id_m[:, None] != id_n[None, :]) & m_n[None, :], w, 0.0)
        dx = tl.dot(w.to(y.dtype), y, dx)
    o_out = o_m.to(tl.int64)[:, None] * stride_dx + o_k[None, :]
    tl.store(p_dx + o_out, dx, mask=m_m[:, None] & (o_k < columns)[None, :])


def gradient(
    x: Tensor, every: Tensor, ids: Tensor, every_ids: Tensor, scale: Tensor, shift: Tensor, lse: Tensor,
    every_lse: Tensor, g: Tensor, every_g: Tensor, maximum: bool, w_scale: float, c: Configuration, out: Tensor,
) -> Tensor:  # fmt: skip
    """w_scale sum_j W_ij x_j of the local rows, into `out` [n, D] float32.

    Args:
        x, every: [n, D], [N, D] scaled rows in fp16, D at most block_k of the configuration.
        ids, every_ids: [n], [N] int32.
        scale, shift: as in `launch.sums`.
        lse, every_lse: [1, n], [1, N] in units of log 2, read only with `maximum`.
        g, every_g: [1, n], [1, N] as `tiles.weights_kernel` takes them.
        w_scale: what W is multiplied by before it is rounded to fp16.
        c: a configuration with `resident`.

    Raises:
        ValueError: wider rows, or float32 rows, whose products need more than one fp16 part.
    """
    n, d = x.shape
    if x.dtype != torch.float16 or d > c.block_k:
        raise ValueError(
            f"a configuration that keeps the gradient in registers: expected float16 rows of at most {c.block_k} "
            f"columns: got {x.dtype} rows of {d}"
        )
    c = c._replace(block_k=max(triton.next_power_of_2(d), 16))
    a = _padded(x, c.block_k)
    b = a if every is x else _padded(every, c.block_k)
    resident_kernel[(triton.cdiv(n, c.block_m),)](
        pointer(a, c, c.block_m), pointer(b, c, c.block_n), ids, every_ids,
        *_bounds(ids, c.block_m), *_bounds(every_ids, c.block_n), scale, shift, lse, every_lse, g, every_g, out,
        n, len(every), a.stride(0), b.stride(0), out.stride(0), d, w_scale,
        MAXIMUM=maximum, DESCRIPTOR=c.descriptor, b_M=c.block_m, b_N=c.block_n, b_K=c.block_k, **c.options(),
    )  # fmt: skip
    return out


def _padded(x: Tensor, columns: int) -> Tensor:
    return x.contiguous() if x.shape[1] == columns else torch.nn.functional.pad(x, (0, columns - x.shape[1]))


def _bounds(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest id of every tile of rows; the tiles of rows and of columns differ in height."""
    n = len(ids)
    place = torch.arange(round_up(n, rows), device=ids.device).clamp_(max=n - 1)
    tiles = ids[place].view(-1, rows)
    return tiles.amin(dim=1), tiles.amax(dim=1)
