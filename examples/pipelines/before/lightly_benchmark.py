"""lightly's ImageNet benchmark of three methods: examples/pipelines/before/lightly_benchmark.py --data DIR"""

import argparse
import math

import pytorch_lightning as pl
import torch
import torchvision.transforms as T
from lightly.data import LightlyDataset
from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from lightly.models.modules.heads import BarlowTwinsProjectionHead, SimCLRProjectionHead, VICRegProjectionHead
from lightly.models.utils import get_weight_decay_parameters
from lightly.transforms import BYOLTransform, SimCLRTransform, VICRegTransform
from lightly.utils.benchmarking import OnlineLinearClassifier
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet50

HEADS = {
    "simclr": lambda: SimCLRProjectionHead(2048, 2048, 128),
    "vicreg": lambda: VICRegProjectionHead(2048, 8192, 8192, num_layers=2),
    "barlow": lambda: BarlowTwinsProjectionHead(2048, 8192, 8192),
}
CRITERIA = {
    "simclr": lambda: NTXentLoss(temperature=0.1, gather_distributed=True),
    "vicreg": lambda: VICRegLoss(gather_distributed=True),
    "barlow": lambda: BarlowTwinsLoss(gather_distributed=True),
}
TRANSFORMS = {"simclr": SimCLRTransform(), "vicreg": VICRegTransform(), "barlow": BYOLTransform()}
RATES = {"simclr": lambda n: 0.075 * math.sqrt(n), "vicreg": lambda n: 0.3 * n / 256, "barlow": lambda n: 0.2 * n / 256}


class Benchmark(pl.LightningModule):
    def __init__(self, batch_size_per_device, num_classes, method):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size_per_device, self.method = batch_size_per_device, method
        self.backbone = resnet50()
        self.backbone.fc = nn.Identity()
        self.projection_head = HEADS[method]()
        self.criterion = CRITERIA[method]()
        self.online_classifier = OnlineLinearClassifier(num_classes=num_classes)

    def forward(self, x):
        return self.backbone(x)

    def training_step(self, batch, batch_idx):
        views, targets = batch[0], batch[1]
        features = self.forward(torch.cat(views)).flatten(start_dim=1)
        z0, z1 = self.projection_head(features).chunk(len(views))
        loss = self.criterion(z0, z1)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(targets))
        labeled = features.detach(), targets.repeat(len(views))
        cls_loss, cls_log = self.online_classifier.training_step(labeled, batch_idx)
        self.log_dict(cls_log, sync_dist=True, batch_size=len(targets))
        return loss + cls_loss

    def validation_step(self, batch, batch_idx):
        images, targets = batch[0], batch[1]
        features = self.forward(images).flatten(start_dim=1)
        cls_loss, cls_log = self.online_classifier.validation_step((features, targets), batch_idx)
        self.log_dict(cls_log, prog_bar=True, sync_dist=True, batch_size=len(targets))
        return cls_loss

    def configure_optimizers(self):
        decayed, rest = get_weight_decay_parameters([self.backbone, self.projection_head])
        groups = [
            {"name": self.method, "params": decayed},
            {"name": "no_weight_decay", "params": rest, "weight_decay": 0.0},
            {"name": "classifier", "params": self.online_classifier.parameters(), "weight_decay": 0.0},
        ]
        rate = RATES[self.method](self.batch_size_per_device * self.trainer.world_size)
        optimizer = LARS(groups, lr=rate, momentum=0.9, weight_decay=1e-6)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = int(steps / self.trainer.max_epochs * 10)
        scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=warmup, max_epochs=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def loader(folder, args, transform, **options):
    data = FakeData(args.images, (3, 256, 256), transform=transform)
    if args.data:
        data = LightlyDataset(f"{args.data}/{folder}", transform=transform)
    return DataLoader(data, batch_size=args.batch_size, num_workers=args.workers, **options)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", help="folder with train/ and val/; without it, random images")
    p.add_argument("--method", choices=("simclr", "vicreg", "barlow"), default="simclr")
    p.add_argument("--classes", type=int, default=1000)
    p.add_argument("--images", type=int, default=64, help="number of random images")
    p.add_argument("--batch-size", type=int, default=32, help="images of every device")
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--epochs", type=int, default=100)
    p.add_argument("--accelerator", default="auto")
    p.add_argument("--devices", type=int, default=1)
    p.add_argument("--out", default="runs/lightly")
    args = p.parse_args(argv)

    normalize = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    whole = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), normalize])
    transform = TRANSFORMS[args.method]
    model = Benchmark(args.batch_size, args.classes, args.method)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        sync_batchnorm=args.accelerator != "cpu",  # a CPU has none
        default_root_dir=args.out,
        log_every_n_steps=1,
    )
    trainer.fit(model, loader("train", args, transform, shuffle=True, drop_last=True), loader("val", args, whole))
    return model


if __name__ == "__main__":
    main()
