"""The same training with style spaces: python examples/pipelines/stable_pretraining_simclr.py --data DIR"""

import argparse
from pathlib import Path

import stable_pretraining as spt
import torch
from lightning.pytorch import Trainer
from stable_pretraining.callbacks import OnlineProbe
from stable_pretraining.data import transforms as T
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import FakeData, ImageFolder
from torchvision.models import resnet18

from ssd_addon import JointEntropyLoss, StructuredTransform, StyleHeads, presets


def forward(self, batch, stage):
    views = batch.get("views", batch)  # a list of views, or named views; none in validation, where there is one image
    views = [v for v in (views.values() if isinstance(views, dict) else views) if isinstance(v, dict) and "image" in v]
    z, features = self.heads([view["image"] for view in views] if views else batch["image"], features=True)
    out = {}
    if views:
        out["loss"] = self.criterion(z, self.plan)
        self.log(f"{stage}/loss", out["loss"], on_step=True, on_epoch=True, sync_dist=True)
        z, features = {name: t.flatten(0, 1) for name, t in z.items()}, features.flatten(0, 1)
    labeled = [{**batch, **view} for view in views] or [batch]
    if "label" in labeled[0]:
        out["label"] = torch.cat([part["label"] for part in labeled])
    return out | {"embedding": features} | {f"z_{name}": t for name, t in z.items()}


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
    transform = StructuredTransform(**presets("color_spatial", size=args.size))

    def views(sample):
        return {"views": [{**sample, "image": view} for view in transform(sample["image"])]}

    plain = T.Compose(T.RGB(), T.Resize(args.size), T.CenterCrop(args.size), T.ToImage(mean=mean, std=std))

    def loader(part, transform, **options):
        data = ImageFolder(args.data / part) if args.data else FakeData(args.images, (3, 48, 48), num_classes=10)
        data = spt.data.FromTorchDataset(data, names=["image", "label"], transform=transform)
        return DataLoader(data, args.batch_size, drop_last=True, **options)

    module = spt.Module(
        forward=forward,
        heads=StyleHeads(resnet18(), {"content": 128, "spatial": 32, "color": 32}),
        criterion=JointEntropyLoss("simclr", gather_distributed=True),
        plan=transform.plan,
        optim={"optimizer": {"type": "AdamW", "lr": 1e-3}, "scheduler": {"type": "CosineAnnealingLR"}},
    )
    probes = []
    for name, width in {"embedding": 512, "z_content": 128, "z_spatial": 32, "z_color": 32}.items():
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
