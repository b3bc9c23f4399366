"""What a file of `StyleHeads` holds, and a model from it: `save`, `load` and `restore`.

`StyleHeads` hands itself over here; this module does not import it.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ssd_addon import _checks, stacked, storage
from ssd_addon.backbones import without_missing
from ssd_addon.card import check_card
from ssd_addon.projection import check_stored

ADDED: dict[str, Any] = {"norm": "batch", "output": None}
"""Settings that older files do not contain, with the values that they had then."""
FOUND = ("axis",)
"""Settings that are in a file only where they were found; compared where both sides have them."""
FLAGS = ("on_sphere", "frozen")
"""Attributes that a file holds where they are True."""


def written(model: Any, card: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `StyleHeads.save` writes.

    Raises:
        ValueError: the card is not valid, or the model is on torch's meta device.
    """
    state = model.state_dict()
    if empty := [name for name, t in state.items() if isinstance(t, Tensor) and t.is_meta]:
        raise ValueError(
            "model: expected one with weights: got one on the meta device, which has none to save "
            f"({_checks.names(empty[:3])}, ...); model.to_empty(device='cpu') and load weights first"
        )
    flags = {n: True for n in FLAGS if getattr(model, n)}
    content: dict[str, Any] = {"config": model.config() | flags, "state_dict": state}
    if card is not None:
        check_card(card)
        content["card"] = dict(card)
    return content


def opened(kind: Any, stored: storage.Stored, backbone: nn.Module) -> Any:
    """The model of a stored file, of this class, around a backbone of the same architecture.

    Raises:
        ValueError: the configuration is not valid for `StyleHeads`, or the weights are of another backbone.
    """
    config = dict(stored.config)
    flags = {n: config.pop(n, False) for n in FLAGS}
    try:
        check_stored(config, stored.state_dict)
        model = kind(backbone, config.pop("spaces"), **config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its configuration is not valid for StyleHeads ({error})") from error
    made = without_missing(model.backbone, model.in_features, model.sample_ndim, stored.state_dict)
    model.backbone, model.changes = made.module, (*model.changes, *made.changes)
    model.restore(stored.config, stored.state_dict)
    model.on_sphere = flags["on_sphere"] is True
    if flags["frozen"] is True:
        model.freeze()
    return model


def restore(model: Any, config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
    """Load weights, for `StyleHeads.restore`; the dimension of the features too, if it was found only there.

    Raises:
        ValueError: they are of another configuration or backbone; the model is then unchanged.
    """
    mine, there = model.config(), ADDED | dict(config)
    compared = [k for k in mine if k not in FOUND or k in there]
    differ = [f"{k}: {there.get(k)} in the checkpoint, {mine[k]} here" for k in compared if there.get(k) != mine[k]]
    if differ:
        raise ValueError(f"the checkpoint belongs to another configuration of StyleHeads: {'; '.join(differ)}")
    axis = _checks.choice(there.get("axis"), (None, 1, -1), "axis")
    own = model.state_dict()
    try:
        state = stacked.matched(state_dict, own, model.projections, model._dropped)
        sizes = [{k: getattr(v, "shape", None) for k, v in each.items()} for each in (state, own)]
        with nullcontext() if sizes[0] == sizes[1] else storage.unchanged_on_error(model):
            state = {k: storage.sharded_as(v, own.get(k)) for k, v in state.items()}
            model.load_state_dict(storage.with_versions(state, storage.versions(own)))
    except RuntimeError as error:
        raise ValueError(f"the checkpoint belongs to another backbone than {model.backbone_name}: {error}") from error
    if axis is not None:
        model._pooling = replace(model._pooling, axis=axis)
