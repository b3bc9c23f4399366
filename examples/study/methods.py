"""The methods of the study: the library's loss in its forms, controls, cures that were tried, and baselines.

A method is a module: (model, batch, terms wanted) -> (loss, terms or None). Legend: V views, B images, S spaces.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from study.augself import AugSelf
from study.looc import LooCLoss
from torch import Tensor, nn

from ssd_addon import DualAscent, EquivarianceLoss, IndependenceLoss, JointEntropyLoss, StyleHeads, ViewBatch
from ssd_addon.kernels.similarity import negative_lse
from ssd_addon.losses import Terms, resolve_family
from ssd_addon.metrics import parameter_differences

Config = dict[str, Any]
Result = tuple[Tensor, Terms | None]


class Trunk(nn.Module):
    """A backbone and hidden layers that all heads share: one projector whose output is split into spaces."""

    def __init__(self, backbone: nn.Module, features: int, hidden: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.hidden = nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(self.backbone(x))


def build_model(c: Config, world: Any) -> StyleHeads:
    backbone, features, hidden = world.backbone(), world.features, (256,)
    if c["heads"] == "one projector":
        # The width gives it as many weights as the separate heads have.
        widths = world.widths.values()
        width = round(sum(features * 256 + 256 * d for d in widths) / (features + sum(widths)))
        return StyleHeads(
            Trunk(backbone, features, width), world.widths, in_features=width, hidden=(), sample_ndim=world.sample_ndim
        )
    shallow = c["heads"] == "shallow styles"
    by_name = {n: () if shallow and n != "content" else hidden for n in world.widths}
    return StyleHeads(backbone, world.widths, in_features=features, hidden=by_name, sample_ndim=world.sample_ndim)


class Joint(nn.Module):
    """JointEntropyLoss, with dual ascent if the configuration has a tolerance."""

    def __init__(self, c: Config, world: Any, **options: Any) -> None:
        super().__init__()
        family = c["family"]
        weights: Any = None
        several = len(world.widths) > 1
        if c["content_weight"] is not None and several:  # with one space, it would outweigh the entropy: collapse
            weights = dict.fromkeys(world.widths, resolve_family(family).weight) | {"content": c["content_weight"]}
        self.ascends = c["dual"] is not None and several
        if self.ascends:
            rise = {"tolerance": c["dual"], "step_size": c["dual_step"], "warmup_steps": c["dual_warmup"]}
            weights = DualAscent(world.widths, start=weights, **rise)
        self.criterion = JointEntropyLoss(
            family,
            temperature=c["temperature"] if family == "simclr" else None,
            weights=weights,
            content_keys=c["content_keys"] if several else "first",
            content_entropy=c["content_entropy"] and several,
            **options,
        )

    def forward(self, model: StyleHeads, batch: ViewBatch, log: bool) -> Result:
        z = model(batch)
        if log or self.ascends:
            terms = self.criterion.terms(z)
            return terms.loss + self.added(z, batch), terms
        return self.criterion(z) + self.added(z, batch), None

    def added(self, z: Mapping[str, Tensor], batch: ViewBatch) -> Tensor | float:
        """The term that a method adds to the loss."""
        return 0.0

    def after(self, terms: Terms | None) -> None:
        if terms is not None:
            self.criterion.weights.step(terms)


class SeparateEntropies(Joint):
    """The mean over spaces of separate contrastive losses: nothing keeps a space from repeating another (SimCLR)."""

    def forward(self, model: StyleHeads, batch: ViewBatch, log: bool) -> Result:
        z = model(batch)
        terms = self.criterion.terms(z)
        ids = z.image_ids if z.image_ids is not None else torch.arange(batch.views.shape[1]).expand(len(batch), -1)
        weights = self.criterion.lambdas(z.plan)
        losses = []
        with torch.autocast("cpu", enabled=False):
            for name, (a, b, _) in z.plan.pairs(batch.views.shape[1]).items():
                u = F.normalize(z[name].float(), dim=-1)
                tau = self.criterion.objective.temperature
                invariance = -(u[a] * u[b]).sum(-1).mean() / tau
                losses.append(weights[name] * invariance + negative_lse(u.flatten(0, 1), ids.flatten(), tau).mean())
        return torch.stack(losses).mean(), terms


class Cube(nn.Module):
    """Squared distance in a cube instead of the cosine on a sphere: z = tanh, no normalization.

    invariance_s = mean |z_a - z_b|^2 / tau,  entropy = mean log sum exp(-mean_s |z_i - z_j|^2 / tau); a cube has no
    rotations, by which a code on a sphere may become entangled with the content.
    """

    def __init__(self, c: Config, world: Any) -> None:
        super().__init__()
        self.temperature = c["temperature"]

    def forward(self, model: StyleHeads, batch: ViewBatch, log: bool) -> Result:
        z = model(batch)
        cubes = {n: torch.tanh(t) / math.sqrt(t.shape[-1]) for n, t in z.items()}  # |z| <= 1
        pulls = []
        for s, t in enumerate(cubes.values()):
            pulls.append((t[0] - t[1 + s]).square().sum(-1).mean() / self.temperature)
        joint = torch.cat(list(cubes.values()), dim=-1).flatten(0, 1) / math.sqrt(len(cubes))
        ids = z.image_ids if z.image_ids is not None else torch.arange(batch.views.shape[1]).expand(len(batch), -1)
        ids = ids.flatten()
        square = joint.square().sum(1)
        distance = square[:, None] + square - 2 * joint @ joint.T
        logits = (-distance / self.temperature).masked_fill(ids[:, None] == ids, -math.inf)
        return torch.stack(pulls).mean() + logits.logsumexp(1).mean(), None


class Equivariant(Joint):
    """The joint loss and `EquivarianceLoss`: a known change of parameters has the same effect on every code."""

    def __init__(self, c: Config, world: Any) -> None:
        super().__init__(c, world)
        self.equivariance = EquivarianceLoss(
            world.widths,
            world_changes(world),
            family=c["family"],
            temperature=c["temperature"] if c["family"] == "simclr" else None,
            weight=c["equivariance"],
        )

    def added(self, z: Mapping[str, Tensor], batch: ViewBatch) -> Tensor | float:
        return self.equivariance(z, batch)


class Independent(Joint):
    """VICReg's loss with nonlinear decorrelation of spaces: covariances of random Fourier features across spaces."""

    def __init__(self, c: Config, world: Any, features: int = 128) -> None:
        super().__init__(c, world)
        self.weight, self.maps, self.features = c["independence"], {}, features
        g = torch.Generator().manual_seed(1)
        for n, d in world.widths.items():
            w = torch.randn(d, features, generator=g) / math.sqrt(d)
            self.maps[n] = (w, 2 * math.pi * torch.rand(features, generator=g))

    def added(self, z: Mapping[str, Tensor], batch: ViewBatch) -> Tensor | float:
        found = []
        for n, t in z.items():
            x = t[0]
            w, phase = self.maps[n]
            x = (x - x.mean(0)) / x.std(0).clamp(min=1e-3)
            f = math.sqrt(2) * torch.cos(x @ w + phase)
            found.append(f - f.mean(0))
        across = [
            (a.T @ b / len(a)).square().sum() / self.features for i, a in enumerate(found) for b in found[i + 1 :]
        ]
        return self.weight * torch.stack(across).mean()


class IndependentEquivariant(Independent):
    """Both: independent features against the leak, equivariance against the entanglement that they bring."""

    def __init__(self, c: Config, world: Any) -> None:
        super().__init__(c, world)
        self.equivariant = Equivariant(c, world)

    def added(self, z: Mapping[str, Tensor], batch: ViewBatch) -> Tensor | float:
        return super().added(z, batch) + self.equivariant.equivariance(z, batch)


class Combined(Joint):
    """The candidates for the recipe: the joint loss, an equivariance term and an independence term."""

    def __init__(self, c: Config, world: Any) -> None:
        super().__init__(c, world)
        family = {"family": c["family"]}
        self.terms = nn.ModuleList()
        if c["equivariance"]:
            temperature = c["temperature"] if c["family"] == "simclr" else None
            options = {**family, "temperature": temperature, "weight": c["equivariance"]}
            self.terms.append(EquivarianceLoss(world.widths, world_changes(world), **options))
        self.independence = IndependenceLoss(world.widths, weight=c["independence"], **family)
        self.contrast = c["contrast"]
        self.alone = JointEntropyLoss(c["family"], temperature=c["temperature"] if c["family"] == "simclr" else None)

    def added(self, z: Mapping[str, Tensor], batch: ViewBatch) -> Tensor | float:
        total: Tensor | float = 0.0
        for term in self.terms:
            total = total + term(z, batch)
        if self.contrast:  # the query and the content key, as content-only SSL has them
            total = total + self.contrast * self.alone({"content": z["content"][:2]})
        return total + self.independence(z) if self.independence.weight else total


class LooC(nn.Module):
    """Xiao et al. 2021, see looc.py."""

    def __init__(self, c: Config, world: Any) -> None:
        super().__init__()
        self.criterion = LooCLoss(c["temperature"])

    def forward(self, model: StyleHeads, batch: ViewBatch, log: bool) -> Result:
        return self.criterion(model(batch)), None


class WithAugSelf(Joint):
    """Ordinary two-view SSL, and AugSelf's prediction from the backbone; see augself.py."""

    def __init__(self, c: Config, world: Any) -> None:
        super().__init__(c, world)
        self.weight = c["augself"]
        self.augself = AugSelf(world.features, world_changes(world))

    def forward(self, model: StyleHeads, batch: ViewBatch, log: bool) -> Result:
        features = model.features(batch.views.flatten(0, 1))
        shape = batch.views.shape[:2]
        z = {n: t.view(*shape, -1) for n, t in model.project(features).items()}
        terms = self.criterion.terms(z)
        changes = parameter_differences(batch.parameters[0], batch.parameters[1])
        a, b = features.float().view(*shape, -1)
        with torch.autocast("cpu", enabled=False):
            return terms.loss + self.weight * self.augself(a, b, changes), terms


def world_changes(world: Any) -> dict[str, int]:
    """The parameters in which two views differ, and their widths."""
    batch = world.batch(64, torch.Generator().manual_seed(0))
    return {k: v.shape[1] for k, v in parameter_differences(batch.parameters[0], batch.parameters[1]).items()}


METHODS = {
    "ours": Joint,
    "content-only": Joint,
    "unstructured pairs": Joint,
    "separate entropies": SeparateEntropies,
    "cube": Cube,
    "equivariance": Equivariant,
    "combined": Combined,
    "independent": Independent,
    "independent equivariant": IndependentEquivariant,
    "looc": LooC,
    "augself": WithAugSelf,
}
