"""Photographs for training and for scores, and what is counted over them on every rank."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from ssd_addon.collate import ImageFiles, StructuredCollate
from ssd_addon.metrics import OnlineProbes


class Photographs(Dataset):
    """Image files, with a flag for each that was replaced because it is broken, whichever worker met it.

    Where images are `scored`, each counts once: one in the place of a broken one has the label -1.
    """

    def __init__(self, root: Path, broken: str, scored: bool = False) -> None:
        self.files, self.scored = ImageFiles(root, broken=broken), scored
        self.replaced = torch.zeros(len(self.files), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        image, label, name = self.files[index]
        if name != self.files.names[index]:
            self.replaced[index] = 1
            label = -1 if self.scored else label
        return image, label, name

    def broken(self, device: torch.device) -> Tensor:
        """The flags of all ranks; every rank has to call it."""
        return (summed(self.replaced.to(device, torch.int64)) > 0).to("cpu", torch.uint8)

    def spread(self, most: int) -> list[tuple]:
        """At most so many samples, spread over the files, without those that stand in for a broken one."""
        rows = torch.linspace(0, len(self) - 1, min(most, len(self))).long().tolist()
        return [sample for i in rows if (sample := self.files[i])[2] == self.files.names[i]]


def in_memory(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """All images of class folders, [n, 3, size, size] uint8, and their classes [n]."""
    files, collate = ImageFiles(folder), StructuredCollate(size)
    images, labels, _ = collate([files[i] for i in range(len(files))])
    return images, torch.as_tensor(labels)


def summed(each: Tensor) -> Tensor:
    """The sum over ranks, in a tensor of its own."""
    total = each.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def counts(probes: OnlineProbes, logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """[1 + S]: the images that have a label, and how many of them each probe classifies rightly."""
    own = labels >= 0
    hits = probes.hits({name: t[own] for name, t in logits.items()}, labels[own])
    return torch.cat([own.sum()[None], hits])


def accuracies(probes: OnlineProbes, counted: dict[str, Tensor]) -> dict[str, float]:
    """ "accuracy_SPLIT/SPACE" -> share of hits, over all ranks."""
    scores = {}
    for split, each in counted.items():
        images, *hits = summed(each).tolist()
        scores |= {f"accuracy_{split}/{n}": h / max(1, images) for n, h in zip(probes.names, hits, strict=True)}
    return scores
