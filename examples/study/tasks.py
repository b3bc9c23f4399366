"""Score a representation on tasks: classes, from all labels and from few, under shifted colors, and tasks of style.

Everything is measured on the even and on the odd held-out images: settings are chosen on the first half ("choose"),
and results are reported on the second ("report"). Images that were used in no choice are scored as one ("all").
"""

from collections.abc import Callable
from typing import Any

import torch
from kornia.enhance import adjust_hue
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn

Embeds = Callable[[Tensor], dict[str, Tensor]]  # images [n, 3, H, W] -> space -> [n, d]
Labelled = tuple[Tensor, Tensor]
FEW = 10  # labels of a class, in the tasks with few
HALVES = {"choose": slice(0, None, 2), "report": slice(1, None, 2), "all": slice(None)}


def fitted(x: Tensor, y: Tensor, decay: float = 1e-3, steps: int = 200) -> Callable[[Tensor], Tensor]:
    """Softmax regression on standardized columns, fitted by L-BFGS; returns a function from [n, d] to classes [n]."""
    x, y = x.detach().float().cpu(), y.cpu()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    a = (x - mean) / std
    layer = nn.Linear(a.shape[1], int(y.max()) + 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(a), y) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]

    @torch.no_grad()
    def predict(new: Tensor) -> Tensor:
        return layer((new.detach().float().cpu() - mean) / std).argmax(1)  # type: ignore[no-any-return]

    return predict


def linear_accuracy(x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor, decay: float = 1e-3) -> float:
    """Accuracy on (x_new, y_new) of softmax regression on standardized columns, fitted on (x, y)."""
    return round(float((fitted(x, y, decay)(x_new) == y_new.cpu()).float().mean()), 4)


def neighbours(x: Tensor, y: Tensor, x_new: Tensor, k: int = 20) -> Tensor:
    """The most frequent class among the k nearest neighbors by cosine."""
    cosine = nn.functional.normalize(x_new, dim=1) @ nn.functional.normalize(x, dim=1).T
    y = y.to(cosine.device)
    votes = nn.functional.one_hot(y[cosine.topk(min(k, len(y)), dim=1).indices]).sum(1)
    return votes.argmax(1).cpu()


def knn_accuracy(x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor, k: int = 20) -> float:
    return round(float((neighbours(x, y, x_new, k) == y_new.cpu()).float().mean()), 4)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "hue + 90 degrees": lambda x: adjust_hue(x, torch.pi / 2),
    "gray": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "half as bright": lambda x: 0.5 * x,
}
"""Changes of all colors in a test set, as in another place than that of the labels."""


def _quadrant(x: Tensor, k: Tensor) -> Tensor:
    """One of the four corners of every image, three quarters of its edge, scaled to the whole."""
    edge = x.shape[-1]
    size = edge * 3 // 4
    corners = [x[..., i : i + size, j : j + size] for i in (0, edge - size) for j in (0, edge - size)]
    chosen = torch.stack(corners)[k, torch.arange(len(x), device=x.device)]
    return nn.functional.interpolate(chosen, size=(edge, edge), mode="bilinear", align_corners=False)


def _turned(x: Tensor, k: Tensor) -> Tensor:
    return torch.stack([torch.rot90(x, n, (2, 3)) for n in range(4)])[k, torch.arange(len(x), device=x.device)]


def _blurred(x: Tensor, k: Tensor) -> Tensor:
    levels = [x, *(gaussian_blur2d(x, (7, 7), (s, s)) for s in (0.6, 1.0, 1.8))]
    return torch.stack(levels)[k, torch.arange(len(x), device=x.device)]


def _hued(x: Tensor, k: Tensor) -> Tensor:
    levels = [adjust_hue(x, torch.pi / 2 * (n if n < 3 else -1)) for n in range(4)]
    return torch.stack(levels)[k, torch.arange(len(x), device=x.device)]


def _lit(x: Tensor, k: Tensor) -> Tensor:
    return (x * torch.tensor([0.5, 0.8, 1.2, 1.5], device=x.device)[k].view(-1, 1, 1, 1)).clamp(0, 1)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hue": _hued,
    "brightness": _lit,
    "blur": _blurred,
    "orientation": _turned,
    "corner": _quadrant,
}
"""Tasks that a style answers: which of four changes was made to an image."""


def own_color(x: Tensor) -> tuple[Tensor, Tensor]:
    """The color class of every image (six classes of its mean hue, weighted by chroma), and whether it has a color."""
    top, low = x.amax(1), x.amin(1)
    chroma = top - low
    a, b = x[:, 0] - 0.5 * (x[:, 1] + x[:, 2]), 0.75**0.5 * (x[:, 1] - x[:, 2])
    angle = torch.atan2(b.mean((1, 2)), a.mean((1, 2)))
    strength = (a.mean((1, 2)) ** 2 + b.mean((1, 2)) ** 2).sqrt()
    kind = ((angle / (2 * torch.pi) + 1 / 12) % 1 * 6).long().clamp(0, 5)
    return kind.cpu(), ((strength > 0.04) & (chroma.mean((1, 2)) > 0.05)).cpu()


def right(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    hits = (predicted == truth.cpu()).float()
    return {half: round(float(hits[rows].mean()), 4) for half, rows in HALVES.items()}


def of_spaces(z: Embeds, plain: Callable[[Tensor], Tensor], train: Labelled, held_out: Labelled) -> dict[str, Any]:
    """task -> space -> {"choose": accuracy, "report": accuracy, "all": accuracy}.

    Args:
        z: images, as the model takes them -> space -> embeddings.
        plain: images in [0, 1] -> images as the model takes them.
        train, held_out: images, uint8 or in [0, 1], and their classes.
    """
    (x, y), (new, truth) = train, held_out
    x, new = (t if t.is_floating_point() else t / 255 for t in (x, new))
    seen, known = z(plain(x)), z(plain(new))
    out: dict[str, dict[str, dict[str, float]]] = {}
    probes = {s: fitted(seen[s], y) for s in seen}
    out["classes, linear"] = {s: right(probes[s](known[s]), truth) for s in seen}
    out["classes, neighbors"] = {s: right(neighbours(seen[s], y, known[s]), truth) for s in seen}
    draws = [few(y, torch.Generator().manual_seed(i)) for i in range(5)]
    out[f"classes, {FEW} labels each"] = {
        s: mean_of([right(fitted(seen[s][rows], y[rows], steps=60)(known[s]), truth) for rows in draws]) for s in seen
    }
    for name, shift in SHIFTS.items():
        moved = z(plain(shift(new)))
        out[f"classes, {name}"] = {s: right(probes[s](moved[s]), truth) for s in seen}
    for name, operation in OPERATIONS.items():
        g = torch.Generator().manual_seed(5)
        asked, answers = (torch.randint(4, (len(t),), generator=g) for t in (x, new))
        a = z(plain(operation(x, asked.to(x.device))))
        b = z(plain(operation(new, answers.to(new.device))))
        out[f"which {name}"] = {s: right(fitted(a[s], asked, steps=100)(b[s]), answers) for s in seen}
    (kind, colored), (kind_new, colored_new) = own_color(x), own_color(new)
    found = {}
    for s in seen:
        said = fitted(seen[s][colored.to(seen[s].device)], kind[colored], steps=100)(known[s])
        hits = said == kind_new
        found[s] = {
            half: round(float(hits[rows][colored_new[rows]].float().mean()), 4) for half, rows in HALVES.items()
        }
    out["own color"] = found
    return out


def few(y: Tensor, g: torch.Generator) -> Tensor:
    """FEW rows of each class."""
    order = torch.randperm(len(y), generator=g)
    return torch.cat([order[y[order] == k][:FEW] for k in y.unique()])


def mean_of(found: list[dict[str, float]]) -> dict[str, float]:
    return {half: round(sum(f[half] for f in found) / len(found), 4) for half in HALVES}
