"""Projection heads: one for each space, on the features of a backbone.

Legend: N rows, V views, B images, F backbone width, h hidden width, d_s width of space s.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssd_addon import _checks, _limits
from ssd_addon._types import as_weights
from ssd_addon.embeddings import Embeddings
from ssd_addon.plan import ViewPlan
from ssd_addon.stacked import ReadsStacked

Hidden = Sequence[int] | Mapping[str, Sequence[int]]
Norm = Literal["batch", "layer"]
NORMS: tuple[Norm | None, ...] = ("batch", "layer", None)


class Head(nn.Module):
    """The head of one space, [N, F] -> [N, d]: hidden layers of Linear, norm and ReLU, then a Linear.

    Every weight is a matrix of this head and layer alone, so that optimizers which go by parameter (the trust ratio of
    LARS, Muon's orthogonal steps) treat a head as if it were trained on its own. Names of biases end in "bias", by
    which frameworks leave them out of weight decay.
    """

    def __init__(self, linears: Sequence[nn.Linear], norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linears, self.norms = nn.ModuleList(linears), nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=False):  # the last layer has no norm
            x = torch.relu(_normed(norm, linear(x)))
        out: Tensor = self.linears[-1](x)
        return out

    def copied(self) -> nn.Sequential:
        """The same as Linear, norm, ReLU, ..., Linear; a copy. Sharded weights are gathered: it is called on every rank
        then."""
        layers: list[nn.Module] = []
        for linear, norm in zip(self.linears, self.norms, strict=False):
            layers += [_linear(linear), *_plain(norm), nn.ReLU()]
        return nn.Sequential(*layers, _linear(self.linears[-1])).train(self.training)


class Projections(nn.Module):
    """The heads of all spaces: [N, F] -> name -> [N, d_s], in the order of the spaces."""

    def __init__(
        self, in_features: int, spaces: Mapping[str, int], hidden: Mapping[str, tuple[int, ...]], norm: Norm | None
    ) -> None:
        super().__init__()
        if torch.get_default_device().type == "cpu":
            size = weights_of(in_features, spaces, hidden) * torch.finfo(torch.get_default_dtype()).bits // 8
            _limits.fits(size, "heads", "weights")
        self.hidden, self.norm, self._keys = dict(hidden), norm, {n: _key(n) for n in spaces}
        linears: dict[str, list[nn.Linear]] = {n: [] for n in spaces}
        for members in self.alike():  # layer by layer: the same seed gives the weights that it always gave
            edges = [in_features, *self.hidden[members[0]]]
            for a, b in itertools.pairwise(edges):
                for n in members:
                    linears[n].append(nn.Linear(a, b, bias=norm is None))
            for n in members:
                linears[n].append(nn.Linear(edges[-1], spaces[n]))
        for n, key in self._keys.items():
            self.add_module(key, Head(linears[n], [_norm(norm, h) for h in self.hidden[n]]))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        features = as_weights(features, self)
        return {n: self._modules[key](features) for n, key in self._keys.items()}  # type: ignore[misc]

    def head(self, name: str) -> nn.Sequential:
        """The head of one space as plain layers, a copy."""
        if name not in self._keys:
            raise KeyError(f"there is no head {name!r}: the spaces are {_checks.names(self._keys)}")
        head = self._modules[self._keys[name]]
        assert isinstance(head, Head)
        return head.copied()

    def alike(self) -> list[list[str]]:
        """The spaces whose heads have the same hidden widths, together."""
        return [
            [n for n in self._keys if self.hidden[n] == h] for h in dict.fromkeys(self.hidden[n] for n in self._keys)
        ]

    def key(self, name: str) -> str:
        """What stands for a space in the keys of the state_dict."""
        return self._keys[name]


def weights_of(in_features: int, spaces: Mapping[str, int], hidden: Mapping[str, tuple[int, ...]]) -> int:
    """How many weights the matrices of all heads have."""
    edges = [(in_features, *hidden[n], d) for n, d in spaces.items()]
    return sum(a * b for each in edges for a, b in itertools.pairwise(each))


def check_stored(config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuse a file's configuration of far more weights than are in the file.

    Raises:
        ValueError, TypeError: such a one, or one that is none.
    """
    spaces = checked_spaces(config["spaces"])
    hidden = checked_hidden(config["hidden"], spaces)
    wanted = weights_of(_checks.width(config["in_features"], "in_features"), spaces, hidden)
    there = sum(t.numel() for t in state.values() if isinstance(t, Tensor))
    if wanted > 4 * there + 10**6:
        raise ValueError(f"expected heads of at most the {there:,} numbers in the file: got some of {wanted:,}")


def _key(name: str) -> str:
    """A name that a module can have: without dots, and none that modules have already, such as "type"."""
    return name.replace("%", "%25").replace(".", "%2E") + "_head"


def checked_spaces(spaces: Any) -> dict[str, int]:
    """Name -> width, content first."""
    if not isinstance(spaces, Mapping):
        raise TypeError(f"spaces: expected a mapping name -> width, 'content' first: got {type(spaces).__name__}")
    _checks.spaces(tuple(spaces), "spaces")
    return {n: _checks.width(w, f"width of space {n!r}") for n, w in spaces.items()}


def checked_hidden(hidden: Hidden, spaces: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name -> widths of the hidden layers of its head."""
    if not isinstance(hidden, Mapping):
        return dict.fromkeys(spaces, _checks.widths(hidden, "every head"))
    _checks.same_names(hidden, tuple(spaces), "hidden", "heads")
    return {n: _checks.widths(hidden[n], n) for n in spaces}


class ProjectionHeads(ReadsStacked):
    """One projection head per space on features that a module of your own makes; `StyleHeads.heads` builds it.

    >>> heads = ProjectionHeads(8, {"content": 16, "color": 4}, hidden=(32,))
    >>> {name: tuple(z.shape) for name, z in heads(torch.rand(12, 8)).items()}
    {'content': (12, 16), 'color': (12, 4)}

    Args:
        in_features: F, the width of the features.
        spaces, hidden, norm: as of `StyleHeads`.

    Raises:
        ValueError, TypeError: as of `StyleHeads`; features that are not [N, F] or [V, B, F].
    """

    def __init__(
        self,
        in_features: int,
        spaces: Mapping[str, int],
        *,
        hidden: Hidden = (2048, 2048),
        norm: Norm | None = "batch",
    ) -> None:
        super().__init__()
        self.in_features = _checks.width(in_features, "in_features")
        self.spaces = checked_spaces(spaces)
        self.hidden = checked_hidden(hidden, self.spaces)
        self.norm = _checks.choice(norm, NORMS, "norm")
        self.projections = Projections(self.in_features, self.spaces, self.hidden, self.norm)

    def forward(self, features: Tensor) -> dict[str, Tensor] | Embeddings:
        """Features [N, F] to a dictionary name -> [N, d]; of views [V, B, F] to `Embeddings` name -> [V, B, d].

        The loss takes rows of views too, [V*B, d] with those of view 0 first, and the plan beside them:
        `criterion(heads(features), transform.plan)`.
        """
        if not isinstance(features, Tensor):
            hint = "; the features of all views are one tensor, backbone(torch.cat(views))"
            raise TypeError(f"features: expected a tensor [N, F] or [V, B, F]: got {type(features).__name__}{hint}")
        if features.ndim not in (2, 3) or features.shape[-1] != self.in_features:
            hint = "; flatten(1) first" if features.ndim == 4 and features.shape[1] == self.in_features else ""
            raise ValueError(
                f"features: expected [N, F] or [V, B, F] with F = {self.in_features} (in_features): got "
                f"{_checks.shape(features)}{hint}"
            )
        if features.ndim == 2:
            z: dict[str, Tensor] = self.projections(features)
            return z
        v, b = features.shape[:2]
        z = self.projections(features.flatten(0, 1))
        plan = ViewPlan.shared_query(tuple(self.spaces))
        return Embeddings({n: t.view(v, b, -1) for n, t in z.items()}, plan, assumed=True)

    def head(self, name: str) -> nn.Sequential:
        """One head as plain layers (a copy): [N, F] -> [N, d]."""
        return self.projections.head(name)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, spaces={self.spaces}, norm={self.norm!r}"


def whole(t: Tensor) -> Tensor:
    """A tensor, gathered from all ranks where it is sharded over them (FSDP2)."""
    gathered: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return gathered.detach()


def _norm(norm: Norm | None, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm1d(width)
    return nn.LayerNorm(width) if norm == "layer" else nn.Identity()


def _plain(norm: nn.Module) -> list[nn.Module]:
    """A copy of a norm in a module of its own; of what is synchronized over ranks, one that is not."""
    if isinstance(norm, nn.Identity):
        return []
    assert isinstance(norm, _BatchNorm | nn.LayerNorm)  # SyncBatchNorm too
    like = whole(norm.weight)
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    single: nn.BatchNorm1d | nn.LayerNorm
    if isinstance(norm, nn.LayerNorm):
        single = nn.LayerNorm(norm.normalized_shape, norm.eps, **options)
    else:
        single = nn.BatchNorm1d(norm.num_features, norm.eps, norm.momentum, **options)
    single.load_state_dict({k: whole(t) for k, t in norm.state_dict().items()})
    return [single]


def _linear(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    state = {k: whole(t) for k, t in layer.state_dict().items()}
    weight = state["weight"]
    made = nn.Linear(
        layer.in_features, layer.out_features, bias="bias" in state, device=weight.device, dtype=weight.dtype
    )
    made.load_state_dict(state)
    return made


def _normed(norm: nn.Module, y: Tensor) -> Tensor:
    """Batch norm in the type of its statistics, which FSDP2's mixed precision leaves as they are."""
    kind = norm.running_mean.dtype if isinstance(norm, _BatchNorm) and norm.running_mean is not None else None
    if kind is None or not isinstance(norm, _BatchNorm) or norm.weight.dtype == kind:
        out: Tensor = norm(y)
        return out
    parameters = {"weight": norm.weight.to(kind), "bias": norm.bias.to(kind)}
    wide: Tensor = torch.func.functional_call(norm, parameters, (y.to(kind),))
    return wide.to(y.dtype)
