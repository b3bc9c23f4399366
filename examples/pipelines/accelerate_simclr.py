"""The same loop under accelerate with style spaces: python examples/pipelines/accelerate_simclr.py --data DIR"""

import argparse
from pathlib import Path

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData, ImageFolder
from torchvision.models import resnet18

from ssd_addon import DualAscent, JointEntropyLoss, StructuredCollate, StructuredViews, StyleHeads, presets


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
    views = StructuredViews(**presets("color_spatial", size=args.size), seed=0).to(accelerator.device)
    data = FakeData(args.images, (3, 48, 48))
    if args.data:
        data = ImageFolder(args.data)
    loading = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True, "num_workers": args.workers}
    loading["collate_fn"] = StructuredCollate(args.size * 3 // 2)
    model = StyleHeads(resnet18(), {"content": 128, "spatial": 32, "color": 32})
    ascent = DualAscent(model.spaces, tolerance=0.1, step_size=0.01)
    criterion = JointEntropyLoss("simclr", weights=ascent, gather_distributed=True).to(accelerator.device)
    optimizer = SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, **loading))
    accelerator.register_for_checkpointing(views, criterion)
    done = len(list(args.out.glob("epoch-*")))
    if done:
        accelerator.load_state(args.out / f"epoch-{done}")

    for epoch in range(done, args.epochs):
        loader.set_epoch(epoch)
        for images, _, _ in loader:
            with accelerator.accumulate(model):
                batch = views(images)
                terms = criterion.terms(model(batch), batch)
                accelerator.backward(terms.loss)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    ascent.step(terms)
        accelerator.print(f"epoch {epoch}  loss {terms.loss.item():.3f}")
        accelerator.save_state(args.out / f"epoch-{epoch + 1}")
    return model, views, criterion


if __name__ == "__main__":
    main()
