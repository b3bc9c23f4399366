"""An untrained copy of a network: the same layers with weights as drawn anew."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

COPIES = 3
"""Copies that an audit compares with, as the scores of two can differ by more than their intervals."""
CALIBRATION = 256
"""Images, at most, from which an untrained copy takes the statistics of its batch norms."""


def untrained_copies(net: nn.Module, images: Tensor, seed: int) -> list[nn.Module]:
    """Several copies as `untrained` makes them, each with weights of its own."""
    return [untrained(net, images, (seed * COPIES + k) % 2**63) for k in range(COPIES)]


def untrained(net: nn.Module, images: Tensor, seed: int) -> nn.Module:
    """A copy in evaluation mode whose weights say nothing of any training.

    Every part is set back by its own `reset_parameters`. A parameter that is no part's (a class token, a position) and
    one that this leaves as it was are shuffled, which keeps their scale. Batch norms take their statistics from the
    images, as a network at the start of its training has those of its batches.

    Args:
        net: of any kind that can be copied.
        images: [n, C, H, W] as the network takes them.
        seed: of the weights; torch's global generators are left as they were.
    """
    device = images.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        twin = copy.deepcopy(net)
        before = {n: p.detach().clone() for n, p in twin.named_parameters()}
        for part in twin.modules():
            reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            if callable(reset):
                reset()
            elif {"running_mean", "running_var"} <= part._buffers.keys():  # a frozen batch norm
                for name, value in (("running_mean", 0.0), ("running_var", 1.0), ("weight", 1.0), ("bias", 0.0)):
                    if isinstance(own := getattr(part, name, None), Tensor):
                        own.fill_(value)
        for name, p in twin.named_parameters():
            if torch.equal(p, before[name]):
                p.copy_(p.flatten()[torch.randperm(p.numel(), device="cpu").to(p.device)].view_as(p))
        _calibrate(twin, images[:CALIBRATION])
    return twin.eval()


def _calibrate(net: nn.Module, images: Tensor) -> None:
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms or len(images) < 2:
        return
    kept = [m.momentum for m in norms]
    net.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the mean over batches
        m.train()
    for part in torch.split(images, 64):
        if len(part) > 1:
            net(part)
    for m, momentum in zip(norms, kept, strict=True):
        m.momentum = momentum
