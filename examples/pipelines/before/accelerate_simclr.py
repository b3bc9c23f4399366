"""SimCLR in a plain loop under accelerate: python examples/pipelines/before/accelerate_simclr.py --data DIR"""

import argparse
from pathlib import Path

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData, ImageFolder
from torchvision.models import resnet18


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, help="folder of class folders; without it, random images")
    p.add_argument("--out", type=Path, default=Path("runs/accelerate"), help="continued if it exists")
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--images", type=int, default=256, help="number of random images")
    p.add_argument("--batch-size", type=int, default=64, help="images of every process")
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--accumulate", type=int, default=1, help="batches for an optimizer step")
    p.add_argument("--epochs", type=int, default=1)
    p.add_argument("--precision", default="no")
    args = p.parse_args(argv)

    accelerator = Accelerator(
        mixed_precision=args.precision,
        gradient_accumulation_steps=args.accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(0)
    transform = SimCLRTransform(input_size=args.size)
    data = FakeData(args.images, (3, 48, 48), transform=transform)
    if args.data:
        data = ImageFolder(args.data, transform)
    loading = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True, "num_workers": args.workers}
    backbone = resnet18()
    backbone.fc = nn.Identity()
    model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))
    criterion = NTXentLoss(temperature=0.15, gather_distributed=True)
    optimizer = SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, **loading))
    done = len(list(args.out.glob("epoch-*")))
    if done:
        accelerator.load_state(args.out / f"epoch-{done}")

    for epoch in range(done, args.epochs):
        loader.set_epoch(epoch)
        for (x0, x1), _ in loader:
            with accelerator.accumulate(model):
                z0, z1 = model(x0), model(x1)
                loss = criterion(z0, z1)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}  loss {loss.item():.3f}")
        accelerator.save_state(args.out / f"epoch-{epoch + 1}")
    return model


if __name__ == "__main__":
    main()
