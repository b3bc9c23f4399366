"""examples/imagenet.py in which rank 1 meets NaN: in its embeddings at step 2, in a gradient at step 4."""

import os
import sys

import torch

from examples import imagenet
from ssd_addon import JointEntropyLoss


class Poisoned(JointEntropyLoss):
    calls = 0

    def terms(self, z, batch=None):
        type(self).calls += 1
        mine = os.environ["RANK"] == "1"
        if mine and self.calls == 2:
            z["color"] = z["color"] * float("nan")
        found = super().terms(z, batch)
        if mine and self.calls == 4:  # a finite loss whose gradient is not
            found.loss = found.loss + torch.where(z["color"].sum() == 0, 1.0, 0.0) + 0 * (z["color"] * 0).sqrt().sum()
        return found


if __name__ == "__main__":
    imagenet.JointEntropyLoss = Poisoned
    imagenet.main(sys.argv[1:])
