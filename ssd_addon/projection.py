"""Projection heads on the features of a backbone, one for each space.

Legend: N samples, V views, B images, F backbone width, h hidden width, d_s width of space s.
"""

import copy
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
NORM_KEYS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


class Head(nn.Module):
    """The head of one space, [N, F] -> [N, d]: hidden layers of Linear, norm and ReLU, then a Linear.

    Every weight matrix belongs to one layer of one head, so that optimizers with per-parameter rules (the trust ratio
    of LARS, Muon's orthogonal steps) treat each head as if it were trained on its own. Names of biases end in "bias",
    by which frameworks exclude them from weight decay.
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
        """A copy as Linear, norm, ReLU, ..., Linear. Gathers sharded weights: call it on every rank then.

        Layers that are no plain Linear (LoRA, quantized) or have parametrizations, and other norms, are copied as they
        are.
        """
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
        for members in self.alike():  # layer by layer, so that a seed gives the same weights as in earlier versions
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
        if self.training and self.norm == "batch" and len(features) == 1:
            self._check_one()
        return {n: self._modules[key](features) for n, key in self._keys.items()}  # type: ignore[misc]

    def _check_one(self) -> None:
        """Refuse one image where its statistics would be its own; those of SyncBatchNorm are of all ranks."""
        if any(type(m) is nn.BatchNorm1d and m.training for m in self.modules()):
            raise ValueError(
                "features: expected at least two images in training mode with norm='batch', which has no statistics of "
                "one: got one; use norm='layer', or more images"
            )

    def head(self, name: str) -> nn.Sequential:
        """A copy of the head of one space, as plain layers."""
        if name not in self._keys:
            raise KeyError(f"space: expected one of {_checks.names(self._keys)}: got {name!r}")
        head = self._modules[self._keys[name]]
        assert isinstance(head, Head)
        return head.copied()

    def alike(self) -> list[list[str]]:
        """Groups of spaces whose heads have the same hidden widths."""
        return [
            [n for n in self._keys if self.hidden[n] == h] for h in dict.fromkeys(self.hidden[n] for n in self._keys)
        ]

    def key(self, name: str) -> str:
        """The name that stands for a space in the keys of the state_dict."""
        return self._keys[name]


def weights_of(in_features: int, spaces: Mapping[str, int], hidden: Mapping[str, tuple[int, ...]]) -> int:
    """Total number of weights in the matrices of all heads."""
    edges = [(in_features, *hidden[n], d) for n, d in spaces.items()]
    return sum(a * b for each in edges for a, b in itertools.pairwise(each))


def check_stored(config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuse a file whose configuration has far more weights than the file contains.

    Raises:
        ValueError, TypeError: there are too few weights, or the configuration is not valid.
    """
    spaces = checked_spaces(config["spaces"])
    hidden = checked_hidden(config["hidden"], spaces)
    wanted = weights_of(_checks.width(config["in_features"], "in_features"), spaces, hidden)
    there = sum(t.numel() for t in state.values() if isinstance(t, Tensor))
    if wanted > 4 * there + 10**6:
        raise ValueError(f"heads: expected at most {there:,} numbers, as many as are in the file: got {wanted:,}")


def _key(name: str) -> str:
    """A valid name for a submodule: without dots, and not an attribute that modules have already, such as "type"."""
    return name.replace("%", "%25").replace(".", "%2E") + "_head"


def checked_spaces(spaces: Any) -> dict[str, int]:
    """Check the spaces and return name -> width, content first."""
    if not isinstance(spaces, Mapping):
        raise TypeError(f"spaces: expected a mapping name -> width, 'content' first: got {type(spaces).__name__}")
    _checks.spaces(tuple(spaces), "spaces")
    return {n: _checks.width(w, f"width of space {n!r}") for n, w in spaces.items()}


def checked_hidden(hidden: Hidden, spaces: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Check the hidden widths and return name -> widths of the hidden layers of its head."""
    if not isinstance(hidden, Mapping):
        return dict.fromkeys(spaces, _checks.widths(hidden, "every head"))
    _checks.same_names(hidden, tuple(spaces), "hidden", "heads")
    return {n: _checks.widths(hidden[n], n) for n in spaces}


class ProjectionHeads(ReadsStacked):
    """One projection head per space, on features that a module of your own computes; `StyleHeads.heads` builds it.

    >>> heads = ProjectionHeads(8, {"content": 16, "color": 4}, hidden=(32,))
    >>> {name: tuple(z.shape) for name, z in heads(torch.rand(12, 8)).items()}
    {'content': (12, 16), 'color': (12, 4)}

    Args:
        in_features: F, the width of the features.
        spaces, hidden, norm: as for `StyleHeads`.

    Raises:
        ValueError, TypeError: as `StyleHeads`; also if features are not [N, F] or [V, B, F].
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
        """Map features [N, F] to a dictionary name -> [N, d], or [V, B, F] of views to `Embeddings` name -> [V, B, d].

        The loss also accepts flat embeddings [V*B, d], view 0 first, together with the plan:
        `criterion(heads(features), transform.plan)`.
        """
        if not isinstance(features, Tensor):
            hint = "; pass the features of all views as one tensor, backbone(torch.cat(views))"
            raise TypeError(f"features: expected a tensor [N, F] or [V, B, F]: got {type(features).__name__}{hint}")
        _checks.floating(features, "features")
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
        """A copy of one head as plain layers, [N, F] -> [N, d]."""
        return self.projections.head(name)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, spaces={self.spaces}, norm={self.norm!r}"


def whole(t: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks if it is sharded (FSDP2)."""
    gathered: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return gathered.detach()


def _norm(norm: Norm | None, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm1d(width)
    return nn.LayerNorm(width) if norm == "layer" else nn.Identity()


def _plain(norm: nn.Module) -> list[nn.Module]:
    """A copy of a norm layer, in a list; SyncBatchNorm becomes an ordinary BatchNorm."""
    if isinstance(norm, nn.Identity):
        return []
    state = norm.state_dict()
    if not isinstance(norm, _BatchNorm | nn.LayerNorm) or not NORM_KEYS >= state.keys() >= {"weight", "bias"}:
        return [_as_it_is(norm)]
    like = whole(norm.weight)
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    single: nn.BatchNorm1d | nn.LayerNorm
    if isinstance(norm, nn.LayerNorm):
        single = nn.LayerNorm(norm.normalized_shape, norm.eps, **options)
    else:
        tracked = norm.track_running_stats
        single = nn.BatchNorm1d(norm.num_features, norm.eps, norm.momentum, track_running_stats=tracked, **options)
    single.load_state_dict({k: whole(t) for k, t in state.items()})
    return [single]


def _linear(layer: nn.Module) -> nn.Module:
    state = layer.state_dict()
    if not isinstance(layer, nn.Linear) or not {"weight", "bias"} >= state.keys() >= {"weight"}:
        return _as_it_is(layer)
    state = {k: whole(t) for k, t in state.items()}
    weight = state["weight"]
    made = nn.Linear(
        layer.in_features, layer.out_features, bias="bias" in state, device=weight.device, dtype=weight.dtype
    )
    made.load_state_dict(state)
    return made


def _as_it_is(layer: nn.Module) -> nn.Module:
    """A deep copy of a layer; tensors that a hook computes before each forward (weight_norm) are copied by value."""
    if any(hasattr(t, "full_tensor") for t in (*layer.parameters(), *layer.buffers())):
        raise TypeError(f"head: expected Linear and norm layers, if they are sharded: got {type(layer).__name__}")
    held = (t for m in layer.modules() for t in vars(m).values() if isinstance(t, Tensor))
    return copy.deepcopy(layer, {id(t): t.detach().clone() for t in held})


def _normed(norm: nn.Module, y: Tensor) -> Tensor:
    """Apply batch norm in the dtype of its statistics, which FSDP2's mixed precision does not cast."""
    kind = norm.running_mean.dtype if isinstance(norm, _BatchNorm) and norm.running_mean is not None else None
    if kind is None or not isinstance(norm, _BatchNorm) or getattr(norm.weight, "dtype", kind) == kind:
        out: Tensor = norm(y)
        return out
    parameters = {"weight": norm.weight.to(kind), "bias": norm.bias.to(kind)}
    wide: Tensor = torch.func.functional_call(norm, parameters, (y.to(kind),))
    return wide.to(y.dtype)
