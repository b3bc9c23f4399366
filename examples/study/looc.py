"""LooC, leave-one-out contrastive learning (Xiao et al. 2021, arXiv 2008.05659), as a loss on the same embeddings.

Query q, keys k_0 (every augmentation redrawn) and k_1..k_M (k_i shares augmentation i with the query): the views of
a shared-query plan. With E(i, x) = exp(<v_i(q), v_i(x)> / tau) in space i, v_i of unit length, N_i the keys of other
images:

    L = - 1/(M + 1) * mean over q of { log E(0, k_0) / (E(0, k_0) + sum_N E(0, n))
                                       + sum_i log E(i, k_i) / (sum_j E(i, k_j) + sum_N E(i, n)) }

So in space i the image's own other keys, which differ in augmentation i, are negatives: the space has to distinguish
them. There is no joint entropy, so nothing keeps a space from repeating another. The paper takes the negatives from
MoCo's queue; here they are the other images' keys of all views in the batch, as for the losses it is compared with.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LooCLoss(nn.Module):
    """The loss: name -> [V, B, d] of a shared-query plan (V = spaces + 1, content first) to a scalar.

    Args:
        temperature: tau; 0.2, as in MoCo v2, which the paper builds on.
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0: got {temperature!r}")
        self.temperature = temperature

    def forward(self, z: Mapping[str, Tensor]) -> Tensor:
        losses = []
        for i, t in enumerate(z.values()):
            views, b = t.shape[:2]
            if views != len(z) + 1:
                raise ValueError(f"{len(z)} spaces need {len(z) + 1} views, a query and a key for each: got {views}")
            with torch.autocast(t.device.type, enabled=False):
                u = F.normalize(t.to(torch.promote_types(t.dtype, torch.float32)), dim=-1)
                logits = torch.einsum("bd,kcd->bkc", u[0], u[1:]) / self.temperature  # [query, key view, image]
            own = torch.eye(b, dtype=torch.bool, device=t.device)[:, None, :].expand_as(logits)
            kept = torch.ones_like(own)
            if i == 0:  # of the image's own keys, only the positive is in the content space's sum
                kept = ~own
                kept[:, 0] = True
            total = logits.masked_fill(~kept, -math.inf).flatten(1).logsumexp(1)
            losses.append((total - logits[:, i].diagonal()).mean())
        return torch.stack(losses).mean()
