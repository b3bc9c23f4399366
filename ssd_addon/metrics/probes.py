"""Fits ridge, kernel ridge and MLP probes.

Inputs are standardized blocks, targets are factors; a problem is one space with all factors that are defined on the
same rows. Ridge and kernel ridge run in float64, with penalties chosen by cross-validation.
Legend: n rows (one per sample), d columns of x, K columns of y over T factors, A penalties.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_addon.metrics.spaces import CHUNK, binary_scale

RIDGE_ALPHAS = tuple(10.0**e for e in range(-6, 4))  # times the training rows; inputs are standardized
KERNEL_ALPHAS = tuple(10.0**e for e in range(-8, 1))  # times the training rows; k(x, x) = 1
BANDWIDTHS = (0.5, 1.0, 2.0)  # times the median distance
LARGE = 1e300
FAR = 9.0  # leverage beyond which ridge does not extrapolate

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Target:
    """One factor: numbers [n, k] standardized by the training rows, or classes [n].

    Classes of the training rows are coded 0..C-1, the others -1, -2, ... The score of numbers is a mean over columns;
    `pooled` sums errors and squares over the columns before they are divided, so that a column counts by its variance.
    """

    values: Tensor
    valid: Tensor  # [n] bool: the samples that count
    classes: int = 0
    majority: int = 0  # the most frequent class of the training rows
    note: str = ""
    pooled: bool = False

    @property
    def width(self) -> int:
        return self.classes or self.values.shape[1]

    def columns(self, rows: Tensor) -> Tensor:
        v = self.values[rows]
        return F.one_hot(v, self.classes).double() if self.classes else v

    def error(self, prediction: Tensor, rows: Tensor) -> Tensor:
        """The contribution of every row to the probe's score: whether the class is correct, or (y - yhat)^2."""
        if self.classes:
            return (prediction.argmax(1) == self.values[rows])[:, None].double()
        return (self.values[rows] - prediction) ** 2

    def baseline(self, rows: Tensor) -> Tensor:
        """The contribution of every row to the baseline: whether the majority class is correct, or y and y^2."""
        y = self.values[rows].double()
        if self.classes:
            return torch.stack([(y == self.majority).double(), y, y**2], 1)
        y = y - y.mean(0)
        return torch.cat([y, y**2], 1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        """Scores [...] from sums [..., q] of `error` and `baseline` over rows, and from the number of rows [...].

        NaN if the rows have only one class, or if no column varies.
        """
        if self.classes:
            right, chance, y, yy = sums.unbind(-1)
            score = (right - chance) / (count - chance)
            return torch.where(yy * count != y**2, score, math.nan)
        sse, y, yy = sums.chunk(3, -1)
        sst = yy - y**2 / count[..., None]
        if self.pooled:
            sse, sst, yy = (t.sum(-1, keepdim=True) for t in (sse, sst, yy))
        return torch.where(sst > 1e-12 * yy, 1 - sse / sst, math.nan).mean(-1)


class Inputs:
    """One or more blocks [n, d_i], concatenated and standardized by the training rows, in float64.

    A column that is constant on the training rows becomes 0. Values of other rows are clipped to the range of the
    training rows, extended on either side by its width: a nearly dead unit, whose few large values are all in held-out
    rows, would otherwise be thousands of standard deviations away. `balance` divides each block by the square root of
    its number of columns, so that every block has the same weight in a distance.
    """

    def __init__(self, blocks: Sequence[Tensor], train: Tensor, *, balance: bool = False) -> None:
        self.blocks, self.sizes = blocks, [b.shape[1] for b in blocks]
        self.width = sum(self.sizes)
        self.unit: Tensor | float = 1.0
        self.mean: Tensor | float = 0.0
        self.scale: Tensor | float = 1.0
        self.low, self.high = (train.new_full((1,), v, dtype=torch.float64) for v in (-math.inf, math.inf))
        self.unit = binary_scale(torch.stack([self(r).abs().amax(0) for r in self.chunks(train)]).amax(0))
        self.mean = mean = sum((self(r).sum(0) for r in self.chunks(train)), train.new_zeros(1)) / len(train)
        std = (sum(((self(r) ** 2).sum(0) for r in self.chunks(train)), train.new_zeros(1)) / len(train)).sqrt()
        used = std > 1e-12 * mean.abs()
        self.scale = torch.where(used, 1 / std, 0.0)
        if balance:
            counts = [used[None].sum().clamp(min=1).expand(len(used)) for used in torch.split(used, self.sizes)]
            self.scale /= torch.cat(counts).sqrt()
        low = torch.stack([self(r).amin(0) for r in self.chunks(train)]).amin(0)
        high = torch.stack([self(r).amax(0) for r in self.chunks(train)]).amax(0)
        self.low, self.high = low - (high - low), high + (high - low)

    def chunks(self, rows: Tensor, width: int = 0) -> Iterable[Tensor]:
        return torch.split(rows, max(1, CHUNK // max(self.width, width)))

    def __call__(self, rows: Tensor) -> Tensor:
        x = torch.cat([b[rows].double() for b in self.blocks], 1) / self.unit
        x = (x.clamp(-LARGE, LARGE) - self.mean) * self.scale  # an infinite value times 0 would be NaN
        return x.clamp(self.low, self.high)


@dataclass(frozen=True, eq=False)
class Problem:
    """One space and the factors that are defined on the same rows, with K columns over all T factors."""

    x: Inputs
    rows: Tensor  # to train on
    targets: Sequence[Target]
    folds: int
    seed: int = 0
    units: Tensor | None = None  # [len(rows)] group index of rows that belong together; None: all independent

    def part(self, f: int, of: int) -> Tensor:
        """Positions in `rows` of the f-th of `of` parts; rows that belong together are in one part."""
        units = torch.arange(len(self.rows), device=self.rows.device) if self.units is None else self.units
        return torch.nonzero(units % of == f).flatten()

    @property
    def widths(self) -> list[int]:
        return [t.width for t in self.targets]

    def y(self, rows: Tensor) -> Tensor:
        return torch.cat([t.columns(rows) for t in self.targets], 1)

    def per_column(self, values: Tensor) -> Tensor:
        """Repeat values [T] for the columns of each factor, [K]."""
        return values.repeat_interleave(torch.tensor(self.widths, device=values.device))

    def best(self, errors: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest of the errors [A, K] over A for each factor [T], and its index [T]."""
        least = torch.stack([e.sum(1) for e in torch.split(errors, self.widths, 1)], 1).min(0)
        return least.values, least.indices

    def held_out(self, predict: Predict, rows: Tensor) -> list[Tensor]:
        """For each factor the contributions [r, q] whose sums `Target.score` takes."""
        parts = []
        for r in self.x.chunks(rows, sum(self.widths)):
            predicted = torch.split(predict(r), self.widths, 1)
            parts.append([t.error(p, r) for t, p in zip(self.targets, predicted, strict=True)])
        errors = [torch.cat(p) for p in zip(*parts, strict=True)]
        return [torch.cat([e, t.baseline(rows)], 1) for e, t in zip(errors, self.targets, strict=True)]


# ---- the probes


def _ridge(p: Problem, alphas: Sequence[float] = ()) -> Predict:
    """yhat = x w + b with w = argmin |y - x w - b|^2 + alpha |w|^2, by the smaller of the d x d and n x n systems.

    Predicts the mean where yhat is outside the range of the training targets and x is so far out along any direction
    that errors of the weights dominate (`_leverage`).
    """
    solve = _primal if p.x.width < len(p.rows) else _dual_ridge
    w, b, alpha = solve(p, alphas or [a * len(p.rows) for a in RIDGE_ALPHAS])
    each = list(zip(p.targets, torch.split(torch.arange(len(b)), p.widths), alpha.tolist(), strict=True))

    def predict(r: Tensor) -> Tensor:
        x = p.x(r)
        y = x @ w + b
        for target, columns, penalty in each:
            if not target.classes:
                trained = target.values[p.rows]
                beyond = ((y[:, columns] < trained.amin(0)) | (y[:, columns] > trained.amax(0))).any(1)
                rows = beyond.nonzero().flatten()
                far = rows[_leverage(p, x[rows], penalty) > FAR] if len(rows) else rows
                y[far[:, None], columns.to(far.device)] = b[columns]
        return y

    return predict


def _leverage(p: Problem, x: Tensor, alpha: float) -> Tensor:
    """x^T A^-1 G A^-1 x [r], G = sum x x^T over the training rows and A = G + alpha: at most 1 for a training row.

    If the targets are noise of variance 1, it is the variance of the prediction at x [r, d].
    """
    d = p.x.width
    if d < len(p.rows):
        gram = torch.stack([t.T @ t for t in map(p.x, p.x.chunks(p.rows, d))]).sum(0)
        u = _shifted_solve(gram, alpha, x.T)
        return torch.einsum("dr,de,er->r", u, gram, u)
    train = p.x(p.rows)
    return (_shifted_solve(train @ train.T, alpha, train @ x.T) ** 2).sum(0)


def _shifted_solve(a: Tensor, alpha: float, b: Tensor) -> Tensor:
    """(a + alpha)^-1 b for a symmetric a."""
    solution: Tensor = torch.linalg.solve(a + alpha * torch.eye(len(a), dtype=a.dtype, device=a.device), b)
    return solution


def _primal(p: Problem, alphas: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """w [d, K], b [K] and the chosen penalties [T].

    Computed from moments per fold, m = [x, 1]^T [x, 1, y]; the training part of a fold is the total minus the fold.
    """
    d, k = p.x.width, sum(p.widths)
    m = torch.zeros(p.folds, d + 1, d + 1 + k, dtype=torch.float64, device=p.rows.device)
    for f in range(p.folds):
        for r in p.x.chunks(p.rows[p.part(f, p.folds)], d + 1 + k):
            x = F.pad(p.x(r), (0, 1), value=1.0)
            m[f] += x.T @ torch.cat([x, p.y(r)], 1)

    def about(m: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """sum (x - mean_x) (x - mean_x)^T [d, d] and sum (x - mean_x) (y - mean_y)^T [d, K]."""
        shifted = m - torch.outer(m[:, d], mean)
        gram, _, cross = torch.split((shifted - torch.outer(mean[: d + 1], shifted[d]))[:d], [d, 1, k], 1)
        return gram, cross

    def path(m: Tensor) -> tuple[Tensor, Callable[[Tensor | float], Tensor]]:
        """Means of [x, 1, y], and alpha (one, or one per column) -> w [d, K]."""
        mean = m[d] / m[d, d]
        gram, cross = about(m, mean)
        lam, v = torch.linalg.eigh(gram)
        rotated = v.T @ cross
        return mean, lambda alpha: v @ (rotated / (lam[:, None] + alpha))

    total, errors = m.sum(0), m.new_zeros(len(alphas), k)
    for fold in m:
        mean, solution = path(total - fold)
        gram, cross = about(fold, mean)
        for i, alpha in enumerate(alphas):
            w = solution(alpha)
            errors[i] += (w * (gram @ w)).sum(0) - 2 * (w * cross).sum(
                0
            )  # without |y - mean_y|^2, which is the same for all alpha
    mean, solution = path(total)
    chosen = m.new_tensor(alphas)[p.best(errors)[1]]
    return solution(p.per_column(chosen)), mean[d + 1 :], chosen


def dual(p: Problem, k: Tensor, alphas: Sequence[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel ridge with intercept, yhat = k(x, .) a + b: from k [n, n] to a [n, K], b [K], penalties and CV errors [T].

    With H the smoother, I - H = V diag(alpha / (lam + alpha)) V^T - 1 1^T / n on the centered kernel V diag(lam) V^T;
    the residuals of a left-out fold F are (I - H)_FF^-1 ((I - H) y)_F: exact cross-validation, one decomposition.
    """
    y = p.y(p.rows)
    n, mean_k, mean_y = len(k), k.mean(0), y.mean(0)
    lam, v = torch.linalg.eigh(k - mean_k - mean_k[:, None] + mean_k.mean())
    rotated, lam = v.T @ (y - mean_y), lam[:, None]
    errors = y.new_zeros(len(alphas), y.shape[1])
    parts = [p.part(f, p.folds) for f in range(p.folds)]
    for i, alpha in enumerate(alphas):
        shrink = alpha / (lam + alpha)
        residual = v @ (shrink * rotated)
        for part in parts:
            vf = v[part]
            left_out = torch.linalg.solve((vf * shrink.T) @ vf.T - 1 / n, residual[part])
            errors[i] += (left_out**2).sum(0)
    least, place = p.best(errors)
    chosen = y.new_tensor(alphas)[place]
    a = v @ (rotated / (lam + p.per_column(chosen)))
    return a, mean_y - mean_k @ a, chosen, least


def _dual_ridge(p: Problem, alphas: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `_primal`, computed with the linear kernel."""
    x = p.x(p.rows)
    a, b, alpha, _ = dual(p, x @ x.T, alphas)
    return x.T @ a, b, alpha


def _kernel(p: Problem, alphas: Sequence[float] = (), bandwidths: Sequence[float] = ()) -> Predict:
    """yhat = sum_i a_i k(x_i, x) + b, k(x, x') = exp(-|x - x'|^2 / (2 h^2)); h and alpha by CV, for each factor."""
    train = p.x(p.rows)

    def squared(x: Tensor) -> Tensor:
        return (x**2).sum(1)[:, None] + (train**2).sum(1) - 2 * x @ train.T

    distances = squared(train)
    some = distances[:1000, :1000]
    some = some[some > 1e-12]
    median = float(some.median().sqrt()) if len(some) else 1.0
    bandwidths = bandwidths or [median * m for m in BANDWIDTHS]
    alphas = alphas or [a * len(p.rows) for a in KERNEL_ALPHAS]
    fits = [dual(p, torch.exp(distances / (-2 * h**2)), alphas) for h in bandwidths]
    place = p.per_column(torch.stack([least for *_, least in fits]).argmin(0))

    def predict(r: Tensor) -> Tensor:
        distances, out = squared(p.x(r)), train.new_empty(len(r), len(place))
        for i, (h, (a, b, _, _)) in enumerate(zip(bandwidths, fits, strict=True)):
            out[:, place == i] = torch.exp(distances / (-2 * h**2)) @ a[:, place == i] + b[place == i]
        return out

    return predict


def _mlp(p: Problem) -> Predict:
    """yhat = GELU(x w1 + b1) w2 + b2 in float32, one net per factor; early stopping on every fifth training row."""
    x = torch.cat([p.x(r).float() for r in p.x.chunks(p.rows)])
    check = p.part(0, 5)
    fit = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, check, False).nonzero().flatten()
    nets: list[list[Tensor]] = []

    def forward(net: Sequence[Tensor], x: Tensor) -> Tensor:
        return F.gelu(x @ net[0] + net[1]) @ net[2] + net[3]

    for t in p.targets:
        generator = torch.Generator("cpu").manual_seed(p.seed)
        y = t.values[p.rows] if t.classes else t.values[p.rows].float()
        loss = F.cross_entropy if t.classes else F.mse_loss
        first = torch.randn(p.x.width, 256, generator=generator, device="cpu") / math.sqrt(p.x.width)
        net = [first.to(x), *(x.new_zeros(s) for s in ((256,), (256, t.width), (t.width,)))]
        optimizer = torch.optim.Adam([w.requires_grad_() for w in net], lr=2e-3)
        best, kept, waited = math.inf, net, 0
        for _ in range(200):
            value = float(loss(forward(net, x[check]), y[check]))
            waited += 1
            if value < best:
                best, kept, waited = value, [w.detach().clone() for w in net], 0
            if waited == 20:
                break
            shuffled = fit[torch.randperm(len(fit), generator=generator, device="cpu").to(x.device)]
            for batch in torch.split(shuffled, 256):
                optimizer.zero_grad()
                with torch.enable_grad():
                    torch.autograd.backward(loss(forward(net, x[batch]), y[batch]))
                optimizer.step()
        nets.append(kept)
    return lambda r: torch.cat([forward(net, p.x(r).float()) for net in nets], 1).double()


SOLVERS: dict[str, Callable[[Problem], Predict]] = {"ridge": _ridge, "kernel": _kernel, "mlp": _mlp}


def softmax_log_likelihood(x: Inputs, y: Tensor, rows: Tensor, held_out: Tensor) -> Tensor:
    """log q(y | x) of every held-out row [r], with q a softmax regression fitted on the training rows.

    The penalty on the weights is the best of seven on every fifth training row; a class that is missing in the training
    rows gets the probability of half a sample. y is [n] int64.
    """
    known = torch.unique(y[rows])
    classes = int(max(y[rows].max(), y[held_out].max())) + 1
    fit, check = rows[torch.arange(len(rows)) % 5 > 0], rows[::5]
    floor = math.log(0.5 / (len(rows) + 0.5))
    unknown = torch.ones(classes, dtype=torch.bool, device=y.device)
    unknown[known] = False

    def log_q(w: Tensor, r: Tensor) -> Tensor:
        parts = []
        for part in x.chunks(r):
            scores = (F.pad(x(part), (0, 1), value=1.0) @ w).masked_fill(unknown, -math.inf)
            parts.append(scores.log_softmax(1).clamp(min=floor).gather(1, y[part][:, None])[:, 0])
        return torch.cat(parts)

    penalties = [10.0**e for e in range(-5, 2)]
    likelihoods = [float(log_q(_softmax(x, y, fit, unknown, p), check).mean()) for p in penalties]
    best = penalties[max(range(len(penalties)), key=likelihoods.__getitem__)]
    return log_q(_softmax(x, y, rows, unknown, best), held_out)


def _softmax(x: Inputs, y: Tensor, on: Tensor, unknown: Tensor, penalty: float) -> Tensor:
    """Weights [d + 1, C] of softmax regression on these rows; the intercept is last and has no penalty."""
    xs = F.pad(torch.cat([x(r) for r in x.chunks(on)]), (0, 1), value=1.0)
    w = xs.new_zeros(xs.shape[1], len(unknown), requires_grad=True)
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        [w], lr=1, max_iter=100, tolerance_grad=1e-7, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            logits = (xs @ w).masked_fill(unknown, -math.inf)
            loss = F.cross_entropy(logits, y[on]) + penalty * w[:-1].square().sum()
            torch.autograd.backward(loss)
        return float(loss.detach())

    optimizer.step(closure)
    return w.detach()
