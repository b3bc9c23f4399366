"""Dual ascent on the weights of the invariance terms: lambda_s <- relu(lambda_s + step_size * (c_s - tolerance))."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon._types import KeepsType
from ssd_addon.losses.terms import Terms
from ssd_addon.losses.weights import Weights


class DualAscent(KeepsType, Weights):
    """Adaptive weights of the invariance terms: lambda_s <- relu(lambda_s + step_size * (c_s - tolerance)).

    Treats every invariance as a constraint c_s <= tolerance, with c_s = `terms.constraint[s]`. Give it to the loss as
    its weights, and call `step` once after each step of the optimizer:

    >>> from ssd_addon import JointEntropyLoss
    >>> spaces = ("content", "color")
    >>> criterion = JointEntropyLoss("simclr", weights=DualAscent(spaces, tolerance=0.1, step_size=0.5))
    >>> terms = criterion.terms({"content": torch.randn(3, 8, 4), "color": torch.randn(3, 8, 2)})
    >>> sorted(criterion.weights.step(terms))
    ['color', 'content']

    lambda is a float64 buffer of fixed size [S] in the criterion's state_dict, together with the number of steps. It is
    saved, averaged and moved with the criterion, and keeps its dtype under `.half()` and `.bfloat16()`.

    Args:
        spaces: names of the spaces, or a mapping with these keys (`StyleHeads.spaces`); content first.
        tolerance: the allowed c_s; a number, or a mapping by space.
        step_size: eta, the step size of the ascent.
        start: lambda before the first step; a number, or a mapping by space. None uses the default weight of the
            criterion's family.
        warmup_steps: number of first calls of `step` that leave lambda unchanged.

    Raises:
        ValueError: a number is out of range, or names differ from those of the spaces.

    Source: Eastwood et al., arXiv 2311.08815, dual ascent on the invariance constraints.
    """

    values: Tensor
    steps: Tensor

    def __init__(
        self,
        spaces: Sequence[str] | Mapping[str, int],
        *,
        tolerance: float | Mapping[str, float],
        step_size: float,
        start: float | Mapping[str, float] | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(spaces, nn.Module):
            raise TypeError(
                f"DualAscent: expected the names of the spaces, such as model.spaces: got {type(spaces).__name__}; "
                "pass the ascent to the loss, JointEntropyLoss(weights=DualAscent(spaces, ...))"
            )
        self.spaces = _checks.spaces(spaces if isinstance(spaces, str) else tuple(spaces), "DualAscent")
        self.tolerance = self._by_space(tolerance, "tolerance", "the allowed c_s")
        self.step_size = _checks.positive(step_size, "step_size", "eta of the ascent")
        self.warmup_steps = _checks.count(warmup_steps, "warmup_steps")
        self.started = start is not None
        first = [0.0] * len(self.spaces) if start is None else self._by_space(start, "start", "lambda at first")
        self.register_buffer(
            "values", torch.tensor(first, dtype=torch.float64)
        )  # a step of 0.001 would be rounded away in 16 bits
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def start_at(self, weight: float) -> None:
        """Start from a family's default weight for every space if no `start` was given."""
        if not self.started:
            self.values.fill_(weight)
            self.started = True

    def lambdas(self, spaces: Sequence[str], order: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Space -> lambda, in the order of the given spaces."""
        _checks.same_names(spaces, self.spaces, "weights", "dual ascent")
        by_name = dict(zip(self.spaces, self.values.unbind(0), strict=True))
        return {n: by_name[n] for n in spaces}

    @torch.no_grad()
    def step(self, terms: Terms) -> dict[str, Tensor]:
        """Update lambda once, after the optimizer's step, and return it; equal on every rank, as the terms are."""
        _checks.same_names(terms.constraint, self.spaces, "terms", "dual ascent")
        c = torch.stack([terms.constraint[n] for n in self.spaces]).to(self.values)
        served = torch.stack([terms.rows[n] for n in self.spaces]).to(self.values.device) > 0
        self.steps += 1
        tolerance = torch.tensor(self.tolerance, dtype=self.values.dtype, device=self.values.device)
        moved = (self.values + self.step_size * (c - tolerance)).relu()
        moves = served & (self.steps > self.warmup_steps) & moved.isfinite()  # NaN: a step that is skipped elsewhere
        self.values.copy_(
            torch.where(moves, moved, self.values)
        )  # in place, as a loss in a CUDA graph reads this buffer
        return {n: w.clone() for n, w in self.lambdas(self.spaces).items()}

    def _by_space(self, value: float | Mapping[str, float], what: str, meaning: str) -> list[float]:
        if not isinstance(value, Mapping):
            return [_checks.not_negative(value, what, meaning)] * len(self.spaces)
        _checks.same_names(value, self.spaces, what, "dual ascent")
        return [_checks.not_negative(value[n], f"{what}[{n!r}]", meaning) for n in self.spaces]

    # ------------------------------------------------------------------------------------------------ state

    def get_extra_state(self) -> Tensor:
        """Hashes of the names, as a tensor, which any file format can hold; guards against loading for other spaces."""
        return torch.tensor([_digest(n) for n in self.spaces], dtype=torch.int64)

    def set_extra_state(self, state: Any) -> None:
        if not isinstance(state, Tensor) or state.tolist() != [_digest(n) for n in self.spaces]:
            raise ValueError(
                f"DualAscent: expected the state of an ascent over the spaces {_checks.names(self.spaces)}, in this "
                f"order: got {'one without names' if state is None else 'one over other spaces'}"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        values, names = prefix + "values", prefix + "_extra_state"
        if values in state_dict:
            self.set_extra_state(state_dict.get(names))  # check the names before loading anything
            state_dict[values] = state_dict[values].to(torch.float64)  # for load_state_dict(assign=True)
            self.started = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"spaces={_checks.names(self.spaces)}, tolerance={self.tolerance}, step_size={self.step_size}"


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
