"""timm's models: without their classifier, pooled as timm pools them. Legend: F backbone width."""

from typing import Any

from torch import Tensor, nn

from ssd_addon.backbone_changes import Prepared, copied, replaced
from ssd_addon.backbone_trial import runs_without_data, trial


class TimmFeatures(nn.Module):
    """timm's own features: forward_features and, if timm pools them, forward_head up to the classifier."""

    def __init__(self, model: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.model, self.pooled = model, pooled

    def forward(self, x: Tensor) -> Any:
        net: Any = self.model
        y = net.forward_features(x)
        return net.forward_head(y, pre_logits=True) if self.pooled else y


def take_timm(made: Prepared, pool: str, in_features: int | None) -> bool:
    """Prepare a timm model; returns whether it pools its features itself."""
    model: Any = made.module
    pooled = pool == "auto"
    if pool == "cls":
        pooled = _class_token_as_timm(made)
    if pool == "mean":
        pooled = _average_as_timm(made)
    made.module = TimmFeatures(made.module, pooled)
    for path in _classifiers(model):
        made.drop(f"model.{path}", nn.Identity(), "the classifier")
    width = (getattr(model, "head_hidden_size", None) if pooled else None) or getattr(model, "num_features", None)
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"backbone {made.name}: expected num_features, as timm's models have: got {width!r}")
    made.in_features = in_features or (0 if pool == "flatten" else width)  # flattened: a trial run may tell
    _drop_idle_parts(made)
    return pooled


def _config(model: Any) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return config if isinstance(config, dict) else {}


def _classifiers(model: Any) -> list[str]:
    """Paths of the classifiers in timm's configuration, if they have parameters."""
    named = _config(model).get("classifier") or ()
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
    if prefix or isinstance(trial(TimmFeatures(net, False), 3, sizes_of(net)).output, Tensor):
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
            made.module = copied(made.module)
            made.module._modules["attn_pool"] = None
            made.changes.append("'model.attn_pool' removed, as this pooling does not run it")
        return True
    pools = [m for m in net.modules() if type(m).__name__ == "SelectAdaptivePool2d"]
    kinds = {str(getattr(m, "pool_type", "")).removeprefix("fast") for m in pools}
    if others := {kind for kind in kinds if "avg" in kind} - {"avg"}:
        raise ValueError(
            f"pool: expected 'auto' for timm's {made.name} with global_pool={min(others)!r}, which is more than an "
            "average: got 'mean'; create it with global_pool='avg'"
        )
    return kinds == {"avg"}


def _pools(net: nn.Module, how: str) -> bool:
    """Does this timm model support that pooling?"""
    return runs_without_data(net, lambda twin: twin.reset_classifier(0, how))


def _pool_by(made: Prepared, how: str) -> None:
    """Make a copy of a timm model pool in another way."""
    if (own := made.module.global_pool) == how:
        return
    made.module = copied(made.module)
    made.module.global_pool = how  # type: ignore[assignment]
    made.changes.append(f"pooled by {how!r}, not {own!r}; on a model of timm's: reset_classifier(0, {how!r})")


def sizes_of(model: Any) -> list[tuple[int, ...]]:
    size = _config(model).get("input_size")
    return [tuple(size)] if size else []


def _drop_idle_parts(made: Prepared) -> None:
    """Remove the parts of a timm model's head that this pooling never runs: they would get no gradient."""
    net: Any = made.module
    seen = trial(net, 3, sizes_of(net.model), graph=True)
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
