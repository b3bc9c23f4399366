"""Untrained copies of a network: the same layers with weights as drawn anew."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssd_addon.backbones import TimmFeatures
from ssd_addon.metrics.evaluation import generators_kept
from ssd_addon.runs.build import required

COPIES = 3
"""Copies that an audit compares with, as the scores of two can differ by more than their intervals."""
CALIBRATION = 256
"""Images, at most, from which an untrained copy takes the statistics of its batch norms."""


Fresh = Callable[[], nn.Module]
"""Builds a network with weights drawn anew, by torch's, numpy's or Python's global generators."""
State = Mapping[str, Tensor]


def untrained_copies(net: nn.Module, images: Tensor, seed: int, fresh: Fresh | None = None) -> list[nn.Module]:
    """Several copies as `untrained` makes them, each with weights of its own.

    Args:
        fresh: builds the network anew, as its author initializes it. It is left aside where it fails, where what it
            builds has other weights than `net` in name or shape, and where it draws most of them alike at every call,
            as a function does that loads trained ones.
    """
    seeds = [(seed * COPIES + k) % 2**63 for k in range(COPIES)]
    states: list[State] = []
    for each in seeds if fresh is not None else ():
        assert fresh is not None
        state = _drawn(net, fresh, each)
        if state is None or (states and _alike(states[-1], state)):
            states = []
            break
        states.append(state)
    return [untrained(net, images, s, states[k] if states else None) for k, s in enumerate(seeds)]


def untrained(net: nn.Module, images: Tensor, seed: int, state: State | None = None) -> nn.Module:
    """A copy in evaluation mode whose weights say nothing of any training.

    Without `state`, every part is set back by its own `reset_parameters`, unless that needs arguments. A parameter that
    is no part's (a class token, a position) and one that this leaves as it was are shuffled, which keeps their scale.
    Batch norms take their statistics from the images, as a network at the start of its training has those of its
    batches.

    Args:
        net: of any kind; what cannot be copied in it (a lock, an open file) is shared with the copy.
        images: [n, C, H, W] as the network takes them.
        seed: of the weights; torch's, numpy's and Python's global generators are left as they were.
        state: weights that the copy takes.

    Raises:
        ValueError: the network cannot be copied.
    """
    with _seeded(seed), torch.no_grad():
        twin = copy_of(net)
        if state is not None:
            twin.load_state_dict(state)
        else:
            _reset(twin)
        _calibrate(twin, images[:CALIBRATION])
    return twin.eval()


def copy_of(net: nn.Module) -> nn.Module:
    """A deep copy; what cannot be copied among a network's attributes is shared with it.

    Raises:
        ValueError: it cannot be copied even so.
    """
    memo: dict[int, Any] = {}
    try:
        return copy.deepcopy(net)
    except Exception:  # locks, files, tensors of a graph
        held = [
            v for m in net.modules() for k, v in vars(m).items() if k not in ("_modules", "_parameters", "_buffers")
        ]
        memo = {id(v): v for v in held if not _can_be_copied(v)}
    try:
        return copy.deepcopy(net, memo)
    except Exception as error:
        name = type(net).__name__
        raise ValueError(
            "backbone: expected a network that copy.deepcopy copies, as the audit measures untrained copies too: got "
            f"{name} ({type(error).__name__}: {error})"
        ) from error


def _can_be_copied(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # whatever it raises
        return False
    return True


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators of torch, numpy and Python with this seed; as they were afterwards."""
    with generators_kept():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield


def _drawn(net: nn.Module, fresh: Fresh, seed: int) -> State | None:
    """The weights of a network that was built anew, under the keys of `net`; None where they are not the same."""
    try:
        with _seeded(seed):
            there = fresh().state_dict()
    except Exception:  # the caller's own code may raise anything
        return None
    inside = "model." if isinstance(net, TimmFeatures) else ""
    own = {k: t.shape for k, t in net.state_dict().items()}
    state = {k: there[k.removeprefix(inside)] for k in own if k.removeprefix(inside) in there}
    return state if {k: t.shape for k, t in state.items()} == own else None


def _alike(a: State, b: State) -> bool:
    """Whether most of the weights are the same in both, apart from tensors of a single value."""
    drawn = [(x, b[k]) for k, x in a.items() if x.is_floating_point() and x.numel() and x.min() != x.max()]
    same = sum(x.numel() for x, y in drawn if torch.equal(x, y))
    return 2 * same >= sum(x.numel() for x, _ in drawn)


def _reset(net: nn.Module) -> None:
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for part in net.modules():
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset) and not required(reset):
            reset()
        elif {"running_mean", "running_var"} <= part._buffers.keys():  # a frozen batch norm
            for name, value in (("running_mean", 0.0), ("running_var", 1.0), ("weight", 1.0), ("bias", 0.0)):
                if isinstance(own := getattr(part, name, None), Tensor):
                    own.fill_(value)
    for name, p in net.named_parameters():
        if torch.equal(p, before[name]):
            p.copy_(p.flatten()[torch.randperm(p.numel(), device="cpu").to(p.device)].view_as(p))


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
