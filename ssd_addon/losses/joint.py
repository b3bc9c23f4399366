"""The loss: the invariance of every space on its own pairs, plus the entropy of all spaces jointly.

    L = (1/S) sum_s lambda_s * invariance_s  +  entropy(joint)  (+ content_entropy)

Legend: V views, B images (N = B over all ranks), S spaces, d_s width of space s, D joint width.
Source: Eastwood et al., arXiv 2311.08815. Over W ranks, per-sample terms are returned as local sum * W / N and batch
terms as the global value, so that the mean over ranks is the one-process value and DDP's averaged gradient is its
gradient.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ssd_addon import _checks, _dist
from ssd_addon._autocast import autocast_off
from ssd_addon._dist import Shards
from ssd_addon._shapes import Scalar
from ssd_addon.batch import ViewBatch
from ssd_addon.embeddings import Embeddings, as_embeddings
from ssd_addon.kernels.dispatch import BACKENDS, Backend, checks_are_on, choose_backend, compute_dtype
from ssd_addon.losses.families import FamilyName, resolve_family
from ssd_addon.losses.header import checked
from ssd_addon.losses.objective import Objective
from ssd_addon.losses.rows import Parts, Rows, pairs_of
from ssd_addon.losses.terms import Terms, terms_of
from ssd_addon.losses.weights import FixedWeights, Weights
from ssd_addon.plan import ViewPlan


class JointEntropyLoss(nn.Module):
    """Joint-entropy loss over content and style spaces.

    loss = (1/S) sum_s weights[s] * invariance[s] + entropy (+ content_entropy)

    With one space and two views, "simclr" equals lightly's DCLLoss(temperature), "vicreg" equals
    VICRegLoss(lambda_param=25, mu_param=25, nu_param=0.5) and "barlow" BarlowTwinsLoss(lambda_param=0.0051).

    >>> z = {"content": torch.randn(3, 8, 16), "color": torch.randn(3, 8, 4)}  # [V, B, d]
    >>> criterion = JointEntropyLoss("simclr", temperature=0.15)
    >>> criterion(z).shape
    torch.Size([])
    >>> sorted(criterion.terms(z).invariance)
    ['color', 'content']

    Args:
        family: "simclr", "vicreg", "barlow", "sigreg", "frossl", "mmcr", or a `losses.Family` of your own.
        temperature: tau (simclr, default 0.15); a float, or a tensor or nn.Parameter to learn it.
        temperature_floor: lower bound of a learned temperature (simclr), as in `kernels.negative_lse`; compiled and
            captured steps are then as fast as with a float.
        variance, covariance: coefficients of the entropy (vicreg, defaults 25 and 1).
        redundancy: coefficient of the off-diagonal entries (barlow, default 0.0051).
        weights: lambda of each space, as absolute values: a number, a mapping by space, a sequence in space order, or a
            `DualAscent`, which `criterion.weights.step(terms)` updates. None uses the family's default: 1 (simclr,
            barlow, frossl), 25 (vicreg), 4.75 (sigreg), 30 (mmcr).
        trim: fraction in [0, 1) of the worst-aligned samples of every pair that its invariance leaves out.
        content_keys: "first" aligns content with the content key; "all" with every key of the same image.
        content_entropy: add the entropy of the content space alone, with the coefficients of the joint entropy.
        gather_distributed: use the samples of all ranks of the default process group. Each rank then returns
            local sum * W / N for per-sample terms and the global value for batch terms; the mean over ranks is the
            one-process loss, and backward assumes that gradients are averaged over ranks (DDP).
        backend: "auto", "eager", "streaming" or "triton" (the fused kernels, on CUDA); the last two are available for
            simclr, vicreg and barlow.
        validate: whether to check values (NaN, divergence, missing negatives). "auto" checks except under CUDA-graph
            capture and torch.compile, where the result is NaN instead of an error.

    Attributes:
        family: name of the family.
        objective: the family object.
        weights: module that holds lambda.

    Computes in max(float32, dtype of the embeddings), outside autocast. Source: Eastwood et al., arXiv 2311.08815.
    """

    objective: Objective
    weights: Weights

    def __init__(
        self,
        family: FamilyName | Objective = "simclr",
        *,
        temperature: float | Tensor | None = None,
        temperature_floor: float | None = None,
        variance: float | None = None,
        covariance: float | None = None,
        redundancy: float | None = None,
        weights: float | Mapping[str, float] | Sequence[float] | Weights | None = None,
        trim: float = 0.0,
        content_keys: Literal["first", "all"] = "first",
        content_entropy: bool = False,
        gather_distributed: bool = False,
        backend: Backend = "auto",
        validate: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.objective = resolve_family(
            family,
            temperature=temperature,
            temperature_floor=temperature_floor,
            variance=variance,
            covariance=covariance,
            redundancy=redundancy,
        )
        self.family: str = self.objective.name
        self.weights = weights if isinstance(weights, Weights) else FixedWeights(weights)
        self.weights.start_at(self.objective.weight)
        self.trim = _checks.not_negative(trim, "trim", "a fraction of the samples")
        if self.trim >= 1:
            raise ValueError(f"trim: expected a fraction below 1, so that some samples are left: got {trim!r}")
        self.content_keys = _checks.choice(content_keys, ("first", "all"), "content_keys")
        self.content_entropy = bool(content_entropy)
        self.gather_distributed = bool(gather_distributed)
        choose_backend(backend, matrix_elements=0, dtype=torch.float32)
        self.backend: Backend = _checks.choice(backend, BACKENDS, "backend")
        self.objective.refuse_backend(backend)
        checks_are_on(validate)
        self.validate = validate

    if TYPE_CHECKING:

        def __call__(self, z: Mapping[str, Tensor], batch: ViewBatch | ViewPlan | None = None) -> Tensor: ...

    def forward(self, z: Mapping[str, Tensor], batch: ViewBatch | ViewPlan | None = None) -> Scalar:
        """The loss, a scalar.

        Args:
            z: `Embeddings`, or a plain dict name -> [V, B, d], which is read as a shared-query plan if there is no
                batch.
            batch: the `ViewBatch` of the embeddings, or its plan. It overrides the embeddings' plan, ids and index, and
                a space may then be [V*B, d]. Needed with frameworks that rebuild a model's output, and for modules of
                your own.

        Raises:
            ValueError: views, names, ids or widths do not fit the plan; the embeddings have lost their plan; there is
                only one image; values are NaN, infinite or too large to be squared (the message names the space).
            TypeError: embeddings or ids have the wrong type.
        """
        loss, _, _ = self._evaluated(z, batch)
        return loss

    def terms(self, z: Mapping[str, Tensor], batch: ViewBatch | ViewPlan | None = None) -> Terms:
        """The loss and its terms, for logging and for `DualAscent`. Collective: call it on every rank."""
        terms = terms_of(*self._evaluated(z, batch), self.on_sphere)
        if isinstance(self.weights, FixedWeights):
            return terms
        now = self.weights.lambdas(tuple(terms.invariance))
        return replace(terms, weights={n: torch.as_tensor(w).to(terms.loss.device).clone() for n, w in now.items()})

    def lambdas(self, plan: ViewPlan, order: Sequence[str] | None = None) -> Mapping[str, float | Tensor]:
        """The weight of every space of a plan, resolved."""
        return self.weights.lambdas(plan.spaces, order)

    @property
    def on_sphere(self) -> bool:
        """Whether the family compares L2-normalized embeddings."""
        return self.objective.on_sphere

    def _evaluated(self, given: Mapping[str, Tensor], of: ViewBatch | ViewPlan | None) -> tuple[Tensor, Parts, Shards]:
        z = as_embeddings(given, of)
        plan, batch, device = z.check()
        if self.content_entropy and len(plan.spaces) == 1:
            raise ValueError(
                "content_entropy: expected two or more spaces, as for 'content' alone it equals the joint entropy: "
                "got one space"
            )
        lambdas = self.lambdas(plan, tuple(z))
        group = _dist.default_group() if self.gather_distributed else None
        dtype = torch.float32
        for t in z.values():
            dtype = torch.promote_types(dtype, compute_dtype(t.dtype))
        checks = checks_are_on(self.validate)
        largest = self._largest(z, dtype, batch, group) if checks else None
        n = plan.num_views * batch * _dist.world_size(group)
        triton_from = self.objective.triton_from(z, n, self.backend, self.content_entropy)
        with autocast_off(device):
            header = checked(z, plan, largest, self.objective.scalar, group, triton_from)
            rows = Rows(
                {name: z[name].to(dtype) for name in plan.spaces},
                pairs_of(z, plan, batch, device, self.content_keys),
                header.ids,
                header.shards,
                self.backend,
                self.trim,
                self.content_entropy,
                {n: t.dtype for n, t in z.items()},
                header.known,
                header.triton_from,
            )
            parts = self.objective.parts(rows)
            loss, share = parts.entropy, 1 / len(plan.spaces)
            for name, w in lambdas.items():
                c = parts.invariance[name]
                if isinstance(w, Tensor):
                    loss = torch.addcmul(loss, w.to(device, dtype, copy=True), c, value=share)
                else:
                    loss = torch.add(loss, c, alpha=w * share)
            if parts.content_entropy is not None:
                loss = loss + parts.content_entropy
            if header.valid is not None:
                loss = loss * torch.where(header.valid, 1.0, math.nan)
        return loss, parts, header.shards

    def _largest(self, z: Embeddings, dtype: torch.dtype, batch: int, group: Any) -> dict[str, float]:
        joint, rows = sum(t.shape[-1] for t in z.values()), batch * _dist.world_size(group)
        return {n: self.objective.largest(dtype, t.shape[-1], joint, rows) for n, t in z.items()}

    def extra_repr(self) -> str:
        return f"trim={self.trim}, content_keys={self.content_keys!r}, backend={self.backend!r}"
