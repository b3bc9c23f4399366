"""The oracle: every loss again, as slow float64 loops written from the equations.

The equations are those of Eastwood et al., "Self-Supervised Disentanglement by Leveraging Structure in Data
Augmentations" (arXiv 2311.08815), for the SimCLR and VICReg families. The Barlow Twins family and cross-image keys
are this project's own definition. Nothing here imports the package that it is the reference for.

Notation: S spaces (content first, then the styles), V views, B images, N = V * B rows, z^s_v the embedding of view v
in space s, lambda_s the weight of invariance_s, tau the temperature. The total is

    loss = (1/S) sum_s lambda_s * invariance_s + entropy(joint)  (+ entropy(content), an option).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_WEIGHTS = {"simclr": 1.0, "vicreg": 25.0, "barlow": 1.0}
VARIANCE_EPSILON = 1e-4  # VICReg: sqrt(var + 1e-4)
STANDARDISE_EPSILON = 1e-5  # Barlow Twins: (x - mean) / sqrt(biased var + 1e-5)


@dataclass
class ReferenceTerms:
    """The loss and its parts; every scalar carries the graph.

    `invariance[name]` is raw: before lambda_s and before 1/S. `entropy` includes its coefficients. `constraint[name]`
    is c_s, or None for a space that has no row in this batch.
    """

    loss: Tensor
    invariance: dict[str, Tensor]
    entropy: Tensor
    content_entropy: Tensor | None
    constraint: dict[str, Tensor | None]


# ---------------------------------------------------------------------------------------------------------------
# Scalars
# ---------------------------------------------------------------------------------------------------------------


def scalars(matrix: Tensor) -> list[list[Tensor]]:
    """A [rows, columns] tensor as a list of rows, each a list of float64 scalars that carry the graph."""
    return [list(row.unbind(0)) for row in matrix.double().unbind(0)]


def total(values: list[Tensor]) -> Tensor:
    """sum_i values_i; zero for an empty list."""
    if not values:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(values).sum()


def mean(values: list[Tensor]) -> Tensor:
    """(1/n) sum_i values_i of a list that is not empty."""
    return total(values) / len(values)


def inner_product(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """<x, y> = sum_k x_k y_k."""
    return total([x[k] * y[k] for k in range(len(x))])


def squared_error(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """Row MSE: (1/d) sum_k (x_k - y_k)^2."""
    return mean([(x[k] - y[k]) ** 2 for k in range(len(x))])


def log_sum_exp(values: list[Tensor]) -> Tensor:
    """log sum_j exp(values_j), shifted by the largest value, which is a constant for the gradient."""
    largest = max(value.detach() for value in values)
    return largest + torch.log(total([torch.exp(value - largest) for value in values]))


def unit_length(row: list[Tensor]) -> list[Tensor]:
    """z / |z|."""
    length = torch.sqrt(inner_product(row, row))
    return [value / length for value in row]


def standardise(rows: list[list[Tensor]]) -> list[list[Tensor]]:
    """Barlow Twins: (x_bk - mean_k) / sqrt(var_k + 1e-5) over the rows of one view, var_k the biased variance."""
    n, width = len(rows), len(rows[0])
    result = [[None] * width for _ in range(n)]
    for k in range(width):
        column = [rows[b][k] for b in range(n)]
        centre = mean(column)
        biased_variance = mean([(value - centre) ** 2 for value in column])
        for b in range(n):
            result[b][k] = (column[b] - centre) / torch.sqrt(biased_variance + STANDARDISE_EPSILON)
    return result


# ---------------------------------------------------------------------------------------------------------------
# Pairs, rows, weights
# ---------------------------------------------------------------------------------------------------------------


def positive_pairs(
    names: list[str],
    n_views: int,
    n_images: int,
    plan: str,
    ids: list[list[int]],
    space_of_row: list[int],
    content_keys: str,
) -> dict[str, list[tuple[int, int, list[int]]]]:
    """name -> list of (view a, view b, rows): the positive pairs of each space.

    Shared query: content (0, 1), style m (0, 1 + m), all rows, also where a cross-image key carries another image's
    id. Interleaved: (0, 1) on the rows that serve the space. content_keys="all": content takes every pair (0, v), on
    the rows whose key shows the query's image.
    """
    pairs = {}
    for s, name in enumerate(names):
        if s == 0 and content_keys == "all":
            pairs[name] = []
            for v in range(1, n_views):
                pairs[name].append((0, v, [b for b in range(n_images) if ids[v][b] == ids[0][b]]))
        elif plan == "interleaved":
            pairs[name] = [(0, 1, [b for b in range(n_images) if space_of_row[b] == s])]
        else:
            pairs[name] = [(0, 1 + s, list(range(n_images)))]
    return pairs


def keep_best(rows: list[int], badness: dict[int, Tensor], trim: float) -> list[int]:
    """Trim: of the n rows that a pair uses, leave out the floor(trim * n + 1e-9) with the largest badness."""
    n_dropped = math.floor(trim * len(rows) + 1e-9)
    best_first = sorted(rows, key=lambda b: float(badness[b].detach()))
    return sorted(best_first[: len(rows) - n_dropped])


def resolve_weights(weights, family: str, names: list[str]) -> dict[str, float]:
    """lambda_s by name, from the family's default, a number, a mapping or a sequence in space order."""
    if weights is None:
        weights = DEFAULT_WEIGHTS[family]
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"weights name {sorted(weights)}, the spaces are {names}")
        return {name: weights[name] for name in names}
    if isinstance(weights, (list, tuple)) or (isinstance(weights, Tensor) and weights.ndim == 1):
        if len(weights) != len(names):
            raise ValueError(f"{len(weights)} weights for {len(names)} spaces")
        return {name: weights[s] for s, name in enumerate(names)}
    return {name: weights for name in names}


# ---------------------------------------------------------------------------------------------------------------
# Invariance of one pair: (invariance, constraint c_s)
# ---------------------------------------------------------------------------------------------------------------


def simclr_invariance(a, b, rows: list[int], temperature, trim: float) -> tuple[Tensor, Tensor]:
    """SimCLR (paper): invariance_s = - mean over rows of <z^s_a, z^s_b> / tau, z of unit length.

    c_s = 1 - mean cosine. The worst rows are those of the lowest cosine.
    """
    cosine = {r: inner_product(a[r], b[r]) for r in rows}
    kept = keep_best(rows, {r: -cosine[r] for r in rows}, trim)
    mean_cosine = mean([cosine[r] for r in kept])
    return -mean_cosine / temperature, 1 - mean_cosine


def vicreg_invariance(a, b, rows: list[int], trim: float) -> tuple[Tensor, Tensor]:
    """VICReg (paper): invariance_s = mean over rows and coordinates of (z^s_a - z^s_b)^2 = c_s.

    The worst rows are those of the highest row MSE.
    """
    error = {r: squared_error(a[r], b[r]) for r in rows}
    kept = keep_best(rows, error, trim)
    mse = mean([error[r] for r in kept])
    return mse, mse


def barlow_invariance(a, b, rows: list[int], trim: float) -> tuple[Tensor, Tensor]:
    """Barlow Twins (ours): invariance_s = sum_i (c_ii - 1)^2, c_ii = mean over the kept rows of x_i y_i.

    `a` and `b` are standardised already, over all rows of their view: before rows are chosen and before trimming. The
    worst rows are those of the highest row MSE after standardisation. c_s = mean_i (c_ii - 1)^2.
    """
    kept = keep_best(rows, {r: squared_error(a[r], b[r]) for r in rows}, trim)
    width = len(a[0])
    deviation = []
    for i in range(width):
        c_ii = mean([a[r][i] * b[r][i] for r in kept])
        deviation.append((c_ii - 1) ** 2)
    return total(deviation), mean(deviation)


# ---------------------------------------------------------------------------------------------------------------
# Entropy
# ---------------------------------------------------------------------------------------------------------------


def negative_lse(z: Tensor, image_ids, temperature, prefix: int | None = None) -> Tensor:
    """SimCLR entropy, row by row (paper): log sum_{j : image(j) != image(i)} exp(<z_i, z_j> / tau).

    `z` is [N, D], used as it is; `image_ids` is [N]. Returns [N]. With `prefix` it returns [N, 2]: first the same sum
    with the inner product over the first `prefix` columns only (the content block), then that over all columns.
    """
    ids = [int(i) for i in image_ids]
    rows = scalars(z)
    widths = [z.shape[1]] if prefix is None else [prefix, z.shape[1]]
    result = []
    for i in range(len(rows)):
        of_row = []
        for width in widths:
            similarities = []
            for j in range(len(rows)):
                if ids[j] != ids[i]:
                    similarities.append(inner_product(rows[i][:width], rows[j][:width]) / temperature)
            if not similarities:
                raise ValueError(f"row {i} has no negatives: every row of the batch shows image {ids[i]}")
            of_row.append(log_sum_exp(similarities))
        result.append(of_row[0] if prefix is None else torch.stack(of_row))
    return torch.stack(result)


def vicreg_entropy(views: list[list[list[Tensor]]], variance: float, covariance: float) -> Tensor:
    """VICReg entropy (paper): the mean over views, each over its own n rows, of

    variance * mean_k relu(1 - sqrt(var_k + 1e-4)) + covariance * sum_{k != l} C_kl^2 / D,

    where var_k = C_kk and C_kl = sum_b (x_bk - mean_k) (x_bl - mean_l) / (n - 1). No normalisation of the rows.
    """
    of_view = []
    for rows in views:
        n, width = len(rows), len(rows[0])
        centred = [[None] * width for _ in range(n)]
        for k in range(width):
            centre = mean([rows[b][k] for b in range(n)])
            for b in range(n):
                centred[b][k] = rows[b][k] - centre
        hinge, off_diagonal = [], []
        for k in range(width):
            for l in range(width):
                c_kl = total([centred[b][k] * centred[b][l] for b in range(n)]) / (n - 1)
                if k == l:
                    hinge.append(torch.relu(1 - torch.sqrt(c_kl + VARIANCE_EPSILON)))
                else:
                    off_diagonal.append(c_kl**2)
        of_view.append(variance * mean(hinge) + covariance * total(off_diagonal) / width)
    return mean(of_view)


def barlow_entropy(views: list[list[list[Tensor]]], pairs: list[tuple[int, int]], redundancy: float) -> Tensor:
    """Barlow Twins entropy (ours): redundancy * mean over pairs of sum_{k != l} C_kl^2, C = X^T Y / n.

    `views` are standardised already. X and Y are the two views of the pair, all n rows, all columns given.
    """
    of_pair = []
    for a, b in pairs:
        x, y = views[a], views[b]
        n, width = len(x), len(x[0])
        off_diagonal = []
        for k in range(width):
            for l in range(width):
                if k != l:
                    c_kl = total([x[r][k] * y[r][l] for r in range(n)]) / n
                    off_diagonal.append(c_kl**2)
        of_pair.append(total(off_diagonal))
    return redundancy * mean(of_pair)


# ---------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------


def joint_entropy_loss(
    z: Mapping[str, Tensor],
    *,
    family: str,
    plan: str = "shared_query",
    image_ids=None,
    space_index=None,
    temperature=0.15,
    weights=None,
    variance: float = 25.0,
    covariance: float = 1.0,
    redundancy: float = 0.0051,
    trim: float = 0.0,
    content_keys: str = "first",
    content_entropy: bool = False,
) -> ReferenceTerms:
    """Total (paper): loss = (1/S) sum_s lambda_s * invariance_s + entropy(joint) (+ entropy(content)).

    `z`: name -> [V, B, d_s], content first. `image_ids`: [V, B], by default the column b in every view.
    `space_index` (interleaved): [B], the space that row r serves, by default r mod S. The entropy always sees every
    row of every view; rows are chosen and trimmed in the invariance alone.
    """
    names = list(z)
    n_spaces = len(names)
    n_views, n_images = z[names[0]].shape[:2]
    if family not in DEFAULT_WEIGHTS:
        raise ValueError(f"unknown family {family!r}")
    if content_keys not in ("first", "all"):
        raise ValueError(f"unknown content_keys {content_keys!r}")
    if names[0] != "content":
        raise ValueError("the first space is content")
    if plan not in ("shared_query", "interleaved"):
        raise ValueError(f"unknown plan {plan!r}")
    if n_views != (n_spaces + 1 if plan == "shared_query" else 2):
        raise ValueError(f"{n_views} views do not fit {n_spaces} spaces of plan {plan!r}")
    if content_entropy and n_spaces == 1:
        raise ValueError("with one space the content entropy is the joint entropy")

    if image_ids is None:
        ids = [list(range(n_images)) for _ in range(n_views)]
    else:
        ids = [[int(image_ids[v][b]) for b in range(n_images)] for v in range(n_views)]
    if space_index is None:
        space_of_row = [r % n_spaces for r in range(n_images)]
    else:
        space_of_row = [int(s) for s in space_index]
    pairs = positive_pairs(names, n_views, n_images, plan, ids, space_of_row, content_keys)
    lambdas = resolve_weights(weights, family, names)

    # spaces[name][v][b] is the list of the d_s coordinates, on the family's own scale.
    spaces = {}
    for name in names:
        spaces[name] = []
        for v in range(n_views):
            rows = scalars(z[name][v])
            if family == "simclr":
                rows = [unit_length(row) for row in rows]
            elif family == "barlow":
                rows = standardise(rows)
            spaces[name].append(rows)

    # joint[v][b] is the concatenation over spaces, for SimCLR divided by sqrt(S).
    joint_scale = 1 / math.sqrt(n_spaces) if family == "simclr" else 1.0
    joint = []
    for v in range(n_views):
        joint.append([])
        for b in range(n_images):
            joint[v].append([value * joint_scale for name in names for value in spaces[name][v][b]])
    content_width = z[names[0]].shape[2]
    content = [[row[:content_width] for row in rows] for rows in joint]

    # Invariance: the mean over the space's pairs that have a row; 0 where none has.
    invariance, constraint = {}, {}
    for name in names:
        of_pair, constraint_of_pair = [], []
        for view_a, view_b, rows in pairs[name]:
            if not rows:
                continue
            a, b = spaces[name][view_a], spaces[name][view_b]
            if family == "simclr":
                value, c = simclr_invariance(a, b, rows, temperature, trim)
            elif family == "vicreg":
                value, c = vicreg_invariance(a, b, rows, trim)
            else:
                value, c = barlow_invariance(a, b, rows, trim)
            of_pair.append(value)
            constraint_of_pair.append(c)
        invariance[name] = mean(of_pair) if of_pair else total([])
        constraint[name] = mean(constraint_of_pair) if constraint_of_pair else None

    # Entropy: all rows of all views.
    entropy_of_content = None
    if family == "simclr":
        every_row = torch.stack([torch.stack(row) for rows in joint for row in rows])
        every_id = [i for row_ids in ids for i in row_ids]
        if content_entropy:
            both = negative_lse(every_row, every_id, temperature, prefix=content_width)
            entropy_of_content, entropy = mean(list(both[:, 0])), mean(list(both[:, 1]))
        else:
            entropy = mean(list(negative_lse(every_row, every_id, temperature)))
    elif family == "vicreg":
        entropy = vicreg_entropy(joint, variance, covariance)
        if content_entropy:
            entropy_of_content = vicreg_entropy(content, variance, covariance)
    else:
        view_pairs = [(0, 1 + s) for s in range(n_spaces)] if plan == "shared_query" else [(0, 1)]
        entropy = barlow_entropy(joint, view_pairs, redundancy)
        if content_entropy:
            entropy_of_content = barlow_entropy(content, view_pairs, redundancy)

    loss = total([lambdas[name] * invariance[name] for name in names]) / n_spaces + entropy
    if entropy_of_content is not None:
        loss = loss + entropy_of_content
    return ReferenceTerms(loss, invariance, entropy, entropy_of_content, constraint)


def dual_ascent(weights: Mapping, constraints: Mapping, *, tolerance: float, step_size: float) -> dict:
    """Dual ascent (paper): lambda_s <- relu(lambda_s + eta * (c_s - tolerance)).

    A space whose constraint is None, or that `constraints` does not name, had no row and keeps its lambda.
    """
    updated = {}
    for name, weight in weights.items():
        c = constraints.get(name)
        if c is None:
            updated[name] = float(weight)
        else:
            updated[name] = max(0.0, float(weight) + step_size * (float(c) - tolerance))
    return updated


# ------------------------------------------------------------------------------------------ rows to try


def unit(n, d, seed=0):
    """Rows of unit length, float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1)


def grouped(n, groups, seed=0):
    """Ids of unequal frequency, in drawn order: every id at least once."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.arange(groups), torch.randint(max(groups // 3, 1), (n - groups,), generator=g)])
    return ids[torch.randperm(n, generator=g)]
