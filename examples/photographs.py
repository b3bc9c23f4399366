"""Photographs for training and for scores, probes on them, and counts over all ranks."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shard_files import ShardFiles, image_files, same_classes
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from ssd_addon import NativeCrops, StructuredCollate, StructuredViews
from ssd_addon.metrics import OnlineProbes
from ssd_addon.runs import ResumableSampler, ShardSampler

NONE = -1


class Photographs(Dataset):
    """Images in files or shards, with a flag for each that was replaced because it is broken, for all workers.

    If images are `scored`, each counts once: the replacement of a broken one has the label -1. The set notes what every
    worker is reading, for the error when a worker was killed or hangs.
    """

    def __init__(self, root: Path, args: Any, size: int, scored: bool = False) -> None:
        self.files = image_files(root, broken=args.broken, short_side=size, decode=args.decode)
        self.scored = scored
        self.layout = b""  # of the shards, if the order depends on it
        self.replaced = torch.zeros(len(self.files), dtype=torch.uint8).share_memory_()
        self.reading = torch.full((max(1, args.workers),), NONE).share_memory_()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        worker = get_worker_info()
        place = 0 if worker is None else worker.id
        self.reading[place] = index
        with warnings.catch_warnings(record=True) as met:
            warnings.simplefilter("always")
            image, label, name = self.files[index]
        replaced = name != self.files.names[index]
        for warning in (
            met if not (replaced and self.replaced[index]) else ()
        ):  # report a broken file once, not every epoch
            warnings.warn(warning.message, stacklevel=2)
        if replaced:
            self.replaced[index] = 1
            label = NONE if self.scored else label
        self.reading[place] = NONE
        return image, label, name

    @property
    def digest(self) -> str:
        """A hash of the names of all files and their classes, which differs between data sets of the same size."""
        digest = hashlib.blake2b(digest_size=16)
        for name, label in zip(self.files.names, self.files.targets, strict=True):
            digest.update(f"{name}\0{label}\0".encode("utf-8", "surrogateescape"))
        digest.update(self.layout)
        return digest.hexdigest()

    def broken(self, device: torch.device) -> Tensor:
        """Combine the flags of all ranks; every rank has to call it."""
        return (summed(self.replaced.to(device, torch.int64)) > 0).to("cpu", torch.uint8)

    def check_broken(self, flags: Tensor, most: float) -> None:
        """End the run if more than this share of the files is broken."""
        bad = flags.nonzero().flatten().tolist()
        if len(bad) > most * len(self):
            shown = ", ".join(self.files.names[i] for i in bad[:20]) + (", ..." if len(bad) > 20 else "")
            raise SystemExit(
                f"{self.files.root}: expected at most {most:.2%} broken files (--max-broken): got {len(bad)} of "
                f"{len(self)}: {shown}"
            )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Add the names of the files being read to errors of data-loader workers that were killed or timed out."""
        try:
            yield
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            busy = [f"worker {k}: {self.files.names[i]}" for k, i in enumerate(self.reading.tolist()) if i != NONE]
            raise RuntimeError(f"{error}; at that moment, {'; '.join(busy) or 'no worker was reading'}") from error

    def spread(self, most: int) -> list[tuple]:
        """At most `most` samples, spread over the files, without replacements of broken ones."""
        rows = torch.linspace(0, len(self) - 1, min(most, len(self))).long().tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # training reports it
            return [sample for i in rows if (sample := self.files[i])[2] == self.files.names[i]]


class Loaders:
    """Training images and, where there is a val folder, held-out ones, for one rank: uint8.

    Workers make the crops of all `views` of the training images, each from the image at its full resolution. With a
    load size they make images of one size, which the device crops later, with fewer pixels.

    Attributes:
        data, held_out: the photographs; held_out is None without a val folder.
        steps: number of steps in an epoch, on every rank.
        unscored: why no probe can be trained, or "".
    """

    def __init__(self, args: Any, views: StructuredViews, world: int, rank: int, pinned: bool) -> None:
        folder = args.data / "train" if (args.data / "train").is_dir() else args.data
        collate = StructuredCollate(args.load_size) if args.load_size else NativeCrops(views)
        least = args.load_size or collate.short_side
        self.data, self.held_out = Photographs(folder, args, least), None
        self.args, self.classes = args, len(self.data.files.classes)
        self.sampler = ResumableSampler(self.data, world, rank, shuffle=True, seed=args.seed)
        if args.mix_shards:
            self.sampler = self._few_shards(args.mix_shards, world, rank, args.seed)
        self.draws = torch.Generator()  # for the loaders: the global generator belongs to the model
        common = {"num_workers": args.workers, "pin_memory": pinned, "generator": self.draws}
        common |= {"timeout": args.timeout} if args.workers else {}
        self.loader = DataLoader(
            self.data, args.batch_size, sampler=self.sampler, collate_fn=collate, drop_last=True, **common
        )
        self.steps = len(self.loader) // args.accumulate
        if not self.steps:
            several = f" for each of the {args.accumulate} parts of a step" if args.accumulate > 1 else ""
            raise ValueError(
                f"expected at least one batch of {args.batch_size} x {world} images{several}: got {len(self.data)} "
                "images"
            )
        targets = torch.tensor(self.data.files.targets)
        self.unscored = ""
        if self.classes < 2 or targets.bincount().max() < 2:
            why = f"{self.classes} classes, {len(self.data)} images"
            self.unscored = f"no probes: {why}, so no class has a second image to be recognized by"
        elif (args.data / "val").is_dir():
            self.held_out = Photographs(args.data / "val", args, args.size, scored=True)
            same_classes(args.data, self.data.files.classes, self.held_out.files.classes)
            mine = Subset(self.held_out, range(rank, len(self.held_out), world))
            self.val = DataLoader(mine, args.batch_size, collate_fn=StructuredCollate(args.size), **common)

    def _few_shards(self, mixed: int, world: int, rank: int, seed: int) -> ShardSampler:
        files = self.data.files
        if not isinstance(files, ShardFiles):
            raise ValueError(f"--mix-shards: expected shards, as examples/shards.py writes them: got {files!r}")
        files.ahead, self.data.layout = True, files.shards.tobytes()
        return ShardSampler(files.shards, mixed=mixed, num_replicas=world, rank=rank, seed=seed)

    def epoch(self, epoch: int, begin: int) -> Iterator[Any]:
        """The batches of an epoch, from a given step on."""
        self.sampler.set_epoch(epoch)
        self.sampler.start = begin * self.args.batch_size * self.args.accumulate
        self.draws.manual_seed(self.args.seed + epoch)
        if isinstance(self.loader.collate_fn, NativeCrops):
            self.loader.collate_fn.set_epoch(epoch)
        return iter(self.loader)


class Probing:
    """Online linear probes with their optimizer and their hits in this epoch, over ranks."""

    def __init__(self, widths: dict[str, int], classes: int, device: torch.device, world: int) -> None:
        self.probes = OnlineProbes(widths, classes).to(device)
        ids = {"device_ids": [device.index] if device.type == "cuda" else None}
        self.net = DistributedDataParallel(self.probes, **ids) if world > 1 else self.probes
        self.optimizer = torch.optim.Adam(self.probes.parameters(), lr=3e-3)
        self.counted = torch.zeros(1 + len(self.probes.names), dtype=torch.int64, device=device)

    def step(self, queries: Sequence[tuple[dict[str, Tensor], Tensor]]) -> None:
        """Train the probes for a step on (features, labels) of the parts of a training step, and count their hits."""
        self.optimizer.zero_grad()
        for features, labels in queries:
            labels = labels.to(self.counted.device)
            logits = self.net(features)
            (self.probes.loss(logits, labels) / len(queries)).backward()
            self.counted += counts(self.probes, logits, labels)
        self.optimizer.step()

    def accuracies(self, split: str, counted: Tensor) -> dict[str, float]:
        """ "accuracy_SPLIT/SPACE" -> share of hits, over all ranks."""
        images, *hits = summed(counted).tolist()
        return {f"accuracy_{split}/{n}": h / max(1, images) for n, h in zip(self.probes.names, hits, strict=True)}

    @torch.no_grad()
    def scored(self, model: Any, loader: Any) -> Tensor:
        """The number of images with a label, and how many of them each probe classifies correctly."""
        counted = torch.zeros_like(self.counted)
        model.eval(), self.probes.eval()
        for x, labels in loader:
            z, features = model(x, features=True)
            counted += counts(self.probes, self.probes({"backbone": features, **z}), labels.to(counted.device))
        model.train(), self.probes.train()
        return counted


def in_memory(root: Path, size: int) -> list[tuple[Tensor, Tensor]]:
    """All images of root/train and root/val, [n, 3, size, size] uint8, and their classes [n].

    Raises:
        ValueError: train and val have other classes.
    """
    splits, collate = [image_files(root / split) for split in ("train", "val")], StructuredCollate(size)
    same_classes(root, *(files.classes for files in splits))
    found = [collate([files[i] for i in range(len(files))]) for files in splits]
    return [(images, torch.as_tensor(labels)) for images, labels, _ in found]


def summed(each: Tensor) -> Tensor:
    """The sum over ranks, in a new tensor."""
    total = each.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def counts(probes: OnlineProbes, logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """[1 + S]: the number of images with a label, and how many of them each probe classifies correctly."""
    own = labels >= 0
    hits = probes.hits({name: t[own] for name, t in logits.items()}, labels[own])
    return torch.cat([own.sum()[None], hits])
