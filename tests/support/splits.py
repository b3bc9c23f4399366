"""The split that the measures promise, drawn again by hand: a random order of the samples, the training rows first."""

import torch


def split_rows(n: int, fraction: float, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    order, train = torch.randperm(n, generator=g), round(fraction * n)
    return order[:train], order[train:]
