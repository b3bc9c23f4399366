"""L2-normalization and cosines of `ssd_addon._unit` with the kernels of `unit_tiles`: one launch per space and pass.

Legend: V views, B images, S spaces.
"""

import math

import torch
import triton
from torch import Tensor

from ssd_addon._autocast import backward_without_autocast
from ssd_addon._unit import JointContext, Pairs, columns_of, differentiable
from ssd_addon.kernels import unit_tiles
from ssd_addon.kernels.launch_around import empty, on_device_of

IMAGES, COLUMNS = 4, 128  # processed by a program at a time


class FusedUnit(torch.autograd.Function):
    """`_unit.joint_and_cosines` in float32; the pairs of a space are adjacent, and there are fewer than 256 views."""

    @staticmethod
    def forward(
        ctx: JointContext, pairs: Pairs, smallest: tuple[float, ...], *z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        (v, b), spaces = z[0].shape[:2], len(z)
        joint = empty(z[0], (v, b, sum(t.shape[-1] for t in z)))
        lengths, cosines = empty(joint, (spaces, v, b)), empty(joint, (len(pairs), b))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(joint, lengths)
        ctx.pairs, ctx.smallest, ctx.columns = pairs, smallest, columns_of([t.shape[-1] for t in z])
        if b:
            with on_device_of(joint):
                for t, length, c, (first, views) in zip(z, lengths, ctx.columns, _places(pairs, spaces), strict=True):
                    own = joint[..., c]
                    unit_tiles.unit_kernel[(triton.cdiv(b, IMAGES),)](
                        t, own, length, cosines[first:], b, t.shape[-1], *t.stride(), *own.stride()[:2],
                        math.sqrt(spaces), VIEWS=v, **_static(views),
                    )  # fmt: skip
        return joint, cosines, lengths

    @staticmethod
    @backward_without_autocast
    def backward(
        ctx: JointContext, grad: Tensor | None, grad_cosines: Tensor | None, grad_lengths: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        joint, lengths = ctx.saved_tensors
        if torch.is_grad_enabled() or grad is None or grad_cosines is None or grad_lengths is not None:
            return None, None, *differentiable(ctx, joint, lengths, grad, grad_cosines, grad_lengths)
        (v, b), spaces = joint.shape[:2], len(lengths)
        found: list[Tensor | None] = []
        for k, (c, (first, views)) in enumerate(zip(ctx.columns, _places(ctx.pairs, spaces), strict=True)):
            if not ctx.needs_input_grad[2 + k]:
                found.append(None)
                continue
            own, g = joint[..., c], grad[..., c]
            dz = empty(joint, (v, b, own.shape[-1]))
            if b:
                with on_device_of(joint):
                    unit_tiles.unit_grad_kernel[(triton.cdiv(b, IMAGES),)](
                        g, grad_cosines[first:], own, lengths[k], dz, b, dz.shape[-1], *g.stride(),
                        *grad_cosines.stride(), *own.stride()[:2], float(spaces), math.sqrt(spaces), ctx.smallest[k],
                        VIEWS=v, **_static(views),
                    )  # fmt: skip
            found.append(dz)
        return None, None, *found


def _places(pairs: Pairs, spaces: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """For each space the index of its first pair, and the views of its pairs."""
    out = []
    for k in range(spaces):
        own = [q for q, (_, _, space) in enumerate(pairs) if space == k]
        out.append((own[0] if own else 0, [pairs[q][:2] for q in own]))
    return out


def _static(views: list[tuple[int, int]]) -> dict[str, int]:
    code = sum((a + 256 * b) << (16 * q) for q, (a, b) in enumerate(views))
    return {"PAIRS": code, "COUNT": len(views), "b_B": IMAGES, "b_K": COLUMNS}
