"""The causal latent model: content and style blocks, mixed by a random invertible network.

Views are drawn in latent space in the same way as structured views of images: the key of style m takes block m from the
query and redraws the other blocks. The content is the image's own, or another image's with cross-image keys.
"""

import torch
from torch import Tensor, nn

from ssd_addon import ViewBatch, ViewPlan


def widths(default: dict[str, int], given: str) -> dict[str, int]:
    """The widths of the spaces: the defaults, replaced by those named in a string such as "content=16,color=4"."""
    own = dict(part.partition("=")[::2] for part in given.split(",") if part)
    if set(own) - set(default) or not all(d.isdecimal() and int(d) for d in own.values()):
        raise SystemExit(f"--widths: expected NAME=D with D from 1 on and names of {', '.join(default)}: got {given!r}")
    return default | {name: int(d) for name, d in own.items()}


class CausalLatents:
    """x = g(c, s_1, ..., s_M); c ~ N(0, 1), or correlated; s_m ~ N(0, 1), or N(a_m c, 1).

    Args:
        seed: seed of the mixing and of the dependences; the draws of a batch come from its own generator.
        content, styles, style: width of c, number of style blocks, width of each block.
        dependent: the coordinates within c and within each s_m are correlated.
        content_dependent: s_m has mean a_m c.
        cross_image: the key of style m is made from the image m rows away.
        plan: "shared_query" (2 + M views) or "interleaved" (2 views).
        structured: False redraws every key, so that no pair shares a style, as in ordinary SSL.
        spaces: False has only the content space, and two views.
    """

    sample_ndim = 1

    def __init__(
        self,
        seed: int = 0,
        *,
        content: int = 4,
        styles: int = 2,
        style: int = 2,
        dependent: bool = False,
        content_dependent: bool = False,
        cross_image: bool = False,
        plan: str = "shared_query",
        structured: bool = True,
        spaces: bool = True,
    ) -> None:
        n = content + styles * style
        g = torch.Generator().manual_seed(1000 + seed)
        self.mix = [torch.linalg.qr(torch.randn(n, n, generator=g))[0] for _ in range(3)]
        self.content_cov, self.style_cov = torch.eye(content), torch.eye(style)
        if dependent:
            self.content_cov = torch.randn(content, content, generator=g) / 2
            self.style_cov = torch.randn(style, style, generator=g)
        scale = 1.0 if content_dependent else 0.0
        self.from_content = [scale * torch.randn(content, style, generator=g) / content**0.5 for _ in range(styles)]
        self.width, self.styles = n, tuple(f"style_{m + 1}" for m in range(styles))
        names = ("content", *self.styles) if spaces else ("content",)
        self.plan = ViewPlan(plan if spaces else "shared_query", names)
        self.cross_image, self.structured = cross_image, structured

    def generate(self, c: Tensor, s: list[Tensor]) -> Tensor:
        """The mixing: orthogonal maps and leaky ReLUs, invertible."""
        x = torch.cat([c, *s], dim=1)
        for w in self.mix[:-1]:
            x = nn.functional.leaky_relu(x @ w, 0.3)
        return x @ self.mix[-1]

    def content(self, n: int, g: torch.Generator) -> Tensor:
        return torch.randn(n, len(self.content_cov), generator=g) @ self.content_cov

    def style(self, m: int, c: Tensor, g: torch.Generator) -> Tensor:
        return torch.randn(len(c), len(self.style_cov), generator=g) @ self.style_cov + c @ self.from_content[m]

    def batch(self, n: int, g: torch.Generator) -> ViewBatch:
        """Views [V, n, width]; `.parameters[v]` holds the style blocks that view v was made with."""
        c, plan, rows = self.content(n, g), self.plan, torch.arange(n)
        query = [self.style(m, c, g) for m in range(len(self.styles))]
        index = plan.default_space_index(n) if plan.kind == "interleaved" else None
        views, ids, drawn = [self.generate(c, query)], [rows], [query]
        for v in range(1, plan.num_views):
            serves = torch.full((n,), v - 1) if index is None else index  # the space of every row of this key
            own = rows.clone()
            if self.cross_image:
                for m in range(len(self.styles)):
                    its = rows[serves == m + 1]
                    own[its] = its.roll(m + 1)
            other = c[own]
            s = []
            for m in range(len(self.styles)):
                fresh = self.style(m, other, g)
                shared = (serves == m + 1) & self.structured
                s.append(torch.where(shared[:, None], query[m], fresh))
            views.append(self.generate(other, s))
            ids.append(own)
            drawn.append(s)
        parameters = [{name: {"0.Block": {"value": t}} for name, t in zip(self.styles, s, strict=True)} for s in drawn]
        return ViewBatch(
            torch.stack(views),
            plan,
            image_ids=torch.stack(ids) if self.cross_image else None,
            space_index=index,
            parameters=parameters,
        )

    def labelled(self, n: int, g: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.content(n, g)
        s = [self.style(m, c, g) for m in range(len(self.styles))]
        return self.generate(c, s), {"content": c, **dict(zip(self.styles, s, strict=True))}
