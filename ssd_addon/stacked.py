"""Reads older files, in which the weights of all heads were stored stacked over spaces.

    stacks.0.first.weight     [S*h, F]      ->  projections.content_head.linears.0.weight  [h, F], ...
    stacks.0.norms.0.weight   [S*h]         ->  projections.content_head.norms.0.weight    [h], ...
    stacks.0.products.0       [S, h', h]    ->  projections.content_head.linears.1.weight  [h', h], ...
    stacks.0.last.0.weight    [d, h']       ->  projections.content_head.linears.2.weight  [d, h']

A stack held the spaces whose heads have the same hidden widths. Only weights are read, not an optimizer's state, which
is stored per parameter of the old layout.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ssd_addon import storage

NORMS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Projections(Protocol):
    """The part of `projection.Projections` that this module uses."""

    @property
    def hidden(self) -> Mapping[str, tuple[int, ...]]: ...

    def alike(self) -> list[list[str]]: ...

    def key(self, name: str) -> str: ...

    def state_dict(self) -> dict[str, Any]: ...


class ReadsStacked(nn.Module):
    """A module with `projections` whose `load_state_dict` also reads stacked weights, even inside other modules."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any, **options: Any) -> None:
        projections: Any = self.projections
        unstack(state_dict, projections, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)


def is_stacked(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds stacked weights; keys may contain the names of wrappers."""
    keys = [f".{storage.bare(key)}" for key in state]
    return any(k.endswith(".stacks.0.last.0.weight") for k in keys) and not any(".projections." in k for k in keys)


def unstack(state: dict[str, Any], projections: Projections, prefix: str = "") -> None:
    """Replace the stacked weights in a state dict by the weights of each head."""
    for old, new in _new_keys(projections).items():
        value = state.get(prefix + old)
        if not isinstance(value, Tensor):
            continue
        if value.ndim == 0:  # a norm's count of batches
            parts: tuple[Tensor, ...] = (value,) * len(new)
        else:
            parts = value.unbind() if value.ndim == 3 else value.tensor_split(len(new))
        if len(parts) == len(new):  # otherwise the spaces differ, and load_state_dict reports what is missing
            del state[prefix + old]
            state.update({f"{prefix}projections.{key}": part.clone() for key, part in zip(new, parts, strict=True)})


def matched(
    state: Mapping[str, Any], own: Mapping[str, Any], projections: Projections, dropped: tuple[str, ...]
) -> Mapping[str, Any]:
    """`storage.matched`, extended to stacked weights."""
    if is_stacked(state):
        others = [key for key in own if not storage.bare(key).startswith("projections.")]
        state = dict(storage.matched(state, [*others, *_new_keys(projections)], dropped))
        unstack(state, projections)
    return storage.matched(state, own, dropped)


def _new_keys(projections: Projections) -> dict[str, list[str]]:
    """Key of a stacked weight -> keys of its parts, both without prefix."""
    own = projections.state_dict()
    out: dict[str, list[str]] = {}
    for i, members in enumerate(projections.alike()):
        heads = [projections.key(name) for name in members]
        last = len(projections.hidden[members[0]])
        for k in range(last):
            old = {f"norms.{k}.{name}": f"norms.{k}.{name}" for name in NORMS}
            old[f"products.{k - 1}" if k else "first.weight"] = f"linears.{k}.weight"
            old[f"biases.{k - 1}_bias" if k else "first.bias"] = f"linears.{k}.bias"
            out |= {f"stacks.{i}.{there}": [f"{head}.{here}" for head in heads] for there, here in old.items()}
        for j, head in enumerate(heads):
            out |= {f"stacks.{i}.last.{j}.{n}": [f"{head}.linears.{last}.{n}"] for n in ("weight", "bias")}
    return {there: here for there, here in out.items() if here[0] in own}
