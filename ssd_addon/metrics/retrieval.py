"""Measures whether nearest-neighbor search in a space finds similar images, by attributes of the images.

Legend: n images, q queries, k neighbors, R resamples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.metrics.labelled import Circular, Factor
from ssd_addon.metrics.probe import at_least
from ssd_addon.metrics.spaces import CHUNK, check_spaces, unit_rows
from ssd_addon.metrics.table import Cell, ScoreTable

TIE = 1e-6
"""Cosines that differ by less count as equal."""


@dataclass(frozen=True, eq=False)
class RetrievalTable(ScoreTable):
    """A `ScoreTable` of spaces x attributes; `probe` is "k nearest", `n_train` the images searched, `n_test` queries.

    Attributes:
        distances: (space, attribute) -> mean distance in the attribute from a query to (its neighbors in the space, all
            other images, the images nearest in the attribute), in units of the attribute; in radians for angles, and as
            the share of other classes for classes.
    """

    distances: Mapping[Cell, tuple[float, float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As in `ScoreTable`, with "distance", "chance" and "ideal" in every cell."""
        out = super().to_json()
        for cell in out["cells"]:
            found = self.distances.get((cell["space"], cell["factor"]), (None, None, None))
            cell |= dict(zip(("distance", "chance", "ideal"), found, strict=True))
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RetrievalTable":
        """The table that `to_json` wrote."""
        table = super().from_json(data)
        assert isinstance(table, cls)
        cells = [c for c in data["cells"] if c.get("distance") is not None]
        return replace(
            table, distances={(c["space"], c["factor"]): (c["distance"], c["chance"], c["ideal"]) for c in cells}
        )

    def footer(self) -> str:
        return f"{self.probe} of {self.n_train} images, {self.n_test} queries; 0: as random images, 1: the best order"


def retrieval(
    embeddings: Mapping[str, Tensor],
    attributes: Mapping[str, Factor],
    *,
    k: int = 10,
    queries: int | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> RetrievalTable:
    """How similar in each attribute the nearest neighbors in each space are: 0 as random images, 1 the best possible.

    For every query the k nearest other images by cosine are found, as with `StyleIndex`, and d is their mean distance
    from it in the attribute: |a - b| for values, the difference for angles, and for classes 1 if they differ, else 0.
    With d_chance the mean distance to all other images and d_ideal that to the k nearest in the attribute,
    score = (mean d_chance - mean d) / (mean d_chance - mean d_ideal), with means over queries. It is negative if
    neighbors are less similar than random images. Neighbors are chosen at random among images whose cosines differ by
    less than 1e-6, so a collapsed space scores 0.

    For an attribute with a heavy tail the few largest values dominate: use its logarithm. `r2_matrix` answers another
    question: whether a probe can decode the attribute. A space that encodes it among many others has a high R^2 and a
    low score here, as the search uses the whole space.

    >>> angle = torch.linspace(0, 6.2, 100)
    >>> z = {"color": torch.stack([angle.cos(), angle.sin()], 1), "none": torch.ones(100, 2)}
    >>> table = retrieval(z, {"hue": Circular(angle)}, k=5)
    >>> round(table["color", "hue"], 2), abs(table["none", "hue"]) < 0.2
    (1.0, True)

    Args:
        embeddings: space -> [n, d] floating point, such as from `embed`; L2-normalized or not.
        attributes: name -> [n] floating point (values), [n] integers or bool (classes), or `Circular` with one fold k
            for all images, or 0 for images without an angle. Images without an angle, or whose value is NaN, are
            neither queries nor results of this attribute. `image_attributes` computes some attributes from the images.
        k: number of neighbors.
        queries: largest number of queries, chosen at random; None uses every image.
        bootstrap: number of resamples of the queries for the 95 % intervals; 0 for no intervals.
        seed: seed of the queries, of ties and of the resamples.

    Returns:
        `RetrievalTable`, spaces x attributes; `.distances` has the distances from which each score is computed. NaN and
        a note if an attribute does not vary, is infinite, or is defined for fewer than k + 2 images.

    Raises:
        ValueError, TypeError: embeddings are not [n, d]; attributes are not [n]; folds vary; k is out of range.

    Source: the scale from chance to the ideal order is that of a normalized gain (Jarvelin and Kekalainen, ACM TOIS
    2002), with distances instead of gains.
    """
    if not embeddings or not attributes:
        raise ValueError("retrieval: expected at least one space and one attribute: got none")
    n, device = check_spaces(embeddings)
    at_least("bootstrap", bootstrap, 0)
    at_least("k", k, 1)
    if queries is not None:
        at_least("queries", queries, 1)
    if k > n - 2:
        raise ValueError(f"k: expected at most {n - 2} neighbors, as there are {n} images: got {k}")
    generator = torch.Generator().manual_seed(seed)
    asked = torch.zeros(n, dtype=torch.bool)
    asked[torch.randperm(n, generator=generator)[:queries]] = True
    scores: dict[Cell, float] = {}
    intervals: dict[Cell, tuple[float, float]] = {}
    notes: dict[Cell, str] = {}
    distances: dict[Cell, tuple[float, float, float]] = {}
    neighbors: dict[tuple[str, bytes], Tensor] = {}
    most = (0, 0)
    for name, attribute in attributes.items():
        values, valid = _attribute(name, attribute, n)
        if values.is_floating_point():  # NaN: the image does not have the attribute, as a gray one has no hue
            valid = valid & ~values.isnan()
        rows = torch.nonzero(valid).flatten()
        places = torch.nonzero(asked[rows]).flatten()
        why = "" if len(rows) >= k + 2 and len(places) else f"defined for {len(rows)} images, {len(places)} queries"
        if not why and values.is_floating_point() and not values[rows].isfinite().all():
            why = f"{int((~values[rows].isfinite()).sum())} of {len(rows)} values are infinite"
        if not why and bool((values[rows] == values[rows][0]).all()):
            why = "constant"
        if not why:
            most = max(most, (len(rows), len(places)))
            v = values[rows]
            chance, ideal = _bounds(v, places, k, isinstance(attribute, Circular))
            if bool((chance - ideal).sum() <= 0):
                why = f"the {k} nearest in it are no closer than any"
        for space, z in embeddings.items():
            cell = (space, name)
            scores[cell] = math.nan
            if why:
                notes[cell] = why
                continue
            if not valid.all():
                notes[cell] = f"defined for {len(rows)} of {n} images"
            key = space, valid.numpy().tobytes()
            if key not in neighbors:
                neighbors[key] = _nearest(z[rows.to(device)], places, k, generator)
            d = _distance(v[places, None], v[neighbors[key]], isinstance(attribute, Circular)).mean(1)
            each = torch.stack([d, chance, ideal], 1)
            scores[cell] = float(_score(each.sum(0)))
            mean = each.mean(0).tolist()
            distances[cell] = (mean[0], mean[1], mean[2])
            if bootstrap:
                draws = torch.Generator().manual_seed(seed)
                again = [each[torch.randint(len(each), (len(each),), generator=draws)].sum(0) for _ in range(bootstrap)]
                low, high = _score(torch.stack(again)).nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
                intervals[cell] = (low, high)
    scores = {(s, a): scores[s, a] for s in embeddings for a in attributes}
    names = tuple(embeddings), tuple(attributes)
    return RetrievalTable(*names, scores, intervals, notes, f"{k} nearest", (), *most, "images", distances=distances)


def _attribute(name: str, attribute: Factor, n: int) -> tuple[Tensor, Tensor]:
    """Values [n] on the CPU, angles multiplied by their fold, and a mask [n] of the images that have a value."""
    if isinstance(attribute, Circular):
        fold = torch.as_tensor(attribute.fold).cpu().long().expand(len(attribute.angle))
        values, valid = attribute.angle.detach().cpu().double(), fold > 0
        if len(folds := fold[valid].unique()) > 1:
            raise ValueError(
                f"attribute {name!r}: expected the same fold for all angles (or 0, for no angle), as angles of "
                f"different symmetry have no distance: got {_checks.names(folds.tolist())}"
            )
        values = values * fold
    elif isinstance(attribute, Tensor) and attribute.ndim == 1 and not attribute.is_complex():
        values = attribute.detach().cpu()
        values = values.double() if values.is_floating_point() else values.long()
        valid = torch.ones(len(values), dtype=torch.bool)
    else:
        got = f"{_checks.shape(attribute)}" if isinstance(attribute, Tensor) else type(attribute).__name__
        raise TypeError(f"attribute {name!r}: expected a tensor [n] of values or classes, or Circular: got {got}")
    if len(values) != n:
        raise ValueError(f"attribute {name!r}: expected a value for each of the {n} images: got {len(values)}")
    return values, valid


def _nearest(z: Tensor, places: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Positions [q, k] of the nearest images to each query by cosine, without itself; ties are broken at random."""
    unit = unit_rows(z.detach().double())
    found = []
    for part in torch.split(places, max(1, CHUNK // len(z))):
        near = unit[part.to(z.device)] @ unit.T + TIE * torch.rand(len(part), len(z), generator=generator).to(unit)
        found.append(near.scatter_(1, part[:, None].to(z.device), -math.inf).topk(k, dim=1).indices.cpu())
    return torch.cat(found)


def _distance(a: Tensor, b: Tensor, circular: bool) -> Tensor:
    if not a.is_floating_point():
        return (a != b).double()
    if circular:
        return (torch.remainder(a - b + math.pi, 2 * math.pi) - math.pi).abs()
    return (a - b).abs()


def _bounds(v: Tensor, places: Tensor, k: int, circular: bool) -> tuple[Tensor, Tensor]:
    """Mean distance of every query [q] to all other images, and to the k nearest."""
    chance, ideal = [], []
    for part in torch.split(places, max(1, CHUNK // len(v))):
        d = _distance(v[part, None], v[None], circular)
        chance.append(d.sum(1) / (len(v) - 1))
        ideal.append(d.scatter_(1, part[:, None], math.inf).topk(k, dim=1, largest=False).values.mean(1))
    return torch.cat(chance), torch.cat(ideal)


def _score(sums: Tensor) -> Tensor:
    """Scores from sums [..., 3] of the distances of neighbors, chance and ideal; NaN if the last two are equal."""
    d, chance, ideal = sums.unbind(-1)
    return torch.where(chance > ideal, (chance - d) / (chance - ideal), math.nan)
