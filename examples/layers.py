"""Read a backbone at several layers: an earlier layer may still encode what the last one has lost."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layers(nn.Module):
    """Images to the outputs of several layers, each averaged in grid x grid cells, side by side: [N, F].

    Args:
        net: the backbone.
        layers: names of modules inside it that return maps [N, C, H, W].
        grid: 1 averages over all places; 2 keeps in which quarter of the image something was.
    """

    def __init__(self, net: nn.Module, layers: list[str], grid: int = 1) -> None:
        super().__init__()
        self.net, self.layers, self.grid = net, layers, grid

    def forward(self, x: Tensor) -> Tensor:
        met: list[Tensor] = []

        def note(module: nn.Module, inputs: tuple, y: Tensor) -> None:
            met.append(F.adaptive_avg_pool2d(y, self.grid).flatten(1))

        handles = [self.net.get_submodule(name).register_forward_hook(note) for name in self.layers]
        try:
            self.net(x)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(met, dim=1)
