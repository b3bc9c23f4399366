"""The operands of the Triton kernels: scaled rows in fp16, renumbered image ids, and scaling factors.

    x_i      = z_i / a,   a a power of 2 so that the longest row has a length of 128 to 256
    s_ij     = scale * <x_i, x_j> * log 2,   scale = a^2 / (tau log 2)

Scaling by a power of 2 keeps fp16 rows exact, and small columns keep their precision. "Exact" rows are stored in
float32 and as two fp16 parts, stacked along K: three products are computed, and the fourth is below float32's
resolution. Columns are padded to whole blocks, level by level, so that rows are aligned even if D or a prefix is odd.
Legend: n rows, D columns, K columns of an operand (padded). Needs torch alone.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ssd_addon.kernels.table import Configuration

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

LONGEST = 256.0
"""Largest length of scaled rows: a column of 1 / 256 of the average is still a normal fp16 number at D = 65536."""


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def cdiv(n: int, size: int) -> int:
    """ceil(n / size); triton's own function takes 3 us."""
    return -(-n // size)


def longest_row(z: Tensor) -> Tensor:
    """Length of the longest row of z [n, D], 0-dim in max(float32, dtype of z); 0 if there are no rows."""
    dtype = torch.promote_types(torch.float32, z.dtype)
    if not z.numel():
        return z.new_zeros((), dtype=dtype)
    lengths: Tensor = torch.linalg.vector_norm(z.detach(), dim=1, dtype=dtype)
    return lengths.amax()


def relabeled(ids: Tensor) -> Tensor:
    """Renumber ids of any integer dtype from 0 on, in int32, without reading from the device."""
    order = ids.argsort()
    found = ids[order]
    number = torch.zeros_like(found, dtype=torch.int32)
    number[1:] = (found[1:] != found[:-1]).cumsum(0, dtype=torch.int32)
    return torch.zeros_like(number).scatter_(0, order, number)


@dataclass(frozen=True)
class Columns:
    """The positions of the columns of z [n, D] in an operand, in which each level is padded to whole blocks.

    Attributes:
        d: D.
        prefix: number of columns of the first level; 0 if there is one level.
        block: a level's width is padded to a multiple of this.
        exact: whether the operand holds two fp16 parts, with three times the columns.
    """

    d: int
    prefix: int
    block: int
    exact: bool = False

    @functools.cached_property
    def first(self) -> int:
        """Number of columns of the first level."""
        return self.prefix or self.d

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """The end of each level in the padded rows."""
        first = round_up(self.first, self.block)
        return (first, first + round_up(self.d - self.prefix, self.block)) if self.prefix else (first,)

    @property
    def levels(self) -> list[tuple[int, int]]:
        """First and last column of each level in the padded rows."""
        return list(zip((0, *self.ends), self.ends, strict=False))

    @functools.cached_property
    def operand_ends(self) -> tuple[int, ...]:
        """The end of each level in the operand of the tiles."""
        return Columns(3 * self.d, 3 * self.prefix, self.block).ends if self.exact else self.ends


class Layout(NamedTuple):
    """The layout of the operands, shared by forward and backward pass.

    Attributes:
        columns: positions of the columns.
        sums, weights: tiles of the log-sums and of their gradient; for products both are the same.
    """

    columns: Columns
    sums: Configuration
    weights: Configuration

    @property
    def block_m(self) -> int:
        """Number of rows per tile for which bounds of ids are stored."""
        return self.sums.block_m

    def tiles(self, n: int) -> int:
        """Number of bounds for n rows, with one more as a column tile may extend one row tile further; a multiple of 16
        bytes, so that the second row of bounds is aligned."""
        return round_up(cdiv(n, self.block_m) + self.sums.block_n // self.block_m, 4)


@dataclass(frozen=True)
class Scaled:
    """Rows in the form that the tiles read, computed once for forward and backward. Unused tensors are empty.

    Attributes:
        x: [n, K] fp16, one side of the similarities.
        other: [n, K] the other side, for exact rows; otherwise x is used.
        rows: [n, padded D] float32, the exact rows; otherwise the gradient sums x.
        ids: [n] int32.
        bounds: [2, tiles] the smallest and the largest id of every row tile.
        numbers: [16] float32: scale, shift, a / tau, a, at 0, 4, 8 and 12.
    """

    x: Tensor
    other: Tensor
    rows: Tensor
    ids: Tensor
    bounds: Tensor
    numbers: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors in the order in which an operator returns them."""
        return self.x, self.other, self.rows, self.ids, self.bounds, self.numbers

    @property
    def n(self) -> int:
        return self.x.shape[0]

    @property
    def second(self) -> Tensor:
        """The operand for the columns of the similarities."""
        return self.other if self.other.numel() else self.x

    @property
    def summed(self) -> Tensor:
        """The rows that the gradient sums."""
        return self.rows if self.rows.numel() else self.x

    @property
    def scale(self) -> Tensor:
        return self.numbers[0]

    @property
    def shift(self) -> Tensor:
        return self.numbers[4]

    @property
    def factor(self) -> Tensor:
        """a / tau, the factor between a sum of rows and the gradient."""
        return self.numbers[8]

    @property
    def a(self) -> Tensor:
        return self.numbers[12]


def pointer(x: Tensor, c: Configuration, rows: int) -> "Tensor | TensorDescriptor":
    """An operand as the argument of a kernel: the tensor, or a descriptor of its blocks [rows, block_k]."""
    if not c.descriptor:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, c.block_k])
