"""The generators of the two numerical identifiability experiments, written from the papers' equations.

Latents are Gaussian; an observation is their mixture by a random invertible network. `ContentStyle` is the pair of von
Kügelgen et al. 2021 (arXiv 2106.04619), `PartialViews` the partially observed views of Yao et al. 2024
(arXiv 2311.04056). Legend: n samples, c content, s style, z all latents.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

POOL = 25_000  # random matrices from which a mixing takes its layers
BEST = 0.001  # the share of the pool that is used: the lowest condition numbers
SLOPE = 0.2  # of the leaky ReLU between layers


class Mixing:
    """An invertible network: square layers of low condition number, leaky ReLUs between them, no biases.

    Entries of a layer are uniform in [-1, 1], columns are scaled to unit length.

    Args:
        width: latents in, observations out.
        g: draws the layers.
        layers: how many.
    """

    def __init__(self, width: int, g: torch.Generator, layers: int = 3) -> None:
        pool = 2 * torch.rand(POOL, width, width, generator=g) - 1
        pool = pool / pool.norm(dim=1, keepdim=True)
        conditions = torch.linalg.cond(pool)
        best = conditions.argsort()[: round(BEST * POOL)]
        chosen = best[torch.randperm(len(best), generator=g)[:layers]]
        self.layers = list(pool[chosen])
        self.conditions = conditions[chosen].tolist()
        self.threshold = float(conditions[best[-1]])

    def __call__(self, z: Tensor) -> Tensor:
        """Latents [n, width] to observations [n, width]."""
        *inner, last = [w.to(z) for w in self.layers]
        for w in inner:
            z = leaky_relu(z @ w.T, SLOPE)
        return z @ last.T

    def inverse(self, x: Tensor) -> Tensor:
        """Observations [n, width] to latents [n, width]."""
        last, *inner = [torch.linalg.inv(w.to(x)) for w in reversed(self.layers)]
        x = x @ last.T
        for w in inner:
            x = torch.where(x < 0, x / SLOPE, x) @ w.T
        return x


def wishart(width: int, g: torch.Generator) -> Tensor:
    """A covariance [width, width] from the Wishart distribution with `width` degrees of freedom and unit scale."""
    a = torch.randn(width, width, generator=g)
    return a @ a.T


def normal(n: int, factor: Tensor, g: torch.Generator) -> Tensor:
    """n draws from N(0, factor factor^T), [n, width]."""
    return torch.randn(n, len(factor), generator=g) @ factor.T


def factor_of(covariance: Tensor) -> Tensor:
    """A matrix whose product with its transpose is the covariance, which may be close to singular."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.clamp(min=0).sqrt()).float()


class ContentStyle:
    """x = g(c, s) with c ~ N(0, C) and s = e + B c + a, e ~ N(0, S); an augmentation adds N(0, A) to some styles.

    Args:
        seed: seed of everything that a run draws once: g, C, S, A, B, a.
        content, style: widths of c and s.
        change: probability that the augmentation changes a style, one draw for each style and sample.
        statistical: C, S and A are Wishart draws instead of the identity.
        causal: B and a are Gaussian draws instead of zero, so that style depends on content.
    """

    def __init__(
        self,
        seed: int,
        *,
        content: int = 5,
        style: int = 5,
        change: float = 1.0,
        statistical: bool = False,
        causal: bool = False,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.widths = {"content": content, "style": style}
        self.change = change

        def covariance(width: int) -> Tensor:
            return wishart(width, g) if statistical else torch.eye(width)

        self.of_content = factor_of(covariance(content))
        self.of_style = factor_of(covariance(style))
        self.of_change = factor_of(covariance(style))
        self.slope = torch.randn(style, content, generator=g) if causal else torch.zeros(style, content)
        self.offset = torch.randn(style, generator=g) if causal else torch.zeros(style)
        self.mix = Mixing(content + style, g)

    def latents(self, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """c [n, content] and s [n, style] of n samples."""
        c = normal(n, self.of_content, g)
        return c, normal(n, self.of_style, g) + c @ self.slope.T + self.offset

    def augmented(self, s: Tensor, g: torch.Generator) -> Tensor:
        """Styles [n, style] after the augmentation."""
        changes = torch.rand(s.shape, generator=g) < self.change
        return s + changes * normal(len(s), self.of_change, g)

    def views(self, n: int, kinds: Sequence[str], g: torch.Generator) -> Tensor:
        """Observations [V, n, content + style] of n samples.

        Args:
            n: samples.
            kinds: the kind of each view: "query", the sample itself; "content key", its augmentation, which shares c;
                "style key", which shares s with the query and has the content of another sample, whatever s is (an
                intervention on s); "negative", another sample.
            g: draws the samples.
        """
        c, s = self.latents(n, g)
        views = []
        for kind in kinds:
            if kind == "query":
                views.append((c, s))
            elif kind == "content key":
                views.append((c, self.augmented(s, g)))
            elif kind == "style key":
                views.append((self.latents(n, g)[0], s))
            elif kind == "negative":
                views.append(self.latents(n, g))
            else:
                raise ValueError(f"kinds: expected query, content key, style key or negative: got {kind!r}")
        return torch.stack([self.mix(torch.cat(view, 1)) for view in views])

    def labelled(self, n: int, g: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Observations [n, content + style] and the factors behind them."""
        c, s = self.latents(n, g)
        return self.mix(torch.cat([c, s], 1)), {"content": c, "style": s}


VIEWS = ((0, 1, 2, 3, 4), (0, 1, 2, 4, 5), (0, 1, 2, 3, 5), (0, 1, 3, 4, 5))
"""The latents that each of the four views observes."""


class PartialViews:
    """x_k = g_k(z[S_k]): each view mixes a subset of the latents z ~ N(0, Sigma) by its own network.

    Args:
        seed: seed of the mixings and of Sigma.
        dependent: the number of first latents with a Wishart covariance; the others are independent.
        views: S_k, the latents of each view.
    """

    def __init__(self, seed: int, *, dependent: int = 0, views: Sequence[Sequence[int]] = VIEWS) -> None:
        g = torch.Generator().manual_seed(seed)
        self.latents_of = tuple(tuple(view) for view in views)
        self.width = 1 + max(max(view) for view in views)
        covariance = torch.eye(self.width)
        if dependent:
            covariance[:dependent, :dependent] = wishart(dependent, g)
        self.of_latents = factor_of(covariance)
        self.mixes = [Mixing(len(view), g) for view in self.latents_of]

    def latents(self, n: int, g: torch.Generator) -> Tensor:
        """z [n, width]."""
        return normal(n, self.of_latents, g)

    def observe(self, z: Tensor) -> list[Tensor]:
        """Latents [n, width] to the observation of every view, [n, len(S_k)] each."""
        return [mix(z[:, list(view)]) for mix, view in zip(self.mixes, self.latents_of, strict=True)]

    def shared(self, subset: Sequence[int]) -> tuple[int, ...]:
        """The latents that all views of a subset observe."""
        return tuple(sorted(set.intersection(*(set(self.latents_of[k]) for k in subset))))
