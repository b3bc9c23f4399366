"""`StyleHeads`: any backbone, followed by one projection head per named space.

Legend: V views, B images, F backbone width, S spaces, h hidden width, d_s width of space s.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from ssd_addon import _checks, heads_state, storage
from ssd_addon._types import as_weights
from ssd_addon.backbones import TimmFeatures, prepared, unwrapped
from ssd_addon.batch import ViewBatch, is_plain, views_of
from ssd_addon.embeddings import Embeddings, of_batch
from ssd_addon.encoder import FEATURES, Encoder, keep_still
from ssd_addon.plan import ViewPlan
from ssd_addon.pooling import POOLS, Pool
from ssd_addon.projection import (
    NORMS,
    Hidden,
    Norm,
    ProjectionHeads,
    Projections,
    checked_hidden,
    checked_spaces,
    whole,
)
from ssd_addon.stacked import ReadsStacked


class StyleHeads(ReadsStacked):
    """A backbone and one projection head per space; maps images or views to one embedding per space, by name.

    z^s = head_s(pool(backbone(x))); a hidden layer is Linear, norm, ReLU, the last layer is Linear.

    All views go through backbone and heads in one pass, so batch statistics are computed over all V*B images.
    `model(batch, view_by_view=True)` passes the views one by one, which takes less memory; batch statistics are then
    per view (B images), so results in training mode differ. Images are cast to the dtype of the weights.

    >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> model = StyleHeads(backbone, {"content": 16, "color": 4}, in_features=8, hidden=(32,))
    >>> {name: tuple(z.shape) for name, z in model(torch.rand(3, 5, 3, 8, 8)).items()}
    {'content': (3, 5, 16), 'color': (3, 5, 4)}

    Args:
        backbone: module that returns [N, F], a map [N, F, H, W] (or [N, H, W, F]) or tokens [N, T, F]. The classifier
            of a timm or torchvision model is removed, and that of any other module if it is called `fc`, `heads`,
            `head` or `classifier`, or in networks of images `linear` or `last_linear`, and comes last; `model.changes`
            lists what was removed. torch.compile,
            DistributedDataParallel and averages of weights are unwrapped. All this happens on copies: the caller's
            backbone is not altered; its parameters are shared and trained.
        spaces: name -> width d_s, "content" first.
        in_features: F, the feature width of the backbone. None reads it from the backbone: from `num_features`, as in
            timm, from the input width of the classifier, or else from a trial run of a copy without data (on torch's
            meta device).
        hidden: widths of the hidden layers, for all heads or by name.
        norm: normalization in the hidden layers: "batch" (BatchNorm), "layer" (LayerNorm, without batch statistics) or
            None (no normalization; hidden layers then have a bias).
        pool: "auto" takes [N, F] unchanged and averages maps and tokens (timm models pool as in timm); "mean" averages
            (timm models as in timm: without class token and registers, unless the model's own average includes them, as
            VOLO's does), and is refused for models that timm does not average; "cls" takes the class token; "flatten"
            keeps every position.
        output: where the features are if the backbone returns a dictionary, a tuple or a Hugging Face ModelOutput: a
            key such as "last_hidden_state", or an index into the tuple.
        sample_ndim: number of dimensions of one sample: 3 for images, 1 for vectors. An input with one dimension more
            is a plain batch, one with two more is views.
        axis: dimension of the features in maps, tokens or series: 1, as in [N, F, H, W], or -1, as in [N, T, F]. None
            finds it by a trial run, or else reads it off each output, which is ambiguous where T or H equals F.

    Attributes:
        spaces, hidden, in_features, norm, pool, output, sample_ndim: the arguments, resolved.
        changes: descriptions of what was removed from the backbone or set in it.
        on_sphere: whether metrics and reports compare L2-normalized embeddings; set it from the loss,
            `model.on_sphere = criterion.on_sphere`.
        frozen: whether the backbone is frozen, see `freeze`.

    Raises:
        ValueError: content is not the first space; a width is below 1; the backbone's width cannot be determined; the
            backbone is sharded; an input has the wrong number of dimensions.
        TypeError: the input has an integer dtype; the backbone returns several tensors and `output` selects none.

    Source: Eastwood et al., arXiv 2311.08815: content and style spaces side by side.
    """

    def __init__(
        self,
        backbone: nn.Module,
        spaces: Mapping[str, int],
        *,
        in_features: int | None = None,
        hidden: Hidden = (2048, 2048),
        norm: Norm | None = "batch",
        pool: Pool = "auto",
        output: str | int | None = None,
        sample_ndim: int = 3,
        axis: int | None = None,
    ) -> None:
        super().__init__()
        self.spaces = checked_spaces(spaces)
        self.pool: Pool = _checks.choice(pool, POOLS, "pool")
        self.norm: Norm | None = _checks.choice(norm, NORMS, "norm")
        self.sample_ndim = _checks.width(sample_ndim, "sample_ndim")
        if output is not None and (isinstance(output, bool) or not isinstance(output, str | int)):
            raise TypeError(f"output: expected a key or an index into the backbone's output: got {output!r}")
        self.output = output
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone: expected an nn.Module: got {type(backbone).__name__}")
        if in_features is not None:
            in_features = _checks.width(in_features, "in_features")
        self.hidden = checked_hidden(hidden, self.spaces)
        _checks.choice(axis, (None, 1, -1), "axis")
        made = prepared(backbone, in_features, pool, self.sample_ndim, output, axis)
        self.backbone, self.in_features = made.module, made.in_features
        self.backbone_name, self.changes = made.name, tuple(made.changes)
        self._dropped = tuple(f"backbone.{path}." for path in made.dropped)
        self._pooling = made.pooling(pool)
        self.on_sphere = self.frozen = False
        self._still: set[str] = set()  # parameters of the backbone that got no gradient before `freeze`
        self.projections = Projections(self.in_features, self.spaces, self.hidden, self.norm)

    @staticmethod
    def heads(
        in_features: int,
        spaces: Mapping[str, int],
        *,
        hidden: Hidden = (2048, 2048),
        norm: Norm | None = "batch",
    ) -> ProjectionHeads:
        """The heads without a backbone, to replace the projection head of a module of your own.

        self.projection_head = StyleHeads.heads(512, {"content": 128, "color": 64})
        ...
        z = self.projection_head(self.backbone(x).flatten(1))     features [V*B, F] -> name -> [V*B, d]
        loss = criterion(z, transform.plan)

        Args:
            in_features: F, the width of the features.
            spaces, hidden, norm: as for the constructor.
        """
        return ProjectionHeads(in_features, spaces, hidden=hidden, norm=norm)

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, x: ViewBatch | Sequence[Tensor], *, view_by_view: bool = False, features: Literal[False] = False
        ) -> Embeddings: ...
        @overload
        def __call__(
            self, x: Tensor, *, view_by_view: bool = False, features: Literal[False] = False
        ) -> Embeddings | dict[str, Tensor]: ...
        @overload
        def __call__(
            self, x: ViewBatch | Sequence[Tensor], *, view_by_view: bool = False, features: Literal[True]
        ) -> tuple[Embeddings, Tensor]: ...
        @overload
        def __call__(
            self, x: Tensor, *, view_by_view: bool = False, features: Literal[True]
        ) -> tuple[Embeddings | dict[str, Tensor], Tensor]: ...
        def __call__(self, x: Any, *, view_by_view: bool = False, features: bool = False) -> Any: ...

    def forward(
        self, x: ViewBatch | Tensor | Sequence[Tensor], *, view_by_view: bool = False, features: bool = False
    ) -> Embeddings | dict[str, Tensor] | tuple[Embeddings | dict[str, Tensor], Tensor]:
        """`Embeddings` name -> [V, B, d] for views; for a plain batch a dict name -> [B, d].

        Args:
            x: a `ViewBatch`; views [V, B, ...] or a list of V batches [B, ...], as lightly's transforms return them
                (both are read as a shared-query plan in the order of the spaces, unless the loss is given a batch or a
                plan); or a plain batch [B, ...]. Views of several sizes go through the backbone size by size.
            view_by_view: make one backbone pass per view, with batch statistics per view.
            features: return (embeddings, features) with the pooled backbone features [V, B, F] or [B, F], for probes
                that are trained along with the model.
        """
        views = views_of(x)
        out: Embeddings | dict[str, Tensor]
        if is_plain(views, x, self.sample_ndim):
            pooled = self._pooled(views)
            out = self.project(pooled)
            return (out, pooled) if features else out
        v, b = len(views), len(views[0])
        if view_by_view:
            parts = [self._pooled(view) for view in views]
            each = [self.project(part) for part in parts]
            pooled = torch.stack(parts)
            z = {n: torch.stack([part[n] for part in each]) for n in self.spaces}
        else:
            pooled = self._features(views)
            z = {n: t.view(v, b, -1) for n, t in self.project(pooled.flatten(0, 1)).items()}
        if isinstance(x, ViewBatch):
            _checks.same_names(self.spaces, x.plan.spaces, "heads", "view plan")
            out = of_batch(z, x)
        else:
            out = Embeddings(z, ViewPlan.shared_query(tuple(self.spaces)), assumed=True)
        return (out, pooled) if features else out

    def features(self, x: ViewBatch | Tensor | Sequence[Tensor]) -> Tensor:
        """Pooled backbone features, [B, F] or [V, B, F]; the caller sets training mode and gradients."""
        views = views_of(x)
        with _outside_forward("features"):
            return self._pooled(views) if is_plain(views, x, self.sample_ndim) else self._features(views)

    def project(self, features: Tensor) -> dict[str, Tensor]:
        """Apply the heads to pooled features of a plain batch, as from `features(x)`: [N, F] to name -> [N, d]."""
        with _outside_forward("project"):
            z: dict[str, Tensor] = self.projections(features)
            return z

    def head(self, name: str) -> nn.Sequential:
        """A copy of one head as plain layers, [N, F] -> [N, d]; `encoder(name)` includes the backbone."""
        return self.projections.head(name)

    def encoder(self, space: str = FEATURES) -> Encoder:
        """One space as a plain module, images [B, C, H, W] -> [B, d], for torch.export, ONNX and inference.

        Args:
            space: name of the space; "backbone" gives the pooled features [B, F].

        Returns:
            A module that shares the backbone and has a copy of the head, in the present training or evaluation mode
            of this model (call `.eval()` first for inference). Its own `train()` and `eval()` set the shared backbone,
            unless this model is frozen.

        Raises:
            KeyError: no such space.
        """
        head = nn.Identity() if space == FEATURES and space not in self.spaces else self.head(space)
        made = Encoder(self.backbone, self._pooling, head.train(self.training), self.sample_ndim, self.frozen)
        made.training = self.training  # the backbone stays as it is
        return made

    def export_backbone(self) -> dict[str, Tensor]:
        """The backbone's weights under the keys of the library that it came from.

        Load them into a model without a classifier, `timm.create_model(name, num_classes=0)`, or into one with a
        classifier with `load_state_dict(weights, strict=False)`. A timm model pools in its own way: where `pool` is
        another one ("mean" for a transformer whose features are its class token), `changes` says so, and
        `net.reset_classifier(0, "avg")` before `load_state_dict` makes the model return the same features as here.

        Wrappers that were put around the backbone since are taken off. The weights of a model that FSDP2 has sharded
        are gathered: call this on every rank.

        Returns:
            key -> tensor, detached and contiguous; without the parts that were removed (`changes`).
        """
        backbone = unwrapped(self.backbone)
        prefix = "model." if isinstance(backbone, TimmFeatures) else ""
        state = backbone.state_dict()

        def own(key: str) -> str:  # "module" is the library's own name here: wrappers were removed
            return storage.bare(key, storage.INSIDE).removeprefix(prefix)

        versions = {own(f"{path}.").rstrip("."): found for path, found in storage.versions(state).items()}
        return storage.with_versions({own(k): whole(t).contiguous() for k, t in state.items()}, versions)

    def freeze(self) -> "StyleHeads":
        """Freeze the backbone and return the model.

        The backbone gets no gradient and stays in evaluation mode even after `train()`, so that its batch statistics do
        not change and dropout is off; only the heads are trained. Its parts are shared with the module that was given
        to the constructor, so they are frozen there too, and put back into evaluation mode here if that is trained.
        """
        if not self.frozen:
            self._still = {n for n, p in self.backbone.named_parameters() if not p.requires_grad}
        self.frozen = True
        self.backbone.requires_grad_(False)
        self.backbone.eval()
        return self

    def unfreeze(self) -> "StyleHeads":
        """Undo `freeze`: train again what was trained before; nothing changes where it was not called."""
        if self.frozen:
            self.frozen = False
            for name, p in self.backbone.named_parameters():
                p.requires_grad_(name not in self._still)
            self.backbone.train(self.training)
        return self

    def train(self, mode: bool = True) -> "StyleHeads":
        """Set training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def config(self) -> dict[str, Any]:
        """The constructor's arguments other than the backbone, as plain numbers and strings; `axis` if it is known."""
        axis = self._pooling.axis
        return {
            "spaces": dict(self.spaces),
            "in_features": self.in_features,
            "hidden": {n: list(h) for n, h in self.hidden.items()},
            "norm": self.norm,
            "pool": self.pool,
            "output": self.output,
            "sample_ndim": self.sample_ndim,
        } | ({} if axis is None else {"axis": axis})

    def save(self, path: str | Path, *, card: Mapping[str, Any] | None = None) -> None:
        """Save the weights of backbone and heads, with the configuration, `on_sphere`, and whether it is frozen.

        A model that FSDP2 has sharded is gathered: call this on every rank; rank 0 writes.

        Args:
            path: the file to write.
            card: what else is needed to open the file without the training script (see `ssd_addon.runs`), as plain
                numbers, strings, lists and dictionaries.

        Raises:
            ValueError: the card is not valid, or the state contains more than tensors and plain data.
            OSError: the file cannot be written.
        """
        storage.write(path, heads_state.written(self, card))

    @classmethod
    def load(cls, path: str | Path, backbone: nn.Module, *, map_location: Any = "cpu") -> "StyleHeads":
        """Load a model that `save` wrote.

        Every entry of the file is compared with its checksum. Files without checksums, such as those in torch.save's
        format before 1.6, are opened unverified.

        Args:
            path: the file.
            backbone: a backbone of the same architecture; its weights are overwritten.
            map_location: as for `torch.load`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is of another kind or damaged, or the backbone has another architecture.
        """
        stored = storage.read(path, expected="a file of StyleHeads.save", map_location=map_location)
        return cls.from_stored(stored, backbone)

    @classmethod
    def from_stored(cls, stored: storage.Stored, backbone: nn.Module) -> "StyleHeads":
        """Build the model from a stored file and a backbone of the same architecture.

        Raises:
            ValueError: the configuration is not valid for `StyleHeads`, or the weights are of another backbone.
        """
        model: StyleHeads = heads_state.opened(cls, stored, backbone)
        return model

    def restore(self, config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
        """Load weights; raises for those of another configuration or backbone, and then leaves the model unchanged.

        Keys may start with the names of wrappers of the saved model ("module.", "_orig_mod.", "model.").
        """
        heads_state.restore(self, config, state_dict)

    def _features(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """Pooled features [V, B, F] of all views, with one backbone pass per image size."""
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
        if self.frozen:
            keep_still(self.backbone)
        return self._pooling(self.backbone(as_weights(x, self.backbone)), x.shape[0])

    def extra_repr(self) -> str:
        changes = f", backbone: {'; '.join(self.changes)}" if self.changes else ""
        return f"spaces={self.spaces}, pool={self.pool!r}{', frozen' if self.frozen else ''}{changes}"


@contextmanager
def _outside_forward(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "DTensor" not in str(error):
            raise
        raise ValueError(
            f"{name}: expected whole parameters: got those of a model that FSDP2 has sharded, which gathers them only "
            f"in forward; call torch.distributed.fsdp.register_fsdp_forward_method(model, {name!r}) first"
        ) from error
