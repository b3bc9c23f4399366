"""Which space knows which factor: a matrix of held-out probe scores.

n samples, d the width of a space, k the columns of a factor, C its classes.

    r2_matrix(embeddings, factors)                       *pure*: factor from the space alone
    r2_matrix(embeddings, factors, given=("content",))   *conditional*: factor from the space and the true content

Disentangled spaces give a matrix near 1 on the diagonal and near 0 off it. Conditional high and pure low is *twisting*:
the space holds its style turned by the content, R(c) phi(s). Twisting is a product of the two, so a kernel or an MLP
probe can see it and a linear one cannot.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.metrics.probes import CHUNK, PROBES, Inputs, Problem, Target
from ssd_addon.metrics.table import Cell, ScoreTable

MIN_ROWS = 5  # on either side of the split


@dataclass(frozen=True, eq=False)
class Circular:
    """An angle of an object with k-fold symmetry, scored as the two columns (cos k*theta, sin k*theta).

    A square looks the same after a quarter turn (k = 4), an ellipse after half a turn (2), a heart after a whole one
    (1); a disc has no angle (k = 0), and such samples are left out of this factor. The columns are pooled over samples
    whatever their k, so where k varies a linear probe has to serve all symmetries at once: give each shape a factor of
    its own (k = 0 elsewhere) to score them apart.

    Args:
        angle: [n] float, radians.
        fold: k, an integer, or [n] integers, one per sample.

    Raises:
        ValueError: an angle that is not [n] float; a fold that is negative, not an integer or of another length.

    >>> Circular(torch.tensor([0.0, math.pi / 2]), fold=2).target()[0].round().long()
    tensor([[ 1,  0],
            [-1,  0]])
    """

    angle: Tensor
    fold: int | Tensor = 1

    def __post_init__(self) -> None:
        angle, k = self.angle, torch.as_tensor(self.fold)
        if not angle.is_floating_point() or angle.ndim != 1:
            raise ValueError(
                f"Circular: expected radians [n], floating point: got {_checks.shape(angle)} {angle.dtype}"
            )
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool or (k < 0).any():
            raise ValueError(f"Circular: expected fold as an integer of 0 (no angle) or more: got {self.fold!r}")
        if k.ndim and k.shape != angle.shape:
            raise ValueError(f"Circular: expected a fold per angle {_checks.shape(angle)}: got {_checks.shape(k)}")

    def target(self) -> tuple[Tensor, Tensor]:
        """(cos k*theta, sin k*theta) [n, 2] float64, zero where k = 0; and [n] bool, where k > 0."""
        k = torch.as_tensor(self.fold, device=self.angle.device).expand_as(self.angle)
        phase = k * self.angle.double()
        valid = k > 0
        return torch.where(valid[:, None], torch.stack((phase.cos(), phase.sin()), 1), 0.0), valid


Factor = Tensor | Circular


def r2_matrix(
    embeddings: Mapping[str, Tensor],
    factors: Mapping[str, Factor],
    *,
    probe: str = "ridge",
    given: Sequence[str] | None = None,
    train_fraction: float = 0.5,
    folds: int = 5,
    bootstrap: int = 200,
    kernel_rows: int = 5000,
    seed: int = 0,
) -> ScoreTable:
    """How well each factor is predicted from each space, on held-out samples.

    Numbers and angles: R^2 = 1 - sum (y - yhat)^2 / sum (y - mean y)^2 over the held-out rows, averaged over columns
    with equal weight. Classes: (accuracy - chance) / (1 - chance), chance being the share of the most frequent class in
    the training split. 1 is perfect, 0 is knowing nothing, below 0 is worse than that.

    Probes, all on inputs standardised by the training split:
    *ridge*: linear with intercept, float64; classes by ridge onto one-hot columns, then the largest. The penalty of
    each factor comes from k-fold cross-validation of the squared error. Bounded memory: Gram matrices by row chunks.
    *kernel*: ridge with an RBF kernel and an intercept, bandwidth and penalty cross-validated; each of the space and
    the given blocks has the same weight in the distance, whatever its width.
    *mlp*: one hidden layer of 256, Adam, stopped early on a fifth of the training split.

    Rows count as independent: give one view of each image, or views of one image land on both sides of the split.

    Args:
        embeddings: space -> [n, d] floating point, on any device, where the probes then run.
        factors: name -> [n] or [n, k] floating point (numbers), [n] integers or bool (classes), or `Circular`.
        probe: "ridge", "kernel" or "mlp".
        given: names for the conditional score: each space is scored together with them. A name is looked up in
            `factors` first (the true factor), then in `embeddings`. The row of a given space is scored alone, and the
            column of a given factor has no score in the other rows.
        train_fraction: share of the samples that the probes are fitted on; one random split for all cells.
        folds: k of the cross-validation.
        bootstrap: resamples of the held-out rows behind the 95 % intervals, with the fitted probes; 0 for none.
        kernel_rows: at most so many training rows for the kernel probe.
        seed: of the split, the resamples and the MLP. The global generator is neither read nor moved.

    Returns:
        `ScoreTable`. A factor that cannot be scored (constant, one class, NaN, no valid sample) gives NaN and a note.

    Raises:
        ValueError: embeddings that are not [n, d], floating point and finite; factors of another length or shape;
            fewer than 5 samples on a side of the split; an unknown name or probe.

    >>> g = torch.Generator().manual_seed(0)
    >>> content, hue = torch.randn(200, 3, generator=g), torch.rand(200, generator=g)
    >>> table = r2_matrix({"content": content @ torch.randn(3, 3, generator=g)}, {"content": content, "hue": hue})
    >>> print(f"{table['content', 'content']:.2f}", table["content", "hue"] < 0.1)
    1.00 True

    Source: Eastwood et al., arXiv 2311.08815, and von Kuegelgen et al., arXiv 2106.04619 (R^2 of latents from blocks).
    """
    n, device = check_factors(embeddings, factors, train_fraction)
    check_options(probe, folds, bootstrap, kernel_rows)
    if isinstance(given, str):
        raise TypeError(f"given: expected a sequence of names, such as ('content',): got {given!r}")
    asked = tuple(given or ())
    generator = torch.Generator("cpu").manual_seed(seed)
    train, test = split_rows(n, train_fraction, generator, device)
    if probe == "kernel":
        train = train[:kernel_rows]
    weights = resamples(len(test), bootstrap, generator, device)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        blocks = [_given(name, embeddings, factors, device) for name in asked]
        made = {name: target_of(factor, train, test) for name, factor in factors.items()}
        inputs = {s: [z] if s in asked else [z, *blocks] for s, z in embeddings.items()}
        given_notes = {
            (s, f): "given, so any space would score it"
            for s in embeddings
            for f in made
            if s not in asked and f in asked
        }
    cells = score_cells(inputs, made, train, test, weights, probe=probe, folds=folds, seed=seed, without=given_notes)
    return ScoreTable(tuple(embeddings), tuple(factors), *cells, probe, asked, len(train), len(test))


# ---- what other matrices share


def check_options(probe: str, folds: int, bootstrap: int, kernel_rows: int) -> None:
    _checks.choice(probe, tuple(PROBES), "probe")
    for what, value, least in (
        ("folds", folds, 2),
        ("bootstrap", bootstrap, 0),
        ("kernel_rows", kernel_rows, MIN_ROWS),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{what}: expected an integer of {least} or more: got {value!r}")


def split_rows(
    n: int, train_fraction: float, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, both in random order."""
    order = torch.randperm(n, generator=generator, device="cpu").to(device)
    train, test = order.split(_sizes(n, train_fraction))
    return train, test


def resamples(n: int, times: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """How often each of n rows is drawn in each bootstrap resample: [times, n] int16."""
    draws = torch.zeros(times, n, dtype=torch.int16, device="cpu")
    for draw in draws:
        draw += torch.randint(n, (n,), generator=generator, device="cpu").bincount(minlength=n)
    return draws.to(device)


def score_cells(
    inputs: Mapping[str, Sequence[Tensor]],
    targets: Mapping[str, Target | str],
    train: Tensor,
    test: Tensor,
    weights: Tensor,
    *,
    probe: str,
    folds: int,
    seed: int,
    without: Mapping[Cell, str],
    units: Tensor | None = None,
    means: Mapping[str, Sequence[str]] | None = None,
) -> tuple[dict[Cell, float], dict[Cell, tuple[float, float]], dict[Cell, str]]:
    """Scores, intervals and notes of every (space, factor).

    Args:
        inputs: space -> blocks [n, d_i] that a probe sees side by side.
        targets: factor -> what to predict, or why there is nothing to.
        train, test: rows.
        weights: [bootstrap, len(test)] how often each held-out row is drawn.
        without: (space, factor) -> why it gets no score.
        units: [len(train)] which training rows belong together, numbered from 0 (pairs of views of an image).
        means: further factor -> the factors whose scores it is the mean of.
    """
    scores: dict[Cell, float] = {}
    intervals: dict[Cell, tuple[float, float]] = {}
    notes: dict[Cell, str] = {}
    again: dict[Cell, Tensor] = {}  # the score of every resample
    device = train.device
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for space, blocks in inputs.items():
            groups: dict[bytes, list[tuple[str, Target]]] = {}  # factors that are defined on the same rows
            for name, target in targets.items():
                if (space, name) in without:
                    target = without[space, name]
                note = target if isinstance(target, str) else target.note
                if note:
                    notes[space, name] = note
                scores[space, name] = math.nan
                if not isinstance(target, str):
                    groups.setdefault(target.valid.cpu().numpy().tobytes(), []).append((name, target))
            for group in groups.values():
                valid = group[0][1].valid
                rows, held_out, w = train[valid[train]], test[valid[test]], weights[:, valid[test]]
                x = Inputs(blocks, rows, balance=probe == "kernel")
                together = None if units is None else units[valid[train]]
                problem = Problem(x, rows, [t for _, t in group], folds, seed, together)
                stats = problem.held_out(PROBES[probe](problem), held_out)
                for (name, target), each in zip(group, stats, strict=True):
                    scores[space, name] = float(target.score(each.sum(0), each.new_tensor(len(each))))
                    if len(w):
                        again[space, name] = target.score(torch.cat([c.double() @ each for c in w.split(64)]), w.sum(1))
            for name, members in (means or {}).items():
                scores[space, name] = sum(scores[space, m] for m in members) / len(members)
                if len(weights):
                    again[space, name] = torch.stack([again[space, m] for m in members]).mean(0)
    for cell, each in again.items():
        low, high = each.nanquantile(each.new_tensor([0.025, 0.975])).tolist()
        intervals[cell] = (low, high)
    return scores, intervals, notes


# ---- what comes in


def check_space(what: str, z: Tensor, least: int) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{what}: expected a tensor [n, d]: got {type(z).__name__}")
    if z.dtype not in _checks.FLOATS:
        raise ValueError(f"{what}: expected floating-point embeddings: got {z.dtype}")
    if z.ndim != 2 or z.shape[1] < 1:
        hint = "; give one view, z[v]" if z.ndim == 3 else ""
        raise ValueError(f"{what}: expected embeddings [n, d], a row per sample: got {_checks.shape(z)}{hint}")
    if len(z) < least:
        raise ValueError(f"{what}: expected at least {least} samples: got {len(z)}")


def check_finite(what: str, z: Tensor) -> None:
    if not all(bool(c.isfinite().all()) for c in z.split(max(1, CHUNK // z.shape[1]))):
        raise ValueError(f"{what}: expected finite embeddings: got NaN or inf, so the network has diverged")


def check_spaces(embeddings: Mapping[str, Tensor]) -> tuple[int, torch.device]:
    """Shapes, types and lengths of the spaces. Returns (n, device)."""
    for space, z in embeddings.items():
        check_space(f"space {space!r}", z, 2 * MIN_ROWS)
    first, z = next(iter(embeddings.items()))
    n, device = len(z), z.device
    for space, z in embeddings.items():
        if len(z) != n:
            raise ValueError(f"space {space!r}: expected the {n} samples of space {first!r}: got {len(z)}")
        if z.device != device:
            raise ValueError(f"space {space!r}: expected the device {device} of space {first!r}: got {z.device}")
        check_finite(f"space {space!r}", z)
    return n, device


def check_fraction(n: int, fraction: float, what: str = "samples") -> None:
    if not 0 < fraction < 1 or min(_sizes(n, fraction)) < MIN_ROWS:
        need = f"a share of the {n} {what} with at least {MIN_ROWS} on either side"
        raise ValueError(f"train_fraction: expected {need}: got {fraction!r}")


def check_factors(
    embeddings: Mapping[str, Tensor], factors: Mapping[str, Factor], fraction: float
) -> tuple[int, torch.device]:
    """Spaces, and factors of the same length. Returns (n, device)."""
    if not embeddings or not factors:
        raise ValueError(f"expected spaces and factors: got {len(embeddings)} spaces and {len(factors)} factors")
    n, device = check_spaces(embeddings)
    check_fraction(n, fraction)
    for name, factor in factors.items():
        t = factor.angle if isinstance(factor, Circular) else factor
        if not isinstance(t, Tensor):
            raise TypeError(f"factor {name!r}: expected a tensor or Circular: got {type(t).__name__}")
        numbers = t.is_floating_point()
        if t.is_complex() or t.ndim not in ((1, 2) if numbers else (1,)) or t.shape[1:].numel() < 1:
            expected = "numbers [n] or [n, k]" if numbers else "classes, integers [n]"
            raise ValueError(f"factor {name!r}: expected {expected}: got {_checks.shape(t)} {t.dtype}")
        if len(t) != n:
            raise ValueError(f"factor {name!r}: expected a value for each of the {n} samples: got {len(t)}")
    return n, device


def _sizes(n: int, train_fraction: float) -> tuple[int, int]:
    return round(train_fraction * n), n - round(train_fraction * n)


def _given(name: str, embeddings: Mapping[str, Tensor], factors: Mapping[str, Factor], device: torch.device) -> Tensor:
    """The block [n, d] that a name in `given` stands for: numbers as they are, classes one-hot, angles two columns."""
    if name not in factors and name not in embeddings:
        known = f"a factor ({_checks.names(factors)}) or a space ({_checks.names(embeddings)})"
        raise ValueError(f"given: expected the name of {known}: got {name!r}")
    if name not in factors:
        return embeddings[name]
    factor = factors[name]
    if isinstance(factor, Circular):
        block = factor.target()[0]
    elif factor.is_floating_point():
        block = factor.reshape(len(factor), -1)
    else:
        block = F.one_hot(factor.long().unique(return_inverse=True)[1]).to(torch.float32)
    if not block.isfinite().all():
        raise ValueError(f"given: expected factor {name!r} to have a finite value for every sample: got NaN or inf")
    return block.to(device)


def target_of(factor: Factor, train: Tensor, test: Tensor) -> Target | str:
    """What to predict, or the reason why there is nothing to."""
    device, note = train.device, ""
    if isinstance(factor, Circular):
        values, valid = (t.to(device) for t in factor.target())
        resolution = torch.full((2,), 1e-6, device=device)
        if not valid.all():
            note = f"scored on {int(valid.sum())} of {len(valid)} samples: the angle of the others is not defined"
    else:
        values = factor.to(device)
        valid = torch.ones(len(values), dtype=torch.bool, device=device)
        if factor.is_floating_point():
            values = values.reshape(len(values), -1).double()
            resolution = 2 * torch.finfo(factor.dtype).eps * values.abs().amax(0)
    bad = int((~values[valid].isfinite()).sum())
    if bad:
        return f"{bad} of {values[valid].numel()} values are NaN or inf"
    rows, held_out = train[valid[train]], test[valid[test]]
    if min(len(rows), len(held_out)) < MIN_ROWS:
        return f"defined for {len(rows)} training and {len(held_out)} held-out samples, fewer than {MIN_ROWS}"
    if not values.is_floating_point():
        values = values.long()
        known, counts = values[rows].unique(return_counts=True)
        if len(known) < 2:
            return "one class in the training split"
        code = torch.searchsorted(known, values).clamp(max=len(known) - 1)
        code = torch.where(known[code] == values, code, -1)
        return Target(code, valid, len(known), int(counts.max()) / len(rows))
    spread = torch.stack([values[r].amax(0) - values[r].amin(0) for r in (rows, held_out)]).amin(0)
    varies = spread > resolution
    if not varies.any():
        return "constant"
    if not varies.all():
        note = "; ".join(filter(None, [note, f"columns {torch.nonzero(~varies).flatten().tolist()} are constant"]))
    values = values[:, varies]
    values = (values - values[rows].mean(0)) / values[rows].std(0)
    return Target(values, valid, note=note)
