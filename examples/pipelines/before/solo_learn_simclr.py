"""SimCLR with solo-learn: PYTHONPATH=SOLO_LEARN python examples/pipelines/before/solo_learn_simclr.py --data DIR"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from omegaconf import OmegaConf
from solo.data.pretrain_dataloader import (
    FullTransformPipeline,
    NCropAugmentation,
    build_transform_pipeline,
    dataset_with_index,
    prepare_dataloader,
)
from solo.methods.simclr import SimCLR
from torchvision.datasets import FakeData, ImageFolder

CONFIG = """
method: simclr
backbone: {name: resnet18}
method_kwargs: {proj_hidden_dim: 2048, proj_output_dim: 128, temperature: 0.15}
data: {dataset: custom, num_large_crops: 2, num_small_crops: 0, num_classes: 10}
optimizer: {name: sgd, lr: 0.06, classifier_lr: 0.1, weight_decay: 5.0e-4, batch_size: 64, kwargs: {momentum: 0.9}}
scheduler: {name: warmup_cosine}
augmentation:
  rrc: {enabled: true, crop_min_scale: 0.08, crop_max_scale: 1.0}
  color_jitter: {prob: 0.8, brightness: 0.4, contrast: 0.4, saturation: 0.2, hue: 0.1}
  grayscale: {prob: 0.2}
  gaussian_blur: {prob: 0.5}
  solarization: {prob: 0.0}
  equalization: {prob: 0.0}
  horizontal_flip: {prob: 0.5}
"""


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, help="folder of class folders; without it, random images")
    p.add_argument("--out", type=Path, default=Path("runs/solo_learn"))
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--images", type=int, default=256, help="number of random images")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--epochs", type=int, default=1)
    p.add_argument("--accelerator", default="auto")
    args = p.parse_args(argv)

    seed_everything(0)
    cfg = OmegaConf.create(CONFIG)
    cfg.max_epochs, cfg.optimizer.batch_size = args.epochs, args.batch_size
    cfg.augmentation.crop_size = args.size
    augment = build_transform_pipeline("custom", cfg.augmentation)
    transform = FullTransformPipeline([NCropAugmentation(augment, cfg.data.num_large_crops)])
    data = dataset_with_index(FakeData)(args.images, (3, 48, 48), transform=transform)
    if args.data:
        data = dataset_with_index(ImageFolder)(args.data, transform)
        cfg.data.num_classes = len(data.classes)
    model = SimCLR(cfg)
    trainer = Trainer(
        accelerator=args.accelerator, devices=1, max_epochs=args.epochs, default_root_dir=args.out, log_every_n_steps=1
    )
    trainer.fit(model, prepare_dataloader(data, args.batch_size, args.workers))
    return trainer


if __name__ == "__main__":
    main()
