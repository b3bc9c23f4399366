"""Runs a table of color instructions on whole images, in place, in one Triton kernel with one program per image.

    BLEND      x <- clamp(a x + b gray(x) + c mean(gray(x)) + d)
    HUE        x <- x with the hue of HSV shifted by a sixths of a turn
    SATURATE   x <- x with the saturation of HSV multiplied by a
    SOLARIZE   x <- y where y < a, else 1 - y;  y = clamp(x + b)

and finally (x - mean) / deviation by channel. A mean over the image needs its own pass over the pixels, which reads
them and runs the preceding columns; every pixel is written once. The table is `colors.Chain`, whose torch functions are
the definition. Legend: N images, K columns, P pixels of an image; p_ pointers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_addon.kernels.launch import why_not

BLOCK = 1024
"""Pixels that a program holds at once."""


@triton.jit
def _grey(r, g, b):
    return 0.299 * r + 0.587 * g + 0.114 * b


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _pixels(p_x, o_p, m_p, pixels):
    return (
        tl.load(p_x + o_p, m_p, 0.0),
        tl.load(p_x + pixels + o_p, m_p, 0.0),
        tl.load(p_x + 2 * pixels + o_p, m_p, 0.0),
    )


@triton.jit
def _near(hue, place):
    """The weight of a channel in a hue, 1 to 2: 2 - |distance on the circle|, and at least 1."""
    return tl.minimum(tl.maximum(tl.abs(tl.abs(hue - place) - 3.0), 1.0), 2.0)


@triton.jit
def _instruction(r, g, b, code, p_numbers, mean):
    """One instruction on pixels of an image; p_numbers points at its a, b, c, d."""
    first = tl.load(p_numbers)
    second = tl.load(p_numbers + 1)
    if code == 1:
        third = tl.load(p_numbers + 2)
        fourth = tl.load(p_numbers + 3)
        rest = second * _grey(r, g, b) + third * mean + fourth
        r, g, b = _clamp(first * r + rest), _clamp(first * g + rest), _clamp(first * b + rest)
    elif code == 2:
        low = tl.minimum(tl.minimum(r, g), b)
        chroma = tl.maximum(tl.maximum(r, g), b) - low
        hue = (g + b - r - low) / tl.maximum(chroma, 1e-12) + 1.0
        hue = tl.where(g - b < 0.0, -hue, hue) + first
        hue -= 6.0 * tl.floor(hue * (1.0 / 6.0) + 0.5)
        low -= chroma
        r, g, b = low + chroma * _near(hue, 0.0), low + chroma * _near(hue, 2.0), low + chroma * _near(hue, -2.0)
    elif code == 3:
        low = tl.minimum(tl.minimum(r, g), b)
        top = tl.maximum(tl.maximum(r, g), b)
        chroma = top - low
        wanted = _clamp(chroma / (top + 1e-8) * first) * top
        gain = wanted / tl.maximum(chroma, 1e-12)
        rest = top - wanted
        r, g, b = _clamp((r - low) * gain + rest), _clamp((g - low) * gain + rest), _clamp((b - low) * gain + rest)
    elif code == 4:
        r, g, b = _clamp(r + second), _clamp(g + second), _clamp(b + second)
        r = tl.where(r < first, r, 1.0 - r)
        g = tl.where(g < first, g, 1.0 - g)
        b = tl.where(b < first, b, 1.0 - b)
    return r, g, b


@triton.jit
def colors_kernel(
    p_x, p_codes, p_numbers, p_ends, pixels, COLUMNS: tl.constexpr, PLACES: tl.constexpr, ENDS: tl.constexpr,
    b_P: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    p_x += image * 3 * pixels
    p_codes += image * COLUMNS
    p_numbers += image * COLUMNS * 4
    places = tl.arange(0, PLACES)
    means = tl.zeros((PLACES,), tl.float32)  # of gray, before each column that needs it
    for k in tl.static_range(COLUMNS):
        wanted = (tl.load(p_codes + k) == 1) & (tl.load(p_numbers + 4 * k + 2) != 0.0)
        if wanted:
            total = tl.zeros((b_P,), tl.float32)
            for start in range(0, pixels, b_P):
                o_p = start + tl.arange(0, b_P)
                m_p = o_p < pixels
                r, g, b = _pixels(p_x, o_p, m_p, pixels)
                for j in tl.static_range(k):
                    mean = tl.sum(tl.where(places == j, means, 0.0))
                    r, g, b = _instruction(r, g, b, tl.load(p_codes + j), p_numbers + 4 * j, mean)
                total += tl.where(m_p, _grey(r, g, b), 0.0)
            means = tl.where(places == k, tl.sum(total) / pixels, means)
    for start in range(0, pixels, b_P):
        o_p = start + tl.arange(0, b_P)
        m_p = o_p < pixels
        r, g, b = _pixels(p_x, o_p, m_p, pixels)
        for k in tl.static_range(COLUMNS):
            mean = tl.sum(tl.where(places == k, means, 0.0))
            r, g, b = _instruction(r, g, b, tl.load(p_codes + k), p_numbers + 4 * k, mean)
        if ENDS:
            r = (r - tl.load(p_ends)) / tl.load(p_ends + 3)
            g = (g - tl.load(p_ends + 1)) / tl.load(p_ends + 4)
            b = (b - tl.load(p_ends + 2)) / tl.load(p_ends + 5)
        tl.store(p_x + o_p, r, m_p)
        tl.store(p_x + pixels + o_p, g, m_p)
        tl.store(p_x + 2 * pixels + o_p, b, m_p)


def runs_on(device: torch.device) -> bool:
    """Whether the kernel can run on this device."""
    return why_not(device) is None


def colors(x: Tensor, codes: Tensor, numbers: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Run a table on images, in place.

    Args:
        x: [N, 3, H, W] float32 in [0, 1], contiguous.
        codes: [N, K] integers.
        numbers: [N, K, 4] float32.
        ends: mean and standard deviation of a final normalization, each of 1 or 3 numbers.

    Raises:
        ValueError: channels, dtypes or numbers of images do not fit.
    """
    n, k = codes.shape
    if x.ndim != 4 or x.shape[1] != 3 or x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"colors: expected contiguous float32 images [N, 3, H, W]: got {x.dtype} {list(x.shape)}")
    if len(x) != n or numbers.shape != (n, k, 4):
        raise ValueError(
            f"colors: expected codes [{len(x)}, K] and numbers [{len(x)}, K, 4]: got {list(codes.shape)}, "
            f"{list(numbers.shape)}"
        )
    there = x.device
    last = numbers.new_empty(6) if ends is None else torch.cat([t.flatten().expand(3) for t in ends])
    with torch.cuda.device(there) if x.is_cuda else torch.no_grad():
        colors_kernel[(n,)](
            x, codes.to(there, torch.int32), numbers.to(there, torch.float32).contiguous(), last.to(there),
            x.shape[2] * x.shape[3], COLUMNS=k, PLACES=triton.next_power_of_2(max(k, 1)), ENDS=ends is not None,
            b_P=BLOCK, num_warps=4,
        )  # fmt: skip
    return x
