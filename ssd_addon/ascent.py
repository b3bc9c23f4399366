"""Dual ascent on the weights of the invariance terms.

    lambda_s <- relu(lambda_s + step_size * (c_s - tolerance))

Source: Eastwood et al., arXiv 2311.08815.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon.batch import ViewPlan
from ssd_addon.losses import JointEntropyLoss, Terms


class DualAscent(nn.Module):
    """Adapts the weights of the invariance terms: lambda_s <- relu(lambda_s + step_size * (c_s - tolerance)).

    Treats every invariance as a constraint c_s <= tolerance, c_s = `terms.constraint[s]`. Starts from the
    criterion's weights; from then on the criterion reads lambda from here. `state_dict` holds lambda and the step.

    >>> criterion = JointEntropyLoss("simclr")
    >>> ascent = DualAscent(criterion, tolerance=0.1, step_size=0.5)
    >>> terms = criterion.terms({"content": torch.randn(2, 8, 4)})
    >>> terms.loss.requires_grad, len(ascent.step(terms))
    (False, 1)

    Args:
        criterion: the loss; it is not registered as a submodule, so lambda is saved once.
        tolerance: a number, or a mapping by space.
        step_size: eta.
        warmup_steps: calls of `step` that leave lambda as it is.

    Source: Eastwood et al., arXiv 2311.08815, dual ascent on the invariance constraints.
    """

    weights: Tensor
    steps: Tensor

    def __init__(
        self,
        criterion: JointEntropyLoss,
        *,
        tolerance: float | Mapping[str, float],
        step_size: float,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(criterion, JointEntropyLoss):
            raise TypeError(f"DualAscent: expected a JointEntropyLoss: got {type(criterion).__name__}")
        if criterion._ascent:
            raise ValueError("DualAscent: this criterion already has one, and two would both move its weights")
        checked = (
            {k: _checks.not_negative(v, f"tolerance[{k!r}]", "the allowed c_s") for k, v in tolerance.items()}
            if isinstance(tolerance, Mapping)
            else _checks.not_negative(tolerance, "tolerance", "the allowed c_s")
        )
        self.tolerance: float | dict[str, float] = checked
        self.step_size = _checks.positive(step_size, "step_size", "eta of the ascent")
        if not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected a whole number, 0 or more: got {warmup_steps!r}")
        self.warmup_steps = warmup_steps
        self._criterion = [criterion]  # in a list, so that it is no submodule
        self.register_buffer("weights", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        criterion._ascent = [self]

    def lambdas(self, spaces: Sequence[str]) -> dict[str, float | Tensor]:
        """Space -> lambda, in the order of the plan."""
        if not len(self.weights):
            criterion = self._criterion[0]
            criterion._ascent = []
            try:
                start = criterion.lambdas(ViewPlan.shared_query(spaces))
            finally:
                criterion._ascent = [self]
            self.weights = torch.tensor(
                [float(start[n]) for n in spaces], dtype=torch.float64, device=self.weights.device
            )
        if len(self.weights) != len(spaces):
            raise ValueError(
                f"DualAscent: holds {len(self.weights)} lambdas: got {len(spaces)} spaces ({_checks.names(spaces)}); "
                "it belongs to another plan"
            )
        return dict(zip(spaces, self.weights.unbind(0), strict=True))

    @torch.no_grad()
    def step(self, terms: Terms) -> dict[str, Tensor]:
        """Move lambda once, after backward. Every rank holds the same terms and so the same lambda; returns it."""
        spaces = list(terms.constraint)
        self.weights = self.weights.to(terms.loss.device)
        self.lambdas(spaces)
        self.steps += 1
        if int(self.steps) > self.warmup_steps:
            if isinstance(self.tolerance, dict):
                _checks.same_names(self.tolerance, spaces, "tolerance", "terms")
                tolerance = torch.tensor([self.tolerance[n] for n in spaces], dtype=torch.float64)
            else:
                tolerance = torch.full((len(spaces),), self.tolerance, dtype=torch.float64)
            c = torch.stack([terms.constraint[n] for n in spaces]).double()
            served = torch.stack([terms.rows[n] for n in spaces]) > 0
            moved = (self.weights + self.step_size * (c - tolerance.to(c.device))).relu()
            self.weights.copy_(torch.where(served, moved, self.weights))  # in place: a captured loss reads it there
        return {n: w.clone() for n, w in zip(spaces, self.weights, strict=True)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "weights")
        if isinstance(stored, Tensor) and stored.ndim == 1:
            self.weights = torch.zeros_like(stored, dtype=torch.float64, device=self.weights.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
