"""SimCLR, VICReg and Barlow Twins in lightly's distributed form: examples/pipelines/before/lightly_distributed.py"""

import argparse

import pytorch_lightning as pl
import torch
from lightly.data import LightlyDataset
from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from lightly.models.modules.heads import BarlowTwinsProjectionHead, SimCLRProjectionHead, VICRegProjectionHead
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform, SimCLRTransform, VICRegTransform
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18

HEADS = {
    "simclr": lambda: SimCLRProjectionHead(512, 512, 128),
    "vicreg": lambda: VICRegProjectionHead(512, 2048, 2048, num_layers=2),
    "barlow": lambda: BarlowTwinsProjectionHead(512, 2048, 2048),
}
CRITERIA = {"simclr": NTXentLoss, "vicreg": VICRegLoss, "barlow": BarlowTwinsLoss}


def two_views(method, size):
    if method == "barlow":
        return BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))
    transform = {"simclr": SimCLRTransform, "vicreg": VICRegTransform}[method]
    return transform(input_size=size)


class Model(pl.LightningModule):
    def __init__(self, method):
        super().__init__()
        resnet = resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = HEADS[method]()
        self.criterion = CRITERIA[method](gather_distributed=True)

    def forward(self, x):
        x = self.backbone(x).flatten(start_dim=1)
        return self.projection_head(x)

    def training_step(self, batch, batch_idx):
        x0, x1 = batch[0]
        z0 = self.forward(x0)
        z1 = self.forward(x1)
        loss = self.criterion(z0, z1)
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

    transform = two_views(args.method, args.size)
    dataset = FakeData(args.images, (3, 48, 48), transform=transform)
    if args.data:
        dataset = LightlyDataset(args.data, transform=transform)
    loading = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True, "num_workers": args.workers}
    loader = DataLoader(dataset, **loading)

    model = Model(args.method)
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
