"""StyleHeads: any backbone, then one head per named space.

Legend: V views, B images, F backbone width, S spaces, h hidden width, d_s width of space s.
"""

import copy
import itertools
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon.batch import Embeddings, ViewBatch

POOLS = ("auto", "mean", "cls", "flatten")
Hidden = Sequence[int] | Mapping[str, Sequence[int]]


class StyleHeads(nn.Module):
    """A backbone and one projection head per space: images or views -> name -> embedding.

    z^s = head_s(pool(backbone(x))); a hidden layer is Linear, BatchNorm, ReLU, the last layer is Linear.

    All views go through backbone and heads in one pass, so that batch statistics are those of the V*B images together.
    `model(batch, view_by_view=True)` passes each view on its own: less memory, and statistics per view (B images), so
    in training mode its numbers differ. Heads of equal depth run as one batched product.

    >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> model = StyleHeads(backbone, {"content": 16, "color": 4}, in_features=8, hidden=(32,))
    >>> {name: tuple(z.shape) for name, z in model(torch.rand(3, 5, 3, 8, 8)).items()}
    {'content': (3, 5, 16), 'color': (3, 5, 4)}

    Args:
        backbone: returns [N, F], a map [N, F, H, W] (or [N, H, W, F]) or tokens [N, T, F]. Its classifier (`fc`,
            `heads`, `head`, `classifier`) is left out, on a copy of the outer module: the caller's backbone is not
            altered, its parameters are shared and trained.
        spaces: name -> width d_s, "content" first.
        in_features: F. None reads it from the backbone: timm's `num_features`, or the input width of the classifier.
        hidden: widths of the hidden layers, for all heads or by name.
        pool: "auto" takes [N, F] as it is, averages maps and tokens (timm models pool as timm does); "mean" averages;
            "cls" takes the first token; "flatten" keeps every position.
        sample_ndim: dimensions of one sample: 3 for images, 1 for vectors. An input of one more is a plain batch,
            of two more is views.

    Raises:
        ValueError: no content first, a width below 1, an unknown backbone width, an input of other dimensions.
        TypeError: integer input, a backbone that returns anything but a tensor.

    Source: Eastwood et al., arXiv 2311.08815: content and style spaces beside each other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        spaces: Mapping[str, int],
        *,
        in_features: int | None = None,
        hidden: Hidden = (2048, 2048),
        pool: str = "auto",
        sample_ndim: int = 3,
    ) -> None:
        super().__init__()
        if not isinstance(spaces, Mapping):
            raise TypeError(f"spaces: expected a mapping name -> width, 'content' first: got {type(spaces).__name__}")
        names = _checks.spaces(tuple(spaces), "spaces")
        self.spaces: dict[str, int] = {n: _checks.width(w, f"width of space {n!r}") for n, w in spaces.items()}
        self.pool = _checks.choice(pool, POOLS, "pool")
        self.sample_ndim = _checks.width(sample_ndim, "sample_ndim")
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone: expected an nn.Module: got {type(backbone).__name__}")
        if in_features is not None:
            in_features = _checks.width(in_features, "in_features")
        self.backbone, self.in_features = _without_classifier(backbone, in_features, pool)
        if isinstance(hidden, Mapping):
            _checks.same_names(hidden, names, "hidden", "heads")
            by_name = {n: _checks.widths(hidden[n], n) for n in names}
        else:
            by_name = dict.fromkeys(names, _checks.widths(hidden, "every head"))
        self.hidden: dict[str, tuple[int, ...]] = by_name
        # Heads of the same hidden widths form a stack, in the order of the spaces.
        self.stacks = nn.ModuleList()
        for widths in dict.fromkeys(by_name.values()):
            members = {n: self.spaces[n] for n in names if by_name[n] == widths}
            self.stacks.append(HeadStack(self.in_features, widths, members))

    def forward(self, x: ViewBatch | Tensor, *, view_by_view: bool = False) -> Embeddings | dict[str, Tensor]:
        """`Embeddings` name -> [V, B, d] for views; for a plain batch a dict name -> [B, d].

        Args:
            x: `ViewBatch`, views [V, B, ...] (read as shared query), or a plain batch [B, ...].
            view_by_view: one backbone pass per view, with batch statistics per view.
        """
        views = x.views if isinstance(x, ViewBatch) else x
        plain = self._is_plain(views, batch_only=isinstance(x, ViewBatch))
        if plain or not view_by_view:
            z = self.project(self._pooled(views if plain else views.flatten(0, 1)))
            if plain:
                return z
            v, b = views.shape[:2]
            out = {n: t.view(v, b, -1) for n, t in z.items()}
        else:
            each = [self.project(self._pooled(view)) for view in views.unbind(0)]
            out = {n: torch.stack([z[n] for z in each]) for n in self.spaces}
        if isinstance(x, ViewBatch):
            _checks.same_names(self.spaces, x.plan.spaces, "heads", "view plan")
            return Embeddings(out, x.plan, image_ids=x.image_ids, space_index=x.space_index)
        return Embeddings(out)

    def features(self, x: ViewBatch | Tensor) -> Tensor:
        """Pooled backbone features, [B, F] or [V, B, F]. Train mode and gradient are the caller's business."""
        views = x.views if isinstance(x, ViewBatch) else x
        if self._is_plain(views, batch_only=isinstance(x, ViewBatch)):
            return self._pooled(views)
        return self._pooled(views.flatten(0, 1)).view(*views.shape[:2], -1)

    def project(self, features: Tensor) -> dict[str, Tensor]:
        """What the heads make of pooled features of a plain batch, `features(x)`: [N, F] to name -> [N, d]."""
        found: dict[str, Tensor] = {}
        for stack in self.stacks:
            found |= stack(features)
        return {n: found[n] for n in self.spaces}

    def head(self, name: str) -> nn.Sequential:
        """One head as plain layers (a copy): [N, F] -> [N, d]. `nn.Sequential(model.backbone, ...)` runs it alone."""
        for stack in self.stacks:
            assert isinstance(stack, HeadStack)
            if name in stack.widths:
                return stack.head(name)
        raise KeyError(f"there is no head {name!r}: the spaces are {_checks.names(self.spaces)}")

    # ------------------------------------------------------------------------------------ saving and loading

    def config(self) -> dict[str, Any]:
        """What the constructor needs beside the backbone: plain numbers and strings."""
        return {
            "spaces": dict(self.spaces),
            "in_features": self.in_features,
            "hidden": {n: list(h) for n, h in self.hidden.items()},
            "pool": self.pool,
            "sample_ndim": self.sample_ndim,
        }

    def save(self, path: str | Path, *, card: Mapping[str, Any] | None = None) -> None:
        """Weights of backbone and heads, with the configuration.

        Args:
            path: where to write.
            card: what else is needed to open the file without the training script (`ssd_addon.checkpoints`): plain
                numbers, strings, lists and dictionaries.

        Raises:
            ValueError: a card that could not be read rightly (`checkpoints.check_card`).
        """
        if card is not None:
            from ssd_addon.checkpoints import check_card  # it opens what this class writes

            check_card(card)
        content = {"config": self.config(), "state_dict": self.state_dict()}
        torch.save(content if card is None else content | {"card": dict(card)}, path)

    @classmethod
    def load(cls, path: str | Path, backbone: nn.Module, *, map_location: Any = "cpu") -> "StyleHeads":
        """The model that `save` wrote, around a backbone of the same architecture (whose weights are overwritten).

        Raises:
            ValueError: not such a file, or a backbone of another architecture.
        """
        try:
            stored = torch.load(path, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: expected a file of StyleHeads.save: could not be read ({error})") from error
        if not isinstance(stored, dict) or not {"config", "state_dict"} <= stored.keys():
            raise ValueError(f"{path}: expected a file of StyleHeads.save (config and state_dict): got another content")
        config = dict(stored["config"])
        spaces = config.pop("spaces")
        model = cls(backbone, spaces, **config)
        model.restore(stored["config"], stored["state_dict"])
        return model

    def restore(self, config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
        """Load weights; refuses those of another configuration and says where the two differ."""
        mine = self.config()
        differ = [f"{k}: {config.get(k)} in the checkpoint, {mine[k]} here" for k in mine if config.get(k) != mine[k]]
        if differ:
            raise ValueError(f"the checkpoint belongs to another configuration of StyleHeads: {'; '.join(differ)}")
        try:
            self.load_state_dict(state_dict)
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint belongs to another backbone than {_name(self.backbone)}: {error}"
            ) from error

    # ------------------------------------------------------------------------------------ inside

    def _is_plain(self, x: Tensor, *, batch_only: bool) -> bool:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a ViewBatch or a tensor of images: got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(
                f"expected floating-point images: got {x.dtype}; StructuredViews scales uint8 images, otherwise divide "
                "by 255"
            )
        n = self.sample_ndim
        if x.ndim not in (n + 1, n + 2) or (batch_only and x.ndim != n + 2):
            raise ValueError(
                f"expected views with {n + 2} dimensions [V, B, ...] or a batch with {n + 1}, as samples have {n} "
                f"(sample_ndim): got {x.ndim} dimensions {_checks.shape(x)}"
            )
        return x.ndim == n + 1

    def _pooled(self, x: Tensor) -> Tensor:
        y = self.backbone(x)
        if not isinstance(y, Tensor):
            inside = f" with keys {_checks.names(y)}" if isinstance(y, Mapping) else ""
            raise TypeError(
                f"backbone: expected one tensor of features: got {type(y).__name__}{inside} from "
                f"{_name(self.backbone)}; "
                "wrap it in a module that returns the features"
            )
        f = self.in_features
        channels_last = y.ndim == 4 and y.shape[1] != f and y.shape[-1] == f
        if self.pool == "flatten":
            y = y.flatten(1)
        elif y.ndim == 4:
            y = y.mean(dim=(1, 2) if channels_last else (2, 3))
        elif y.ndim == 3:
            y = y[:, 0] if self.pool == "cls" else y.mean(dim=1)
        if y.ndim != 2 or y.shape[1] != f or y.shape[0] != x.shape[0]:
            raise ValueError(
                f"backbone: expected {f} features per image (in_features), [N, F], maps [N, F, H, W] or tokens "
                f"[N, T, F]: got {_checks.shape(y)} from {_name(self.backbone)} after pool={self.pool!r}"
            )
        return y


class HeadStack(nn.Module):
    """Heads of equal hidden widths, run side by side: [N, F] -> name -> [N, d_s].

    One product makes the first hidden layer of all heads, one batched product each further one; the batch norm of
    all heads is one layer over their channels, which is what each head would do alone. Weights are stored stacked
    (first layer [S*h, F], further ones [S, h, h'], norms and biases one-dimensional).
    """

    def __init__(self, in_features: int, hidden: tuple[int, ...], widths: Mapping[str, int]) -> None:
        super().__init__()
        self.hidden, self.widths = hidden, dict(widths)
        s = len(widths)
        self.first = nn.Linear(in_features, s * hidden[0], bias=False) if hidden else None
        self.norms = nn.ModuleList([nn.BatchNorm1d(s * h) for h in hidden])
        self.products = nn.ParameterList()
        for h_in, h_out in itertools.pairwise(hidden):
            layers = [nn.Linear(h_in, h_out, bias=False).weight.detach() for _ in widths]
            self.products.append(nn.Parameter(torch.stack(layers)))
        last = hidden[-1] if hidden else in_features
        self.last = nn.ModuleList([nn.Linear(last, d) for d in widths.values()])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.first is None:
            return {n: layer(x) for n, layer in zip(self.widths, self.last, strict=True)}
        s, n = len(self.widths), x.shape[0]
        y = torch.relu(self.norms[0](self.first(x)))  # [N, S*h]
        for weight, norm in zip(self.products, self.norms[1:], strict=True):
            per_head = torch.einsum("nsi,soi->nso", y.view(n, s, -1), weight)
            y = torch.relu(norm(per_head.reshape(n, -1)))
        each = y.view(n, s, -1).unbind(1)
        return {name: layer(h) for name, layer, h in zip(self.widths, self.last, each, strict=True)}

    def head(self, name: str) -> nn.Sequential:
        """The head of one space as Linear, BatchNorm1d, ReLU, ..., Linear; a copy."""
        k = list(self.widths).index(name)
        layers: list[nn.Module] = []
        for i, (h, norm) in enumerate(zip(self.hidden, self.norms, strict=True)):
            part = slice(k * h, (k + 1) * h)
            if i == 0:
                assert self.first is not None
                weight = self.first.weight[part]
            else:
                weight = self.products[i - 1][k]
            linear = nn.Linear(weight.shape[1], h, bias=False, device=weight.device, dtype=weight.dtype)
            assert isinstance(norm, nn.modules.batchnorm._BatchNorm)  # SyncBatchNorm too
            single = nn.BatchNorm1d(h, norm.eps, norm.momentum, device=weight.device, dtype=weight.dtype)
            assert single.num_batches_tracked is not None and norm.num_batches_tracked is not None
            with torch.no_grad():
                linear.weight.copy_(weight)
                for attribute in ("weight", "bias", "running_mean", "running_var"):
                    getattr(single, attribute).copy_(getattr(norm, attribute)[part])
                single.num_batches_tracked.copy_(norm.num_batches_tracked)
            layers += [linear, single, nn.ReLU()]
        layers.append(copy.deepcopy(self.last[k]))
        return nn.Sequential(*layers).train(self.training)


class _TimmFeatures(nn.Module):
    """timm's own features: forward_features, and its pooling where pool is "auto"."""

    def __init__(self, model: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.model, self.pooled = model, pooled

    def forward(self, x: Tensor) -> Any:
        y = self.model.forward_features(x)  # type: ignore[operator]
        return self.model.forward_head(y, pre_logits=True) if self.pooled else y  # type: ignore[operator]


def _without_classifier(backbone: nn.Module, in_features: int | None, pool: str) -> tuple[nn.Module, int]:
    """(a module that returns features, F). Shares every parameter with the caller's backbone, alters none of it."""
    if callable(getattr(backbone, "forward_features", None)) and callable(getattr(backbone, "forward_head", None)):
        pooled = pool == "auto"
        width = getattr(backbone, "head_hidden_size", None) if pooled else None
        width = width or getattr(backbone, "num_features", None)
        return _TimmFeatures(backbone, pooled), in_features or _checks.width(width, "num_features of the backbone")
    for attribute in ("fc", "heads", "head", "classifier"):
        classifier = getattr(backbone, attribute, None)
        if not isinstance(classifier, nn.Module):
            continue
        linear = next((m for m in classifier.modules() if isinstance(m, nn.Linear)), None)
        if linear is None or in_features not in (None, linear.in_features):
            continue
        outer = copy.copy(backbone)
        outer._modules = dict(backbone._modules)
        outer._modules[attribute] = nn.Identity()
        return outer, linear.in_features
    if in_features is None:
        width = getattr(backbone, "num_features", None)
        if isinstance(width, int) and width > 0:
            return backbone, width
        raise ValueError(
            f"backbone {_name(backbone)}: expected num_features, or a classifier fc, heads, head or classifier, to "
            "read the width of its features from: got none of them; give in_features"
        )
    return backbone, in_features


def _name(module: nn.Module) -> str:
    inner = module.model if isinstance(module, _TimmFeatures) else module
    return type(inner).__name__
