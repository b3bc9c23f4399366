"""Triton kernels that L2-normalize one space in all views and compute the cosines of its pairs, in one pass each way.

    joint[v, i, k] = z[v, i, k] / divisor[v, i],   divisor = max(|z[v, i]|, EPS) * root,   root = sqrt(S)
    cosines[p, i]  = S <joint[a, i], joint[b, i]>
    dz[v, i]       = (g - [|z| > EPS] S <g, joint[v, i]> joint[v, i]) / divisor,
        g = djoint[v, i] + S * sum over the pairs (v, w) of dcosines[p, i] joint[w, i]

A program handles b_B images. PAIRS holds the pairs of views, 16 bits each: a in the lower byte, b in the upper.
The definition in torch's functions is `ssd_addon._unit`. Legend: V views, B images, S spaces, d columns.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)


@triton.jit
def _divisor(square):
    """The length of a row, at least EPS; NaN on overflow, as x / inf would be 0."""
    length = tl.sqrt(square)
    length = tl.where(length == float("inf"), float("nan"), length)
    return tl.where(length < EPS, EPS, length)


@triton.jit(do_not_specialize=["n"])
def unit_kernel(
    z,
    p_joint,
    p_length,
    p_cosine,
    n,
    d,
    stride_zv,
    stride_zb,
    stride_zk,
    stride_jv,
    stride_jb,
    root,
    VIEWS: tl.constexpr,
    PAIRS: tl.constexpr,
    COUNT: tl.constexpr,
    b_B: tl.constexpr,
    b_K: tl.constexpr,
):
    """joint and length [V, B] (NaN on overflow), then the cosines [pairs, B]."""
    o_b = tl.program_id(0) * b_B + tl.arange(0, b_B)
    m_b, o_k = o_b < n, tl.arange(0, b_K)
    row = o_b.to(tl.int64)[:, None]
    for v in range(VIEWS):
        square = tl.zeros((b_B,), tl.float32)
        p_z = z + v * stride_zv + row * stride_zb
        for k in range(0, d, b_K):
            mask = m_b[:, None] & (k + o_k < d)[None, :]
            x = tl.load(p_z + (k + o_k)[None, :] * stride_zk, mask=mask, other=0.0).to(tl.float32)
            square += tl.sum(x * x, 1)
        divisor = _divisor(square)
        length = tl.where(divisor == EPS, tl.sqrt(square), divisor)
        tl.store(p_length + v * n + o_b, length, mask=m_b)
        divisor = divisor * root
        for k in range(0, d, b_K):
            mask = m_b[:, None] & (k + o_k < d)[None, :]
            x = tl.load(p_z + (k + o_k)[None, :] * stride_zk, mask=mask, other=0.0).to(tl.float32)
            out = p_joint + v * stride_jv + row * stride_jb + (k + o_k)[None, :]
            tl.store(out, x / divisor[:, None], mask=mask)
    for q in tl.static_range(COUNT):
        a, b = (PAIRS >> (16 * q)) & 255, (PAIRS >> (16 * q + 8)) & 255
        xx, xy, yy = tl.zeros((b_B,), tl.float32), tl.zeros((b_B,), tl.float32), tl.zeros((b_B,), tl.float32)
        for k in range(0, d, b_K):
            mask = m_b[:, None] & (k + o_k < d)[None, :]
            place = row * stride_zb + (k + o_k)[None, :] * stride_zk
            x = tl.load(z + a * stride_zv + place, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(z + b * stride_zv + place, mask=mask, other=0.0).to(tl.float32)
            xx, xy, yy = xx + tl.sum(x * x, 1), xy + tl.sum(x * y, 1), yy + tl.sum(y * y, 1)
        cosine = xy / _divisor(xx) / _divisor(yy)
        tl.store(p_cosine + q * n + o_b, cosine, mask=m_b)


@triton.jit(do_not_specialize=["n"])
def unit_grad_kernel(
    p_grad,
    p_grad_cosine,
    p_joint,
    p_length,
    p_dz,
    n,
    d,
    stride_gv,
    stride_gb,
    stride_gk,
    stride_cq,
    stride_cb,
    stride_jv,
    stride_jb,
    spaces,
    root,
    smallest,
    VIEWS: tl.constexpr,
    PAIRS: tl.constexpr,
    COUNT: tl.constexpr,
    b_B: tl.constexpr,
    b_K: tl.constexpr,
):
    """dz [V, B, d]; 0 for rows of at most `smallest`."""
    o_b = tl.program_id(0) * b_B + tl.arange(0, b_B)
    m_b, o_k = o_b < n, tl.arange(0, b_K)
    row = o_b.to(tl.int64)[:, None]
    for v in tl.static_range(VIEWS):
        length = tl.load(p_length + v * n + o_b, mask=m_b, other=1.0)
        along = tl.zeros((b_B,), tl.float32)
        for final in tl.static_range(2):
            for k in range(0, d, b_K):
                mask = m_b[:, None] & (k + o_k < d)[None, :]
                place = row * stride_jb + (k + o_k)[None, :]
                own = tl.load(p_joint + v * stride_jv + place, mask=mask, other=0.0)
                p_g = p_grad + v * stride_gv + row * stride_gb + (k + o_k).to(tl.int64)[None, :] * stride_gk
                g = tl.load(p_g, mask=mask, other=0.0)
                for q in tl.static_range(COUNT):
                    a, b = (PAIRS >> (16 * q)) & 255, (PAIRS >> (16 * q + 8)) & 255
                    if a == v or b == v:
                        c = tl.load(p_grad_cosine + q * stride_cq + o_b.to(tl.int64) * stride_cb, mask=m_b, other=0.0)
                        other = b if a == v else a
                        g += tl.load(p_joint + other * stride_jv + place, mask=mask, other=0.0) * (c * spaces)[:, None]
                if final == 0:
                    along += tl.sum(own * g, 1)
                else:
                    dz = (g - own * along[:, None]) / (tl.where(length < EPS, EPS, length) * root)[:, None]
                    dz = tl.where((length <= smallest)[:, None], 0.0, dz)
                    tl.store(p_dz + (v * n + row) * d + (k + o_k)[None, :], dz, mask=mask)
            # A row shorter than EPS was divided by EPS, and its length has no gradient; NaN stays.
            along = tl.where(length <= EPS, 0.0, along * spaces)
