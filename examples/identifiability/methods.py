"""The methods: the two papers' contrastive losses, written from their equations, and this library's loss.

Every method is a module with `loss(world, samples, g)`, `passes(samples)`, the encoder passes that it costs, and
`encode`. Legend: V views, n samples of a batch, d width of a space.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from identifiability.generators import ContentStyle, PartialViews
from torch import Tensor, nn

from ssd_addon import DualAscent, JointEntropyLoss, StyleHeads, ViewPlan

Config = dict[str, Any]


def trunk(width: int, times: Sequence[int]) -> nn.Sequential:
    """An MLP with hidden layers of a multiple of its input's width; leaky ReLUs of slope 0.01."""
    sizes = [width, *(width * k for k in times)]
    layers = [nn.Sequential(nn.Linear(a, b), nn.LeakyReLU(0.01)) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(layer for pair in layers for layer in pair))


def contrast(positives: Sequence[Tensor], negatives: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """InfoNCE with squared Euclidean distances, summed over the views of a subset.

    pos_i = sum_k |a_i^k - a_i^{k+1}|^2 / tau,  neg_ij = sum_k |a_i^k - b_j^k|^2 / tau,
    loss = mean_i [pos_i + log((exp(-pos_i) + sum_j exp(-neg_ij)) / (n + 1))].

    Args:
        positives: embeddings [n, d] of the same n samples, one of each view.
        negatives: embeddings [n, d] of n other samples, one of each view that is compared with them.
        temperature: tau.

    Source: arXiv 2311.04056, section 5 and its code's form for numerical data; with two views and the negatives of the
    first view alone it is the loss of arXiv 2106.04619.
    """
    pos = torch.stack([(a - b).square().sum(1) for a, b in itertools.pairwise(positives)]).sum(0) / temperature
    neg = [_squared(a, b) for a, b in zip(positives, negatives, strict=False)]
    logits = torch.cat([-torch.stack(neg).sum(0) / temperature, -pos[:, None]], 1)
    return (pos + logits.logsumexp(1) - math.log(logits.shape[1])).mean()


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of all rows, [n, m]."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


# ------------------------------------------------------------------------------------- content and style


class Theirs(nn.Module):
    """The content encoder of von Kügelgen et al.: one output for each content latent, negatives from a third sample.

    With `style pairs`, it has as many more outputs for style, trained by the same loss on pairs that share style.
    """

    def __init__(self, c: Config, world: ContentStyle) -> None:
        super().__init__()
        wanted = ("content", "style") if c["pairs"] == "content and style" else ("content",)
        self.widths = {name: world.widths[name] for name in wanted}
        self.kinds = ("query", *(f"{name} key" for name in wanted), "negative")
        width = sum(world.widths.values())
        self.net = trunk(width, c["encoder"])
        self.last = nn.Linear(width * c["encoder"][-1], sum(self.widths.values()))

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        blocks = self.last(self.net(x)).split(list(self.widths.values()), dim=-1)
        return dict(zip(self.widths, blocks, strict=True))

    def passes(self, samples: int) -> int:
        return len(self.kinds) * samples

    def loss(self, world: ContentStyle, samples: int, g: torch.Generator) -> Tensor:
        z = self.encode(world.views(samples, self.kinds, g).to(self.last.weight))
        each = [contrast([z[name][0], z[name][1 + m]], [z[name][-1]]) for m, name in enumerate(self.widths)]
        return torch.stack(each).sum()


class Ours(nn.Module):
    """Content alone, or content and style, by `JointEntropyLoss`: the same trunk, a linear head for each space."""

    def __init__(self, c: Config, world: ContentStyle) -> None:
        super().__init__()
        wanted = ("content", "style") if c["pairs"] == "content and style" else ("content",)
        self.plan = ViewPlan.shared_query(wanted)
        self.kinds = ("query", *(f"{name} key" for name in wanted))
        width = sum(world.widths.values())
        self.model = StyleHeads(
            trunk(width, c["encoder"]),
            {name: c["space"] for name in wanted},
            in_features=width * c["encoder"][-1],
            hidden=(),
            sample_ndim=1,
        )
        self.criterion = JointEntropyLoss("simclr", temperature=c["temperature"], weights=c["weight"])
        self.model.on_sphere = self.criterion.on_sphere

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {name: nn.functional.normalize(t, dim=-1) for name, t in self.model(x).items()}

    def passes(self, samples: int) -> int:
        return len(self.kinds) * samples

    def loss(self, world: ContentStyle, samples: int, g: torch.Generator) -> Tensor:
        views = world.views(samples, self.kinds, g).to(next(self.model.parameters()))
        if "style" not in self.plan.spaces:
            return self.criterion(self.model(views))
        z = self.model(views)
        # The style key shows another sample's content, so it is another image with the query's style.
        ids = torch.arange(samples, device=views.device).expand(len(views), -1).clone()
        ids[2] += samples
        z.image_ids = ids
        return self.criterion(z)


# ------------------------------------------------------------------------------------- partial views

Subset = tuple[int, ...]


def subsets(views: int) -> list[Subset]:
    """All sets of two or more views, beginning with all views."""
    return [s for size in range(views, 1, -1) for s in itertools.combinations(range(views), size)]


def named(subset: Subset) -> str:
    """The name of a subset's space; content is what all views share."""
    return "views " + " ".join(str(k) for k in subset)


class TheirsPartial(nn.Module):
    """One encoder for each view, with one output for each observed latent, and the loss of every subset of views.

    Each output is assigned to a latent of its view beforehand (their option "ground_truth"). The code of a subset
    consists of the outputs for the latents that it shares.
    """

    def __init__(self, c: Config, world: PartialViews) -> None:
        super().__init__()
        sizes = [len(view) for view in world.latents_of]
        self.nets = nn.ModuleList(
            nn.Sequential(trunk(n, c["encoder"]), nn.Linear(n * c["encoder"][-1], n)) for n in sizes
        )
        self.places = {
            subset: {k: [world.latents_of[k].index(j) for j in world.shared(subset)] for k in subset}
            for subset in subsets(len(sizes))
        }

    def passes(self, samples: int) -> int:
        return 2 * len(self.nets) * samples

    def encode(self, observed: Sequence[Tensor]) -> dict[Subset, dict[int, Tensor]]:
        out = [net(x) for net, x in zip(self.nets, observed, strict=True)]
        return {s: {k: out[k][..., columns] for k, columns in at.items()} for s, at in self.places.items()}

    def loss(self, world: PartialViews, samples: int, g: torch.Generator) -> Tensor:
        like = next(self.parameters())
        both = [self.encode([x.to(like) for x in world.observe(world.latents(samples, g))]) for _ in range(2)]
        each = [contrast(list(a.values()), list(b.values())) for a, b in zip(*(z.values() for z in both), strict=True)]
        return torch.stack(each).sum()


class OursPartial(nn.Module):
    """One encoder for each view, a linear head for each space, and `JointEntropyLoss` over a plan of pairs of views.

    `spaces` of the configuration: "subsets" has a space for each subset of views, "latents" one for all views and one
    for each subset of all views but one. With `entropy` "separate" every subset has its own loss, over its own
    views, instead of the joint entropy of all spaces. With `dual`, a tolerance, dual ascent raises the weights of
    spaces whose pairs disagree by more.
    """

    def __init__(self, c: Config, world: PartialViews) -> None:
        super().__init__()
        views = len(world.latents_of)
        all_views, *others = subsets(views)
        kept = others if c["spaces"] == "subsets" else [s for s in others if len(s) == views - 1]
        self.subsets = {"content": all_views, **{named(s): s for s in kept}}
        pairs = {name: list(itertools.combinations(s, 2)) for name, s in self.subsets.items()}
        self.plan, self.separate = ViewPlan(pairs=pairs), c["entropy"] == "separate"
        self.nets = nn.ModuleList(
            StyleHeads(
                trunk(len(view), c["encoder"]),
                dict.fromkeys(self.subsets, c["space"]),
                in_features=len(view) * c["encoder"][-1],
                hidden=(),
                sample_ndim=1,
            )
            for view in world.latents_of
        )
        weights: Any = c["weight"]
        if c["dual"] is not None:
            ascent = {"tolerance": c["dual"], "step_size": 0.02, "warmup_steps": 300}
            weights = DualAscent(self.plan.spaces, start=c["weight"], **ascent)
        self.criterion = JointEntropyLoss("simclr", temperature=c["temperature"], weights=weights)

    def passes(self, samples: int) -> int:
        return len(self.nets) * samples

    def project(self, observed: Sequence[Tensor]) -> dict[str, Tensor]:
        """Space -> embeddings of every view [V, n, d]."""
        out: list[Mapping[str, Tensor]] = [net(x) for net, x in zip(self.nets, observed, strict=True)]
        return {name: torch.stack([z[name] for z in out]) for name in self.subsets}

    def encode(self, observed: Sequence[Tensor]) -> dict[Subset, dict[int, Tensor]]:
        z = {name: nn.functional.normalize(t, dim=-1) for name, t in self.project(observed).items()}
        return {s: {k: z[name][k] for k in s} for name, s in self.subsets.items()}

    def loss(self, world: PartialViews, samples: int, g: torch.Generator) -> Tensor:
        like = next(self.parameters())
        z = self.project([x.to(like) for x in world.observe(world.latents(samples, g))])
        if isinstance(self.criterion.weights, DualAscent):
            self.terms = self.criterion.terms(z, self.plan)
            return self.terms.loss
        if not self.separate:
            return self.criterion(z, self.plan)
        losses = []
        for name, subset in self.subsets.items():
            plan = ViewPlan(pairs={"content": list(itertools.combinations(range(len(subset)), 2))})
            losses.append(self.criterion({"content": z[name][list(subset)]}, plan))
        return torch.stack(losses).sum()

    def after(self) -> None:
        """Called after the optimizer's step."""
        if isinstance(self.criterion.weights, DualAscent):
            self.criterion.weights.step(self.terms)


METHODS: dict[str, dict[str, Any]] = {
    "pair": {"theirs": Theirs, "ours": Ours},
    "partial": {"theirs": TheirsPartial, "ours": OursPartial},
}
