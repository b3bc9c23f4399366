"""SimCLR: cosine similarity of pairs, and the log-sum-exp over the embeddings of all other images.

    invariance_s = - mean over samples of <u_a, u_b> / tau,   u L2-normalized
    entropy      = mean over the N embeddings of log sum_{j : image(j) != image(i)} exp(<z_i, z_j> / tau)

z_i is the concatenation of the spaces' u, divided by sqrt(S). Source: Eastwood et al., arXiv 2311.08815; with one space
and two views it is the decoupled contrastive loss of Yeh et al., arXiv 2110.06848.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd_addon._dist import Shards
from ssd_addon._shapes import Ids, Joint, Matrix, Scalar, Vector
from ssd_addon._unit import joint_and_cosines
from ssd_addon.kernels.dispatch import Backend, rows_for_triton
from ssd_addon.kernels.similarity import (
    Known,
    check_floor,
    check_temperature,
    check_temperatures,
    log_sums,
    log_sums_backend,
    negative_lse,
    similarity_bound,
)
from ssd_addon.losses.objective import Objective
from ssd_addon.losses.rows import Parts, Rows, columns_of, mean_of_rows, mean_over_keys


class SimCLR(Objective):
    """The SimCLR family. In `Terms`, invariance is -cosine / tau and the constraint 1 - cosine.

    Args:
        temperature: tau; a number, or one element to learn: an nn.Parameter, which moves and is saved with the loss,
            or a tensor that requires a gradient, which stays the caller's.
        temperature_floor: lower bound of a learned temperature, as in `kernels.negative_lse`.
    """

    defaults: ClassVar[dict[str, float | None]] = {"temperature": 0.15, "temperature_floor": None}
    temperature: float | Tensor

    def __init__(self, temperature: float | Tensor = 0.15, temperature_floor: float | None = None) -> None:
        super().__init__("simclr", on_sphere=True)
        check_temperature(temperature)
        check_floor(temperature, temperature_floor)
        self.temperature_floor = temperature_floor
        if isinstance(temperature, Tensor) and not temperature.requires_grad:
            self.register_buffer("temperature", temperature, persistent=False)
        else:
            self.temperature = temperature

    @property
    def scalar(self) -> float | Tensor:
        return self.temperature

    def alignment(self, a: Matrix, b: Matrix) -> Vector:
        """1 - cosine of L2-normalized embeddings, [n]."""
        return 1 - (a * b).sum(dim=-1)

    def entropy(self, joint: Joint, ids: Ids) -> Scalar:
        """Mean over all embeddings of the log-sum-exp over the embeddings of other images."""
        floor = self.temperature_floor
        return negative_lse(joint.flatten(0, 1), ids.flatten(), self.temperature, temperature_floor=floor).mean()

    def triton_from(self, z: Mapping[str, Tensor], rows: int, backend: Backend, content_entropy: bool) -> int:
        joint, prefix = sum(t.shape[-1] for t in z.values()), z["content"].shape[-1] if content_entropy else 0
        widest = max((t.dtype for t in z.values()), key=lambda dtype: dtype.itemsize)
        device = z["content"].device
        return rows_for_triton(backend, device, joint, came_as=widest, prefix=prefix, rows=rows)

    def parts(self, rows: Rows) -> Parts:
        z, s = rows.z, rows.shards
        place = {name: k for k, name in enumerate(z)}
        flat = tuple((p.a, p.b, place[name]) for name, pairs in rows.pairs.items() for p in pairs)
        types = [rows.types.get(name, t.dtype) for name, t in z.items()]
        content = z["content"]
        tau: Any = self.temperature
        if isinstance(tau, Tensor):
            tau = tau.to(content.device, content.dtype).reshape(())
        v, b = content.shape[:2]
        known = self._known(rows, v * s.total, content.dtype)
        bound = similarity_bound(tau, known, self.temperature_floor)
        backend = log_sums_backend(
            rows.backend,
            s.times(v),
            dtype=content.dtype,
            device=content.device,
            triton_from=rows.triton_from,
            bound=bound,
        )
        joint, cosines = joint_and_cosines(list(z.values()), flat, types, backend == "triton")  # [V, B, D], [pairs, B]
        count: dict[str, int | Tensor]
        if not rows.trim and all(len(pairs) == 1 and pairs[0].mask is None for pairs in rows.pairs.values()):
            count = dict.fromkeys(rows.pairs, s.total)  # one pair each, over all samples: computed at once
            means = s.mean(cosines.sum(dim=1), s.total)
        else:
            means, count = _means(cosines, rows)
        scaled = -means / tau if isinstance(tau, Tensor) else means * (-1 / tau)
        invariance = dict(zip(rows.pairs, scaled.unbind(0), strict=True))
        constraint = dict(zip(rows.pairs, (1 - means.detach()).unbind(0), strict=True))
        lse = log_sums(
            joint.flatten(0, 1),
            rows.ids.reshape(v * b),
            tau,
            prefix=content.shape[-1] if rows.content_entropy else None,
            backend=rows.backend,
            shards=s.times(v),
            known=known,
            triton_from=rows.triton_from,
            temperature_floor=self.temperature_floor,
        ).view(v * b, 2 if rows.content_entropy else 1)  # not -1, as a rank may have no samples
        entropy = s.mean(lse.sum(dim=0), v * s.total).unbind()
        columns = columns_of(z)
        return Parts(
            invariance,
            constraint,
            count,
            entropy[-1],
            entropy[0] if rows.content_entropy else None,
            {name: joint[0, :, c].detach() for name, c in columns.items()},
            backend,
            {n: (joint[p.a, :, columns[n]], joint[p.b, :, columns[n]], p.mask) for n, (p, *_) in rows.pairs.items()},
        )

    def _known(self, rows: Rows, total: int, dtype: torch.dtype) -> Known | None:
        """Results of the checks, if there were any; refuses a batch with a single image id."""
        known = rows.known
        if known is None:
            return None
        check_temperatures(known.numbers, dtype)
        check_floor(min(known.numbers), self.temperature_floor)
        if known.id_low == known.id_high:
            raise ValueError(
                f"image_ids: expected at least 2 images, so that each has a negative: got one, as all {total} rows "
                f"carry the image id {known.id_high}"
            )
        return Known(1.0, min(known.numbers), known.id_low, known.id_high)

    def misalignment(self, guess: Matrix, target: Matrix, mask: Vector | None, shards: Shards | None = None) -> Scalar:
        return super().misalignment(guess, target, mask, shards) / self.temperature

    def refuse_backend(self, backend: str) -> None:
        pass

    def extra_repr(self) -> str:
        return f"temperature={self.temperature!r}"


def _means(cosines: Tensor, rows: Rows) -> tuple[Tensor, dict[str, int | Tensor]]:
    """Mean cosine of every space [S] over the samples that its pairs keep, and the number of these samples."""
    each, means, count = iter(cosines.unbind(0)), [], {}
    for name, pairs in rows.pairs.items():
        kept = [mean_of_rows(c, c.neg, p, rows.trim, rows.shards) for p, c in zip(pairs, each, strict=False)]
        mean, count[name] = mean_over_keys(kept, rows.shards)
        means.append(mean)
    return torch.stack(means), count
