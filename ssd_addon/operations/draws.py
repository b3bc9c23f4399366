"""Randomness: a seeded generator for every (view, stage, operation), and a watch over everybody else's generators.

Sharing a group's parameters is then a copy, and nothing else changes. Drawing never reads or moves a global generator
for good, and an operation that draws while it is applied is found out.
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
"""The one parameter of an operation that is shared by seed."""
Seed = tuple[int, ...]


class Refused(ValueError):
    """An operation that views cannot share exactly."""


def generator(*seed: int) -> torch.Generator:
    """A CPU generator of its own for some numbers."""
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def in_place_of_the_global(g: torch.Generator) -> Iterator[None]:
    """Kornia draws from the global CPU generator: put `g` in its place, and the user's state back."""
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
    """Draws and pixels do not depend on the type that torch makes tensors of."""
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
    """The states of torch's, numpy's and Python's global generators; `moved` names those that were drawn from since."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.torch = torch.default_generator.get_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.numpy: Any = np.random.get_state()
        self.python = random.getstate()

    def moved(self) -> str:
        """ "torch's", "numpy's", "Python's" generator, whichever has moved; "" where none has."""
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
    """The query's values in the rows of the mask, the view's own in the others."""
    out = {}
    for k, t in parameters.items():
        out[k] = torch.where(shared.view(-1, *[1] * (t.ndim - 1)), query[k], t)
    return out


def pick(parameters: Mapping[str, Tensor], rows: Tensor) -> Parameters:
    """The parameters of some rows."""
    return {k: t[rows.to(t.device)] for k, t in parameters.items()}
