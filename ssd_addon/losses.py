"""The loss: invariance of every space on its own pair, and the entropy of all spaces jointly.

    L = (1/S) sum_s lambda_s * invariance_s  +  entropy(joint)  (+ content_entropy)

Legend: V views, B images (N = B over all ranks), S spaces, d_s width of space s, D joint width, tau temperature.
Source: Eastwood et al., arXiv 2311.08815 (SimCLR and VICReg families); the Barlow Twins family is defined in
docs/method.md. Over ranks every function takes `Shards`: row terms come back as local sum * W / N and batch terms as
the global value, so that the mean over ranks is the one-process value and DDP's averaged gradient is its gradient.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_addon import _checks, _dist
from ssd_addon._dist import Shards
from ssd_addon._unit import joint_and_cosines
from ssd_addon.batch import Embeddings, ViewPlan, as_embeddings
from ssd_addon.kernels.covariance import energy_backend, off_diagonal_energy
from ssd_addon.kernels.dispatch import BACKENDS, Backend, checks_are_on, choose_backend, compute_dtype
from ssd_addon.kernels.similarity import check_temperature, negative_lse

FAMILIES = ("simclr", "vicreg", "barlow")
DEFAULT_WEIGHT = {"simclr": 1.0, "vicreg": 25.0, "barlow": 1.0}
DEFAULTS = {
    "simclr": {"temperature": 0.15},
    "vicreg": {"variance": 25.0, "covariance": 1.0},
    "barlow": {"redundancy": 0.0051},
}
VARIANCE_EPS = 1e-4
STANDARDISE_EPS = 1e-5


# ------------------------------------------------------------------------------------------ rows of a pair


@dataclass(frozen=True)
class Pair:
    """One positive pair of views (a, b) and the rows of the local batch that use it; mask None means all."""

    a: int
    b: int
    mask: Tensor | None = None


def pairs_of(z: Embeddings, content_keys: str = "first") -> dict[str, list[Pair]]:
    """Space -> its positive pairs. Content has several with content_keys="all", every other space has one."""
    plan, ids = z.plan, z.image_ids
    same = [None if ids is None else ids[v] == ids[0] for v in range(plan.num_views)]
    if plan.kind == "interleaved":
        first = z["content"]
        index = z.space_index
        if index is None:
            index = plan.default_space_index(first.shape[1], first.device)
        out = {name: [Pair(0, 1, index == s)] for s, name in enumerate(plan.spaces)}
        if content_keys == "all":
            out["content"] = [Pair(0, 1, same[1])]
        return out
    out = {name: [Pair(0, 1 + s)] for s, name in enumerate(plan.spaces)}
    if content_keys == "all":
        out["content"] = [Pair(0, v, same[v]) for v in range(1, plan.num_views)]
    return out


def kept_rows(badness: Tensor, mask: Tensor | None, trim: float, s: Shards) -> tuple[Tensor | None, int | Tensor]:
    """Which local rows a pair keeps once its floor(trim * n + 1e-9) worst rows over all ranks are left out.

    Args:
        badness: [B] larger is worse; not differentiated.
        mask: [B] bool, the rows that the pair uses, or None for all.

    Returns:
        The kept rows ([B] bool, None for all) and their number over all ranks.
    """
    if mask is None and not trim:
        return None, s.total
    used = torch.ones_like(badness, dtype=torch.bool) if mask is None else mask
    n: Tensor = _dist.all_sum(used.sum(), s.group)
    if not trim:
        return used, n
    drop = torch.floor(trim * n.double() + 1e-9)
    ranked = _dist.gather(badness.detach().masked_fill(~used, -math.inf), s)
    place = torch.empty_like(ranked, dtype=torch.int64)
    order = ranked.argsort(descending=True, stable=True)
    place[order] = torch.arange(len(ranked), device=ranked.device)
    kept = used & (place[s.offset : s.offset + s.size] >= drop)
    return kept, (n - drop).to(n.dtype)


def _masked(t: Tensor, mask: Tensor | None) -> Tensor:
    """Rows outside the mask become 0 (selected, not multiplied: a NaN there stays out)."""
    return t if mask is None else torch.where(mask.view(-1, *[1] * (t.ndim - 1)), t, 0)


def _mean_over_keys(values: list[Tensor], counts: list[int | Tensor], s: Shards) -> tuple[Tensor, int | Tensor]:
    """The mean over the pairs that have a row; the number of rows behind it. One pair: the pair."""
    if len(values) == 1:
        return values[0], counts[0]
    n = torch.stack([c if isinstance(c, Tensor) else torch.full((), c, device=values[0].device) for c in counts])
    present = n > 0
    mean = torch.where(present, torch.stack(values), 0).sum() / present.sum().clamp(min=1)
    return mean, n.sum()


def columns_of(z: Mapping[str, Tensor]) -> dict[str, slice]:
    """Where each space lies in the joint embedding."""
    out, start = {}, 0
    for name, t in z.items():
        out[name] = slice(start, start + t.shape[-1])
        start += t.shape[-1]
    return out


# ------------------------------------------------------------------------------------------ SimCLR family


def simclr_alignment(cosine: Tensor, pair: Pair, trim: float, s: Shards) -> tuple[Tensor, int | Tensor]:
    """Mean over the pair's rows of cosine [B] = <z_a, z_b>, of rows of unit length."""
    keep, n = kept_rows(-cosine, pair.mask, trim, s)
    return s.mean(_masked(cosine, keep).sum(), n), n


# ------------------------------------------------------------------------------------------ VICReg family


def vicreg_alignment(z: Tensor, pair: Pair, trim: float, s: Shards) -> tuple[Tensor, int | Tensor]:
    """Mean over the pair's rows and the d coordinates of (z_a - z_b)^2, z [V, B, d]."""
    distance = (z[pair.a] - z[pair.b]).square().mean(dim=-1)
    keep, n = kept_rows(distance, pair.mask, trim, s)
    return s.mean(_masked(distance, keep).sum(), n), n


def centred(x: Tensor, s: Shards) -> Tensor:
    """x - mean over the rows of all ranks, x [B, D]."""
    return x - _dist.all_sum(x.sum(dim=0), s.group) / s.total


def vicreg_entropy(x: Tensor, variance: float, covariance: float, backend: Backend, s: Shards) -> Tensor:
    """variance * mean_k relu(1 - sqrt(var_k + 1e-4)) + covariance * sum_{k != l} C_kl^2 / D, x [B, D] centred."""
    n, d = s.total, x.shape[1]
    var = _dist.all_sum(x.square().sum(dim=0), s.group) / (n - 1)
    hinge = F.relu(1 - torch.sqrt(var + VARIANCE_EPS)).mean()
    energy = off_diagonal_energy(x / math.sqrt(n - 1), backend=backend, group=s.group)
    return variance * hinge + covariance * energy / d


# ------------------------------------------------------------------------------------------ Barlow Twins family


def standardised(x: Tensor, s: Shards) -> Tensor:
    """(x - mean) / sqrt(biased variance + 1e-5) over the rows of all ranks, x [B, D]."""
    x = centred(x, s)
    var = _dist.all_sum(x.square().sum(dim=0), s.group) / s.total
    return x / torch.sqrt(var + STANDARDISE_EPS)


def barlow_alignment(x: Sequence[Tensor], pair: Pair, trim: float, s: Shards) -> tuple[Tensor, int | Tensor]:
    """sum_k (c_kk - 1)^2 with c_kk = mean over the pair's rows of x_a,k x_b,k; x: V times [B, d] standardised."""
    a, b = x[pair.a], x[pair.b]
    keep, n = kept_rows((a - b).square().mean(dim=-1), pair.mask, trim, s)
    total = _dist.all_sum(_masked(a * b, keep).sum(dim=0), s.group)
    if isinstance(n, Tensor):
        value = (total / n.clamp(min=1) - 1).square().sum()
        return torch.where(n > 0, value, 0), n
    return (total / n - 1).square().sum(), n


# ------------------------------------------------------------------------------------------ the module


@dataclass
class Terms:
    """The parts of the loss. `.loss` carries the graph; all others are detached, and equal on every rank.

    Attributes:
        loss: scalar, of this rank (see `JointEntropyLoss` on ranks).
        invariance: space -> raw term, before its weight and 1/S.
        entropy: of the joint embedding, with its coefficients.
        content_entropy: the same for content alone, or None.
        constraint: space -> c_s, alignment on a scale that starts at 0: 1 - mean cosine, the mean squared
            difference, or the mean over coordinates of (c_kk - 1)^2.
        rows: space -> rows behind its term, over all ranks; 0 where no row served the space.
        effective_rank: space -> (tr C)^2 / tr(C^2) of the query's covariance, 1 to d_s: 1 is a collapsed space.
        backend: what computed the entropy.
    """

    loss: Tensor
    invariance: dict[str, Tensor]
    entropy: Tensor
    content_entropy: Tensor | None
    constraint: dict[str, Tensor]
    rows: dict[str, Tensor]
    effective_rank: dict[str, Tensor]
    backend: str

    def scalars(self) -> dict[str, float]:
        """Flat name -> number, for a logger: "loss", "entropy", "invariance/content", "effective_rank/content" ..."""
        out = {"loss": self.loss.item(), "entropy": self.entropy.item()}
        if self.content_entropy is not None:
            out["content_entropy"] = self.content_entropy.item()
        for key in ("invariance", "constraint", "effective_rank"):
            out |= {f"{key}/{name}": value.item() for name, value in getattr(self, key).items()}
        return out


@dataclass
class _Parts:
    loss: Tensor
    invariance: dict[str, Tensor]
    entropy: Tensor
    content_entropy: Tensor | None
    constraint: dict[str, Tensor]
    rows: dict[str, int | Tensor]
    seen: dict[str, Tensor] = field(default_factory=dict)  # space -> what the loss compares, [B, d] of the query
    shards: Shards = field(default_factory=lambda: Shards(None, (0,), 0))
    backend: str = ""


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
        family: "simclr", "vicreg" or "barlow".
        temperature: tau (simclr, default 0.15); a float, or a tensor or nn.Parameter to learn it.
        variance, covariance: coefficients of the entropy (vicreg, defaults 25 and 1).
        redundancy: coefficient of the off-diagonal (barlow, default 0.0051).
        weights: lambda, absolute: a number, a mapping by space, or a sequence in space order. Default 1 (simclr),
            25 (vicreg), 1 (barlow).
        trim: fraction of the worst-aligned rows of every pair that its invariance leaves out, in [0, 1).
        content_keys: "first" aligns content on the content key; "all" on every key of the same image.
        content_entropy: add the entropy of content alone, at the coefficients of the joint one.
        gather_distributed: use the rows of all ranks of the default process group. Each rank then returns
            local sum * W / N of the row terms and the global value of batch terms; the mean over ranks is the
            one-process loss, and backward assumes that gradients are averaged over ranks (DDP).
        backend: "auto", "eager", "streaming", "triton" (the fused kernels, on CUDA).
        validate: "auto" checks values (NaN, no negatives) except under CUDA-graph capture and torch.compile, where
            the result is NaN; True, False.

    Computes in max(float32, type of the embeddings), outside autocast. Source: Eastwood et al., arXiv 2311.08815.
    """

    def __init__(
        self,
        family: str = "simclr",
        *,
        temperature: float | Tensor | None = None,
        variance: float | None = None,
        covariance: float | None = None,
        redundancy: float | None = None,
        weights: float | Mapping[str, float] | Sequence[float] | None = None,
        trim: float = 0.0,
        content_keys: str = "first",
        content_entropy: bool = False,
        gather_distributed: bool = False,
        backend: Backend = "auto",
        validate: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.family = _checks.choice(family, FAMILIES, "family")
        given = {"temperature": temperature, "variance": variance, "covariance": covariance, "redundancy": redundancy}
        own = DEFAULTS[family]
        for name, value in given.items():
            if value is not None and name not in own:
                raise ValueError(
                    f"{name}: the {family!r} family has {_checks.names(own)}, not {name}: got {name}={value!r}"
                )
        for name, default in own.items():
            value = default if given[name] is None else given[name]
            if name == "temperature":
                check_temperature(value)  # type: ignore[arg-type]
            else:
                _checks.not_negative(value, name, "a coefficient of the entropy")  # type: ignore[arg-type]
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)
        self.weights = _check_weights(weights)
        self.trim = _checks.not_negative(trim, "trim", "a fraction of the rows")
        if self.trim >= 1:
            raise ValueError(f"trim: expected a fraction below 1, some rows must be left: got {trim!r}")
        self.content_keys = _checks.choice(content_keys, ("first", "all"), "content_keys")
        self.content_entropy = bool(content_entropy)
        self.gather_distributed = bool(gather_distributed)
        choose_backend(backend, matrix_elements=0, dtype=torch.float32)
        self.backend: Backend = _checks.choice(backend, BACKENDS, "backend")
        checks_are_on(validate)
        self.validate = validate
        self._ascent: list[Any] = []  # a DualAscent that holds lambda; in a list, so that it is no submodule

    def forward(self, z: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar. z: `Embeddings`, or a plain dict name -> [V, B, d] read as a shared-query plan.

        Raises:
            ValueError: views, names, ids or widths that do not fit the plan; one image; NaN (names the space).
            TypeError: embeddings or ids of the wrong type.
        """
        return self._parts(z).loss

    def terms(self, z: Mapping[str, Tensor]) -> Terms:
        """The loss and its parts, for logging and for `DualAscent`. Collective: call it on every rank."""
        parts = self._parts(z)
        group = parts.shards.group or _dist.default_group()
        names = list(parts.invariance)
        rows = torch.stack([torch.as_tensor(parts.rows[n], device=parts.loss.device) for n in names]).double()
        if parts.shards.group is None and group is not None:
            # Every rank has a loss of its own here: means over ranks are weighted by the rows behind them.
            size = torch.full((), float(parts.shards.total), device=rows.device, dtype=rows.dtype)
            weight, rows = rows, _dist.all_sum(rows.clone(), group)
        else:
            size, weight = torch.ones((), device=rows.device, dtype=rows.dtype), torch.ones_like(rows)
        mean = _RankMean(group)
        terms = Terms(
            loss=parts.loss,
            invariance=dict(zip(names, mean([parts.invariance[n] for n in names], weight), strict=True)),
            entropy=mean([parts.entropy], size[None])[0],
            content_entropy=None if parts.content_entropy is None else mean([parts.content_entropy], size[None])[0],
            constraint=dict(zip(names, mean([parts.constraint[n] for n in names], weight), strict=True)),
            rows=dict(zip(names, rows.long(), strict=True)),
            effective_rank={n: _effective_rank(x, parts.shards, group) for n, x in parts.seen.items()},
            backend=parts.backend,
        )
        return terms

    def lambdas(self, plan: ViewPlan, order: Sequence[str] | None = None) -> dict[str, float | Tensor]:
        """The weight of every space of a plan, resolved."""
        if self._ascent:
            return self._ascent[0].lambdas(plan.spaces)
        w, spaces = self.weights, plan.spaces
        if w is None or isinstance(w, float):
            return dict.fromkeys(spaces, DEFAULT_WEIGHT[self.family] if w is None else w)
        if isinstance(w, Mapping):
            _checks.same_names(w, spaces, "weights", "plan")
            return dict(w)
        if len(w) != len(spaces):
            raise ValueError(f"weights: expected one per space ({_checks.names(spaces)}): got {len(w)} of them")
        if order is not None and tuple(order) != spaces:
            raise ValueError(
                f"weights: the plan orders the spaces {_checks.names(spaces)} and the embeddings "
                f"{_checks.names(order)}; give the weights by name"
            )
        return dict(zip(spaces, w, strict=True))

    def _parts(self, z: Mapping[str, Tensor]) -> _Parts:
        z = as_embeddings(z)
        batch, device = z.check()
        plan = z.plan
        if self.content_entropy and len(plan.spaces) == 1:
            raise ValueError(
                "content_entropy: with the one space 'content' it is the joint entropy again: got content_entropy=True"
            )
        lambdas = self.lambdas(plan, tuple(z))
        group = _dist.default_group() if self.gather_distributed else None
        s, ids = self._shards(z, batch, device, group)
        with torch.autocast(device.type, enabled=False):
            dtype = torch.float32
            for t in z.values():
                dtype = torch.promote_types(dtype, compute_dtype(t.dtype))
            spaces = {name: z[name].to(dtype) for name in plan.spaces}
            pairs = pairs_of(z, self.content_keys)
            parts = getattr(self, f"_{self.family}")(spaces, pairs, ids, s)
            on_device = {n: w.to(device, dtype, copy=True) if isinstance(w, Tensor) else w for n, w in lambdas.items()}
            terms = [w * parts.invariance[n] for n, w in on_device.items()]
            invariance = torch.stack(terms).sum() / len(plan.spaces)
            parts.loss = invariance + parts.entropy
            if parts.content_entropy is not None:
                parts.loss = parts.loss + parts.content_entropy
        parts.shards = s
        parts.backend = self._used_backend(spaces, s)
        return parts

    def _shards(self, z: Embeddings, batch: int, device: torch.device, group: Any) -> tuple[Shards, Tensor]:
        """Shard sizes, global image ids [V, B], and every check on values: raised on all ranks alike."""
        v, names = z.plan.num_views, list(z)
        checking = checks_are_on(self.validate)
        bad = local = wrong_index = 0
        if checking or group is not None:
            finite = [torch.isfinite(t).all() for t in z.values()] if checking else []
            bad = sum(1 << k for k, ok in enumerate(finite) if not ok)
            local = z.image_ids is None or not batch or bool((z.image_ids.min() >= 0) & (z.image_ids.max() < batch))
            if checking and z.space_index is not None and batch:
                wrong_index = not bool((z.space_index.min() >= 0) & (z.space_index.max() < len(names)))
        s, flags = _dist.shards(batch, [bad, int(local), int(wrong_index)], device, group)
        for rank, (mask, _, _) in enumerate(flags):
            broken = [n for k, n in enumerate(names) if mask >> k & 1]
            if broken:
                where = f" on rank {rank}" if s.world > 1 else ""
                raise ValueError(
                    f"embeddings: expected finite numbers: got NaN or infinity in the space {_checks.names(broken)}"
                    f"{where}; a diverged step or an overflow in half precision are the usual causes"
                )
        if any(wrong for _, _, wrong in flags):
            raise ValueError(f"space_index: expected 0 to {len(names) - 1}, one of the {z.plan}: got a number outside")
        if s.total < 2:
            raise ValueError(
                f"expected at least 2 images in the batch, the entropy compares each with others: got {s.total}"
                + (" over all ranks" if s.world > 1 else "")
            )
        ids = z.image_ids
        if ids is None:
            ids = torch.arange(batch, device=device).expand(v, batch)
        if s.world > 1 and all(mine for _, mine, _ in flags):
            ids = ids + s.offset  # row numbers of the local batch on every rank: make them global
        return s, ids

    def _used_backend(self, spaces: Mapping[str, Tensor], s: Shards) -> str:
        first = next(iter(spaces.values()))
        width = sum(t.shape[-1] for t in spaces.values())
        if self.family == "simclr":
            elements = max(s.sizes) * s.total * first.shape[0] ** 2
            n = s.total * first.shape[0]
            return choose_backend(
                self.backend, matrix_elements=elements, dtype=first.dtype, device=first.device, rows=n, width=width
            )
        return energy_backend(self.backend, s.size, width, dtype=first.dtype, device=first.device, group=s.group)

    def _simclr(self, z: Mapping[str, Tensor], pairs: dict[str, list[Pair]], ids: Tensor, s: Shards) -> _Parts:
        columns = columns_of(z)
        place = {name: k for k, name in enumerate(z)}
        flat = tuple((p.a, p.b, place[name]) for name, space_pairs in pairs.items() for p in space_pairs)
        joint, cosines = joint_and_cosines(list(z.values()), flat)  # [V, B, D], [pairs, B]
        tau: Any = self.temperature
        if isinstance(tau, Tensor):
            tau = tau.to(joint.device, joint.dtype).reshape(())
        invariance, constraint, rows = {}, {}, {}
        rest = iter(cosines.unbind(0))
        for name, space_pairs in pairs.items():
            found = [simclr_alignment(next(rest), p, self.trim, s) for p in space_pairs]
            cosine, rows[name] = _mean_over_keys([f[0] for f in found], [f[1] for f in found], s)
            invariance[name] = -cosine / tau
            constraint[name] = 1 - cosine
        v, b, d = joint.shape
        with_content = self.content_entropy
        lse = negative_lse(
            joint.reshape(v * b, d),
            ids.reshape(v * b),
            tau,
            prefix=z["content"].shape[-1] if with_content else None,
            backend=self.backend,
            group=s.group,
            validate=self.validate,
        ).view(v * b, 2 if with_content else 1)  # -1 would not do: a rank may hold no row
        entropy = s.mean(lse.sum(dim=0), v * s.total)
        query = {name: joint[0, :, c].detach() for name, c in columns.items()}
        return _Parts(entropy, invariance, entropy[-1], entropy[0] if with_content else None, constraint, rows, query)

    def _vicreg(self, z: Mapping[str, Tensor], pairs: dict[str, list[Pair]], ids: Tensor, s: Shards) -> _Parts:
        invariance, constraint, rows = {}, {}, {}
        for name, space_pairs in pairs.items():
            found = [vicreg_alignment(z[name], p, self.trim, s) for p in space_pairs]
            invariance[name], rows[name] = _mean_over_keys([f[0] for f in found], [f[1] for f in found], s)
            constraint[name] = invariance[name]
        joint = torch.cat(list(z.values()), dim=-1)
        width = z["content"].shape[-1]
        variance, covariance = float(self.variance), float(self.covariance)  # type: ignore[arg-type]
        whole, content = [], []
        for view in joint.unbind(0):
            x = centred(view, s)
            whole.append(vicreg_entropy(x, variance, covariance, self.backend, s))
            if self.content_entropy:
                content.append(vicreg_entropy(x[:, :width], variance, covariance, self.backend, s))
        entropy = torch.stack(whole).mean()
        query = {name: t[0] for name, t in z.items()}
        alone = torch.stack(content).mean() if content else None
        return _Parts(entropy, invariance, entropy, alone, constraint, rows, query)

    def _barlow(self, z: Mapping[str, Tensor], pairs: dict[str, list[Pair]], ids: Tensor, s: Shards) -> _Parts:
        joint = torch.cat(list(z.values()), dim=-1)
        x = [standardised(view, s) for view in joint.unbind(0)]  # V times [B, D]
        columns = columns_of(z)
        invariance, constraint, rows = {}, {}, {}
        for name, space_pairs in pairs.items():
            own = [view[:, columns[name]] for view in x]
            found = [barlow_alignment(own, p, self.trim, s) for p in space_pairs]
            invariance[name], rows[name] = _mean_over_keys([f[0] for f in found], [f[1] for f in found], s)
            constraint[name] = invariance[name] / own[0].shape[-1]
        n = s.total
        redundancy = float(self.redundancy)  # type: ignore[arg-type]

        def energy(part: slice) -> Tensor:
            found = [
                off_diagonal_energy(x[0][:, part], x[key][:, part], backend=self.backend, group=s.group) / n**2
                for key in range(1, 2 if len(x) == 2 else len(z) + 1)
            ]
            return redundancy * torch.stack(found).mean()

        entropy = energy(slice(None))
        alone = energy(columns["content"]) if self.content_entropy else None
        query = {name: x[0][:, c] for name, c in columns.items()}
        return _Parts(entropy, invariance, entropy, alone, constraint, rows, query)

    def extra_repr(self) -> str:
        own = ", ".join(f"{name}={getattr(self, name)!r}" for name in DEFAULTS[self.family])
        return f"{self.family!r}, {own}, weights={self.weights}, backend={self.backend!r}"


class _RankMean:
    """Weighted means over ranks of detached scalars: equal on every rank. Without a group, detached clones."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, values: list[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        v = torch.stack([x.detach() for x in values])
        if self.group is not None:
            both = torch.stack([v.double() * weight, weight.double()])
            dist.all_reduce(both, group=self.group)
            v = torch.where(both[1] > 0, both[0] / both[1].clamp(min=1e-300), 0).to(v.dtype)
        return tuple(x.clone() for x in v.unbind(0))


def _effective_rank(x: Tensor, s: Shards, group: Any) -> Tensor:
    """(tr C)^2 / tr(C^2), the participation ratio of the covariance of x [B, d] over all ranks."""
    with torch.no_grad():
        x = x.detach()
        total = torch.full((), float(x.shape[0]), device=x.device, dtype=x.dtype)
        x = x - _dist.all_sum(x.sum(dim=0), group) / _dist.all_sum(total, group)
        diagonal = _dist.all_sum(x.square().sum(dim=0), group)
        square = off_diagonal_energy(x, group=group) + diagonal.square().sum()
        return torch.where(square > 0, diagonal.sum().square() / square.clamp(min=torch.finfo(x.dtype).tiny), 0)


def _check_weights(
    weights: float | Mapping[str, float] | Sequence[float] | None,
) -> None | float | dict[str, float] | tuple[float, ...]:
    meaning = "the weight of a space's invariance"
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        return {k: _checks.not_negative(v, f"weights[{k!r}]", meaning) for k, v in weights.items()}
    if isinstance(weights, Sequence) and not isinstance(weights, str):
        return tuple(_checks.not_negative(v, f"weights[{i}]", meaning) for i, v in enumerate(weights))
    return _checks.not_negative(weights, "weights", meaning)  # type: ignore[arg-type]
