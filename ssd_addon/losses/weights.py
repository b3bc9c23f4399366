"""Weights of the invariance terms: lambda of every space, absolute."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon.losses.terms import Terms


class Weights(nn.Module):
    """lambda of every space, and what a training step does to it."""

    def start_at(self, weight: float) -> None:
        """Learn a family's default weight, for spaces that were given none."""
        raise NotImplementedError

    def lambdas(self, spaces: Sequence[str], order: Sequence[str] | None = None) -> Mapping[str, float | Tensor]:
        """Space -> lambda for the spaces of a plan; `order` is that of the embeddings, if it may be another."""
        raise NotImplementedError

    def step(self, terms: Terms) -> Mapping[str, float | Tensor]:
        """Called once after the optimizer's step; returns lambda."""
        raise NotImplementedError


class FixedWeights(Weights):
    """Weights that stay: a number for all spaces, a mapping by name, or a sequence in the order of the plan.

    Args:
        given: None is the family's weight.

    Raises:
        ValueError: a weight that is negative or not finite; in use: names or a number of weights that do not fit.
    """

    def __init__(self, given: float | Mapping[str, float] | Sequence[float] | None = None) -> None:
        super().__init__()
        meaning = "the weight of a space's invariance"
        self.given: float | dict[str, float] | tuple[float, ...] | None
        if given is None:
            self.given = None
        elif isinstance(given, Mapping):
            self.given = {k: _checks.not_negative(v, f"weights[{k!r}]", meaning) for k, v in given.items()}
        elif isinstance(given, Sequence) and not isinstance(given, str):
            self.given = tuple(_checks.not_negative(v, f"weights[{i}]", meaning) for i, v in enumerate(given))
        else:
            self.given = _checks.not_negative(given, "weights", meaning)

    def start_at(self, weight: float) -> None:
        if self.given is None:
            self.given = weight

    def lambdas(self, spaces: Sequence[str], order: Sequence[str] | None = None) -> Mapping[str, float]:
        w = self.given
        if isinstance(w, dict):
            _checks.same_names(w, spaces, "weights", "plan")
            return dict(w)
        if not isinstance(w, tuple):
            return dict.fromkeys(spaces, 0.0 if w is None else w)
        if len(w) != len(spaces):
            raise ValueError(f"weights: expected one per space ({_checks.names(spaces)}): got {len(w)} of them")
        if order is not None and tuple(order) != tuple(spaces):
            raise ValueError(
                f"weights: the plan orders the spaces {_checks.names(spaces)} and the embeddings "
                f"{_checks.names(order)}; give the weights by name"
            )
        return dict(zip(spaces, w, strict=True))

    def step(self, terms: Terms) -> Mapping[str, float]:
        """Fixed weights stay as they are."""
        return self.lambdas(tuple(terms.constraint))

    def extra_repr(self) -> str:
        return f"{self.given}"
