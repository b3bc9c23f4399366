"""What the Triton kernels read: scaled rows in fp16, numbered image ids, and the numbers that go with them.

    x_i      = z_i / a,   a a power of 2 so that the longest row has a length of 128 to 256
    s_ij     = scale * <x_i, x_j> * log 2,   scale = a^2 / (tau log 2)

fp16 rows keep their bits and their small columns keep their digits. "Exact" rows stay float32 and are split into two
fp16 parts, stacked along K: three products, the fourth is below float32's resolution.
Legend: n rows, D columns, K columns of an operand (padded), M rows of a tile. Needs torch alone.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssd_addon.kernels.ranges import LOG2E
from ssd_addon.kernels.table import Configuration

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

LONGEST = 256.0
"""Bound of the scaled rows: a column of 1 / 256 of its average is still a normal fp16 number at D = 65536."""


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ------------------------------------------------------------------------------------------------ rows


def longest_row(z: Tensor) -> Tensor:
    """Length of the longest row of z [n, D], 0-dim in max(float32, type of z); 0 where there is none."""
    dtype = torch.promote_types(torch.float32, z.dtype)
    if not z.numel():
        return z.new_zeros((), dtype=dtype)
    lengths: Tensor = torch.linalg.vector_norm(z.detach(), dim=1, dtype=dtype)
    return lengths.amax()


def row_scale(longest: Tensor) -> Tensor:
    """What rows are divided by so that the longest has length LONGEST at most: a power of 2, or NaN for infinity."""
    _, exponent = torch.frexp(longest)
    return (torch.ldexp(torch.ones_like(longest), exponent) / LONGEST).masked_fill(~longest.isfinite(), torch.nan)


def scaled_rows(z: Tensor, longest: Tensor, exact: bool) -> Tensor:
    """Rows [n, D] in fp16, or (exact) in float32, at most LONGEST long."""
    return (z.float() / row_scale(longest)).to(torch.float32 if exact else torch.float16).contiguous()


def similarity_scale(temperature: Tensor, longest: Tensor) -> Tensor:
    """The factor that makes <x_i, x_j> of scaled rows s_ij / log 2."""
    return LOG2E / temperature.float() * row_scale(longest).square()


def normalized(g: Tensor) -> tuple[Tensor, Tensor]:
    """Upstream gradients of at most 1, and what they were divided by: a loss scaler's 65536 would leave fp16."""
    top = g.abs().amax()
    top = top.masked_fill(~(top > 0), 1.0)
    return (g / top).contiguous(), top


def relabeled(ids: Tensor) -> Tensor:
    """Ids of any integer type numbered from 0 in int32, without reading anything back from the device."""
    order = ids.argsort()
    found = ids[order]
    number = torch.zeros_like(found, dtype=torch.int32)
    number[1:] = (found[1:] != found[:-1]).cumsum(0, dtype=torch.int32)
    return torch.zeros_like(number).scatter_(0, order, number)


# ------------------------------------------------------------------------------------------------ operands


def column_levels(prefix: int, d: int) -> list[tuple[int, int]]:
    """(first, stop) of the columns of each level: one level, or two with a prefix."""
    return [(0, prefix), (prefix, d)] if prefix else [(0, d)]


def stacked(x: Tensor, levels: list[tuple[int, int]], block: int, second: bool) -> tuple[Tensor, list[int]]:
    """The operand [n, K] in fp16, each level padded to whole K blocks, and where each level ends.

    float32 rows are split: [high, high, low] along K, and [high, low, high] for the other side (`second`).
    """
    exact = x.dtype == torch.float32
    if not exact and len(levels) == 1 and x.shape[1] % block == 0 and x.is_contiguous():
        return x, [x.shape[1]]
    widths = [(3 if exact else 1) * (stop - start) for start, stop in levels]
    ends, k = [], 0
    for w in widths:
        k += round_up(w, block)
        ends.append(k)
    out = x.new_zeros((x.shape[0], k), dtype=torch.float16)
    k = 0
    for (start, stop), end in zip(levels, ends, strict=True):
        part = x[:, start:stop]
        if exact:
            high = part.to(torch.float16)
            low = (part - high.float()).to(torch.float16)
            part = torch.cat([high, low, high] if second else [high, high, low], dim=1)
        out[:, k : k + part.shape[1]] = part
        k = end
    return out, ends


def pointer(x: Tensor, c: Configuration, rows: int) -> "Tensor | TensorDescriptor":
    """An operand as a kernel takes it: the tensor, or a descriptor of its blocks [rows, block_k]."""
    if not c.descriptor:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, c.block_k])


class Operand:
    """Rows [n, K] with their ids, and the smallest and largest id of every tile of rows."""

    def __init__(self, x: Tensor, ids: Tensor, levels: list[tuple[int, int]], c: Configuration, second: bool) -> None:
        self.n = x.shape[0]
        self.x, self.ends = stacked(x, levels, c.block_k, second)
        self.ids = ids.contiguous()
        tiles_m = -(-self.n // c.block_m)
        # A column tile may reach one tile of rows further.
        place = torch.arange((tiles_m + c.block_n // c.block_m) * c.block_m, device=x.device).clamp_(max=self.n - 1)
        bounds = self.ids[place].view(-1, c.block_m)
        self.low, self.high = bounds.amin(dim=1), bounds.amax(dim=1)
