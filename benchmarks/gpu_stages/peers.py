"""What our loss is timed beside: formulas in torch, and losses of other packages where they can be imported."""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TAU = 0.1
PACKAGES = {"siglip_kernel": "siglip-kernel", "memeff": "memeff", "inf_cl": "inf-cl"}
TWO_TOWERS = (65536, 768)
"""The shape at which losses of images and texts are timed, of which N images and N texts make N x N similarities."""


def importable() -> dict[str, bool]:
    return {name: importlib.util.find_spec(module) is not None for module, name in PACKAGES.items()}


def eager(z: Tensor, ids: Tensor) -> Tensor:
    """The readable formula in 16 bit: product in the type of z, the rest in float32."""
    s = (z @ z.T).float() / TAU
    return s.masked_fill(ids[:, None] == ids[None, :], -math.inf).logsumexp(dim=1).mean()


def ntxent(z: Tensor, ids: Tensor) -> Tensor:
    """NT-Xent as lightly computes it: two views, all similarities without the diagonal, cross entropy."""
    n = len(z)
    z = torch.cat([z[0::2], z[1::2]])
    s = (z @ z.T).float() / TAU
    s = s[~torch.eye(n, dtype=torch.bool, device=z.device)].view(n, n - 1)
    labels = torch.arange(n // 2, device=z.device)
    return F.cross_entropy(s, torch.cat([labels + n // 2 - 1, labels]))


def of_shape(z: Tensor) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Losses of other packages for rows z [N, D]: a function, and its inputs."""
    found: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {}
    have = importable()
    if have["inf-cl"]:  # one direction of N/2 x N/2 similarities, a quarter of the entries
        found["Inf-CL"] = (inf_cl, (z[0::2].contiguous(), z[1::2].contiguous()))
    if tuple(z.shape) == TWO_TOWERS or not z.is_cuda:
        towers = (z, z.roll(1, 0).contiguous())
        if have["siglip-kernel"]:
            found["siglip-kernel"] = (siglip, tuple(t.bfloat16() for t in towers))
        if have["memeff"]:
            found["memeff"] = (memeff, towers)
    return found


def inf_cl(a: Tensor, b: Tensor) -> Tensor:
    from inf_cl import cal_inf_loss

    return cal_inf_loss(a, b, scale=torch.tensor(1 / TAU, device=a.device))


def siglip(images: Tensor, texts: Tensor) -> Tensor:
    """The sigmoid loss: N x N similarities, gradients of both towers."""
    from siglip_kernel import fused_siglip_loss

    def number(x: float) -> Any:
        return torch.tensor(x, device=images.device, requires_grad=True)

    loss: Tensor = fused_siglip_loss(images, texts, number(math.log(1 / TAU)), number(-10.0))
    return loss


def memeff(images: Tensor, texts: Tensor) -> Tensor:
    """CLIP's loss: N x N similarities, log-sums of both directions, gradients of both towers."""
    from memeff import MemoryEfficientCLIPLoss

    loss: Tensor = MemoryEfficientCLIPLoss(temperature=TAU, normalized_inputs=True, stable=False)(images, texts)
    return loss
