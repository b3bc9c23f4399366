"""Computes the gradient of the log-sums in registers, per row tile: an alternative to blocks of W for narrow rows.

    dx_i = sum_j W_ij x_j,    W_ij = 2^(s_ij - shift) (g_i + g_j)    or with both log-sums, as in `tiles`

One program computes the whole gradient of its rows: for every tile of columns the similarities, their weights, and the
product of the weights with the rows of these columns. W stays in registers, so only x, the ids and two numbers per row
are read, and only dx is written. It needs 2u operations, as it cannot exploit the symmetry of W, whereas block pairs
need 1.5u and move W, about 2 N^2 bytes, to memory and back; `tune` measures which is faster.
Legend: u = 2 N^2 D, b_K columns of x, padded; otherwise as in `tiles`.
"""

import triton
import triton.language as tl
from torch import Tensor

from ssd_addon.kernels.operands import Scaled, pointer
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
        # Rows beyond the last are read as the last, so the tile that contains them compares ids too.
        if _same_image(p_low_a, p_high_a, p_low_b, p_high_b, i, j, 1) | ((j + 1) * b_N > n_n):
            id_n = tl.load(p_id_b + o_n, mask=m_n, other=0)
            w = tl.where((id_m[:, None] != id_n[None, :]) & m_n[None, :], w, 0.0)
        dx = tl.dot(w.to(y.dtype), y, dx)
    o_out = o_m.to(tl.int64)[:, None] * stride_dx + o_k[None, :]
    tl.store(p_dx + o_out, dx, mask=m_m[:, None] & (o_k < columns)[None, :])


def gradient(
    a: Scaled, b: Scaled, bounds_a: Tensor, bounds_b: Tensor, log: Tensor, every_log: Tensor, g: Tensor,
    every_g: Tensor, maximum: bool, w_scale: float, c: Configuration, out: Tensor,
) -> None:  # fmt: skip
    """w_scale sum_j W_ij x_j of the local rows, into `out` [n, K] float32.

    Args:
        a, b: the local rows, and all rows; K columns, a power of 2.
        bounds_a, bounds_b: bounds of the ids in tiles of block_m and of block_n rows.
        log, every_log: [1, n], [1, N] lse in units of log 2, read only with `maximum`.
        g, every_g: [1, n], [1, N] as for `tiles.weights_kernel`.
        w_scale: factor of W before it is rounded to fp16.
        c: a configuration with `resident`.

    Raises:
        ValueError: rows are too wide, or in two fp16 parts, which need more than one product.
    """
    k = a.x.shape[1]
    if a.rows.numel() or k > c.block_k:
        raise ValueError(
            f"configuration: expected float16 rows of at most {c.block_k} columns, as it keeps the gradient in "
            f"registers: got {'float32' if a.rows.numel() else 'float16'} rows of {k}"
        )
    c = c._replace(block_k=k)
    resident_kernel[(triton.cdiv(a.n, c.block_m),)](
        pointer(a.x, c, c.block_m), pointer(b.x, c, c.block_n), a.ids, b.ids, *bounds_a, *bounds_b,
        a.scale, a.shift, log, every_log, g, every_g, out, a.n, b.n, a.x.stride(0), b.x.stride(0), out.stride(0), k,
        w_scale, MAXIMUM=maximum, DESCRIPTOR=c.descriptor, b_M=c.block_m, b_N=c.block_n, b_K=c.block_k, **c.options(),
    )  # fmt: skip
