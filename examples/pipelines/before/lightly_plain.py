"""SimCLR, VICReg and Barlow Twins in lightly's plain loop: examples/pipelines/before/lightly_plain.py --data DIR"""

import argparse

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


class Model(nn.Module):
    def __init__(self, backbone, method):
        super().__init__()
        self.backbone = backbone
        self.projection_head = HEADS[method]()

    def forward(self, x):
        x = self.backbone(x).flatten(start_dim=1)
        return self.projection_head(x)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", help="folder of images; without it, random images")
    p.add_argument("--method", choices=("simclr", "vicreg", "barlow"), default="simclr")
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--images", type=int, default=1024, help="number of random images")
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--epochs", type=int, default=10)
    args = p.parse_args(argv)

    resnet = resnet18()
    backbone = nn.Sequential(*list(resnet.children())[:-1])
    model = Model(backbone, args.method)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    transform = two_views(args.method, args.size)
    dataset = FakeData(args.images, (3, 48, 48), transform=transform)
    if args.data:
        dataset = LightlyDataset(args.data, transform=transform)
    loading = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True, "num_workers": args.workers}
    loader = DataLoader(dataset, **loading)

    criterion = CRITERIA[args.method]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    for epoch in range(args.epochs):
        total = 0.0
        for batch in loader:
            x0, x1 = batch[0]
            z0 = model(x0.to(device))
            z1 = model(x1.to(device))
            loss = criterion(z0, z1)
            total += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}  loss {total / len(loader):.3f}")
    return model


if __name__ == "__main__":
    main()
