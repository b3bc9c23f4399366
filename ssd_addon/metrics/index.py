"""Nearest images by any weighting of the spaces, such as "same content, other color".

The similarity of a query q and an image x is sum_s w_s cos(q_s, x_s) / sum_s |w_s|. As it is linear in q, the images
are stored once, as concatenated L2-normalized embeddings, and only the query is weighted: one index serves every
weighting.
Legend: n images, q queries, d_s the width of a space, D their sum, k neighbors.
"""

import importlib
import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.metrics.spaces import CHUNK, check_finite, check_space, unit_rows

Weights = Mapping[str, float] | str
ENDS_FAISS = re.compile(r"(?<!\d)0+(?!\d)|(HNSW|NSG)1(?!\d)")
"""Factory strings on which FAISS aborts the process instead of raising: a number 0, and graphs of one link."""


class StyleIndex:
    """Nearest neighbors over the embeddings of a data set.

    >>> g = torch.Generator().manual_seed(0)
    >>> z = {"content": torch.randn(100, 8, generator=g), "color": torch.randn(100, 4, generator=g)}
    >>> index = StyleIndex(z)
    >>> scores, rows = index.search(7, {"content": 1, "color": -1}, k=5)  # same content, other color
    >>> scores.shape, rows.shape, 7 in rows
    (torch.Size([1, 5]), torch.Size([1, 5]), False)

    Args:
        embeddings: space -> [n, d_s] floating point, on any device; an exact search runs there. Embeddings are
            L2-normalized; an embedding of zeros has similarity 0 to all.
        backend: "exact" compares with every image, in bounded memory; "faiss" uses FAISS (`pip install faiss-cpu`).
        factory: a FAISS factory string, such as "HNSW32,Flat" or "IVF256,Flat"; "Flat" is exact. FAISS finds the
            candidates; their scores are recomputed exactly, however coarse the index is. An approximate index is built
            for equal weights: the further the weights are from equal, the lower its recall.

    Raises:
        ValueError: there are no spaces; embeddings are not [n, d], finite and of the same length; FAISS cannot parse
            the factory string, or cannot build the index from these images (too few for its clusters, or without
            inner products).
        ImportError: backend="faiss" and FAISS is not installed.
    """

    def __init__(
        self,
        embeddings: Mapping[str, Tensor],
        *,
        backend: Literal["exact", "faiss"] = "exact",
        factory: str = "Flat",
    ) -> None:
        if not embeddings:
            raise ValueError("StyleIndex: expected at least one space: got none")
        _checks.choice(backend, ("exact", "faiss"), "backend")
        if backend == "exact" and factory != "Flat":
            raise ValueError(f"factory: expected it only with backend='faiss': got {factory!r}")
        self.backend = backend
        self.widths: dict[str, int] = {}
        units: list[Tensor] = []
        self._length = -1
        for name, z in embeddings.items():
            check_space(f"space {name!r}", z, 1)
            if self._length not in (-1, len(z)):
                first = next(iter(embeddings))
                raise ValueError(f"space {name!r}: expected the {self._length} images of space {first!r}: got {len(z)}")
            check_finite(f"space {name!r}", z)
            self._length, self.widths[name] = len(z), z.shape[1]
            units.append(unit_rows(z.detach().double()).float())
        self.rows = torch.cat(units, 1)  # [n, D]
        self._faiss: Any = None
        if backend == "faiss":
            self._faiss = _built(factory, self.rows)

    def __len__(self) -> int:
        return self._length

    @property
    def spaces(self) -> tuple[str, ...]:
        return tuple(self.widths)

    def __repr__(self) -> str:
        return f"StyleIndex({len(self)} images, spaces {_checks.names(self.widths)}, {self.backend})"

    def search(
        self, query: int | Tensor | Mapping[str, Tensor], weights: Weights | None = None, k: int = 10
    ) -> tuple[Tensor, Tensor]:
        """The k images most similar to each query, best first.

        Args:
            query: the position of an image in the index, or positions [q], each of which is excluded from its own
                result; or embeddings of other images, space -> [q, d_s], for every space with nonzero weight.
            weights: the name of a space, or space -> weight; spaces that are not named have weight 0, and a negative
                weight asks for images that differ in the space. None weights all spaces equally.
            k: number of neighbors, at most the number of images.

        Returns:
            (scores [q, k] float32 in [-1, 1], positions [q, k] int64). If an approximate FAISS index finds fewer than k
            images, the remaining positions are -1 and their scores -inf.

        Raises:
            ValueError: a space is unknown; all weights are 0; a position or k is out of range.
            TypeError: positions are not integers.
        """
        w = self._weights(weights)
        exclude: Tensor | None = None
        if isinstance(query, Mapping):
            unit = self._queries(query, w)
        else:
            exclude = self._row_numbers(query)
            unit = self.rows[exclude]
        most = len(self) - (exclude is not None)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
            raise ValueError(f"k: expected 1 to {most} neighbors, as the index holds {len(self)} images: got {k!r}")
        scale = torch.cat([torch.full((d,), w.get(s, 0.0)) for s, d in self.widths.items()]).to(unit)
        q = unit * (scale / sum(abs(v) for v in w.values()))
        if self._faiss is not None:
            return self._ask_faiss(q, exclude, k)
        scores, rows = [], []
        step = max(1, CHUNK // len(self))
        for start in range(0, len(q), step):
            with torch.autocast(q.device.type, enabled=False):
                similarity = (q[start : start + step] @ self.rows.T).clamp_(-1, 1)
            if exclude is not None:
                similarity.scatter_(1, exclude[start : start + step, None], -math.inf)
            best = similarity.topk(k, dim=1)
            scores.append(best.values)
            rows.append(best.indices)
        if not scores:
            return q.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64, device=q.device)
        return torch.cat(scores), torch.cat(rows)

    def _ask_faiss(self, q: Tensor, exclude: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        wanted = min(len(self), k + (exclude is not None))
        _, places = self._faiss.search(q.cpu().contiguous().numpy(), wanted)
        rows = torch.from_numpy(places).to(q.device)
        step = max(1, CHUNK // (wanted * self.rows.shape[1]))
        with torch.autocast(q.device.type, enabled=False):
            chunks = zip(torch.split(q, step), torch.split(rows, step), strict=True)
            scores = torch.cat([torch.einsum("qd,qkd->qk", a, self.rows[r.clamp(min=0)]) for a, r in chunks])
        scores = scores.clamp(-1, 1).masked_fill(rows < 0, -math.inf)
        if exclude is not None:  # the query itself is moved to the end, where it is cut off or marks a missing result
            own = rows == exclude[:, None]
            scores, rows = scores.masked_fill(own, -math.inf), rows.masked_fill(own, -1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        return scores.gather(1, order), rows.gather(1, order)

    def _weights(self, weights: Weights | None) -> dict[str, float]:
        if weights is None:
            return dict.fromkeys(self.widths, 1.0)
        if isinstance(weights, str):
            weights = {weights: 1.0}
        for name, value in weights.items():
            if name not in self.widths:
                raise ValueError(f"weights: expected names of spaces ({_checks.names(self.widths)}): got {name!r}")
            if isinstance(value, bool) or not isinstance(value, Real) or not _is_finite(value):
                raise ValueError(f"weights: expected a finite number for space {name!r}: got {_short(value)}")
        most = max((abs(float(value)) for value in weights.values()), default=0.0)
        if not most:
            raise ValueError(f"weights: expected at least one nonzero weight: got {dict(weights)!r}")
        return {
            name: float(value) / most for name, value in weights.items() if value
        }  # scaled, so that their sum does not overflow

    def _row_numbers(self, query: int | Tensor) -> Tensor:
        rows = torch.as_tensor(query, device=self.rows.device).reshape(-1)
        if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
            raise TypeError(
                f"query: expected integer positions in the index, or a mapping of embeddings: got {rows.dtype}"
            )
        rows = rows.long()
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(self)):
            got = f"{int(rows.min())} to {int(rows.max())}"
            raise ValueError(f"query: expected positions 0 to {len(self) - 1}: got {got}")
        return rows

    def _queries(self, query: Mapping[str, Tensor], w: Mapping[str, float]) -> Tensor:
        missing = [name for name in w if name not in query]
        if missing:
            raise ValueError(
                f"query: expected embeddings of every weighted space: got none of {_checks.names(missing)}"
            )
        for name in w:
            check_space(f"query {name!r}", query[name], 1)
        count = len(query[next(iter(w))])
        parts = []
        for name, d in self.widths.items():
            if name not in w:
                parts.append(self.rows.new_zeros(count, d))
                continue
            check_finite(f"query {name!r}", query[name])
            if query[name].shape != (count, d):
                got = _checks.shape(query[name])
                raise ValueError(f"query: expected space {name!r} as [{count}, {d}], the width of the index: got {got}")
            parts.append(unit_rows(query[name].detach().double()).float().to(self.rows.device))
        return torch.cat(parts, 1)


def _built(factory: str, rows: Tensor) -> Any:
    """A FAISS index of the embeddings [n, D] for inner products."""
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError("backend='faiss' needs FAISS (pip install faiss-cpu); 'exact' needs nothing") from error
    if not isinstance(factory, str) or ENDS_FAISS.search(factory):
        raise ValueError(
            "factory: expected a FAISS factory string whose numbers are 1 or more, and 2 or more for the links of a "
            f"graph, such as 'Flat', 'IVF256,Flat' or 'HNSW32': got {factory!r}"
        )
    try:
        index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, TypeError, MemoryError) as error:
        raise ValueError(
            f"factory: expected a string that FAISS can parse, for {rows.shape[1]} dimensions and inner products, "
            f"such as 'Flat' or 'HNSW32': got {factory!r} ({_reason(error)})"
        ) from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"factory: expected an index that compares by inner products: got {factory!r}, which does not")
    stored = rows.cpu().contiguous().numpy()
    try:
        _silence(faiss, index)
        if not index.is_trained:
            index.train(stored)
        index.add(stored)
        index.search(stored[:1], 1)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"factory: expected an index that FAISS can build from {len(rows)} images of {rows.shape[1]} dimensions: "
            f"got {factory!r} ({_reason(error)})"
        ) from error
    return index


def _silence(faiss: Any, index: Any) -> None:
    """Suppress FAISS's warnings on standard error about clusterings with few images."""
    found: list[Any] = [index]
    while found:
        part = found.pop()
        part = faiss.downcast_index(part) if isinstance(part, faiss.Index) else part
        if isinstance(part, faiss.IndexPreTransform):
            chain = [faiss.downcast_VectorTransform(part.chain.at(i)) for i in range(part.chain.size())]
            for rotation in (c for c in chain if isinstance(c, faiss.OPQMatrix)):
                quantizer = faiss.ProductQuantizer(rotation.d_out, rotation.M, 8)  # the one that FAISS would create
                rotation.pq = quantizer
                found.append(quantizer)
                index.referenced_objects = [
                    *getattr(index, "referenced_objects", ()),
                    quantizer,
                ]  # FAISS keeps a pointer to it
        if hasattr(part, "cp"):
            part.cp.min_points_per_centroid = 1
        inner = (getattr(part, name, None) for name in ("index", "base_index", "quantizer", "storage", "pq", "rq"))
        found += [each for each in inner if each is not None]


def _reason(error: BaseException) -> str:
    """FAISS's error message without the location in its C++ files."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"^Error in .*\.(cpp|h):\d+: ", "", text).removeprefix("Error: ").rpartition(" failed: ")[2]


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]}... ({len(text)} characters)"
