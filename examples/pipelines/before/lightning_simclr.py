"""SimCLR in Lightning: python examples/pipelines/before/lightning_simclr.py --data CLASS_FOLDERS"""

import argparse

import lightning.pytorch as pl
import torch
import torchvision
from lightly.loss import NTXentLoss
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


class TwoViews:
    def __init__(self, size):
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(size, (0.2, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __call__(self, image):
        return self.augment(image), self.augment(image)


class SimCLR(pl.LightningModule):
    def __init__(self, size):
        super().__init__()
        backbone = torchvision.models.resnet18()
        backbone.fc = nn.Identity()
        self.model = nn.Sequential(backbone, nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
        self.criterion = NTXentLoss(temperature=0.15, gather_distributed=True)

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        loss = self.criterion(self.model(x0), self.model(x1))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", required=True)
    p.add_argument("--out", default="runs/lightning")
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--steps", type=int, default=10_000)
    p.add_argument("--workers", type=int, default=8)
    args = p.parse_args(argv)
    data = ImageFolder(args.data, transform=TwoViews(args.size))
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    trainer = pl.Trainer(max_steps=args.steps, max_epochs=-1, default_root_dir=args.out, log_every_n_steps=1)
    trainer.fit(SimCLR(args.size), loader)
    return trainer


if __name__ == "__main__":
    main()
