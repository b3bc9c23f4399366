"""Measures which factors can be decoded from which space: a matrix of held-out probe scores.

n samples, d the width of a space, k the columns of a factor, C its classes.

    r2_matrix(embeddings, factors)                       *pure*: factor from the space alone
    r2_matrix(embeddings, factors, given=("content",))   *conditional*: factor from the space and the true content

Disentangled spaces give a matrix near 1 on the diagonal and near 0 elsewhere. A conditional score that is much higher
than the pure one indicates *content-entangled* style codes: the same style maps to a different code for each image,
such as R(c) phi(s), a product of both, which a kernel or an MLP probe can decode and a linear probe cannot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.metrics.probe import Kind, Probe, Split, at_least, score_cells
from ssd_addon.metrics.probes import Target
from ssd_addon.metrics.spaces import MIN_ROWS, check_spaces, standardized
from ssd_addon.metrics.table import ScoreTable


@dataclass(frozen=True, eq=False)
class Circular:
    """An angle of an object with k-fold symmetry, scored as the two columns (cos k*theta, sin k*theta).

    A square looks the same after a quarter turn (k = 4), an ellipse after half a turn (2), a heart after a full turn
    (1); a disc has no angle (k = 0), and such samples are left out of this factor. All samples share the two columns,
    so if k varies, a linear probe has to fit all symmetries at once: give each shape its own factor (k = 0 for the
    other shapes) to score them separately.

    Args:
        angle: [n] float, radians.
        fold: k, an integer, or [n] integers, one per sample.

    Raises:
        ValueError: the angle is not [n] float; the fold is negative, not an integer or of another length.

    >>> Circular(torch.tensor([0.0, torch.pi / 2]), fold=2).target()[0].round().long()
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
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool or (k.long() < 0).any():
            raise ValueError(f"Circular: expected fold as an integer of 0 (no angle) or more: got {self.fold!r}")
        if k.ndim and k.shape != angle.shape:
            raise ValueError(f"Circular: expected a fold per angle {_checks.shape(angle)}: got {_checks.shape(k)}")

    def target(self) -> tuple[Tensor, Tensor]:
        """(cos k*theta, sin k*theta) [n, 2] float64, zero where k = 0; and [n] bool, where k > 0."""
        k = torch.as_tensor(self.fold, device=self.angle.device).long().expand_as(self.angle)
        phase = k * self.angle.double()
        valid = k > 0
        return torch.where(valid[:, None], torch.stack((phase.cos(), phase.sin()), 1), 0.0), valid


Factor = Tensor | Circular


def r2_matrix(
    embeddings: Mapping[str, Tensor],
    factors: Mapping[str, Factor],
    *,
    probe: Kind | Probe = "ridge",
    given: Sequence[str] = (),
    bootstrap: int = 200,
    seed: int = 0,
) -> ScoreTable:
    """How well each factor can be predicted from each space, on held-out samples.

    Numbers and angles: R^2 = 1 - sum (y - yhat)^2 / sum (y - mean y)^2 over held-out samples, averaged over columns
    with equal weight. Classes: (accuracy - chance) / (1 - chance), where chance is the accuracy, on the same held-out
    samples, of always answering the most frequent class of the training samples; so noise scores 0 however rare a class
    is. 1 is perfect, 0 is no better than the mean or the most frequent class, and negative scores are worse than that.

    Intervals are percentiles over resamples of the held-out samples, without refitting the probes. A resample with a
    single class cannot distinguish a probe from chance and counts as 0, so that no interval lies above 0 if fewer than
    four held-out samples are outside the most frequent class. A resample in which a number does not vary is left out.

    Probes, all on inputs standardized by the training samples:
    *ridge*: linear with intercept, float64; classes by ridge onto one-hot columns, then the largest. The penalty for
    each factor is chosen by k-fold cross-validation of the squared error. Gram matrices are summed in chunks, which
    bounds memory.
    *kernel*: ridge with an RBF kernel and an intercept, bandwidth and penalty cross-validated; the space and each given
    block have the same weight in the distance, whatever their width.
    *mlp*: one hidden layer of 256, Adam, stopped early on a fifth of the training split.

    Outliers among held-out samples are limited in two ways. Inputs are clipped to the range of the training samples,
    extended on either side by its width (nearly dead units, which are 0 for almost all samples, could otherwise be
    thousands of standard deviations away); and ridge predicts the mean for a sample so far out along any direction that
    errors of the weights dominate the prediction. This lowers the scores of inputs and factors with very heavy tails:
    use their logarithm.

    Samples are assumed independent: use one view of each image, or else views of one image may be on both sides of the
    split.

    Args:
        embeddings: space -> [n, d] floating point, on any device; the probes run there.
        factors: name -> [n] or [n, k] floating point (numbers), [n] integers or bool (classes), or `Circular`.
        probe: "ridge", "kernel" or "mlp", or a `Probe` with your own settings; all cells share one random split.
        given: names for the conditional score: each space is scored together with them. A name is looked up in
            `factors` first (the true factor), then in `embeddings`. A given space itself is scored alone, and a given
            factor has no score in the other spaces.
        bootstrap: number of resamples of the held-out samples for the 95 % intervals; 0 for no intervals.
        seed: seed of the split, the resamples and the MLP. The global generator is not used.

    Returns:
        `ScoreTable`. A factor that cannot be scored (constant, one class, NaN, no valid sample) gives NaN and a note.

    Raises:
        ValueError: embeddings are not [n, d], floating point and finite; factors have another length or shape; a side
            of the split has fewer than 5 samples; a name or probe is unknown.

    >>> g = torch.Generator().manual_seed(0)
    >>> content, hue = torch.randn(200, 3, generator=g), torch.rand(200, generator=g)
    >>> table = r2_matrix({"content": content @ torch.randn(3, 3, generator=g)}, {"content": content, "hue": hue})
    >>> print(f"{table['content', 'content']:.2f}", table["content", "hue"] < 0.1)
    1.00 True

    Source: Eastwood et al., arXiv 2311.08815, and von Kuegelgen et al., arXiv 2106.04619 (R^2 of latents from blocks).
    """
    chosen = Probe.of(probe)
    at_least("bootstrap", bootstrap, 0)
    n, device = check_factors(embeddings, factors)
    chosen.sizes(n)
    if isinstance(given, str):
        raise TypeError(f"given: expected a sequence of names, such as ('content',): got {given!r}")
    asked = tuple(given)
    split = Split.draw(n, chosen, bootstrap, seed, device)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        blocks = [_given(name, embeddings, factors, device) for name in asked]
        targets = {name: target_of(factor, split.train, split.test) for name, factor in factors.items()}
    inputs = {s: [z] if s in asked else [z, *blocks] for s, z in embeddings.items()}
    others = [s for s in embeddings if s not in asked]
    without = {(s, f): "given, so it has no score" for s in others for f in factors if f in asked}
    cells = score_cells(inputs, targets, split, chosen, seed=seed, without=without)
    return ScoreTable(tuple(embeddings), tuple(factors), *cells, chosen.kind, asked, len(split.train), len(split.test))


# ---- arguments


def check_factors(embeddings: Mapping[str, Tensor], factors: Mapping[str, Factor]) -> tuple[int, torch.device]:
    """Check that spaces and factors have the same length. Returns (n, device)."""
    if not embeddings or not factors:
        raise ValueError(
            f"embeddings, factors: expected at least one each: got {len(embeddings)} spaces and {len(factors)} factors"
        )
    n, device = check_spaces(embeddings)
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


def _given(name: str, embeddings: Mapping[str, Tensor], factors: Mapping[str, Factor], device: torch.device) -> Tensor:
    """The block [n, d] for a name in `given`."""
    if name not in factors and name not in embeddings:
        known = f"a factor ({_checks.names(factors)}) or a space ({_checks.names(embeddings)})"
        raise ValueError(f"given: expected the name of {known}: got {name!r}")
    if name not in factors:
        return embeddings[name]
    return block_of(factors[name], f"given: factor {name!r}").to(device)


def block_of(factor: Factor, what: str) -> Tensor:
    """A factor as an input [n, d]: numbers as they are, classes one-hot, angles as two columns; must be finite."""
    if isinstance(factor, Circular):
        block = factor.target()[0]
    elif factor.is_floating_point():
        block = factor.reshape(len(factor), -1)
    else:
        block = F.one_hot(torch.unique(factor.long(), return_inverse=True)[1]).to(torch.float32)
    if not block.isfinite().all():
        raise ValueError(f"{what}: expected a finite value for every sample: got NaN or inf")
    return block


def target_of(factor: Factor, train: Tensor, test: Tensor) -> Target | str:
    """The target of a probe, or a string with the reason why there is none."""
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
        known, counts = torch.unique(values[rows], return_counts=True)
        if len(known) < 2:
            return "one class in the training split"
        if len(torch.unique(values[held_out])) < 2:
            return "one class among the held-out samples"
        code = torch.searchsorted(known, values).clamp(max=len(known) - 1)
        unknown = known[code] != values
        code[unknown] = -1 - torch.unique(values[unknown], return_inverse=True)[1]
        return Target(code, valid, len(known), int(counts.argmax()))
    spread = torch.stack([values[r].amax(0) - values[r].amin(0) for r in (rows, held_out)]).amin(0)
    varies = spread > resolution
    if not varies.any():
        return "constant"
    if not varies.all():
        note = "; ".join(filter(None, [note, f"columns {torch.nonzero(~varies).flatten().tolist()} are constant"]))
    return Target(standardized(values[:, varies], rows), valid, note=note)
