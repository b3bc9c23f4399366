"""What the Triton kernels read: scaled rows in fp16, numbered image ids, and the numbers that go with them.

    x_i      = z_i / a,   a a power of 2 so that the longest row has a length of 128 to 256
    s_ij     = scale * <x_i, x_j> * log 2,   scale = a^2 / (tau log 2)

fp16 rows keep their bits and their small columns keep their digits. "Exact" rows stay float32 beside two fp16 parts of
them, stacked along K: three products, the fourth is below float32's resolution. Columns are padded to whole blocks,
level by level, so that the matrix library too finds aligned rows where D or a prefix is odd.
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
"""Bound of the scaled rows: a column of 1 / 256 of its average is still a normal fp16 number at D = 65536."""


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def cdiv(n: int, size: int) -> int:
    """Pieces of a size that hold n; triton's own takes 3 us."""
    return -(-n // size)


def longest_row(z: Tensor) -> Tensor:
    """Length of the longest row of z [n, D], 0-dim in max(float32, type of z); 0 where there is none."""
    dtype = torch.promote_types(torch.float32, z.dtype)
    if not z.numel():
        return z.new_zeros((), dtype=dtype)
    lengths: Tensor = torch.linalg.vector_norm(z.detach(), dim=1, dtype=dtype)
    return lengths.amax()


def relabeled(ids: Tensor) -> Tensor:
    """Ids of any integer type numbered from 0 in int32, without reading anything back from the device."""
    order = ids.argsort()
    found = ids[order]
    number = torch.zeros_like(found, dtype=torch.int32)
    number[1:] = (found[1:] != found[:-1]).cumsum(0, dtype=torch.int32)
    return torch.zeros_like(number).scatter_(0, order, number)


@dataclass(frozen=True)
class Columns:
    """Where the columns of z [n, D] lie in what is made of it: each level is padded to whole blocks.

    Attributes:
        d: D.
        prefix: columns of the first level; 0: there is one level.
        block: what a level's width is padded to.
        exact: whether the operand holds two fp16 parts, three times the columns.
    """

    d: int
    prefix: int
    block: int
    exact: bool = False

    @functools.cached_property
    def first(self) -> int:
        """Columns of the first level."""
        return self.prefix or self.d

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """Where each level ends in the padded rows."""
        first = round_up(self.first, self.block)
        return (first, first + round_up(self.d - self.prefix, self.block)) if self.prefix else (first,)

    @property
    def levels(self) -> list[tuple[int, int]]:
        """First and last column of each level in the padded rows."""
        return list(zip((0, *self.ends), self.ends, strict=False))

    @functools.cached_property
    def operand_ends(self) -> tuple[int, ...]:
        """Where each level ends in the operand of the tiles."""
        return Columns(3 * self.d, 3 * self.prefix, self.block).ends if self.exact else self.ends


class Layout(NamedTuple):
    """How forward and backward lay out their operands: one layout for both.

    Attributes:
        columns: where the columns lie.
        sums, weights: the tiles of the log-sums and of their gradient; products have one kind.
    """

    columns: Columns
    sums: Configuration
    weights: Configuration

    @property
    def block_m(self) -> int:
        """Rows of a tile that has bounds of its own."""
        return self.sums.block_m

    def tiles(self, n: int) -> int:
        """Bounds of n rows: a column tile may reach one tile of rows further. Whole 16 bytes, so that the second row
        of them is aligned."""
        return round_up(cdiv(n, self.block_m) + self.sums.block_n // self.block_m, 4)


@dataclass(frozen=True)
class Scaled:
    """Rows as the tiles read them, made once for forward and backward. What is not there has no entries.

    Attributes:
        x: [n, K] fp16, one side of the similarities.
        other: [n, K] the other side of exact rows; without them it is x.
        rows: [n, padded D] float32, the exact rows themselves; without them x is what the gradient adds up.
        ids: [n] int32.
        bounds: [2, tiles] the smallest and the largest id of every tile of rows.
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
        """As an operator returns them."""
        return self.x, self.other, self.rows, self.ids, self.bounds, self.numbers

    @property
    def n(self) -> int:
        return self.x.shape[0]

    @property
    def second(self) -> Tensor:
        """The side of the columns."""
        return self.other if self.other.numel() else self.x

    @property
    def summed(self) -> Tensor:
        """What the gradient adds up."""
        return self.rows if self.rows.numel() else self.x

    @property
    def scale(self) -> Tensor:
        return self.numbers[0]

    @property
    def shift(self) -> Tensor:
        return self.numbers[4]

    @property
    def factor(self) -> Tensor:
        """a / tau, what a sum of rows is multiplied by to be a gradient."""
        return self.numbers[8]

    @property
    def a(self) -> Tensor:
        return self.numbers[12]


def pointer(x: Tensor, c: Configuration, rows: int) -> "Tensor | TensorDescriptor":
    """An operand as a kernel takes it: the tensor, or a descriptor of its blocks [rows, block_k]."""
    if not c.descriptor:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, c.block_k])
