"""SimCLR with stable-pretraining: python examples/pipelines/before/stable_pretraining_simclr.py --data DIR"""

import argparse
from pathlib import Path

import stable_pretraining as spt
from lightning.pytorch import Trainer
from stable_pretraining.callbacks import OnlineProbe
from stable_pretraining.data import transforms as T
from stable_pretraining.forward import simclr
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import FakeData, ImageFolder
from torchvision.models import resnet18


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, help="folder with train/ and val/ of class folders; without it, random images")
    p.add_argument("--out", type=Path, default=Path("runs/stable_pretraining"))
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--images", type=int, default=256, help="number of random images")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--epochs", type=int, default=1)
    p.add_argument("--accelerator", default="auto")
    args = p.parse_args(argv)

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    augment = T.Compose(
        T.RGB(),
        T.RandomResizedCrop((args.size, args.size), scale=(0.08, 1.0)),
        T.RandomHorizontalFlip(p=0.5),
        T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
        T.RandomGrayscale(p=0.2),
        T.ToImage(mean=mean, std=std),
    )
    views = T.MultiViewTransform([augment, augment])
    plain = T.Compose(T.RGB(), T.Resize(args.size), T.CenterCrop(args.size), T.ToImage(mean=mean, std=std))

    def loader(part, transform, **options):
        data = ImageFolder(args.data / part) if args.data else FakeData(args.images, (3, 48, 48), num_classes=10)
        data = spt.data.FromTorchDataset(data, names=["image", "label"], transform=transform)
        return DataLoader(data, args.batch_size, drop_last=True, **options)

    backbone = resnet18()
    backbone.fc = nn.Identity()
    projector = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128))
    module = spt.Module(
        forward=simclr,
        backbone=backbone,
        projector=projector,
        simclr_loss=spt.losses.NTXEntLoss(temperature=0.15),
        optim={"optimizer": {"type": "AdamW", "lr": 1e-3}, "scheduler": {"type": "CosineAnnealingLR"}},
    )
    probes = []
    for name, width in {"embedding": 512}.items():
        probe, loss, accuracy = nn.Linear(width, 10), nn.CrossEntropyLoss(), {"accuracy": MulticlassAccuracy(10)}
        probes.append(OnlineProbe(module, f"probe_{name}", name, "label", probe, loss, metrics=accuracy))
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_epochs=args.epochs,
        callbacks=probes,
        default_root_dir=args.out,
        log_every_n_steps=1,
        logger=False,
    )
    trainer.fit(module, loader("train", views, shuffle=True), loader("val", plain))
    return trainer


if __name__ == "__main__":
    main()
