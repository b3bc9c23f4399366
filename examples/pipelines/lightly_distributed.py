"""lightly's distributed form with style spaces: python examples/pipelines/lightly_distributed.py"""

import argparse

import pytorch_lightning as pl
import torch
from lightly.data import LightlyDataset
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18

from ssd_addon import JointEntropyLoss, StructuredTransform, StyleHeads, presets

SPACES = {"content": 2048, "spatial": 512, "color": 512}


class Model(pl.LightningModule):
    def __init__(self, method, plan):
        super().__init__()
        resnet = resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = StyleHeads.heads(512, SPACES)
        self.criterion = JointEntropyLoss(method, gather_distributed=True)
        self.plan = plan

    def forward(self, x):
        x = self.backbone(x).flatten(start_dim=1)
        return self.projection_head(x)

    def training_step(self, batch, batch_idx):
        z = self.forward(torch.cat(batch[0]))
        loss = self.criterion(z, self.plan)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch[1]), sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", help="folder of images; without it, random images")
    p.add_argument("--method", choices=("simclr", "vicreg", "barlow"), default="simclr")
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--images", type=int, default=1024, help="number of random images")
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--accelerator", default="auto")
    p.add_argument("--out", default="runs/lightly")
    p.add_argument("--devices", type=int, default=2)
    args = p.parse_args(argv)

    transform = StructuredTransform(**presets("color_spatial", size=args.size))
    dataset = FakeData(args.images, (3, 48, 48), transform=transform)
    if args.data:
        dataset = LightlyDataset(args.data, transform=transform)
    loading = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True, "num_workers": args.workers}
    loader = DataLoader(dataset, **loading)

    model = Model(args.method, transform.plan)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp",
        sync_batchnorm=args.accelerator != "cpu",  # a CPU has none
        use_distributed_sampler=True,
        default_root_dir=args.out,
        log_every_n_steps=1,
    )
    trainer.fit(model, loader)
    return model


if __name__ == "__main__":
    main()
