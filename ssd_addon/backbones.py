"""Prepares a backbone for the heads: unwraps it and removes its classifier, on copies.

The caller's module is never altered: to remove a part, the modules that contain it are copied (not their parameters,
which stay shared and are trained). Legend: F backbone width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ssd_addon import _checks
from ssd_addon.backbone_trial import Trial, copied, patched, replaced, runs_without_data, trial, tried_width
from ssd_addon.pooling import Pool, Pooling, picked

CLASSIFIERS = ("fc", "heads", "head", "classifier")
"""Names of the classifier in torchvision's models and most others."""
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


@dataclass
class Prepared:
    """A backbone that is ready for the heads.

    Attributes:
        module: returns features; shares the parameters of the caller's backbone.
        in_features: F.
        name: name of the caller's backbone, for messages.
        changes: descriptions of the changes.
        dropped: names of the removed parts.
        class_token: whether an output [N, F] is the class token.
        output: key or index of the features in the module's output.
        axis: dimension of the features in maps, tokens or series, 1 or -1; None if it is not known.
    """

    module: nn.Module
    in_features: int
    name: str
    output: str | int | None = None
    changes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    class_token: bool = False
    axis: int | None = None

    def pooling(self, pool: Pool) -> Pooling:
        """The pooling for its features."""
        return Pooling(self.in_features, pool, self.output, self.class_token, self.name, self.axis)

    def drop(self, path: str, new: nn.Module, why: str) -> None:
        """Replace a part by a module without parameters, on a copy."""
        if patched(self.module):
            raise ValueError(
                f"backbone {self.name}: expected a module with the forward of its class, as {path!r} has to be "
                "removed: got one whose forward was replaced on the instance; put nn.Identity() there yourself and "
                "give in_features, or pass the module before it was changed"
            )
        self.module = replaced(self.module, path, new)
        self.dropped.append(path)
        self.changes.append(f"{path!r} removed, {why}")


def prepared(
    backbone: nn.Module, in_features: int | None, pool: str, sample_ndim: int, output: str | int | None = None
) -> Prepared:
    """The backbone without wrappers and classifier, and its width.

    Raises:
        ValueError: the width cannot be determined; a wrapper cannot be removed.
        TypeError: the backbone returns several tensors and `output` selects none.
    """
    made = Prepared(backbone, in_features or 0, type(backbone).__name__, output)
    _unwrap(made)
    net = made.module
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
    elif callable(getattr(net, "forward_features", None)) and callable(getattr(net, "forward_head", None)):
        _timm(made, pool, in_features)
    elif not _torchvision(made, in_features, pool):
        _other(made, in_features, sample_ndim)
        made.in_features = made.in_features or _width(made, sample_ndim, pool)
    return made


def _width(made: Prepared, sample_ndim: int, pool: str) -> int:
    """The width of a module's output, from a trial run."""
    found = tried_width(made.module, sample_ndim, pool, lambda y: picked(y, made.output, made.name))
    if found is not None:
        made.axis = found[1]
        return found[0]
    if pool == "flatten":
        raise ValueError(
            f"backbone {made.name}: expected in_features for pool='flatten', as the number of features depends on the "
            "size of the images: got None; give the width of the flattened features"
        )
    raise ValueError(
        f"backbone {made.name}: expected num_features, a classifier fc, heads, head or classifier at its end, or a "
        "module that runs on images of a usual size, from which to read the feature width: got none of them; give "
        "in_features, the width of its output"
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
        kind = next((c.__name__ for c in type(made.module).__mro__ if c.__name__ in WRAPPERS), "")
        inner = made.module._modules.get(WRAPPERS[kind]) if kind else None
        if inner is None:
            return
        made.changes.append(f"unwrapped from {kind}; wrap the StyleHeads instead")
        made.module = inner


# ------------------------------------------------------------------------------------------------ classifiers


def _torchvision(made: Prepared, in_features: int | None, pool: str) -> bool:
    """Remove the classifiers, auxiliary ones included, of a torchvision model. False if it is not one."""
    if not type(made.module).forward.__module__.startswith("torchvision.models"):
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
        layers = [] if part is None else [m for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        if not layers:
            continue
        first = layers[0]
        width = first.in_features if isinstance(first, nn.Linear) else first.in_channels
        if in_features not in (None, width):
            continue
        made.drop(name, nn.Identity() if isinstance(first, nn.Linear) else nn.AdaptiveAvgPool2d(1), "the classifier")
        made.in_features = width
        for aux in ("aux1", "aux2", "AuxLogits"):
            if made.module._modules.get(aux) is not None:
                made.drop(aux, nn.Identity(), "an auxiliary classifier")
        if getattr(made.module, "aux_logits", False):
            made.module.aux_logits = False  # type: ignore[assignment]
        return True
    return False


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
    for name in CLASSIFIERS:
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


# ------------------------------------------------------------------------------------------------ timm


class TimmFeatures(nn.Module):
    """timm's own features: forward_features and, if timm pools them, forward_head up to the classifier."""

    def __init__(self, model: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.model, self.pooled = model, pooled

    def forward(self, x: Tensor) -> Any:
        net: Any = self.model
        y = net.forward_features(x)
        return net.forward_head(y, pre_logits=True) if self.pooled else y


def _timm(made: Prepared, pool: str, in_features: int | None) -> None:
    model: Any = made.module
    pooled = pool == "auto"
    if pool == "cls":
        pooled = _class_token_as_timm(made)
    if pool == "mean":
        pooled = _average_as_timm(made)
    made.module = TimmFeatures(made.module, pooled)
    for path in _timm_classifiers(model):
        made.drop(f"model.{path}", nn.Identity(), "the classifier")
    width = (getattr(model, "head_hidden_size", None) if pooled else None) or getattr(model, "num_features", None)
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"backbone {made.name}: expected num_features, as timm's models have: got {width!r}")
    made.in_features = in_features or width
    _drop_idle_parts(made)


def _timm_config(model: Any) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return config if isinstance(config, dict) else {}


def _timm_classifiers(model: Any) -> list[str]:
    """Paths of the classifiers in timm's configuration, if they have parameters."""
    named = _timm_config(model).get("classifier") or ()
    found = []
    for path in (named,) if isinstance(named, str) else tuple(named):
        try:
            part = model.get_submodule(path)
        except AttributeError:
            continue
        if any(True for _ in part.parameters()):
            found.append(path)
    return found


def _class_token_as_timm(made: Prepared) -> bool:
    """Make a timm model return its class token. False if the class token is the first of the tokens that the model
    returns, True if timm has to select it (CrossViT and CoaT have one at every scale)."""
    net: Any = made.module
    prefix = getattr(net, "num_prefix_tokens", None)
    tokens = {n.rpartition(".")[2]: p for n, p in net.named_parameters()}
    if prefix:  # some have registers and no class token
        found = prefix > (tokens["reg_token"].shape[1] if "reg_token" in tokens else 0)
    else:
        found = prefix is None and any(n.startswith("cls_token") for n in tokens) and _pools(net, "token")
    if not found:
        raise ValueError(f"pool: expected a model with a class token for 'cls': got {made.name} without one")
    if prefix or isinstance(trial(TimmFeatures(net, False), 3, _timm_sizes(net)).output, Tensor):
        return False
    _pool_by(made, "token")
    made.class_token = True
    return True


def _average_as_timm(made: Prepared) -> bool:
    """Make a timm model pool by its own average, without the class token; False if it has no such pooling."""
    net = made.module
    if isinstance(getattr(net, "global_pool", None), str):
        if not _pools(net, "avg"):
            raise ValueError(
                f"pool: expected 'auto' or 'cls' for timm's {made.name}, whose tokens timm does not average: got 'mean'"
            )
        _pool_by(made, "avg")
        if net._modules.get("attn_pool") is not None:
            made.module._modules["attn_pool"] = None
            made.dropped.append("model.attn_pool")
        return True
    kinds = [getattr(m, "pool_type", "") for m in net.modules() if type(m).__name__ == "SelectAdaptivePool2d"]
    return bool(kinds) and all("avg" in str(kind) for kind in kinds)


def _pools(net: nn.Module, how: str) -> bool:
    """Does this timm model support that pooling?"""
    return runs_without_data(net, lambda twin: twin.reset_classifier(0, how))


def _pool_by(made: Prepared, how: str) -> None:
    made.module = copied(made.module)
    made.module.global_pool = how  # type: ignore[assignment]


def _timm_sizes(model: Any) -> list[tuple[int, ...]]:
    size = _timm_config(model).get("input_size")
    return [tuple(size)] if size else []


def _drop_idle_parts(made: Prepared) -> None:
    """Remove the parts of a timm model's head that this pooling never runs: they would get no gradient."""
    net: Any = made.module
    seen = trial(net, 3, _timm_sizes(net.model), graph=True)
    if not seen.ran:
        return
    for name, part in net.model.named_children():
        inside = [f"model.{name}.{n}" for n, _ in part.named_children()] if name in ("head", "head_dist") else []
        for path in inside or [f"model.{name}"]:
            runs = any(c == path or c.startswith(f"{path}.") for c in seen.calls)
            if not runs and any(True for _ in net.get_submodule(path).parameters()):
                made.drop(path, nn.Identity(), "as this pooling does not run it")
    idle = [name for name, _ in net.model.named_parameters(recurse=False) if f"model.{name}" in seen.idle]
    if idle:  # EfficientViM has weights for its classifiers, which timm's reset_classifier(0) freezes too
        inner = copied(made.module.model)  # type: ignore[arg-type]
        for name in idle:
            inner._parameters[name] = nn.Parameter(getattr(inner, name).detach(), requires_grad=False)
            made.changes.append(f"'model.{name}' frozen, as only the classifier uses it")
        made.module = replaced(made.module, "model", inner)
