"""Class accuracy of fixed features: a linear probe and k nearest neighbors.

Legend: n images, d the width of a space, C classes.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.metrics.labelled import check_factors, target_of
from ssd_addon.metrics.probe import Probe, Split, at_least
from ssd_addon.metrics.probes import SOLVERS, Inputs, Problem, Target
from ssd_addon.metrics.spaces import unit_rows
from ssd_addon.metrics.table import Cell, ScoreTable

LINEAR, KNN = "linear probe", "k-NN"


def class_accuracy(
    embeddings: Mapping[str, Tensor],
    labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    train_fraction: float = 0.5,
    bootstrap: int = 200,
    seed: int = 0,
) -> ScoreTable:
    """Accuracy of a linear probe and of k-NN on held-out images, for each space.

    *linear probe*: ridge regression of the one-hot classes on standardized features, with the penalty chosen by
    cross-validation. *k-NN*: each of the k training images with the highest cosine similarity votes for its class with
    weight exp(cosine / temperature).

    >>> labels = torch.arange(60) % 3
    >>> table = class_accuracy({"content": torch.eye(3)[labels] + 0.1 * torch.rand(60, 3)}, labels)
    >>> table["content", "linear probe"], table["content", "k-NN"]
    (1.0, 1.0)

    Args:
        embeddings: name -> [n, d].
        labels: [n] integers.
        k: number of neighbors; at most the number of training images.
        temperature: temperature of the votes.
        train_fraction: fraction of the images on which classifiers are fitted.
        bootstrap: number of resamples of the held-out images for the 95 % intervals.
        seed: seed of the split and the resamples.

    Returns:
        `ScoreTable`, spaces x ("linear probe", "k-NN"), accuracies in [0, 1]. `table.notes` of the first cell gives the
        accuracy of always answering the most frequent class.

    Raises:
        ValueError: there are fewer than two classes on a side of the split; labels are not integers [n]; or as in
            `r2_matrix`.

    Source: weighted k-NN with k = 20 and temperature 0.07 as in DINO, Caron et al., arXiv 2104.14294.
    """
    at_least("k", k, 1)
    at_least("bootstrap", bootstrap, 0)
    temperature = _checks.positive(temperature, "temperature", "of the votes")
    probe = Probe("ridge", train_fraction=train_fraction)
    if isinstance(labels, Tensor) and labels.is_floating_point():
        raise ValueError(f"labels: expected classes, integers [n]: got {labels.dtype}")
    n, device = check_factors(embeddings, {"labels": labels})
    probe.sizes(n)
    split = Split.draw(n, probe, bootstrap, seed, device)
    target = target_of(labels, split.train, split.test)
    if isinstance(target, str):
        raise ValueError(f"labels: expected at least two classes on both sides of the split: got {target}")
    scores: dict[Cell, float] = {}
    intervals: dict[Cell, tuple[float, float]] = {}
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for space, z in embeddings.items():
            for name, right in (
                (LINEAR, _linear(z, target, split, probe)),
                (KNN, _knn(z, target, split, k, temperature)),
            ):
                scores[space, name] = float(right.mean())
                if bootstrap:
                    again = split.weights.double() @ right / split.weights.sum(1)
                    low, high = again.quantile(again.new_tensor([0.025, 0.975])).tolist()
                    intervals[space, name] = low, high
    chance = float((target.values[split.test] == target.majority).double().mean())
    notes = {(next(iter(embeddings)), LINEAR): f"always answering the most frequent class: {chance:.2f}"}
    sizes = len(split.train), len(split.test)
    return ScoreTable(tuple(embeddings), (LINEAR, KNN), scores, intervals, notes, "accuracy", (), *sizes, "images")


def _linear(z: Tensor, target: Target, split: Split, probe: Probe) -> Tensor:
    """Whether each held-out image is classified correctly [r], 0 or 1."""
    problem = Problem(Inputs([z], split.train), split.train, [target], probe.folds)
    return problem.held_out(SOLVERS["ridge"](problem), split.test)[0][:, 0]


def _knn(z: Tensor, target: Target, split: Split, k: int, temperature: float) -> Tensor:
    unit = unit_rows(z.double())
    train = unit[split.train]
    votes = F.one_hot(target.values[split.train], target.classes).double()
    right: list[Tensor] = []
    parts: Sequence[Tensor] = torch.split(split.test, 1024)
    for rows in parts:
        cosine, near = (unit[rows] @ train.T).topk(min(k, len(train)), 1)
        weights = (cosine / temperature).softmax(1)
        right.append((weights[:, :, None] * votes[near]).sum(1).argmax(1) == target.values[rows])
    return torch.cat(right).double()
