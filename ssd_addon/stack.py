"""Projection heads, side by side as batched products.

Legend: N rows, V views, B images, F backbone width, S spaces, h hidden, d_s width of space s.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssd_addon import _checks
from ssd_addon._types import as_weights
from ssd_addon.embeddings import Embeddings
from ssd_addon.plan import ViewPlan

Hidden = Sequence[int] | Mapping[str, Sequence[int]]
Norm = Literal["batch", "layer"]
NORMS: tuple[Norm | None, ...] = ("batch", "layer", None)


class HeadStack(nn.Module):
    """Heads of equal hidden widths, run side by side: [N, F] -> name -> [N, d_s].

    One product makes the first hidden layer of all heads, one batched product each further one; the norm of all heads
    is one layer over their channels, which is what each head would do alone (for layer norm, a group norm with a group
    per head). Weights are stored stacked (first layer [S*h, F], further ones [S, h, h'], norms and biases
    one-dimensional). Names of biases end in "bias", by which frameworks leave them out of weight decay.
    """

    def __init__(
        self, in_features: int, hidden: tuple[int, ...], widths: Mapping[str, int], norm: Norm | None = "batch"
    ) -> None:
        super().__init__()
        self.hidden, self.widths = hidden, dict(widths)
        s = len(widths)
        bias = norm is None
        self.first = nn.Linear(in_features, s * hidden[0], bias=bias) if hidden else None
        self.norms = nn.ModuleList([_norm(norm, s, h) for h in hidden])
        self.products, self.biases = nn.ParameterList(), nn.ParameterDict()
        for k, (h_in, h_out) in enumerate(itertools.pairwise(hidden)):
            layers = [nn.Linear(h_in, h_out, bias=bias) for _ in widths]
            self.products.append(nn.Parameter(torch.stack([layer.weight.detach() for layer in layers])))
            if bias:
                self.biases[f"{k}_bias"] = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]))
        last = hidden[-1] if hidden else in_features
        self.last = nn.ModuleList([nn.Linear(last, d) for d in widths.values()])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.first is None:
            return {n: layer(x) for n, layer in zip(self.widths, self.last, strict=True)}
        s, n = len(self.widths), x.shape[0]
        y = torch.relu(_normed(self.norms[0], self.first(x)))  # [N, S*h]
        for k, norm in enumerate(self.norms[1:]):
            per_head = torch.einsum("nsi,soi->nso", y.view(n, s, -1), self.products[k]).reshape(n, -1)
            y = torch.relu(_normed(norm, per_head + self.biases[f"{k}_bias"] if len(self.biases) else per_head))
        each = y.view(n, s, -1).unbind(1)
        return {name: layer(h) for name, layer, h in zip(self.widths, self.last, each, strict=True)}

    def head(self, name: str) -> nn.Sequential:
        """The head of one space as Linear, norm, ReLU, ..., Linear; a copy. Sharded weights are gathered: it is
        called on every rank then."""
        k = list(self.widths).index(name)
        layers: list[nn.Module] = []
        bias: Tensor | None
        for i, (h, norm) in enumerate(zip(self.hidden, self.norms, strict=True)):
            part = slice(k * h, (k + 1) * h)
            if i == 0:
                assert self.first is not None
                weight = whole(self.first.weight)[part]
                bias = whole(self.first.bias)[part] if self.first.bias is not None else None
            else:
                weight = whole(self.products[i - 1])[k]
                bias = whole(self.biases[f"{i - 1}_bias"])[part] if len(self.biases) else None
            layers += [_linear(weight, bias), *_single(norm, h, part), nn.ReLU()]
        last = self.last[k]
        assert isinstance(last, nn.Linear)
        layers.append(_linear(whole(last.weight), whole(last.bias)))
        return nn.Sequential(*layers).train(self.training)


def stacks_of(
    in_features: int, spaces: Mapping[str, int], hidden: Mapping[str, tuple[int, ...]], norm: Norm | None
) -> nn.ModuleList:
    """Heads of the same hidden widths form a stack, in the order of the spaces."""
    stacks = nn.ModuleList()
    for widths in dict.fromkeys(hidden.values()):
        members = {n: d for n, d in spaces.items() if hidden[n] == widths}
        stacks.append(HeadStack(in_features, widths, members, norm))
    return stacks


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


class ProjectionHeads(nn.Module):
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
        self.stacks = stacks_of(self.in_features, self.spaces, self.hidden, self.norm)

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
            return projected(self.stacks, features, self.spaces)
        v, b = features.shape[:2]
        z = projected(self.stacks, features.flatten(0, 1), self.spaces)
        plan = ViewPlan.shared_query(tuple(self.spaces))
        return Embeddings({n: t.view(v, b, -1) for n, t in z.items()}, plan, assumed=True)

    def head(self, name: str) -> nn.Sequential:
        """One head as plain layers (a copy): [N, F] -> [N, d]."""
        return head_of(self.stacks, name, self.spaces)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, spaces={self.spaces}, norm={self.norm!r}"


def projected(stacks: nn.ModuleList, features: Tensor, spaces: Mapping[str, int]) -> dict[str, Tensor]:
    """Features [N, F] to name -> [N, d], in the order of the spaces."""
    found: dict[str, Tensor] = {}
    features = as_weights(features, stacks)
    for stack in stacks:
        found |= stack(features)
    return {n: found[n] for n in spaces}


def head_of(stacks: nn.ModuleList, name: str, spaces: Mapping[str, int]) -> nn.Sequential:
    """The head of one space as plain layers."""
    for stack in stacks:
        assert isinstance(stack, HeadStack)
        if name in stack.widths:
            return stack.head(name)
    raise KeyError(f"there is no head {name!r}: the spaces are {_checks.names(spaces)}")


def whole(t: Tensor) -> Tensor:
    """A tensor, gathered from all ranks where it is sharded over them (FSDP2)."""
    gathered: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return gathered.detach()


def _norm(norm: Norm | None, heads: int, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm1d(heads * width)
    return nn.GroupNorm(heads, heads * width) if norm == "layer" else nn.Identity()


def _single(norm: nn.Module, width: int, part: slice) -> list[nn.Module]:
    """What a norm over all heads is for one of them."""
    if isinstance(norm, nn.Identity):
        return []
    assert isinstance(norm, _BatchNorm | nn.GroupNorm)  # SyncBatchNorm too
    like = whole(norm.weight)
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    single: nn.BatchNorm1d | nn.LayerNorm
    if isinstance(norm, nn.GroupNorm):
        single = nn.LayerNorm(width, norm.eps, **options)
        copied: tuple[str, ...] = ("weight", "bias")
    else:
        single = nn.BatchNorm1d(width, norm.eps, norm.momentum, **options)
        copied = ("weight", "bias", "running_mean", "running_var")
        assert single.num_batches_tracked is not None and norm.num_batches_tracked is not None
        with torch.no_grad():
            single.num_batches_tracked.copy_(norm.num_batches_tracked)
    with torch.no_grad():
        for attribute in copied:
            getattr(single, attribute).copy_(whole(getattr(norm, attribute))[part])
    return [single]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
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
