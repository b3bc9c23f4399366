"""The same loop under Fabric with style spaces: python examples/pipelines/fabric_simclr.py --data DIR"""

import argparse
from pathlib import Path

from lightning.fabric import Fabric
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData, ImageFolder
from torchvision.models import resnet18

from ssd_addon import DualAscent, JointEntropyLoss, StructuredCollate, StructuredViews, StyleHeads, presets


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
    views = fabric.to_device(StructuredViews(**presets("color_spatial", size=args.size), seed=0))
    data = FakeData(args.images, (3, 48, 48))
    if args.data:
        data = ImageFolder(args.data)
    loading = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True, "num_workers": args.workers}
    loading["collate_fn"] = StructuredCollate(args.size * 3 // 2)
    model = StyleHeads(resnet18(), {"content": 128, "spatial": 32, "color": 32})
    ascent = DualAscent(model.spaces, tolerance=0.1, step_size=0.01)
    criterion = fabric.to_device(JointEntropyLoss("simclr", weights=ascent, gather_distributed=True))
    model, optimizer = fabric.setup(model, SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4))
    state = {"model": model, "optimizer": optimizer, "epoch": 0, "views": views, "criterion": criterion}
    if args.out.exists():
        fabric.load(args.out, state)

    for epoch in range(state["epoch"], args.epochs):
        fabric.seed_everything(epoch, verbose=False)  # the order of the images, also after a restart
        loader = fabric.setup_dataloaders(DataLoader(data, **loading))
        for step, (images, _, _) in enumerate(loader, 1):
            last = step % args.accumulate == 0 or step == len(loader)
            with fabric.no_backward_sync(model, enabled=not last):
                batch = views(images)
                terms = criterion.terms(model(batch), batch)
                fabric.backward(terms.loss / args.accumulate)
            if last:
                optimizer.step()
                optimizer.zero_grad()
                ascent.step(terms)
        fabric.print(f"epoch {epoch}  loss {terms.loss.item():.3f}")
        state["epoch"] = epoch + 1
        fabric.save(args.out, state)
    return state


if __name__ == "__main__":
    main()
