"""Randomness: a seeded generator for every (view, stage, operation), and a check that no global generator is used.

With one generator per operation, sharing a group's parameters is a copy that changes no other draw. Drawing leaves the
global generators as they were, and an operation that draws random numbers while it is applied is detected.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Parameters = dict[str, Tensor]
SEED = "seed"
"""The name of the only parameter of a seeded operation."""
Seed = tuple[int, ...]


class Refused(ValueError):
    """Raised for an operation whose parameters views cannot share exactly."""


def generator(*seed: int) -> torch.Generator:
    """A CPU generator seeded with these numbers."""
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def in_place_of_the_global(g: torch.Generator) -> Iterator[None]:
    """Use `g` as the global CPU generator, from which Kornia draws; restore the user's state afterwards."""
    default = torch.default_generator
    state = default.get_state()
    try:
        default.set_state(g.get_state())
        yield
        g.set_state(default.get_state())
    finally:
        default.set_state(state)


@contextmanager
def in_float32() -> Iterator[None]:
    """Set torch's default dtype to float32, so that draws and pixels do not depend on the user's default."""
    default = torch.get_default_dtype()
    if default == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class Watch:
    """The states of torch's, numpy's and Python's global generators; `moved` names one that was used since then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.torch = torch.default_generator.get_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.numpy: Any = np.random.get_state()
        self.python = random.getstate()

    def moved(self) -> str:
        """ "torch's", "torch's CUDA", "numpy's" or "Python's": a generator that was used; "" if none was."""
        if not torch.equal(self.torch, torch.default_generator.get_state()):
            return "torch's"
        if self.cuda is not None and not torch.equal(self.cuda, torch.cuda.get_rng_state(self.device)):
            return "torch's CUDA"
        now: Any = np.random.get_state()
        if now[2:] != self.numpy[2:] or not np.array_equal(now[1], self.numpy[1]):
            return "numpy's"
        return "" if random.getstate() == self.python else "Python's"

    def restore(self) -> None:
        torch.default_generator.set_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def clone(parameters: Mapping[str, Tensor]) -> Parameters:
    return {k: t.clone() for k, t in parameters.items()}


def rows_from(parameters: Parameters, query: Parameters, shared: Tensor) -> Parameters:
    """The query's values where the mask [B] is true, the view's own values elsewhere."""
    out = {}
    for k, t in parameters.items():
        out[k] = torch.where(shared.view(-1, *[1] * (t.ndim - 1)), query[k], t)
    return out


def pick(parameters: Mapping[str, Tensor], rows: Tensor) -> Parameters:
    """The parameters of the selected images."""
    return {k: t[rows.to(t.device)] for k, t in parameters.items()}
