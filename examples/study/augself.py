"""AugSelf: predict from two views by how much their augmentations differ (Lee et al. 2021, arXiv 2111.09613).

    L = L_ssl + weight * sum_t mean (phi_t(f(v_1), f(v_2)) - (omega_t(v_2) - omega_t(v_1)))^2

f are the features of the backbone and phi_t is a three-layer perceptron for augmentation parameter t, so style is kept
in the backbone and not in a separate space. Targets are the differences that `metrics.parameter_differences` computes
(an angle or a hue as cosine and sine), standardized over the batch, so that a parameter with a wide range has no larger
weight. The paper uses a cross-entropy for flips; here they are two values like any other.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class AugSelf(nn.Module):
    """The auxiliary loss: features of two views [B, F] and name -> difference [B, k] to a scalar.

    Args:
        features: F, the width of the backbone.
        targets: name -> k, the width of each parameter that is predicted.
        hidden: width of the perceptrons.
    """

    def __init__(self, features: int, targets: Mapping[str, int], *, hidden: int = 256) -> None:
        super().__init__()
        if not targets:
            raise ValueError("targets: expected the augmentation parameters to predict, name -> width: got none")
        self.names = list(targets)

        def perceptron(k: int) -> nn.Module:
            layers: list[nn.Module] = []
            for a in (2 * features, hidden):
                layers += [nn.Linear(a, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(hidden, k))

        self.predict = nn.ModuleList(perceptron(k) for k in targets.values())
        self.scale = nn.ModuleList(nn.BatchNorm1d(k, affine=False, eps=1e-10) for k in targets.values())

    def forward(self, a: Tensor, b: Tensor, differences: Mapping[str, Tensor]) -> Tensor:
        both = torch.cat([a, b], dim=1)
        total = both.new_zeros(())
        for name, predict, scale in zip(self.names, self.predict, self.scale, strict=True):
            target = scale(differences[name].to(both.dtype))
            total = total + (predict(both) - target).square().mean()
        return total
