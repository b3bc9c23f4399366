"""Prepares a backbone for the heads: unwraps it and removes its classifier, on copies.

The caller's module is never altered: to remove a part, the modules that contain it are copied (not their parameters,
which stay shared and are trained). Legend: F backbone width.
"""

import warnings
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ssd_addon import _checks, backbone_transformers, storage
from ssd_addon.backbone_changes import Prepared
from ssd_addon.backbone_timm import TimmFeatures as TimmFeatures
from ssd_addon.backbone_timm import sizes_of, take_timm
from ssd_addon.backbone_trial import Trial, trial, trials, width_and_axis
from ssd_addon.pooling import picked

CLASSIFIERS = ("fc", "heads", "head", "classifier", "linear", "last_linear")
"""Names of the classifier in torchvision's models and most others; "linear" in the common ResNets for CIFAR."""
NO_FEATURES = ("torchvision.models.detection", "torchvision.models.segmentation")
"""Modules whose models, around a backbone, return boxes and masks."""
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "ModelEma": "module",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "_FabricModule": "_original_module",
}
"""Classes that wrap a network, and the attribute that holds it."""


def prepared(
    backbone: nn.Module,
    in_features: int | None,
    pool: str,
    sample_ndim: int,
    output: str | int | None = None,
    axis: int | None = None,
) -> Prepared:
    """The backbone without wrappers and classifier, and its width.

    Raises:
        ValueError: the width cannot be determined; a wrapper cannot be removed; the features are in another dimension
            than `axis`; the backbone returns boxes or masks.
        TypeError: the backbone returns several tensors and `output` selects none.
    """
    made = Prepared(backbone, in_features or 0, type(backbone).__name__, output)
    _unwrap(made)
    net = made.module
    backbone_transformers.check(net, pool)
    made.name = type(net).__name__
    if lazy := [n for n, t in (*net.named_parameters(), *net.named_buffers()) if is_lazy(t)]:
        raise ValueError(
            f"backbone {made.name}: expected initialized parameters: got lazy ones, {_checks.names(lazy)}; run the "
            "backbone on one batch first"
        )
    if isinstance(net, torch.jit.ScriptModule):
        if in_features is None:
            raise ValueError(
                f"backbone {made.name}: expected in_features for a script module, whose classifier cannot be removed: "
                "got none; give the width of its output, or pass the module before scripting"
            )
    elif isinstance(net, torch.fx.GraphModule) and "train" in vars(net):
        raise ValueError(
            f"backbone {made.name}: expected a module with train() and eval(): got one of torch.export, whose mode is "
            "fixed; pass the module before it was exported"
        )
    elif _home(net).startswith(NO_FEATURES) and "backbone" in net._modules:
        raise ValueError(
            f"backbone: expected a network that returns features: got torchvision's {made.name}, which returns boxes "
            "or masks; give its features, model.backbone, with output= for the one of them that you want"
        )
    elif callable(getattr(net, "forward_features", None)) and callable(getattr(net, "forward_head", None)):
        if not take_timm(made, pool, in_features):
            _try(made, sample_ndim, pool, sizes_of(net))
    elif not _torchvision(made, in_features, pool):
        _other(made, in_features, sample_ndim)
        _try(made, sample_ndim, pool, backbone_transformers.sizes_of(net) if sample_ndim == 3 else ())
    if axis is not None and made.axis not in (None, axis):
        raise ValueError(
            f"axis: expected {made.axis}, the dimension in which {made.name} returned {made.in_features} features in a "
            f"trial run: got {axis}"
        )
    made.axis = made.axis or axis
    return made


def without_missing(net: nn.Module, in_features: int, sample_ndim: int, state: Mapping[str, Any]) -> Prepared:
    """The backbone of a stored model without a classifier that the file lacks, as it was removed before it was saved.

    Where it is as wide as the features, the width alone does not tell whether it belongs to them (see `_other`).
    """
    made = Prepared(net, in_features, type(net).__name__)
    keys = [f".{storage.bare(key)}" for key in state]
    for name in CLASSIFIERS:
        part = net._modules.get(name)
        if not isinstance(part, nn.Linear) or any(f".backbone.{name}." in key for key in keys):
            continue
        if trial(net, sample_ndim).is_last(name):
            made.drop(name, nn.Identity(), "as the file has no weights of it")
    return made


def _home(net: nn.Module) -> str:
    """The module that a network's forward comes from; "" of one that is generated (torch.fx)."""
    return type(net).forward.__module__ or ""


def _try(made: Prepared, sample_ndim: int, pool: str, sizes: Iterable[tuple[int, ...]] = ()) -> None:
    """Find the dimension of the features of a module by trial runs, and their number if it is not known."""
    seen = list(islice(trials(made.module, sample_ndim, sizes), 2))
    try:
        found = width_and_axis(seen, pool, lambda y: picked(y, made.output, made.name), made.in_features or None)
    except TypeError:
        if not made.in_features:
            raise
        return  # in training mode it may return another kind of output
    if found is not None:
        made.axis = found[1]
    if made.in_features:
        return
    if found is not None:
        made.in_features = found[0]
        if sample_ndim > 1:  # of vectors, any encoder ends in such a layer
            _warn_of_logits(made, seen[0])
        return
    if pool == "flatten":
        raise ValueError(
            f"backbone {made.name}: expected in_features for pool='flatten', as the number of features depends on the "
            "size of the images: got None; give the width of the flattened features"
        )
    what = (
        f"an output of shape {_checks.shape(picked(seen[0].output, made.output, made.name))}" if seen else "none of it"
    )
    raise ValueError(
        f"backbone {made.name}: expected num_features, a classifier fc, heads, head or classifier at its end, or an "
        f"output for images of a usual size, from which to read the feature width: got {what}; give in_features, the "
        "width of its output"
    )


def _warn_of_logits(made: Prepared, seen: Trial) -> None:
    """Say that the features come from a Linear layer, which may be a classifier of another name."""
    for name, part in made.module.named_children():
        if name in seen.last and isinstance(part, nn.Linear) and not isinstance(made.module, nn.Sequential):
            warnings.warn(
                f"backbone {made.name}: {name!r}, a Linear layer ({part.in_features} to {part.out_features}), comes "
                "last, and what it returns is used as features; if it is a classifier, replace it by nn.Identity(), "
                f"otherwise give in_features={part.out_features}",
                UserWarning,
                stacklevel=5,
            )


# ------------------------------------------------------------------------------------------------ wrappers


def _unwrap(made: Prepared) -> None:
    while True:
        kinds = {c.__name__ for m in made.module.modules() for c in type(m).__mro__}
        if "FullyShardedDataParallel" in kinds or "FSDPModule" in kinds:
            raise ValueError(
                "backbone: expected a module before it is sharded: got one inside FSDP; build StyleHeads around the "
                "bare backbone and shard the StyleHeads, fully_shard(model)"
            )
        kind, inner = _inside(made.module)
        if inner is None:
            return
        made.changes.append(f"unwrapped from {kind}; wrap the StyleHeads instead")
        made.module = inner


def unwrapped(net: nn.Module) -> nn.Module:
    """The network inside the wrappers around it."""
    while (inner := _inside(net)[1]) is not None:
        net = inner
    return net


def _inside(net: nn.Module) -> tuple[str, nn.Module | None]:
    """The class of a wrapper and the module in it; None of any other module."""
    kind = next((c.__name__ for c in type(net).__mro__ if c.__name__ in WRAPPERS), "")
    return kind, net._modules.get(WRAPPERS[kind]) if kind else None


# ------------------------------------------------------------------------------------------------ classifiers


def _torchvision(made: Prepared, in_features: int | None, pool: str) -> bool:
    """Remove the classifiers, auxiliary ones included, of a torchvision model. False if it is not one."""
    if not _home(made.module).startswith("torchvision.models"):
        return False
    if type(made.module).__name__ == "VisionTransformer":
        made.class_token = True
        if pool == "mean":
            raise ValueError(
                "pool: expected 'auto' or 'cls' for torchvision's VisionTransformer, which returns its class token "
                "alone: got 'mean'; timm's transformers can be averaged"
            )
    for name in CLASSIFIERS:
        part = made.module._modules.get(name)
        layers = [] if part is None else [m for m in part.modules() if isinstance(m, nn.Linear | _ConvNd)]
        if not layers:
            continue
        first = layers[0]
        width = first.in_features if isinstance(first, nn.Linear) else first.in_channels
        if in_features not in (None, width):
            continue
        made.drop(name, _without_positions(first), "the classifier")
        made.in_features = width
        for aux in ("aux1", "aux2", "AuxLogits"):
            if made.module._modules.get(aux) is not None:
                made.drop(aux, nn.Identity(), "an auxiliary classifier")
        if getattr(made.module, "aux_logits", False):
            made.module.aux_logits = False  # type: ignore[assignment]
        return True
    return False


def _without_positions(classifier: nn.Module) -> nn.Module:
    """What stands in for a classifier: where it is a convolution, it also averages over positions."""
    if isinstance(classifier, nn.Linear):
        return nn.Identity()
    assert isinstance(classifier, _ConvNd)
    return (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(classifier.kernel_size) - 1](1)


def _other(made: Prepared, in_features: int | None, sample_ndim: int) -> None:
    """Any other module: a part with the name of a classifier is removed only if it comes last.

    If the feature width is given (in_features, or its num_features) and the module returns as many features, nothing is
    removed, unless its last part also takes as many. If no width is given, `made.in_features` stays 0.
    """
    net: Any = made.module
    own = getattr(net, "num_features", None)
    own = own if isinstance(own, int) and own > 0 else None
    declared = in_features or own
    seen: Trial | None = None
    for name in CLASSIFIERS if sample_ndim == 3 else CLASSIFIERS[:4]:  # of vectors, "linear" may be any encoder's last
        part = net._modules.get(name)
        layers = [] if part is None else [m for m in part.modules() if isinstance(m, nn.Linear)]
        if not layers:
            continue
        before, after = layers[0].in_features, layers[-1].out_features
        if in_features is not None and (after == in_features or before != in_features):
            continue
        if declared == after != before:
            continue
        seen = seen or trial(net, sample_ndim)
        if not seen.ran and in_features is None:
            raise ValueError(
                f"backbone {made.name}: expected a module that runs on images of a usual size, to find out whether "
                f"{name!r} is a classifier at its end: got one that does not; give in_features, the width of its "
                f"output, and replace {name!r} by nn.Identity() if it is a classifier"
            )
        if seen.is_last(name):
            made.drop(name, nn.Identity(), f"a classifier ({before} to {after}), as it comes last")
            made.in_features = before
            return
    made.in_features = in_features or own or 0
