"""The same, with views of whole batches on the device: python examples/pipelines/lightly_gpu.py --data DIR"""

import argparse

import torch
from lightly.data import LightlyDataset
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18

from ssd_addon import JointEntropyLoss, StructuredCollate, StructuredViews, StyleHeads, presets

SPACES = {"content": 2048, "spatial": 512, "color": 512}


class Model(nn.Module):
    def __init__(self, backbone, method):
        super().__init__()
        self.backbone = backbone
        self.projection_head = StyleHeads.heads(512, SPACES)

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

    views = StructuredViews(**presets("color_spatial", size=args.size)).to(device)
    dataset = FakeData(args.images, (3, 48, 48))
    if args.data:
        dataset = LightlyDataset(args.data)
    loading = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True, "num_workers": args.workers}
    loader = DataLoader(dataset, collate_fn=StructuredCollate(args.size * 3 // 2), **loading)

    criterion = JointEntropyLoss(args.method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    for epoch in range(args.epochs):
        total = 0.0
        for images, _, _ in loader:
            batch = views(images.to(device))
            z = model(batch.views.flatten(0, 1))
            loss = criterion(z, batch)
            total += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}  loss {total / len(loader):.3f}")
    return model


if __name__ == "__main__":
    main()
