"""SimCLR with style spaces in Lightning: python examples/pipelines/lightning_simclr.py --data CLASS_FOLDERS"""

import argparse

import lightning.pytorch as pl
import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ssd_addon import JointEntropyLoss, StructuredViews, StyleHeads, presets
from ssd_addon.lightning import StructuredTraining


class SimCLR(StructuredTraining, pl.LightningModule):
    def __init__(self, size):
        super().__init__()
        self.views = StructuredViews(**presets("color_spatial", size=size))
        spaces = {"content": 128, "spatial": 64, "color": 64}
        self.model = StyleHeads(torchvision.models.resnet18(), spaces, hidden=(512,))
        self.criterion = JointEntropyLoss("simclr", temperature=0.15, gather_distributed=True)

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
    whole = v2.Compose([v2.Resize(args.size), v2.CenterCrop(args.size), v2.ToImage()])
    data = ImageFolder(args.data, transform=whole)
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    trainer = pl.Trainer(max_steps=args.steps, max_epochs=-1, default_root_dir=args.out, log_every_n_steps=1)
    trainer.fit(SimCLR(args.size), loader)
    return trainer


if __name__ == "__main__":
    main()
