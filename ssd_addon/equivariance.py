"""Equivariance: what a known change of parameters does to a style code depends on the code alone, not on the image.

    L = (weight / M) sum_m alignment(h_m(z^m_a, theta^m_b - theta^m_a), z^m_b)

a and b are two views of an image that share nothing (query and content key), theta^m what group m drew for them, and
h_m a small network of its own for style m, trained with the model. Plain style pairs leave open that a style code is
turned by the content (docs/method.md, "Twisting"): then the answer to a known change differs from image to image, and
h_m, which does not see the image, cannot give it. Unlike cross-image keys it needs no second image, and works as well
where operations shift a style as where they set one. *Ours*, measured in docs/results.md; off unless you add it.

Legend: V views, B images, M styles, d_m width of style m, k_m numbers that group m's change has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon._dist import Shards
from ssd_addon.batch import Embeddings, ViewBatch
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
from ssd_addon.metrics.parameters import parameter_differences


class EquivarianceLoss(nn.Module):
    """A term to add: `loss = criterion(z) + equivariance(z, batch)`.

    The alignment is that of the criterion's family, on the same scale: (1 - mean cosine) / temperature, 25 * mean
    squared difference, or sum over coordinates of (c_kk - 1)^2.

    >>> import kornia.augmentation as K
    >>> from ssd_addon import StructuredViews
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
        weight: of the term; 1 counts as much as an invariance of the family's default weight in each style space.
        hidden: widths of h_m's hidden layers.

    Its parameters are trained with the model's: give both to the optimizer (and both to DistributedDataParallel).

    Raises:
        ValueError: a style space without a group, or a group that draws nothing; a temperature in another family.

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
        self.family = _checks.choice(family, FAMILIES, "family")
        if temperature is not None and family != "simclr":
            raise ValueError(f"temperature: the {family!r} family has none: got {temperature!r}")
        chosen = DEFAULTS["simclr"]["temperature"] if temperature is None else temperature
        self.temperature = _checks.positive(chosen, "temperature", "of the criterion")
        self.weight = _checks.not_negative(weight, "weight", "of this term")
        self.groups: dict[str, list[str]] = {}
        found = {} if not isinstance(batch, ViewBatch) else _differences(batch)
        networks = {}
        for name, width in spaces.items():
            if name == "content":
                continue
            own = {key: t.shape[1] for key, t in found.items() if key.startswith(f"{name}/")}
            if not own:
                drawn = _checks.names(dict.fromkeys(key.split("/")[0] for key in found)) or "nothing"
                raise ValueError(
                    f"style space {name!r}: expected a group of that name that draws parameters: got those of {drawn}"
                )
            self.groups[name] = list(own)
            layers: list[nn.Module] = []
            last = width + sum(own.values())
            for h in hidden:
                layers += [nn.Linear(last, h), nn.ReLU()]
                last = h
            networks[name] = nn.ModuleDict(
                {
                    "scale": nn.BatchNorm1d(sum(own.values()), affine=False),
                    "predict": nn.Sequential(*layers, nn.Linear(last, width)),
                }
            )
        if not networks:
            raise ValueError(f"spaces: expected content and at least one style: got {_checks.names(spaces)}")
        self.networks = nn.ModuleDict({f"_{name}": network for name, network in networks.items()})

    def forward(self, z: Embeddings, batch: ViewBatch) -> Tensor:
        """The term, a scalar. z: embeddings [V, B, d] of `batch`, whose parameters it reads."""
        terms = self.terms(z, batch)
        return self.weight * torch.stack(list(terms.values())).mean()

    def terms(self, z: Mapping[str, Tensor], batch: ViewBatch) -> dict[str, Tensor]:
        """Style -> its term before the weight, on the family's scale; 0 is perfect."""
        changes = _differences(batch)
        same = None if batch.image_ids is None else batch.image_ids[1] == batch.image_ids[0]
        out = {}
        for name, keys in self.groups.items():
            if name not in z:
                raise ValueError(f"embeddings: expected the style space {name!r}: got {_checks.names(z)}")
            missing = [key for key in keys if key not in changes]
            if missing:
                raise ValueError(f"batch: expected parameters {_checks.names(missing)} as in the first batch: got none")
            network: Any = self.networks[f"_{name}"]
            x = z[name].to(torch.promote_types(z[name].dtype, torch.float32))
            with torch.autocast(x.device.type, enabled=False):
                change = torch.cat([changes[key] for key in keys], dim=1).to(x.device, x.dtype)
                if change.shape[0] != x.shape[1]:
                    raise ValueError(f"batch: expected {x.shape[1]} images, those of the embeddings: got {len(change)}")
                out[name] = self._alignment(network, x[0], x[1], change, same)
        return out

    def _alignment(self, network: Any, a: Tensor, b: Tensor, change: Tensor, same: Tensor | None) -> Tensor:
        """How far h(a, change) is from b, rows [B, d]; `same` are the rows whose views show one image."""
        rows, pair = Shards(None, (len(a),), 0), Pair(0, 1, same)
        if self.family == "simclr":
            a, b = nn.functional.normalize(a, dim=1), nn.functional.normalize(b, dim=1)
        guess = network["predict"](torch.cat([a, network["scale"](change)], dim=1))
        if self.family == "simclr":
            cosine = (nn.functional.normalize(guess, dim=1) * b).sum(1)
            return (1 - simclr_alignment(cosine, pair, 0.0, rows)[0]) / self.temperature
        if self.family == "vicreg":
            value = vicreg_alignment(torch.stack([guess, b]), pair, 0.0, rows)[0]
        else:
            value = barlow_alignment([standardised(guess, rows), standardised(b, rows)], pair, 0.0, rows)[0]
        return DEFAULT_WEIGHT[self.family] * value

    def extra_repr(self) -> str:
        own = f", temperature={self.temperature}" if self.family == "simclr" else ""
        return f"{self.family!r}{own}, weight={self.weight}, styles={_checks.names(self.groups)}"


def _differences(batch: ViewBatch) -> dict[str, Tensor]:
    if len(batch.parameters) < 2:
        raise ValueError(
            "batch: expected the parameters of two views, as StructuredViews gives them: got "
            f"{len(batch.parameters)}; views loaded from elsewhere have none"
        )
    return parameter_differences(batch.parameters[0], batch.parameters[1])
