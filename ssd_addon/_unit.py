"""L2-normalized rows and the cosines of their pairs, with as few copies of the batch as the gradient allows.

    joint[v, i] = [u_1, ..., u_S] / sqrt(S),   u_s = z_s[v, i] / |z_s[v, i]|
    cosines[p, i] = <u_s[a, i], u_s[b, i]>     for the pairs p = (a, b, s)

Chained from torch's own functions, a step of two views keeps seven copies of the joint embedding; here it is two beside
the gradient itself: the joint embedding, and the entropy's gradient. The spaces are not kept.
Legend: V views, B images, S spaces.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_addon._autocast import Context, backward_without_autocast
from ssd_addon._shapes import Joint, Matrices, Matrix, PairRows, Vector

EPS = 1e-12  # of the length, as in torch.nn.functional.normalize
ROWS = 1024  # of a product that is made only to be summed

Pairs = tuple[tuple[int, int, int], ...]


def joint_and_cosines(
    z: Sequence[Tensor], pairs: Pairs, types: Sequence[torch.dtype] | None = None, fused: bool = False
) -> tuple[Joint, PairRows]:
    """Joint rows [V, B, sum of d_s] of unit length, and the cosines [P, B] of the pairs (view a, view b, space s).

    A row whose length overflows is NaN throughout, as is its gradient. Otherwise values are those of
    torch.nn.functional.normalize, and so are gradients, with one exception: a row without a direction gets the gradient
    0 where the embeddings came in 16 bits. That is a row whose length is at most the smallest normal number of the
    type, a row of zeros for one; its gradient g / 1e-12 would be infinite in float16.

    Args:
        z: spaces [V, B, d_s], all of one type.
        types: the type in which each space came, before it was promoted for the loss; None: its type in z.
        fused: by a Triton kernel, where triton runs. For float32, with the pairs of each space in a row.
    """
    smallest = tuple(map(without_direction, (t.dtype for t in z) if types is None else types))
    if torch.compiler.is_compiling():  # the compiler makes its own plan for memory
        return _plain(z, pairs, smallest)
    if fused:
        from ssd_addon.kernels.unit import FusedUnit

        joint, cosines, _ = FusedUnit.apply(pairs, smallest, *z)
        return joint, cosines
    joint, cosines, _ = _JointAndCosines.apply(pairs, smallest, *z)
    return joint, cosines


def without_direction(dtype: torch.dtype) -> float:
    """Up to this length a row has no direction; below 0 where every row has one."""
    return torch.finfo(dtype).smallest_normal if dtype.itemsize == 2 else -1.0


def unit_rows(z: Matrices, came_as: torch.dtype | None = None) -> Matrices:
    """z [..., d] with rows of unit length; a row without a direction, and one that overflows, as above.

    Args:
        came_as: the type in which z came, before it was promoted for the loss; None: its own.
    """
    return _unit(z, without_direction(came_as or z.dtype))


def _unit(z: Tensor, smallest: float) -> Tensor:
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    u = z / torch.where(length.isinf(), math.nan, length.clamp(min=EPS))
    return u if smallest < 0 else torch.where(length <= smallest, u.detach(), u)


def _plain(z: Sequence[Tensor], pairs: Pairs, smallest: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """The definition, in torch's own functions. smallest: by space as `without_direction`; None: as for float32."""
    unit = [_unit(t, least) for t, least in zip(z, smallest or [-1.0] * len(z), strict=True)]
    cosines = torch.stack([(unit[s][a] * unit[s][b]).sum(dim=-1) for a, b, s in pairs])
    return torch.cat(unit, dim=-1) / math.sqrt(len(z)), cosines


def columns_of(widths: Sequence[int]) -> list[slice]:
    """Of each space in the joint embedding."""
    ends = list(itertools.accumulate(widths))
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def _divisors(lengths: Tensor) -> Tensor:
    """What rows are divided by, [S, V, B, 1], from their lengths [S, V, B]."""
    return lengths.clamp(min=EPS).mul_(math.sqrt(len(lengths)))[..., None]


def _row_products(a: Matrix, b: Matrix) -> Vector:
    """<a_i, b_i> [B] of a, b [B, d]; on a CPU a few rows at a time, which stay in the cache."""
    if len(a) <= ROWS or a.device.type != "cpu":
        return (a * b).sum(dim=-1)
    return torch.cat([(a[r : r + ROWS] * b[r : r + ROWS]).sum(dim=-1) for r in range(0, len(a), ROWS)])


def differentiable(
    ctx: "JointContext", joint: Tensor, lengths: Tensor, grad: Tensor | None, grad_cosines: Tensor | None,
    grad_lengths: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradient of (joint, cosines, lengths) by space, as a differentiable function of all that it is made of.

    joint and lengths are results of z, and the second derivative goes through them: z itself need not be kept.
    """
    found: list[Tensor | None] = []
    s = len(lengths)
    for k, (c, need) in enumerate(zip(ctx.columns, ctx.needs_input_grad[2:], strict=True)):
        if not need:
            found.append(None)
            continue
        u, length = joint[..., c], lengths[k, ..., None]
        views = list((torch.zeros_like(u) if grad is None else grad[..., c]).unbind(0))
        for q, (a, b, space) in enumerate(ctx.pairs):
            if space == k and grad_cosines is not None:
                g = s * grad_cosines[q, :, None]
                views[a], views[b] = views[a] + g * u[b], views[b] + g * u[a]
        g, divisor = torch.stack(views), length.clamp(min=EPS) * math.sqrt(s)
        along = s * (g * u).sum(dim=-1, keepdim=True)
        dz = (g - torch.where(length > EPS, along, 0) * u) / divisor
        if grad_lengths is not None:
            dz = dz + _along_length(grad_lengths[k], u, length, divisor)
        found.append(torch.where(length <= ctx.smallest[k], 0, dz) if ctx.smallest[k] >= 0 else dz)
    return tuple(found)


def _along_length(grad: Tensor, u: Tensor, length: Tensor, divisor: Tensor) -> Tensor:
    """grad * z / |z|, 0 for a row of zeros."""
    return grad[..., None] * u * (divisor / length.clamp(min=torch.finfo(u.dtype).tiny))


class JointContext(Context):
    """What both forms keep beside the joint embedding and the lengths of its rows."""

    pairs: Pairs
    smallest: tuple[float, ...]
    columns: list[slice]  # of each space in the joint embedding


class _JointAndCosines(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: JointContext, pairs: Pairs, smallest: tuple[float, ...], *z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        s = len(z)
        joint = z[0].new_empty((*z[0].shape[:2], sum(t.shape[-1] for t in z)))
        lengths = joint.new_empty((s, *joint.shape[:2]))
        columns = columns_of([t.shape[-1] for t in z])
        for t, length in zip(z, lengths, strict=True):
            torch.linalg.vector_norm(t, dim=-1, out=length)
        lengths.masked_fill_(lengths.isinf(), math.nan)  # x / inf would be 0, a wrong number
        for t, divisor, c in zip(z, _divisors(lengths), columns, strict=True):
            torch.div(t, divisor, out=joint[..., c])
        rows = [_row_products(joint[a, :, columns[k]], joint[b, :, columns[k]]) for a, b, k in pairs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(joint, lengths)
        ctx.pairs, ctx.smallest, ctx.columns = pairs, smallest, columns
        return joint, torch.stack(rows).mul_(s), lengths

    @staticmethod
    @backward_without_autocast
    def backward(
        ctx: JointContext, grad: Tensor | None, grad_cosines: Tensor | None, grad_lengths: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        joint, lengths = ctx.saved_tensors
        s, needed = len(lengths), ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or grad_lengths is not None:  # create_graph=True, or the pass that follows it
            return None, None, *differentiable(ctx, joint, lengths, grad, grad_cosines, grad_lengths)
        found: list[Tensor | None] = []
        divisors = _divisors(lengths)
        # A row shorter than EPS was divided by EPS, and its length has no gradient.
        factors = torch.where(lengths > EPS, -float(s), 0.0)
        for k, c in enumerate(ctx.columns):
            if not needed[k]:
                found.append(None)
                continue
            own = joint[..., c]
            dz = torch.zeros_like(own) if grad is None else grad[..., c].clone(memory_format=torch.contiguous_format)
            for g, (a, b, space) in zip(() if grad_cosines is None else grad_cosines, ctx.pairs, strict=False):
                if space == k:
                    dz[a].addcmul_(joint[b, :, c], g[:, None], value=s)
                    dz[b].addcmul_(joint[a, :, c], g[:, None], value=s)
            along = torch.stack([_row_products(joint[v, :, c], d) for v, d in enumerate(dz)]).mul_(factors[k])
            dz.addcmul_(joint[..., c], along[..., None]).div_(divisors[k])
            if ctx.smallest[k] >= 0:
                dz.masked_fill_(lengths[k, ..., None] <= ctx.smallest[k], 0)
            found.append(dz)
        return None, None, *found
