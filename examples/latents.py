"""The causal latent model: content and two style blocks, mixed by a random invertible network.

Views are drawn in latent space just as structured views of images are: style m's key takes block m from the query and
redraws the others; content is always the image's own (with cross-image keys: another image's).
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssd_addon import ViewBatch, ViewPlan

CONTENT, STYLES, STYLE = 4, 2, 2  # widths: content, number of style blocks, each of them


def widths(default: dict[str, int], given: str) -> dict[str, int]:
    """The widths of the spaces, those of "content=16,color=4" instead of the default ones."""
    own = dict(part.partition("=")[::2] for part in given.split(",") if part)
    if set(own) - set(default) or not all(d.isdecimal() and int(d) for d in own.values()):
        raise SystemExit(f"--widths: expected NAME=D with D from 1 on and names of {', '.join(default)}: got {given!r}")
    return default | {name: int(d) for name, d in own.items()}


class CausalLatents:
    """x = g(c, s_1, s_2); c ~ N(0, 1), or correlated (`--dependent`); s_m ~ N(0, 1), or N(a_m c, 1) with content."""

    sample_ndim = 1

    def __init__(self, args: argparse.Namespace, backbone: Callable[[int], nn.Module]) -> None:
        n = CONTENT + STYLES * STYLE
        g = torch.Generator().manual_seed(1000 + args.seed)
        self.mix = [torch.linalg.qr(torch.randn(n, n, generator=g))[0] for _ in range(3)]
        self.content_cov = torch.eye(CONTENT)
        self.style_cov = torch.eye(STYLE)
        if args.dependent:
            self.content_cov = torch.randn(CONTENT, CONTENT, generator=g) / 2
            self.style_cov = torch.randn(STYLE, STYLE, generator=g)
        scale = 1.0 if args.content_dependent_style else 0.0
        self.from_content = [scale * torch.randn(CONTENT, STYLE, generator=g) / CONTENT**0.5 for _ in range(STYLES)]
        self.ours, self.cross = args.method == "ours", args.cross_image
        styles = tuple(f"style_{m + 1}" for m in range(STYLES)) if self.ours else ()
        self.plan = ViewPlan.shared_query(("content", *styles))
        self.widths = widths({"content": 16, **dict.fromkeys(styles, 8)}, args.widths)
        self.backbone, self.features = backbone(n), 256

    def generate(self, c: Tensor, s: list[Tensor]) -> Tensor:
        """The mixing: orthogonal maps and leaky ReLUs, invertible."""
        x = torch.cat([c, *s], dim=1)
        for w in self.mix[:-1]:
            x = nn.functional.leaky_relu(x @ w, 0.3)
        return x @ self.mix[-1]

    def content(self, n: int, g: torch.Generator) -> Tensor:
        return torch.randn(n, CONTENT, generator=g) @ self.content_cov

    def style(self, m: int, c: Tensor, g: torch.Generator) -> Tensor:
        return torch.randn(len(c), STYLE, generator=g) @ self.style_cov + c @ self.from_content[m]

    def batch(self, n: int, g: torch.Generator) -> ViewBatch:
        c = self.content(n, g)
        query = [self.style(m, c, g) for m in range(STYLES)]
        views, ids = [self.generate(c, query)], [torch.arange(n)]
        for v in range(1, self.plan.num_views):
            own = torch.arange(n).roll(v - 1) if self.cross and v > 1 else torch.arange(n)
            other = c[own]
            s = [query[m] if v == m + 2 else self.style(m, other, g) for m in range(STYLES)]
            views.append(self.generate(other, s))
            ids.append(own)
        return ViewBatch(torch.stack(views), self.plan, image_ids=torch.stack(ids) if self.cross else None)

    def labelled(self, n: int, g: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.content(n, g)
        s = [self.style(m, c, g) for m in range(STYLES)]
        return self.generate(c, s), {"content": c, **{f"style_{m + 1}": t for m, t in enumerate(s)}}
