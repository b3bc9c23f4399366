"""Equivariance: what a known change of parameters does to a style code depends on the code alone, not on the image.

    L = (weight / M) sum_m alignment(h_m(z^m_a, theta^m_b - theta^m_a), z^m_b)

a and b are two views of an image that share nothing (query and content key), theta^m what group m drew for them, and
h_m a small network of its own for style m, trained with the model. Plain style pairs leave open that a style code is
turned by the content (docs/method.md, "Twisting"): then the answer to a known change differs from image to image, and
h_m, which does not see the image, cannot give it. Unlike cross-image keys it needs no second image. For the SimCLR
family: the others hardly twist, and VICReg's was measured to suffer at weight 1. *Ours*, figures in docs/results.md;
off unless you add it.

Legend: V views, B images, M styles, d_m width of style m, k_m numbers that group m's change has.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon._dist import Shards
from ssd_addon.batch import ViewBatch
from ssd_addon.differences import parameter_differences
from ssd_addon.losses import (
    DEFAULT_WEIGHT,
    DEFAULTS,
    FAMILIES,
    Pair,
    barlow_alignment,
    simclr_alignment,
    standardised,
    vicreg_alignment,
)

ENOUGH = 32
"""Images of a batch that say whether a group draws at all; of fewer, an operation may not have fired by chance."""
SCALE_EPS = 1e-10
"""Under the root that changes are divided by: below any range that a parameter has in its own units."""


class EquivarianceLoss(nn.Module):
    """A term to add: `loss = criterion(z) + equivariance(z, batch)`.

    The alignment is that of the criterion's family, on the same scale: (1 - mean cosine) / temperature, 25 * mean
    squared difference, or sum over coordinates of (c_kk - 1)^2.

    >>> import kornia.augmentation as K
    >>> from ssd_addon import Embeddings, StructuredViews
    >>> batch = StructuredViews({"color": [K.ColorJitter(hue=0.5, p=1.0)]}, seed=0)(torch.rand(8, 3, 4, 4))
    >>> equivariance = EquivarianceLoss({"content": 6, "color": 3}, batch)
    >>> z = Embeddings({"content": torch.randn(3, 8, 6), "color": torch.randn(3, 8, 3)}, batch.plan)
    >>> equivariance(z, batch).shape
    torch.Size([])

    Args:
        spaces: name -> width, those of `StyleHeads.spaces`.
        batch: any batch of the views that it will see: it says which parameters each group draws.
        family: of the criterion.
        temperature: of the criterion (simclr; default 0.15).
        weight: of the term, which is a mean over the M styles where the criterion's invariance is one over all M + 1
            spaces: 1 counts (M + 1) / M times as much as an invariance of the family's default weight. Photographs were
            run with 0.5; 2, the best on latents, lost rotation and hue there (one seed).
        hidden: widths of h_m's hidden layers.

    Its parameters are trained with the model's: give both to the optimizer, and under DistributedDataParallel wrap it
    too, without `device_ids` (which would rebuild the embeddings and lose their plan), so that its gradients are
    averaged. Over ranks every rank takes its own rows and their statistics (the changes' scale; barlow's
    standardisation); nothing is gathered. Rows whose key was made from another image, and in an interleaved plan the
    rows whose key shares group m, are left out.

    Raises:
        ValueError: a style space without a group, or whose operations have no parameters; a temperature in another
            family.
        TypeError: spaces that are no mapping, a batch that is no `ViewBatch`.

    Warns:
        RuntimeWarning: a group that drew the same for every one of 32 images or more.

    Source: docs/method.md; networks that predict the embedding of a changed view from the change are known from
    Devillers and Lefort 2022 (EquiMod), arXiv 2211.01244, for one space and without structured views.
    """

    def __init__(
        self,
        spaces: Mapping[str, int],
        batch: ViewBatch,
        *,
        family: str = "simclr",
        temperature: float | None = None,
        weight: float = 1.0,
        hidden: Sequence[int] = (128, 128),
    ) -> None:
        super().__init__()
        if not isinstance(spaces, Mapping):
            raise TypeError(
                f"spaces: expected a mapping name -> width, as StyleHeads.spaces: got {type(spaces).__name__}"
            )
        self.family = _checks.choice(family, FAMILIES, "family")
        if temperature is not None and family != "simclr":
            raise ValueError(f"temperature: the {family!r} family has none: got {temperature!r}")
        chosen = DEFAULTS["simclr"]["temperature"] if temperature is None else temperature
        self.temperature = _checks.positive(chosen, "temperature", "of the criterion")
        self.weight = _checks.not_negative(weight, "weight", "of this term")
        self.widths = {n: _checks.width(d, f"width of space {n!r}") for n, d in spaces.items() if n != "content"}
        if not self.widths:
            raise ValueError(f"spaces: expected content and at least one style: got {_checks.names(spaces)}")
        found = _differences(batch)
        self.groups: dict[str, list[str]] = {}  # style -> the parameters of its group
        self.scales, self.networks = nn.ModuleDict(), nn.ModuleDict()
        for name, width in self.widths.items():
            own = [key for key in found if _group(key) == name]
            if not own:
                drawn = _checks.names(dict.fromkeys(_group(key) for key in found)) or "nothing"
                raise ValueError(
                    f"style space {name!r}: expected a group of that name that draws parameters: got those of {drawn}"
                )
            images = batch.views.shape[1]
            if images >= ENOUGH and all(bool((found[key] == found[key][:1]).all()) for key in own):
                warnings.warn(
                    f"style space {name!r}: expected a group that draws its parameters anew for every view, or the "
                    f"term has no change to learn from: got the same change for all {images} images of this batch",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self.groups[name] = own
            numbers = sum(found[key].shape[1] for key in own)
            sizes = [width + numbers, *_checks.widths(hidden, "every style")]
            layers = [f for a, b in itertools.pairwise(sizes) for f in (nn.Linear(a, b), nn.ReLU())]
            self.scales[f"_{name}"] = nn.BatchNorm1d(numbers, affine=False, eps=SCALE_EPS)
            self.networks[f"_{name}"] = nn.Sequential(*layers, nn.Linear(sizes[-1], width))

    def forward(self, z: Mapping[str, Tensor], batch: ViewBatch) -> Tensor:
        """The term, a scalar. z: embeddings [V, B, d] of `batch`, whose parameters it reads."""
        return self.weight * torch.stack(list(self.terms(z, batch).values())).mean()

    def terms(self, z: Mapping[str, Tensor], batch: ViewBatch) -> dict[str, Tensor]:
        """Style -> its term before the weight, on the family's scale; 0 is perfect."""
        changes = _differences(batch)
        b = batch.views.shape[1]
        out = {}
        for name, keys in self.groups.items():
            t = z.get(name)
            if t is None:
                raise ValueError(f"embeddings: expected the style space {name!r}: got {_checks.names(z)}")
            if t.ndim != 3 or len(t) < 2 or t.shape[1:] != (b, self.widths[name]):
                expected = f"[V, {b}, {self.widths[name]}], two views or more of the batch's images"
                raise ValueError(f"embeddings, {name!r}: expected {expected}: got {_checks.shape(t)}")
            missing = [key for key in keys if key not in changes]
            if missing:
                raise ValueError(f"batch: expected parameters {_checks.names(missing)} as in the first batch: got none")
            network = self.networks[f"_{name}"]
            dtype = next(network.parameters()).dtype
            change = torch.cat([changes[key] for key in keys], dim=1).to(t.device, dtype, non_blocking=True)
            rows = self._rows(name, batch, t.device)
            with torch.autocast(t.device.type, enabled=False):
                out[name] = self._alignment(name, t[0].to(dtype), t[1].to(dtype), change, rows)
        return out

    def _rows(self, name: str, batch: ViewBatch, device: torch.device) -> Tensor | None:
        """Which rows show one image under two draws of group `name`: [B] bool, None for all."""
        same = None if batch.image_ids is None else (batch.image_ids[1] == batch.image_ids[0]).to(device)
        if batch.plan.kind != "interleaved":
            return same
        b, index = batch.views.shape[1], batch.space_index
        index = (batch.plan.default_space_index(b) if index is None else index).to(device)
        redrawn = index != batch.plan.spaces.index(name)
        return redrawn if same is None else redrawn & same

    def _alignment(self, name: str, a: Tensor, b: Tensor, change: Tensor, rows: Tensor | None) -> Tensor:
        """How far h(a, change) is from b, both [B, d], over the rows."""
        if self.family == "simclr":
            a, b = nn.functional.normalize(a, dim=1), nn.functional.normalize(b, dim=1)
        scale: Any = self.scales[f"_{name}"]
        if len(change) > 1 or not self.training:
            change = scale(change)
        else:  # one row has no statistics of its own
            change = nn.functional.batch_norm(change, scale.running_mean, scale.running_var, eps=scale.eps)
        guess = self.networks[f"_{name}"](torch.cat([a, change], dim=1))
        everything, pair = Shards(None, (len(a),), 0), Pair(0, 1, rows)
        if self.family == "simclr":
            cosine = (nn.functional.normalize(guess, dim=1) * b).sum(1)
            value, n = simclr_alignment(cosine, pair, 0.0, everything)
            return torch.where(torch.as_tensor(n, device=a.device) > 0, 1 - value, 0) / self.temperature
        if self.family == "vicreg":
            return DEFAULT_WEIGHT["vicreg"] * vicreg_alignment(torch.stack([guess, b]), pair, 0.0, everything)[0]
        if rows is not None:  # statistics are of the rows alone
            guess, b = guess[rows], b[rows]
        if len(guess) < 2:
            return guess.sum() * 0
        few = Shards(None, (len(guess),), 0)
        return barlow_alignment([standardised(guess, few), standardised(b, few)], Pair(0, 1), 0.0, few)[0]

    def extra_repr(self) -> str:
        own = f", temperature={self.temperature}" if self.family == "simclr" else ""
        return f"{self.family!r}{own}, weight={self.weight}, styles={_checks.names(self.groups)}"


def _group(parameter: str) -> str:
    """ "color/0.ColorJitter/hue_factor" -> "color"; a group's own name may hold slashes."""
    return parameter.rsplit("/", 2)[0]


def _differences(batch: ViewBatch) -> dict[str, Tensor]:
    if not isinstance(batch, ViewBatch):
        raise TypeError(f"batch: expected a ViewBatch, what StructuredViews returns: got {type(batch).__name__}")
    if len(batch.parameters) < 2:
        raise ValueError(
            "batch: expected the parameters of two views, as StructuredViews gives them: got "
            f"{len(batch.parameters)}; views loaded from elsewhere have none"
        )
    return parameter_differences(batch.parameters[0], batch.parameters[1])
