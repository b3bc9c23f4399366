"""Unit rows and cosines of `ssd_addon._unit` by the kernels of `unit_tiles`: a launch for each space and direction.

Legend: V views, B images, S spaces.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ssd_addon._autocast import backward_without_autocast
from ssd_addon._unit import Pairs, second_derivative
from ssd_addon.kernels import unit_tiles
from ssd_addon.kernels.launch_around import empty, on_device_of

IMAGES, COLUMNS = 4, 128  # of a program at a time


class FusedUnit(torch.autograd.Function):
    """`_unit.joint_and_cosines` in float32. pairs: those of a space one after the other; views below 256."""

    @staticmethod
    def forward(ctx: Any, pairs: Pairs, smallest: tuple[float, ...], *z: Tensor) -> tuple[Tensor, Tensor]:
        (v, b), spaces = z[0].shape[:2], len(z)
        joint = empty(z[0], (v, b, sum(t.shape[-1] for t in z)))
        lengths, cosines = empty(joint, (spaces, v, b)), empty(joint, (len(pairs), b))
        ctx.save_for_backward(joint, lengths, *z)
        ctx.pairs, ctx.smallest = pairs, smallest
        if b:
            with on_device_of(joint):
                for t, length, (columns, first, views) in zip(z, lengths, _places(pairs, z), strict=True):
                    own = joint[..., columns]
                    unit_tiles.unit_kernel[(triton.cdiv(b, IMAGES),)](
                        t, own, length, cosines[first:], b, t.shape[-1], *t.stride(), *own.stride()[:2],
                        math.sqrt(spaces), VIEWS=v, **_static(views),
                    )  # fmt: skip
        return joint, cosines

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, grad: Tensor, grad_cosines: Tensor) -> tuple[Tensor | None, ...]:
        joint, lengths, *z = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, *second_derivative(ctx, z, grad, grad_cosines)
        (v, b), spaces = joint.shape[:2], len(z)
        found: list[Tensor | None] = []
        for k, (columns, first, views) in enumerate(_places(ctx.pairs, z)):
            if not ctx.needs_input_grad[2 + k]:
                found.append(None)
                continue
            dz, own, g = empty(joint, (v, b, z[k].shape[-1])), joint[..., columns], grad[..., columns]
            if b:
                with on_device_of(joint):
                    unit_tiles.unit_grad_kernel[(triton.cdiv(b, IMAGES),)](
                        g, grad_cosines[first:], own, lengths[k], dz, b, dz.shape[-1], *g.stride(),
                        *grad_cosines.stride(), *own.stride()[:2], float(spaces), math.sqrt(spaces), ctx.smallest[k],
                        VIEWS=v, **_static(views),
                    )  # fmt: skip
            found.append(dz)
        return None, None, *found


def _places(pairs: Pairs, z: Any) -> list[tuple[slice, int, list[tuple[int, int]]]]:
    """By space its columns in the joint embedding, its first pair, and the views of its pairs."""
    out, start = [], 0
    for k, t in enumerate(z):
        own = [q for q, (_, _, space) in enumerate(pairs) if space == k]
        columns = slice(start, start + t.shape[-1])
        out.append((columns, own[0] if own else 0, [pairs[q][:2] for q in own]))
        start = columns.stop
    return out


def _static(views: list[tuple[int, int]]) -> dict[str, int]:
    code = sum((a + 256 * b) << (16 * q) for q, (a, b) in enumerate(views))
    return {"PAIRS": code, "COUNT": len(views), "b_B": IMAGES, "b_K": COLUMNS}
