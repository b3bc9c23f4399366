"""Triton kernels that prepare the inputs of the tile kernels and process their outputs.

    prepare       x_i = z_i / a in fp16, padded and stacked; int32 ids, their range in every tile; scale, shift, a / tau
    fold          adds up the partial sums of a strip: lse_i
    coefficients  g_i / max |g|, and, with a constant shift, times 2^(shift - l_i)
    finish        dz_i = factor * dx_i (minus a term of the diagonal), in the dtype of z; partial sums of <z_i, dz_i>
    energy        the sum of squares of a covariance without its diagonal, added up in float64

Each fuses a few elementwise operations that torch would launch one by one. Every output is written by one program.
Legend: n rows, d columns of z, K columns of an operand; o_ offsets, m_ masks, b_ block sizes, p_ pointers. A pointer
that is None is not used.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
EXPONENT = tl.constexpr(80.0)  # as in `ranges`


@triton.jit
def _power(longest):
    """(a, 1 / a) with a power of 2 that scales the longest row to a length of 128 to 256; NaN if it is not finite."""
    field = (longest.to(tl.int32, bitcast=True) >> 23) & 255
    field = tl.maximum(field - 7, 1)  # not below the smallest normal number
    finite = longest < float("inf")
    a = tl.where(finite, (field << 23).to(tl.float32, bitcast=True), float("nan"))
    inverse = tl.where(finite, ((254 - field) << 23).to(tl.float32, bitcast=True), float("nan"))
    return a, inverse


@triton.jit(do_not_specialize=["n", "d0", "d", "k0", "s0", "blocks"])
def prepare_kernel(
    z,
    p_given_ids,
    p_tau,
    p_longest,
    p_x,
    p_other,
    p_rows,
    p_ids,
    p_low,
    p_high,
    p_numbers,
    tau,
    longest,
    limit,
    log_n,
    n,
    d0,
    d,
    k0,
    s0,
    stride_z,
    stride_zc,
    stride_id,
    stride_x,
    stride_rows,
    blocks,
    EXACT: tl.constexpr,
    b_M: tl.constexpr,
    b_R: tl.constexpr,
    b_K: tl.constexpr,
):
    """Tile (i, k) of the operand: b_M rows, b_R at a time, and b_K columns.

    z None: ids only. p_given_ids None: rows only. tau, longest: used if their pointers are None. Rows longer than
    `limit` make everything NaN. Columns: d0 of the first level padded to k0, then the rest. EXACT: p_rows holds the
    rows in float32, p_x [high, high, low] and p_other [high, low, high] of each level, the second from column s0 on.
    numbers: scale, shift, a / tau and a, four times each, so that each is aligned.
    """
    i = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks
    o_m = i * b_M + tl.arange(0, b_M)
    if p_given_ids is not None:
        if k == 0:  # outside the constant, which decides what triton compiles
            ids = tl.load(p_given_ids + tl.minimum(o_m, n - 1).to(tl.int64) * stride_id).to(tl.int32)
            tl.store(p_ids + o_m, ids, mask=o_m < n)
            tl.store(p_low + i, tl.min(ids, 0))
            tl.store(p_high + i, tl.max(ids, 0))
    if z is not None:
        if p_longest is not None:
            longest = tl.load(p_longest).to(tl.float32)
        if p_tau is not None:
            tau = tl.load(p_tau)
        longest = tl.where(longest <= limit, longest, float("nan"))
        a, inverse = _power(longest)
        if i + k == 0:
            scale, shift = a * a * LOG2E / tau, tl.maximum(longest * longest / tau + (log_n - EXPONENT), 0.0) * LOG2E
            o_p = tl.arange(0, 16)
            tl.store(
                p_numbers + o_p, tl.where(o_p < 8, tl.where(o_p < 4, scale, shift), tl.where(o_p < 12, a / tau, a))
            )
        o_k = k * b_K + tl.arange(0, b_K)
        second = k * b_K >= k0
        source = tl.where(second, o_k - k0 + d0, o_k)
        m_k = (source < tl.where(second, d, d0))[None, :]
        width, target = tl.where(second, d - d0, d0), tl.where(second, s0 + o_k - k0, o_k)[None, :]
        for r in range(0, b_M, b_R):  # a few rows at a time, as the tile's addresses do not fit in registers
            o_r = i * b_M + r + tl.arange(0, b_R)
            m_r, row = (o_r < n)[:, None], o_r.to(tl.int64)[:, None]
            value = tl.load(z + row * stride_z + source.to(tl.int64)[None, :] * stride_zc, mask=m_r & m_k, other=0.0)
            value = value.to(tl.float32) * inverse
            high = value.to(tl.float16)
            if EXACT:
                low = (value - high.to(tl.float32)).to(tl.float16)
                tl.store(p_rows + row * stride_rows + o_k[None, :], value, mask=m_r)
                place = row * stride_x + target
                tl.store(p_x + place, high, mask=m_r & m_k)
                tl.store(p_x + place + width, high, mask=m_r & m_k)
                tl.store(p_x + place + 2 * width, low, mask=m_r & m_k)
                tl.store(p_other + place, high, mask=m_r & m_k)
                tl.store(p_other + place + width, low, mask=m_r & m_k)
                tl.store(p_other + place + 2 * width, high, mask=m_r & m_k)
            else:
                tl.store(p_x + row * stride_x + o_k[None, :], high, mask=m_r)


@triton.jit(do_not_specialize=["n", "start", "stop", "end", "slots", "count"])
def fold_kernel(
    p_near,
    p_near_max,
    p_far,
    p_far_max,
    p_total,
    p_top,
    p_lse,
    p_shift,
    n,
    start,
    stop,
    end,
    slots,
    count,
    FIRST: tl.constexpr,
    b_T: tl.constexpr,
    b_N: tl.constexpr,
):
    """Add the slots of a strip (see `tiles.sums_kernel`) to the results of earlier strips: lse of its own rows, from
    start to stop, and sums of the following rows, up to `end`. With p_near_max the sums are relative to the maxima. A
    sum of 0 (no negative) gives NaN.
    """
    level = tl.program_id(1)
    o_n = start + tl.program_id(0) * b_N + tl.arange(0, b_N)
    m_n, near = o_n < end, o_n < stop
    o_t = tl.arange(0, b_T)
    base = (level * n).to(tl.int64)
    total = tl.zeros((b_N,), tl.float32)
    top = tl.full((b_N,), float("-inf"), tl.float32)
    if not FIRST:
        total = tl.load(p_total + base + o_n, mask=m_n, other=0.0)
        if p_near_max is not None:
            top = tl.load(p_top + base + o_n, mask=m_n, other=float("-inf"))
    for t in range(0, tl.maximum(slots, count), b_T):
        slot = t + o_t
        m_near = near[None, :] & (slot < slots)[:, None]
        m_far = (m_n & (o_n >= stop))[None, :] & (slot < count)[:, None]
        o_near = (level * slots + slot).to(tl.int64)[:, None] * (stop - start) + (o_n - start)[None, :]
        o_far = (level * count + slot).to(tl.int64)[:, None] * (n - stop) + (o_n - stop)[None, :]
        part = tl.load(p_near + o_near, mask=m_near, other=0.0) + tl.load(p_far + o_far, mask=m_far, other=0.0)
        if p_near_max is not None:
            part_top = tl.load(p_near_max + o_near, mask=m_near, other=float("-inf"))
            part_top = tl.maximum(part_top, tl.load(p_far_max + o_far, mask=m_far, other=float("-inf")))
            new = tl.maximum(top, tl.max(part_top, 0))
            safe = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2(top - safe) + tl.sum(part * tl.exp2(part_top - safe[None, :]), 0)
            top = new
        else:
            total += tl.sum(part, 0)
    tl.store(p_total + base + o_n, total, mask=m_n & (o_n >= stop))
    if p_near_max is not None:
        tl.store(p_top + base + o_n, top, mask=m_n & (o_n >= stop))
    else:
        top = tl.zeros((b_N,), tl.float32) + tl.load(p_shift)
    nothing = total == 0.0
    lse = tl.where(nothing, float("nan"), (tl.log2(tl.where(nothing, 1.0, total)) + top) / LOG2E)
    tl.store(p_lse + base + o_n, lse, mask=near)


@triton.jit(do_not_specialize=["n"])
def coefficients_kernel(
    p_grad,
    p_lse,
    p_largest,
    p_shift,
    p_g,
    p_log,
    p_unit,
    n,
    stride_level,
    stride_row,
    stride_lse,
    b_N: tl.constexpr,
):
    """unit = max |grad|, or 1 if that is 0 or NaN; g = grad / unit, and log = lse / log 2.

    p_log None: g 2^(shift - lse / log 2) instead, so that one exponential serves both rows of a pair; exp(shift - lse)
    is representable in float32 if the constant shift is used.
    """
    level = tl.program_id(1)
    o_n = tl.program_id(0) * b_N + tl.arange(0, b_N)
    m_n = o_n < n
    largest = tl.load(p_largest)
    unit = tl.where(largest > 0.0, largest, 1.0)
    if tl.program_id(0) + level == 0:
        tl.store(p_unit, unit)
    g = tl.load(p_grad + level * stride_level + o_n.to(tl.int64) * stride_row, mask=m_n, other=0.0) / unit
    log = tl.load(p_lse + level * stride_lse + o_n, mask=m_n, other=0.0) * LOG2E
    o_out = (level * n).to(tl.int64) + o_n
    if p_log is None:
        g = g * tl.exp2(tl.load(p_shift) - log)
    else:
        tl.store(p_log + o_out, log, mask=m_n)
    tl.store(p_g + o_out, g, mask=m_n)


@triton.jit(do_not_specialize=["n", "d0", "d", "k0", "blocks"])
def finish_kernel(
    p_dx,
    p_dz,
    p_first,
    p_second,
    p_third,
    p_fourth,
    p_rows,
    p_part,
    p_term,
    p_diagonal,
    constant,
    term_constant,
    n,
    d0,
    d,
    k0,
    stride_dx,
    stride_dxc,
    stride_rows,
    blocks,
    b_M: tl.constexpr,
    b_K: tl.constexpr,
):
    """dz [n, d] = constant * first * second * third * fourth * dx, where the columns of dx are padded as by `prepare`.

    first to fourth: numbers on the device. p_part not None: -first / 2 times the sum of rows * dz, by program.
    p_term not None: minus term_constant * first * fourth * term[i, k] * diagonal[k].
    """
    i = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks
    o_m = i * b_M + tl.arange(0, b_M)
    o_k = k * b_K + tl.arange(0, b_K)
    second = k * b_K >= k0
    target = tl.where(second, o_k - k0 + d0, o_k)
    m_k = target < tl.where(second, d, d0)
    mask = (o_m < n)[:, None] & m_k[None, :]
    row = o_m.to(tl.int64)[:, None]
    first = tl.load(p_first)
    dz = tl.load(p_dx + row * stride_dx + o_k.to(tl.int64)[None, :] * stride_dxc, mask=mask, other=0.0)
    dz = dz * constant * first
    if p_second is not None:
        dz = dz * tl.load(p_second)
    if p_third is not None:
        dz = dz * tl.load(p_third)
    if p_fourth is not None:
        dz = dz * tl.load(p_fourth)
    if p_term is not None:
        term = tl.load(p_term + row * stride_rows + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
        diagonal = tl.load(p_diagonal + target, mask=m_k, other=0.0)
        dz -= term * diagonal[None, :] * (term_constant * first * tl.load(p_fourth))
    tl.store(p_dz + row * d + target[None, :], dz.to(p_dz.dtype.element_ty), mask=mask)
    if p_part is not None:
        rows = tl.load(p_rows + row * stride_rows + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(p_part + tl.program_id(0), tl.sum(rows * dz) * first * -0.5)


@triton.jit(do_not_specialize=["parts", "d"])
def energy_kernel(p_part, p_diagonal, p_a, p_b, p_out, parts, d, b_N: tl.constexpr):
    """out = a^2 b^2 * the sum of the partial sums - the sum of the squared diagonal (None: 0), by one program."""
    o_n = tl.arange(0, b_N)
    total = tl.zeros((b_N,), tl.float64)
    for k in range(0, parts, b_N):
        total += tl.load(p_part + k + o_n, mask=k + o_n < parts, other=0.0).to(tl.float64)
    a, b = tl.load(p_a).to(tl.float64), tl.load(p_b).to(tl.float64)
    out = tl.sum(total, 0) * (a * b) * (a * b)
    if p_diagonal is not None:
        square = tl.zeros((b_N,), tl.float64)
        for k in range(0, d, b_N):
            c = tl.load(p_diagonal + k + o_n, mask=k + o_n < d, other=0.0).to(tl.float64)
            square += c * c
        out -= tl.sum(square, 0)
    tl.store(p_out, out.to(tl.float32))
