"""StyleHeads: any backbone, then one head per named space.

Legend: V views, B images, F backbone width, S spaces, h hidden width, d_s width of space s.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from ssd_addon import _checks, storage
from ssd_addon._types import as_weights
from ssd_addon.backbones import prepared
from ssd_addon.batch import ViewBatch, stacked
from ssd_addon.card import check_card
from ssd_addon.embeddings import Embeddings, of_batch
from ssd_addon.plan import ViewPlan
from ssd_addon.stack import HeadStack

Pool = Literal["auto", "mean", "cls", "flatten"]
POOLS: tuple[Pool, ...] = ("auto", "mean", "cls", "flatten")
Hidden = Sequence[int] | Mapping[str, Sequence[int]]


class StyleHeads(nn.Module):
    """A backbone and one projection head per space: images or views -> name -> embedding.

    z^s = head_s(pool(backbone(x))); a hidden layer is Linear, BatchNorm, ReLU, the last layer is Linear.

    All views go through backbone and heads in one pass, so that batch statistics are those of the V*B images together.
    `model(batch, view_by_view=True)` passes each view on its own: less memory, and statistics per view (B images), so
    in training mode its numbers differ. Heads of equal depth run as one batched product. Images are cast to the type of
    the weights.

    >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> model = StyleHeads(backbone, {"content": 16, "color": 4}, in_features=8, hidden=(32,))
    >>> {name: tuple(z.shape) for name, z in model(torch.rand(3, 5, 3, 8, 8)).items()}
    {'content': (3, 5, 16), 'color': (3, 5, 4)}

    Args:
        backbone: returns [N, F], a map [N, F, H, W] (or [N, H, W, F]) or tokens [N, T, F]. The classifier of a timm or
            torchvision model is left out, and that of any other module where it is called `fc`, `heads`, `head` or
            `classifier` and comes last; `model.changes` says what was. A module inside torch.compile,
            DistributedDataParallel or an average of weights is taken out of it. All of that is done on copies: the
            caller's backbone is not altered, its parameters are shared and trained.
        spaces: name -> width d_s, "content" first.
        in_features: F, the width of what the backbone returns. None reads it from the backbone: timm's and others'
            `num_features`, or the input width of the classifier.
        hidden: widths of the hidden layers, for all heads or by name.
        pool: "auto" takes [N, F] as it is, averages maps and tokens (timm models pool as timm does); "mean" averages
            (timm models as timm does, without the class token); "cls" takes the first token; "flatten" keeps every
            position.
        sample_ndim: dimensions of one sample: 3 for images, 1 for vectors. An input of one more is a plain batch,
            of two more is views.

    Attributes:
        spaces, hidden, in_features, pool, sample_ndim: as above, resolved.
        changes: what was taken off the backbone, in words.
        on_sphere: whether embeddings are compared L2-normalized, for measures and reports; set it from the loss,
            `model.on_sphere = criterion.on_sphere`.

    Raises:
        ValueError: no content first, a width below 1, an unknown backbone width, a sharded backbone, an input of other
            dimensions.
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
        pool: Pool = "auto",
        sample_ndim: int = 3,
    ) -> None:
        super().__init__()
        if not isinstance(spaces, Mapping):
            raise TypeError(f"spaces: expected a mapping name -> width, 'content' first: got {type(spaces).__name__}")
        names = _checks.spaces(tuple(spaces), "spaces")
        self.spaces: dict[str, int] = {n: _checks.width(w, f"width of space {n!r}") for n, w in spaces.items()}
        self.pool: Pool = _checks.choice(pool, POOLS, "pool")
        self.sample_ndim = _checks.width(sample_ndim, "sample_ndim")
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone: expected an nn.Module: got {type(backbone).__name__}")
        if in_features is not None:
            in_features = _checks.width(in_features, "in_features")
        made = prepared(backbone, in_features, pool, self.sample_ndim)
        self.backbone, self.in_features = made.module, made.in_features
        self.backbone_name, self.changes = made.name, tuple(made.changes)
        self._dropped = tuple(f"backbone.{path}." for path in made.dropped)
        self._class_token = made.class_token
        self.on_sphere = False
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

    if TYPE_CHECKING:

        @overload
        def __call__(self, x: ViewBatch | Sequence[Tensor], *, view_by_view: bool = False) -> Embeddings: ...
        @overload
        def __call__(self, x: Tensor, *, view_by_view: bool = False) -> Embeddings | dict[str, Tensor]: ...
        def __call__(self, x: Any, *, view_by_view: bool = False) -> Any: ...

    def forward(
        self, x: ViewBatch | Tensor | Sequence[Tensor], *, view_by_view: bool = False
    ) -> Embeddings | dict[str, Tensor]:
        """`Embeddings` name -> [V, B, d] for views; for a plain batch a dict name -> [B, d].

        Args:
            x: `ViewBatch`, views [V, B, ...] or a list of V batches [B, ...] as lightly's transforms give them (both
                read as shared query in the order of the spaces, unless the loss is given a batch or a plan), or a plain
                batch [B, ...]. Views of several sizes go through the backbone size by size.
            view_by_view: one backbone pass per view, with batch statistics per view.
        """
        views = self._views(x)
        if self._is_plain(views, x):
            return self.project(self._pooled(views))
        v, b = len(views), len(views[0])
        if view_by_view:
            each = [self.project(self._pooled(view)) for view in views]
            out = {n: torch.stack([z[n] for z in each]) for n in self.spaces}
        else:
            out = {n: t.view(v, b, -1) for n, t in self.project(self._features(views).flatten(0, 1)).items()}
        if isinstance(x, ViewBatch):
            _checks.same_names(self.spaces, x.plan.spaces, "heads", "view plan")
            return of_batch(out, x)
        return Embeddings(out, ViewPlan.shared_query(tuple(self.spaces)), assumed=True)

    def features(self, x: ViewBatch | Tensor | Sequence[Tensor]) -> Tensor:
        """Pooled backbone features, [B, F] or [V, B, F]. Train mode and gradient are the caller's business."""
        views = self._views(x)
        with _outside_forward("features"):
            return self._pooled(views) if self._is_plain(views, x) else self._features(views)

    def project(self, features: Tensor) -> dict[str, Tensor]:
        """What the heads make of pooled features of a plain batch, `features(x)`: [N, F] to name -> [N, d]."""
        found: dict[str, Tensor] = {}
        with _outside_forward("project"):
            features = as_weights(features, self.stacks)
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
        """Weights of backbone and heads, with the configuration. A model that FSDP2 has sharded is gathered: call it on
        every rank; rank 0 writes.

        Args:
            path: where to write.
            card: what else is needed to open the file without the training script (`ssd_addon.runs`): plain numbers,
                strings, lists and dictionaries.

        Raises:
            ValueError: a card that could not be read rightly, or a state that holds more than tensors and plain data.
            OSError: the file cannot be written.
        """
        content: dict[str, Any] = {"config": self.config(), "state_dict": self.state_dict()}
        if card is not None:
            check_card(card)
            content["card"] = dict(card)
        storage.write(path, content)

    @classmethod
    def load(cls, path: str | Path, backbone: nn.Module, *, map_location: Any = "cpu") -> "StyleHeads":
        """The model that `save` wrote, around a backbone of the same architecture (whose weights are overwritten).

        Every entry of the file is compared with its checksum. Files without checksums, such as those of torch.save's
        format before 1.6, open unverified.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, a damaged one, or a backbone of another architecture.
        """
        stored = storage.read(path, expected="a file of StyleHeads.save", map_location=map_location)
        return cls.from_stored(stored, backbone)

    @classmethod
    def from_stored(cls, stored: storage.Stored, backbone: nn.Module) -> "StyleHeads":
        """The model of a file that was read, around a backbone of the same architecture.

        Raises:
            ValueError: a configuration that makes no `StyleHeads`, or weights of another backbone.
        """
        config = dict(stored.config)
        try:
            model = cls(backbone, config.pop("spaces"), **config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"its configuration does not make a StyleHeads ({error})") from error
        model.restore(stored.config, stored.state_dict)
        return model

    def restore(self, config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
        """Load weights; refuses those of another configuration or backbone, says where the two differ, and is left as
        it was.

        Keys may carry the names of what wrapped the model when it was saved ("module.", "_orig_mod.", "model.").
        """
        mine = self.config()
        differ = [f"{k}: {config.get(k)} in the checkpoint, {mine[k]} here" for k in mine if config.get(k) != mine[k]]
        if differ:
            raise ValueError(f"the checkpoint belongs to another configuration of StyleHeads: {'; '.join(differ)}")
        own = self.state_dict()
        try:
            state = storage.matched(state_dict, own, self._dropped)
            sizes = [{k: getattr(v, "shape", None) for k, v in each.items()} for each in (state, own)]
            with nullcontext() if sizes[0] == sizes[1] else storage.unchanged_on_error(self):
                self.load_state_dict({k: storage.sharded_as(v, own.get(k)) for k, v in state.items()})
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint belongs to another backbone than {self.backbone_name}: {error}"
            ) from error

    # ------------------------------------------------------------------------------------ inside

    def _views(self, x: Any) -> Any:
        """Views as one tensor, or as a list where their sizes differ; a plain batch as it is."""
        if isinstance(x, ViewBatch):
            return x.views
        if isinstance(x, list | tuple):
            return stacked(x)[0]
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a ViewBatch, a tensor of images or a list of views: got {type(x).__name__}")
        return x

    def _is_plain(self, views: Tensor | Sequence[Tensor], given: Any) -> bool:
        n = self.sample_ndim
        for t in (views,) if isinstance(views, Tensor) else views:
            if not t.is_floating_point():
                raise TypeError(
                    f"expected floating-point images: got {t.dtype}; StructuredViews scales uint8 images, otherwise "
                    "divide by 255"
                )
            dimensions = t.ndim if isinstance(views, Tensor) else t.ndim + 1
            if dimensions != n + 2 and (dimensions != n + 1 or not isinstance(given, Tensor)):
                raise ValueError(
                    f"expected views with {n + 2} dimensions [V, B, ...] or a batch with {n + 1}, as samples have {n} "
                    f"(sample_ndim): got {t.ndim} dimensions {_checks.shape(t)}"
                )
        return isinstance(views, Tensor) and views.ndim == n + 1

    def _features(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """Pooled features [V, B, F] of all views: one pass for each size."""
        if isinstance(views, Tensor):
            return self._pooled(views.flatten(0, 1)).view(*views.shape[:2], -1)
        sizes: dict[Any, list[int]] = {}
        for v, view in enumerate(views):
            sizes.setdefault(view.shape[1:], []).append(v)
        out: dict[int, Tensor] = {}
        for members in sizes.values():
            together = self._pooled(torch.cat([views[v] for v in members]))
            out |= dict(zip(members, together.chunk(len(members)), strict=True))
        return torch.stack([out[v] for v in range(len(views))])

    def _pooled(self, x: Tensor) -> Tensor:
        y = self.backbone(as_weights(x, self.backbone))
        if not isinstance(y, Tensor):
            inside = f" with keys {_checks.names(y)}" if isinstance(y, Mapping) else ""
            raise TypeError(
                f"backbone: expected one tensor of features: got {type(y).__name__}{inside} from {self.backbone_name}; "
                "wrap it in a module that returns the features"
            )
        f = self.in_features
        if self.pool == "cls" and y.ndim != 3 and not self._class_token:
            raise ValueError(
                f"pool: expected a backbone that returns tokens [N, T, F] for 'cls': got {_checks.shape(y)} from "
                f"{self.backbone_name}; 'auto' takes what it returns"
            )
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
                f"[N, T, F]: got {_checks.shape(y)} from {self.backbone_name} after pool={self.pool!r}"
            )
        return y

    def extra_repr(self) -> str:
        changes = f", backbone: {'; '.join(self.changes)}" if self.changes else ""
        return f"spaces={self.spaces}, pool={self.pool!r}{changes}"


@contextmanager
def _outside_forward(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "DTensor" not in str(error):
            raise
        raise ValueError(
            f"{name}: expected whole parameters: got those of a model that FSDP2 has sharded, which gathers them in "
            f"forward alone; call torch.distributed.fsdp.register_fsdp_forward_method(model, {name!r}) first"
        ) from error
