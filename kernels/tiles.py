"""Triton kernels that compute one tile of similarities per program and reduce it while it is in registers.

    s_ij = scale * <a_i, b_j>                                   fp16 products, summed in fp32, in units of log 2
    sums:     sum_j 2^(s_ij - shift)                            over a tile's columns and over its rows
    weights:  W_ij = g_i 2^(s_ij - l_i) + g_j 2^(s_ij - l_j)    l = lse / log 2, g the upstream gradient
    products: <a_i, b_j>, and the sum over the tile of its square (or of <a_i, b_j> <c_i, d_j>)

Entries with equal image ids are left out of the first two. With two levels the accumulator is used after the first k0
columns and again after all. Every element of every output is written by exactly one program, without atomics, so
results are bitwise reproducible.

Legend: i, j tile of rows, of columns; o_ offsets, m_ masks, b_ block sizes, p_ pointers. Operands are padded along K to
whole blocks; rows beyond the last are read as the last and masked in the epilogue. Derivation: kernels/README.md.
"""

import triton
import triton.language as tl


@triton.jit
def _grouped(p, rows, columns, GROUP: tl.constexpr):
    """Tile (i, j) of program p: GROUP row tiles take turns, so that a column's operand stays in the L2 cache."""
    width = GROUP * columns
    first = (p // width) * GROUP
    size = tl.minimum(rows - first, GROUP)
    q = p % width
    return first + q % size, q // size


@triton.jit
def _accumulate(
    acc,
    a,
    b,
    i,
    j,
    o_m,
    o_n,
    n_m,
    n_n,
    stride_a,
    stride_b,
    start,
    stop,
    b_M: tl.constexpr,
    b_N: tl.constexpr,
    b_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """acc + A[rows of tile i, start:stop] B[rows of tile j, start:stop]^T"""
    if DESCRIPTOR:
        for k in range(start, stop, b_K):
            acc = tl.dot(a.load([i * b_M, k]), b.load([j * b_N, k]).T, acc)
    else:
        o_k = tl.arange(0, b_K)
        p_a = a + tl.minimum(o_m, n_m - 1).to(tl.int64)[:, None] * stride_a + o_k[None, :]
        p_b = b + tl.minimum(o_n, n_n - 1).to(tl.int64)[None, :] * stride_b + o_k[:, None]
        for k in range(start, stop, b_K):
            acc = tl.dot(tl.load(p_a + k), tl.load(p_b + k), acc)
    return acc


@triton.jit
def _same_image(p_low_a, p_high_a, p_low_b, p_high_b, i, j, RATIO: tl.constexpr):
    """Whether tile (i, j) may contain a pair of one image; most tiles do not, and skip the comparison."""
    low, high = tl.load(p_low_b + j * RATIO), tl.load(p_high_b + j * RATIO)
    for h in tl.static_range(1, RATIO):
        low = tl.minimum(low, tl.load(p_low_b + j * RATIO + h))
        high = tl.maximum(high, tl.load(p_high_b + j * RATIO + h))
    return (tl.load(p_low_a + i) <= high) & (low <= tl.load(p_high_a + i))


@triton.jit
def _store_tile(p, w, i, j, stride, SYMMETRIC: tl.constexpr, b_M: tl.constexpr, b_N: tl.constexpr):
    """Store tile (i, j) of a matrix of whole tiles; SYMMETRIC: also its transpose, if it lies above the diagonal.

    A tile twice as wide as high that touches the diagonal is stored without its transpose, and so is the one below it:
    the four squares at the diagonal are all computed, and no entry is written twice.
    """
    RATIO: tl.constexpr = b_N // b_M
    w = w.to(p.dtype.element_ty)
    o_m, o_n = tl.arange(0, b_M), tl.arange(0, b_N)
    # int64 for the tile's start, int32 inside it: 64-bit offsets for every entry would take half of the registers.
    tile = (i * b_M).to(tl.int64) * stride + j * b_N
    tl.store(p + tile + (o_m[:, None] * stride + o_n[None, :]), w)
    if SYMMETRIC:
        if j * RATIO > i:
            across = (j * b_N).to(tl.int64) * stride + i * b_M
            tl.store(p + across + (o_n[:, None] * stride + o_m[None, :]), w.T)


@triton.jit
def _reduce(s, shift, p_sum, p_max, o_out, m_out, axis: tl.constexpr, MAXIMUM: tl.constexpr):
    """Store sum 2^(s - shift) over an axis, or the maximum and the sum relative to it."""
    if MAXIMUM:
        top = tl.max(s, axis)
        safe = tl.where(top == float("-inf"), 0.0, top)
        tl.store(p_max + o_out, top, mask=m_out)
        tl.store(p_sum + o_out, tl.sum(tl.exp2(s - tl.expand_dims(safe, axis)), axis), mask=m_out)
    else:
        tl.store(p_sum + o_out, tl.sum(s, axis), mask=m_out)  # s was exponentiated once for both axes


@triton.jit
def column_sums(s, b_M: tl.constexpr, b_N: tl.constexpr):
    """sum_i s_ij, [b_N], by halves; tl.sum would shuffle every column of a tile through 8 lanes (kernels/README.md)."""
    # Tensor cores leave rows r and r + 8 in one thread, so only half of the tile has to change its layout.
    x, y = s.reshape(b_M // 16, 2, 8, b_N).permute(0, 2, 3, 1).split()
    s = (x + y).reshape(b_M // 2, b_N)
    for h in tl.static_range(3):
        x, y = s.reshape(2, b_M // 2 ** (h + 2), b_N).permute(1, 2, 0).split()
        s = x + y
    return tl.sum(s, 0)


@triton.jit(do_not_specialize=["n_m", "n_n", "first", "tiles_m", "tiles_n"])
def sums_kernel(
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
    p_near,
    p_near_max,
    p_far,
    p_far_max,
    n_m,
    n_n,
    first,
    tiles_m,
    tiles_n,
    stride_a,
    stride_b,
    k0,
    k1,
    LEVELS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MAXIMUM: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    GROUP: tl.constexpr,
    b_M: tl.constexpr,
    b_N: tl.constexpr,
    b_K: tl.constexpr,
):
    """Partial sums of a strip: row tiles first .. first + tiles_m - 1 against all columns (SYMMETRIC: from `first` on).

    near [LEVELS, slots, rows of the strip]: slot j holds the sums over column tile first + j (0 + j). SYMMETRIC: for
    j < i it holds the column sums of tile (j, i), which are the same numbers.
    far [LEVELS, tiles_m, rows after the strip]: slot i holds the column sums of row tile first + i.
    """
    RATIO: tl.constexpr = b_N // b_M
    i, j = _grouped(tl.program_id(0), tiles_m, tiles_n, GROUP)
    i += first
    origin = 0
    if SYMMETRIC:
        origin = first
        j += first // RATIO
        if j * RATIO + RATIO - 1 < i:
            return
    o_m = i * b_M + tl.arange(0, b_M)
    o_n = j * b_N + tl.arange(0, b_N)
    m_m, m_n = o_m < n_m, o_n < n_n
    scale, shift = tl.load(p_scale), tl.load(p_shift)
    # Padded rows need no test: they only reach the columns of the diagonal tile, which compares ids anyway.
    compare = _same_image(p_low_a, p_high_a, p_low_b, p_high_b, i, j, RATIO) | ((j + 1) * b_N > n_n)
    strip = tl.minimum(tiles_m * b_M, n_m - first * b_M).to(tl.int64)
    behind = (n_n - (first + tiles_m) * b_M).to(tl.int64)
    slots = tl.cdiv(n_n, b_M) - origin
    acc = tl.zeros((b_M, b_N), tl.float32)
    for level in tl.static_range(LEVELS):
        start = 0 if level == 0 else k0
        stop = k0 if level + 1 < LEVELS else k1
        acc = _accumulate(
            acc, a, b, i, j, o_m, o_n, n_m, n_n, stride_a, stride_b, start, stop, b_M, b_N, b_K, DESCRIPTOR
        )
        s = acc * scale
        if not MAXIMUM:
            s = tl.exp2(s - shift)
        if compare:
            id_m = tl.load(p_id_a + o_m, mask=m_m, other=0)
            id_n = tl.load(p_id_b + o_n, mask=m_n, other=0)
            keep = (id_m[:, None] != id_n[None, :]) & m_m[:, None] & m_n[None, :]
            s = tl.where(keep, s, float("-inf") if MAXIMUM else 0.0)
        for h in tl.static_range(RATIO):
            t = j * RATIO + h
            part = s
            if RATIO > 1:
                part = tl.where((o_n // b_M == t)[None, :], s, float("-inf") if MAXIMUM else 0.0)
            place = t + tl.zeros_like(o_m)  # as a block: Triton 3.9's interpreter takes no scalar in a mask of a block
            written = m_m & (place - origin < slots)
            if SYMMETRIC:
                written = written & (place >= i)
            o_out = (level * slots + t - origin) * strip + (o_m - first * b_M)
            _reduce(part, shift, p_near, p_near_max, o_out, written, 1, MAXIMUM)
        if SYMMETRIC:
            o_t = o_n // b_M
            inside = m_n & (o_t > i) & (o_t < first + tiles_m)
            outside = m_n & (o_t >= first + tiles_m)
            o_in = (level * slots + i - first) * strip + (o_n - first * b_M)
            o_far = (level * tiles_m + i - first) * behind + (o_n - (first + tiles_m) * b_M)
            if MAXIMUM:
                top = tl.max(s, 0)
                safe = tl.where(top == float("-inf"), 0.0, top)
                total = tl.sum(tl.exp2(s - safe[None, :]), 0)
                tl.store(p_near_max + o_in, top, mask=inside)
                tl.store(p_far_max + o_far, top, mask=outside)
            else:
                total = column_sums(s, b_M, b_N)
            tl.store(p_near + o_in, total, mask=inside)
            tl.store(p_far + o_far, total, mask=outside)


@triton.jit(do_not_specialize=["n_m", "n_n", "tiles_m", "tiles_n"])
def weights_kernel(
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
    p_w,
    p_w_first,
    n_m,
    n_n,
    tiles_m,
    tiles_n,
    stride_a,
    stride_b,
    stride_w,
    stride_l_a,
    stride_l_b,
    k0,
    k1,
    w_scale,
    LEVELS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MAXIMUM: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    GROUP: tl.constexpr,
    b_M: tl.constexpr,
    b_N: tl.constexpr,
    b_K: tl.constexpr,
):
    """W [whole tiles] of a block pair, times w_scale. SYMMETRIC: tiles above the diagonal are also stored transposed.

    MAXIMUM: lse (in units of log 2) and the upstream g are [LEVELS, n]. Otherwise g holds g_i 2^(shift - l_i), which is
    representable in float32 if the shift is used, so that one exponential serves both rows:
    W_ij = 2^(s_ij - shift) (g_i + g_j). Two levels: w_first holds the sum of both levels' weights, as the first columns
    of z are in both similarities; w holds those of the last level.
    """
    RATIO: tl.constexpr = b_N // b_M
    i, j = _grouped(tl.program_id(0), tiles_m, tiles_n, GROUP)
    if SYMMETRIC:
        if j * RATIO + RATIO - 1 < i:
            return
    o_m = i * b_M + tl.arange(0, b_M)
    o_n = j * b_N + tl.arange(0, b_N)
    m_m, m_n = o_m < n_m, o_n < n_n
    scale, shift = tl.load(p_scale), tl.load(p_shift)
    compare = _same_image(p_low_a, p_high_a, p_low_b, p_high_b, i, j, RATIO)
    acc = tl.zeros((b_M, b_N), tl.float32)
    total = acc
    for level in tl.static_range(LEVELS):
        start = 0 if level == 0 else k0
        stop = k0 if level + 1 < LEVELS else k1
        acc = _accumulate(
            acc, a, b, i, j, o_m, o_n, n_m, n_n, stride_a, stride_b, start, stop, b_M, b_N, b_K, DESCRIPTOR
        )
        s = acc * scale
        g_m = tl.load(p_g_a + level * stride_l_a + o_m, mask=m_m, other=0.0) * w_scale
        g_n = tl.load(p_g_b + level * stride_l_b + o_n, mask=m_n, other=0.0) * w_scale
        if MAXIMUM:
            lse_m = tl.load(p_lse_a + level * stride_l_a + o_m, mask=m_m, other=0.0)
            lse_n = tl.load(p_lse_b + level * stride_l_b + o_n, mask=m_n, other=0.0)
            w = tl.exp2(s - lse_m[:, None]) * g_m[:, None] + tl.exp2(s - lse_n[None, :]) * g_n[None, :]
        else:
            w = tl.exp2(s - shift) * (g_m[:, None] + g_n[None, :])
        if compare:
            id_m = tl.load(p_id_a + o_m, mask=m_m, other=0)
            id_n = tl.load(p_id_b + o_n, mask=m_n, other=0)
            w = tl.where(id_m[:, None] != id_n[None, :], w, 0.0)
        if level + 1 == LEVELS:
            _store_tile(p_w, w, i, j, stride_w, SYMMETRIC, b_M, b_N)
        if LEVELS > 1:
            total += w
    if LEVELS > 1:
        _store_tile(p_w_first, total, i, j, stride_w, SYMMETRIC, b_M, b_N)


@triton.jit(do_not_specialize=["n_m", "n_n", "tiles_m", "tiles_n"])
def products_kernel(
    a,
    b,
    c,
    d,
    p_sum,
    p_w,
    p_w_second,
    n_m,
    n_n,
    tiles_m,
    tiles_n,
    stride_a,
    stride_b,
    stride_w,
    k1,
    w_scale,
    PAIR: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SKIP_DIAGONAL: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    GROUP: tl.constexpr,
    b_M: tl.constexpr,
    b_N: tl.constexpr,
    b_K: tl.constexpr,
):
    """W = <a_i, b_j> [whole tiles] times w_scale, and per program the sum of its squares before scaling.

    PAIR: also W_second = <c_i, d_j>, and the sum is that of the product of the two. SYMMETRIC: tiles above the diagonal
    count twice and are also stored transposed. SKIP_DIAGONAL: entries i = j are 0.
    """
    RATIO: tl.constexpr = b_N // b_M
    p = tl.program_id(0)
    i, j = _grouped(p, tiles_m, tiles_n, GROUP)
    if SYMMETRIC:
        if j * RATIO + RATIO - 1 < i:
            tl.store(p_sum + p, 0.0)
            return
    o_m = i * b_M + tl.arange(0, b_M)
    o_n = j * b_N + tl.arange(0, b_N)
    edge = ((i + 1) * b_M > n_m) | ((j + 1) * b_N > n_n)
    if SKIP_DIAGONAL:
        edge = edge | ((i + 1) * b_M > j * b_N) & ((j + 1) * b_N > i * b_M)
    acc = tl.zeros((b_M, b_N), tl.float32)
    acc = _accumulate(acc, a, b, i, j, o_m, o_n, n_m, n_n, stride_a, stride_b, 0, k1, b_M, b_N, b_K, DESCRIPTOR)
    if edge:
        valid = (o_m < n_m)[:, None] & (o_n < n_n)[None, :]
        if SKIP_DIAGONAL:
            valid = valid & (o_m[:, None] != o_n[None, :])
        acc = tl.where(valid, acc, 0.0)
    _store_tile(p_w, acc * w_scale, i, j, stride_w, SYMMETRIC, b_M, b_N)
    if PAIR:
        second = tl.zeros((b_M, b_N), tl.float32)
        second = _accumulate(
            second, c, d, i, j, o_m, o_n, n_m, n_n, stride_a, stride_b, 0, k1, b_M, b_N, b_K, DESCRIPTOR
        )
        _store_tile(p_w_second, second * w_scale, i, j, stride_w, SYMMETRIC, b_M, b_N)
        total = tl.sum(second * acc)
    else:
        total = tl.sum(acc * acc)
    if SYMMETRIC:
        total = tl.where(j * RATIO > i, 2 * total, total)
    tl.store(p_sum + p, total)
