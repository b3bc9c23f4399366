"""Linear probes that are trained along with a model, one per space, to see what each space encodes at every step.

Legend: n images, d the width of a space, C classes, S spaces.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon._shapes import Matrix, Scalar, Vector
from ssd_addon._types import KeepsType
from ssd_addon.kernels.dispatch import checks_are_on


class OnlineProbes(KeepsType):
    """Linear classifiers on the features of every space; no gradient flows back to the model.

    logits_s = W_s BatchNorm(z_s) + b_s, where BatchNorm has no affine parameters; in float32, outside autocast. Under
    DistributedDataParallel wrap the probes like any other module.

    In training, features that are NaN, infinite or too large for BatchNorm raise an error before they enter its
    running statistics, which would not recover (except under torch.compile and CUDA-graph capture, where the logits are
    NaN).

    >>> probes = OnlineProbes({"backbone": 16, "color": 4}, classes=10)
    >>> optimizer = torch.optim.Adam(probes.parameters(), lr=3e-3)
    >>> z, labels = {"backbone": torch.randn(8, 16), "color": torch.randn(8, 4)}, torch.arange(8)
    >>> logits = probes(z)  # in every training step, with the query's embeddings and backbone features
    >>> probes.loss(logits, labels).backward()
    >>> optimizer.step()
    >>> hits = probes.hits(logits, labels)  # add them up over batches, and over ranks by all_reduce
    >>> dict(zip(probes.names, (hits / len(labels)).tolist())).keys()
    dict_keys(['backbone', 'color'])

    Args:
        widths: name -> d, such as {"backbone": model.in_features, **model.spaces}.
        classes: C; labels are 0 to C - 1.

    Attributes:
        names: names of the spaces, in the order of `hits`.

    Raises:
        ValueError: there is no space; a width or the number of classes is below 1.
        TypeError: widths is not a mapping.

    Source: online linear evaluation as in SimCLR, Chen et al., arXiv 2002.05709; BatchNorm before the classifier as in
    the linear probes of MAE, He et al., arXiv 2111.06377.
    """

    def __init__(self, widths: Mapping[str, int], classes: int) -> None:
        super().__init__()
        if not isinstance(widths, Mapping):
            raise TypeError(f"widths: expected a mapping name -> width: got {type(widths).__name__}")
        if not widths:
            raise ValueError("widths: expected at least one space: got none")
        self.widths = {name: _checks.width(width, f"width of {name!r}") for name, width in widths.items()}
        self.classes = _checks.width(classes, "classes")
        self.names = tuple(self.widths)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(d, affine=False, dtype=torch.float32), nn.Linear(d, classes, dtype=torch.float32)
            )
            for d in self.widths.values()
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map features name -> [n, d] to logits name -> [n, C].

        Raises:
            ValueError: names, shapes or numbers of images are not as expected; in training, BatchNorm cannot compute
                statistics of the features.
        """
        self._check_names(features, "features")
        rows: dict[str, Tensor] = {}
        n = len(features[self.names[0]])
        if self.training and n < 2:
            raise ValueError(f"features: expected at least 2 images in training mode, for BatchNorm: got {n}")
        for name, width in self.widths.items():
            z = features[name]
            if z.shape != (n, width):
                raise ValueError(f"features {name!r}: expected [{n}, {width}]: got {_checks.shape(z)}")
            rows[name] = z.detach().float()
        if self.training:
            rows = self._bounded(rows)
        out: dict[str, Tensor] = {}
        layer: Any
        for (name, x), layer in zip(rows.items(), self.layers, strict=True):
            with torch.autocast(x.device.type, enabled=False):
                out[name] = layer(x.to(layer[1].weight.dtype))
        return out

    def _bounded(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Refuse features without a finite variance; where the device may not be read, make the logits NaN."""
        fine = torch.stack([x.square().sum().isfinite() for x in rows.values()])
        if not checks_are_on("auto"):
            return {name: torch.where(ok, x, torch.nan) for (name, x), ok in zip(rows.items(), fine, strict=True)}
        if bad := [name for name, ok in zip(rows, fine.tolist(), strict=True) if not ok]:
            raise _checks.Diverged(
                f"features {bad[0]!r}: expected finite numbers whose squares fit in float32: got "
                + ("too large ones" if bool(rows[bad[0]].isfinite().all()) else "NaN or infinity")
                + ", so the network has diverged",
                bad,
            )
        return rows

    def loss(self, logits: Mapping[str, Matrix], labels: Vector) -> Scalar:
        """The sum of the cross-entropies over spaces, a scalar; the gradients of the probes are independent.

        Args:
            logits: the result of `forward`.
            labels: [n] integers, 0 to C - 1.

        Raises:
            ValueError: labels are outside the classes, or their number differs from that of the images.
        """
        target = self._checked(logits, labels)
        return torch.stack([F.cross_entropy(logits[name], target) for name in self.names]).sum()

    @torch.no_grad()
    def hits(self, logits: Mapping[str, Matrix], labels: Vector) -> Tensor:
        """Number of images that each space classifies correctly, [S] int64, in the order of `names`.

        Images with NaN or infinite logits do not count.

        Args:
            logits, labels: as in `loss`.
        """
        target = self._checked(logits, labels)
        given = [logits[name] for name in self.names]
        return torch.stack([((t.argmax(1) == target) & t.isfinite().all(1)).sum() for t in given])

    def _checked(self, logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        self._check_names(logits, "logits")
        n = len(logits[self.names[0]])
        if labels.shape != (n,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            got = f"{_checks.shape(labels)} {labels.dtype}"
            raise ValueError(f"labels: expected [{n}] integers, a class for each image: got {got}")
        labels = labels.long()
        if n and not (int(labels.min()) >= 0 and int(labels.max()) < self.classes):
            raise ValueError(
                f"labels: expected classes 0 to {self.classes - 1}: got {int(labels.min())} to {int(labels.max())}"
            )
        return labels.to(logits[self.names[0]].device)

    def _check_names(self, given: Iterable[str], what: str) -> None:
        _checks.same_names(given, self.names, what, "probes")
