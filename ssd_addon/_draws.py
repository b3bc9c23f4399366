"""Drawing: the parameters of one Kornia operation, one value per image, from seeds of their own.

Kornia draws from torch's global CPU generator and, for some operations, once for a whole batch. Here every (view,
stage, operation) has a seed of its own and every value is per image: sharing is a copy and nothing else changes.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import kornia.augmentation as K
import torch
from torch import Tensor

from ssd_addon import _checks

Parameters = dict[str, Tensor]
GATE = "batch_prob"
"""Kornia's name for which images an operation fires on."""


class Draws:
    """Seeded draws of one call: each (view, stage, operation) has a generator state of its own."""

    def __init__(self, seeds: tuple[int, ...]) -> None:
        self.seeds = seeds

    @contextmanager
    def _seeded(self, *place: int) -> Iterator[None]:
        """Kornia draws from the global CPU generator: put ours in, and the user's back."""
        digest = hashlib.blake2b(repr((*self.seeds, *place)).encode(), digest_size=8).digest()
        generator = torch.default_generator
        state = generator.get_state()
        try:
            generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            yield
        finally:
            generator.set_state(state)

    def __call__(self, op: Any, shape: tuple[int, ...], place: tuple[int, ...]) -> Parameters:
        """Parameters of an operation for a batch [B, ...], every value per image."""
        b = shape[0]
        with self._seeded(*place, 2):  # apart: only the first call looks, and all calls must draw alike
            wide = batch_wide(op, shape)
        with self._seeded(*place, 0):
            if not wide:
                out = rows_of(op.forward_parameters(torch.Size(shape)))
            elif has_order(op):
                out = rows_of(op.forward_parameters(torch.Size(shape)))
                fixed = getattr(op, "_fixed_order", None)
                if fixed is None:
                    out["order"] = torch.rand(b, 4).argsort(dim=1)
                else:
                    out["order"] = torch.tensor(fixed).expand(b, -1).clone()
            else:
                each = [rows_of(op.forward_parameters(torch.Size((1, *shape[1:])))) for _ in range(b)]
                out = {k: torch.cat([e[k] for e in each]) for k in each[0]}
            if 0 < op.p_batch < 1:  # a gate for the whole batch: one per image instead
                out[GATE] = (torch.rand(b) < op.p * op.p_batch).to(out[GATE].dtype)
        return out

    def near(self, box: Tensor, a: float, op: Any, shape: tuple[int, ...], place: tuple[int, ...]) -> Tensor:
        """Corners [B, 4, 2] of a crop near the query's corners: area, aspect and centre as in docs/method.md."""
        b, h, w = shape[0], shape[-2], shape[-1]
        low, high = box[:, 0].double(), box[:, 2].double() + 1  # (x, y), exclusive
        ratio = torch.as_tensor(op._param_generator.ratio, dtype=torch.float64).log()
        with self._seeded(*place, 1):
            u = torch.rand(b, 4, dtype=torch.float64)
        extent = high - low
        area = extent.prod(dim=1) * (1 - a + 2 * a * u[:, 0])
        aspect = (ratio[0] + (ratio[1] - ratio[0]) * u[:, 1]).exp()
        size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1)
        limit = torch.tensor([w, h], dtype=torch.float64)
        # Where one edge meets the image, the other one keeps the area.
        size = torch.minimum(torch.minimum(size, limit), limit)
        size = torch.minimum(torch.maximum(size, area[:, None] / size.flip(1).clamp(min=1)), limit).round()
        size = torch.minimum(size.clamp(min=1), limit)
        start = low + extent * u[:, 2:] - size / 2
        start = torch.minimum(start.round().clamp(min=0), limit - size)
        stop = start + size - 1
        x0, y0, x1, y1 = start[:, 0], start[:, 1], stop[:, 0], stop[:, 1]
        corners = [torch.stack(c, dim=1) for c in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))]
        return torch.stack(corners, dim=1)


def rows_of(parameters: Mapping[str, Any]) -> Parameters:
    """The per-image parameters, as tensors of our own."""
    return {k: torch.as_tensor(t).clone() for k, t in parameters.items() if k not in ("forward_input_shape", "order")}


def batch_wide(op: Any, shape: tuple[int, ...]) -> bool:
    """Does the operation draw anything for the whole batch? Found by drawing for batches of two sizes, once."""
    known = op.__dict__.get("_ssd_batch_wide")
    if known is None:
        small, large = (dict(op.forward_parameters(torch.Size((n, *shape[1:])))) for n in (5, 7))
        for d in (small, large):
            d.pop("forward_input_shape", None)
        known = any(
            not isinstance(t, Tensor) or t.ndim == 0 or t.shape[0] != 5 or large[k].shape[0] != 7
            for k, t in small.items()
        )
        op.__dict__["_ssd_batch_wide"] = known
    return known


def take(parameters: Parameters, query: Parameters, shared: bool | Tensor, name: str) -> Parameters:
    """The query's parameters in the shared rows."""
    if shared is True:
        return clone(query)
    assert isinstance(shared, Tensor)
    out = {}
    for k, t in parameters.items():
        if t.shape != query[k].shape:
            raise ValueError(
                f"{name}: its parameter {k!r} has another size in every draw ({_checks.shape(t)}, "
                f"{_checks.shape(query[k])}), which an interleaved plan cannot share; use plan='shared_query'"
            )
        out[k] = torch.where(shared.view(-1, *[1] * (t.ndim - 1)), query[k], t)
    return out


def merged(
    stage: str, key: dict[str, Parameters], query: dict[str, Parameters], shared: Tensor
) -> dict[str, Parameters]:
    """Query and key ran other operations: rows of `shared` hold the query's values, the others the key's."""
    out = {}
    for name in dict.fromkeys((*query, *key)):
        if name in query and name in key:
            if query[name].keys() != key[name].keys():
                raise ValueError(f"{stage}: {name} of query and key draw different parameters; give them other places")
            out[name] = take(key[name], query[name], shared, f"{stage}: {name}")
        else:
            out[name] = clone(query.get(name) or key[name])
    return out


def clone(parameters: Parameters) -> Parameters:
    return {k: t.clone() for k, t in parameters.items()}


def has_order(op: Any) -> bool:
    return isinstance(op, K.ColorJitter | K.ColorJiggle)
