"""Weights of the invariance terms: lambda of every space, as absolute values."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon.losses.terms import Terms


class Weights(nn.Module):
    """Base class: holds lambda of every space and may update it after a training step."""

    def start_at(self, weight: float) -> None:
        """Use a family's default weight for spaces that have none."""
        raise NotImplementedError

    def lambdas(self, spaces: Sequence[str], order: Sequence[str] | None = None) -> Mapping[str, float | Tensor]:
        """Space -> lambda for the spaces of a plan; `order` is the order of the embeddings, if it may differ."""
        raise NotImplementedError

    def step(self, terms: Terms) -> Mapping[str, float | Tensor]:
        """Called once after the optimizer's step; returns lambda."""
        raise NotImplementedError


class FixedWeights(Weights):
    """Constant weights: a number for all spaces, a mapping by name, or a sequence in the order of the plan.

    Args:
        given: the weights; None uses the family's default.

    Raises:
        ValueError: a weight is negative or not finite; when used: names or number of weights do not fit the plan.
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
                f"weights: expected a mapping by name, as the plan orders the spaces {_checks.names(spaces)} and the "
                f"embeddings {_checks.names(order)}: got a sequence"
            )
        return dict(zip(spaces, w, strict=True))

    def step(self, terms: Terms) -> Mapping[str, float]:
        """Fixed weights stay as they are."""
        return self.lambdas(tuple(terms.constraint))

    def extra_repr(self) -> str:
        return f"{self.given}"
