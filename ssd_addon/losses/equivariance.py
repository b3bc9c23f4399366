"""Equivariance: a given change of augmentation parameters changes a style code in a way that depends only on the code.

    L = (weight / M) sum_m misalignment(h_m(z^m_a, theta^m_b - theta^m_a), z^m_b)

a and b are two views of an image that share no parameters (query and content key), theta^m are the parameters of group
m, and h_m is a small network for style m, trained with the model. Plain style pairs allow *content-entangled* style
codes: the same style maps to a different code for each image (docs/method.md). The effect of a given change then
differs from image to image, and h_m, which does not see the image, cannot predict it. Unlike cross-image keys, this
term needs no second image. It is meant for the SimCLR family; measurements are in docs/results.md.

Legend: V views, B images, M styles, d_m width of style m, k_m numbers that describe a change of group m's parameters.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ssd_addon import _checks, _dist
from ssd_addon._dist import Shards
from ssd_addon._shapes import Scalar
from ssd_addon._types import KeepsType
from ssd_addon.batch import ViewBatch
from ssd_addon.differences import parameter_differences
from ssd_addon.losses.families import FamilyName, resolve_family
from ssd_addon.losses.objective import Objective

DRIFT = 1e-7
"""Difference of the networks' weights between ranks from which they are not the same, as a share of their size."""
SCALE_EPS = 1e-10
"""Added to the variance by which changes are scaled; smaller than any parameter's range in its own units."""


class DrawsParameters(Protocol):
    """Anything that draws views and lists its parameters, such as `StructuredViews`."""

    def parameter_sizes(self) -> Mapping[str, int]: ...


class EquivarianceLoss(KeepsType):
    """Equivariance term to add to the loss: `loss = criterion(z) + equivariance(z, batch)`.

    Misalignment is measured as in the criterion's family, on the same scale: (1 - mean cosine) / temperature, 25 * mean
    squared difference, sum over coordinates of (c_kk - 1)^2, or weight * mean alignment.

    >>> import kornia.augmentation as K
    >>> from ssd_addon import Embeddings, StructuredViews
    >>> views = StructuredViews({"color": [K.ColorJitter(hue=0.5, p=1.0)]}, seed=0)
    >>> equivariance = EquivarianceLoss({"content": 6, "color": 3}, views)
    >>> batch = views(torch.rand(8, 3, 4, 4))
    >>> z = Embeddings({"content": torch.randn(3, 8, 6), "color": torch.randn(3, 8, 3)}, batch.plan)
    >>> equivariance(z, batch).shape
    torch.Size([])

    Args:
        spaces: name -> width, as in `StyleHeads.spaces`.
        views: the `StructuredViews` that draws the batches, or its `parameter_sizes()`.
        family: the criterion's family, a name or a `losses.Family`.
        temperature: the criterion's temperature (simclr only; default 0.15).
        weight: weight of the term. The term is a mean over the M styles, whereas the criterion's invariance is a mean
            over all M + 1 spaces: weight 1 counts (M + 1) / M times as much as an invariance of default weight.
        hidden: widths of h_m's hidden layers.
        gather_distributed: use the samples of all ranks of the default process group, as in `JointEntropyLoss`: the
            mean over ranks then equals the term of one process on the whole batch. Otherwise every rank uses its own
            samples and their statistics (the scale of the changes; the standardization of barlow).

    Its parameters are trained with the model's: give both to the optimizer. Under DistributedDataParallel wrap it too,
    without `device_ids` (which would rebuild the embeddings), so that its gradients are averaged; Fabric's `setup` and
    accelerate's `prepare` do so. Samples whose key was made from another image are left out; in an interleaved plan, so
    are those whose key shares group m.

    Raises:
        ValueError: a style space has no group, or its operations have no parameters to predict; a temperature is given
            for another family; when called: the batch was drawn by other views; with `gather_distributed`, the
            networks differ between ranks, because nothing averages their gradients.
        TypeError: spaces is not a mapping; views is neither `StructuredViews` nor a mapping.

    Source: docs/method.md; Devillers and Lefort 2022 (EquiMod), arXiv 2211.01244, predict the embedding of a changed
    view from the change, for one space and without structured views.
    """

    def __init__(
        self,
        spaces: Mapping[str, int],
        views: DrawsParameters | Mapping[str, int],
        *,
        family: FamilyName | Objective = "simclr",
        temperature: float | None = None,
        weight: float = 1.0,
        hidden: Sequence[int] = (128, 128),
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.gather_distributed = bool(gather_distributed)
        if not isinstance(spaces, Mapping):
            raise TypeError(
                f"spaces: expected a mapping name -> width, as StyleHeads.spaces: got {type(spaces).__name__}"
            )
        named = family if isinstance(family, str) else family.name
        if temperature is not None and named != "simclr":
            raise ValueError(f"temperature: the {named!r} family has none: got {temperature!r}")
        self.objective = resolve_family(family, temperature=temperature)
        self.weight = _checks.not_negative(weight, "weight", "of this term")
        self.widths = {n: _checks.width(d, f"width of space {n!r}") for n, d in spaces.items() if n != "content"}
        if not self.widths:
            raise ValueError(f"spaces: expected content and at least one style: got {_checks.names(spaces)}")
        sizes = _sizes(views)
        self.groups: dict[str, dict[str, int]] = {}  # style -> parameter of its group -> numbers of its change
        self.scales, self.networks = nn.ModuleDict(), nn.ModuleDict()
        for name, width in self.widths.items():
            own = {path: k for path, k in sizes.items() if _group(path) == name}
            if not own:
                drawn = _checks.names(dict.fromkeys(map(_group, sizes)))
                raise ValueError(
                    f"style space {name!r}: expected a group of that name that draws parameters: got those of {drawn}; "
                    "operations that are shared by seed (operations.seeded) have none to predict"
                )
            self.groups[name] = own
            numbers = sum(own.values())
            layers: list[nn.Module] = []
            edges = [width + numbers, *_checks.widths(hidden, "every style")]
            for a, b in itertools.pairwise(edges):
                layers += [nn.Linear(a, b), nn.ReLU()]
            self.scales[_key(name)] = nn.BatchNorm1d(numbers, affine=False, eps=SCALE_EPS)
            self.networks[_key(name)] = nn.Sequential(*layers, nn.Linear(edges[-1], width))

    if TYPE_CHECKING:

        def __call__(self, z: Mapping[str, Tensor], batch: ViewBatch) -> Tensor: ...

    def forward(self, z: Mapping[str, Tensor], batch: ViewBatch) -> Scalar:
        """The term, a scalar.

        Args:
            z: embeddings [V, B, d] of the batch.
            batch: the batch, with the parameters of its views.
        """
        return self.weight * torch.stack(list(self.terms(z, batch).values())).mean()

    def terms(self, z: Mapping[str, Tensor], batch: ViewBatch) -> dict[str, Scalar]:
        """Style -> its term before the weight, on the family's scale; 0 means perfectly predictable."""
        changes = _changes(batch)
        b = batch.images
        group = _dist.default_group() if self.gather_distributed else None
        shards = None
        out = {}
        for name, sizes in self.groups.items():
            t = z.get(name)
            if t is None:
                raise ValueError(f"embeddings: expected the style space {name!r}: got {_checks.names(z)}")
            if t.ndim != 3 or len(t) < 2 or t.shape[1:] != (b, self.widths[name]):
                expected = f"[V, {b}, {self.widths[name]}], two views or more of the batch's images"
                raise ValueError(f"embeddings, {name!r}: expected {expected}: got {_checks.shape(t)}")
            _check_drawn(sizes, changes)
            network = self.networks[_key(name)]
            dtype = next(network.parameters()).dtype
            change = torch.cat([changes[path] for path in sizes], dim=1).to(t.device, dtype, non_blocking=True)
            rows = _redrawn_rows(name, batch, t.device)
            if shards is None:
                size = self._size(t.device) if group is not None and self.training else []
                shards, sizes = _dist.shards(b, size, t.device, group)
                _check_equal(sizes)
            with torch.autocast(t.device.type, enabled=False):
                out[name] = self._misalignment(name, t[0].to(dtype), t[1].to(dtype), change, rows, shards)
        return out

    def _size(self, device: torch.device) -> Tensor | list[int]:
        """Sum of all weights and of their absolute values, as the bits of float64; nothing where they are sharded."""
        weights = [p.detach() for p in self.parameters() if p.requires_grad]
        if not weights or any(hasattr(p, "full_tensor") for p in weights):
            return []
        sums = [torch.stack([t.sum(dtype=torch.float64) for t in each]).sum() for each in (weights, map(abs, weights))]
        return torch.stack(sums).to(device).view(torch.int64)

    def _misalignment(
        self, name: str, a: Tensor, b: Tensor, change: Tensor, rows: Tensor | None, shards: Shards
    ) -> Tensor:
        """Misalignment of h(a, change) and b, both [B, d], over the samples in the mask."""
        if self.objective.on_sphere:
            a = nn.functional.normalize(a, dim=1)
        scale: Any = self.scales[_key(name)]
        change = _dist.gather(change, shards)  # a few numbers per sample, with statistics over all ranks
        if len(change) > 1 or not self.training:
            change = scale(change)
        else:  # a single sample has no statistics
            change = nn.functional.batch_norm(change, scale.running_mean, scale.running_var, eps=scale.eps)
        own = change[shards.offset : shards.offset + shards.size]
        guess = self.networks[_key(name)](torch.cat([a, own], dim=1))
        return self.objective.misalignment(guess, b, rows, shards)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, styles={_checks.names(self.groups)}"


def _sizes(views: DrawsParameters | Mapping[str, int]) -> Mapping[str, int]:
    if isinstance(views, Mapping):
        return {path: _checks.width(k, f"numbers of {path!r}") for path, k in views.items()}
    if not callable(getattr(views, "parameter_sizes", None)):
        got = type(views).__name__
        hint = "; pass the object that draws the batches, not a batch" if isinstance(views, ViewBatch) else ""
        raise TypeError(f"views: expected StructuredViews, or its parameter_sizes(): got {got}{hint}")
    return views.parameter_sizes()


def _check_drawn(sizes: Mapping[str, int], changes: Mapping[str, Tensor]) -> None:
    if missing := [path for path in sizes if path not in changes]:
        raise ValueError(
            f"batch: expected the parameters {_checks.names(missing)}, which the views draw: got none of these"
        )
    for path, k in sizes.items():
        if changes[path].shape[1] != k:
            raise ValueError(
                f"batch: expected {k} numbers for the change of {path}: got {changes[path].shape[1]}; the batch was "
                "drawn by other views"
            )


def _check_equal(sizes: Sequence[Sequence[int]]) -> None:
    """Refuse networks that differ between ranks."""
    found = [_dist.from_bits(row, torch.float64) for row in sizes if row]
    for rank, (total, absolute) in enumerate(found):
        if abs(total - found[0][0]) > DRIFT * max(absolute, found[0][1]):
            raise ValueError(
                "equivariance: expected the same networks on every rank, as their gradients have to be averaged: got "
                f"others on rank {rank} than on rank 0; wrap this loss as the model, DistributedDataParallel("
                "equivariance), fabric.setup(equivariance) or accelerator.prepare(equivariance)"
            )


def _redrawn_rows(name: str, batch: ViewBatch, device: torch.device) -> Tensor | None:
    """Mask [B] of the samples that show one image under two draws of group `name`; None for all."""
    same = None if batch.image_ids is None else (batch.image_ids[1] == batch.image_ids[0]).to(device)
    if batch.plan.kind != "interleaved":
        return same
    b, index = batch.images, batch.space_index
    index = (batch.plan.default_space_index(b) if index is None else index).to(device)
    redrawn = index != batch.plan.spaces.index(name)
    return redrawn if same is None else redrawn & same


def _changes(batch: ViewBatch) -> dict[str, Tensor]:
    if not isinstance(batch, ViewBatch):
        raise TypeError(f"batch: expected a ViewBatch, as StructuredViews returns: got {type(batch).__name__}")
    if len(batch.parameters) < 2:
        raise ValueError(
            "batch: expected the parameters of at least two views, as StructuredViews records them: got "
            f"{len(batch.parameters)}; views from other sources have none"
        )
    return parameter_differences(batch.parameters[0], batch.parameters[1])


def _key(name: str) -> str:
    """A valid name for a submodule, without dots."""
    return "_" + name.replace("%", "%25").replace(".", "%2E")


def _group(path: str) -> str:
    """ "color/0.ColorJitter/hue_factor" -> "color"; a group's own name may hold slashes."""
    return path.rsplit("/", 2)[0]
