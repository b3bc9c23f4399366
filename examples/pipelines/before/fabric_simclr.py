"""SimCLR in a plain loop under Fabric: python examples/pipelines/before/fabric_simclr.py --data DIR"""

import argparse
from pathlib import Path

from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightning.fabric import Fabric
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData, ImageFolder
from torchvision.models import resnet18


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, help="folder of class folders; without it, random images")
    p.add_argument("--out", type=Path, default=Path("runs/fabric.ckpt"), help="continued if it exists")
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--images", type=int, default=256, help="number of random images")
    p.add_argument("--batch-size", type=int, default=64, help="images of every process")
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--accumulate", type=int, default=1, help="batches for an optimizer step")
    p.add_argument("--epochs", type=int, default=1)
    p.add_argument("--accelerator", default="auto")
    p.add_argument("--devices", type=int, default=1)
    p.add_argument("--precision", default="32-true")
    args = p.parse_args(argv)

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices, precision=args.precision)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    transform = SimCLRTransform(input_size=args.size)
    data = FakeData(args.images, (3, 48, 48), transform=transform)
    if args.data:
        data = ImageFolder(args.data, transform)
    loading = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True, "num_workers": args.workers}
    backbone = resnet18()
    backbone.fc = nn.Identity()
    model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))
    criterion = NTXentLoss(temperature=0.15, gather_distributed=True)
    model, optimizer = fabric.setup(model, SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4))
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    if args.out.exists():
        fabric.load(args.out, state)

    for epoch in range(state["epoch"], args.epochs):
        fabric.seed_everything(epoch, verbose=False)  # the order of the images, also after a restart
        loader = fabric.setup_dataloaders(DataLoader(data, **loading))
        for step, ((x0, x1), _) in enumerate(loader, 1):
            last = step % args.accumulate == 0 or step == len(loader)
            with fabric.no_backward_sync(model, enabled=not last):
                z0, z1 = model(x0), model(x1)
                loss = criterion(z0, z1)
                fabric.backward(loss / args.accumulate)
            if last:
                optimizer.step()
                optimizer.zero_grad()
        fabric.print(f"epoch {epoch}  loss {loss.item():.3f}")
        state["epoch"] = epoch + 1
        fabric.save(args.out, state)
    return state


if __name__ == "__main__":
    main()
