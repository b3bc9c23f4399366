"""The same with style spaces: PYTHONPATH=SOLO_LEARN python examples/pipelines/solo_learn_simclr.py --data DIR"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from omegaconf import OmegaConf
from solo.data.pretrain_dataloader import dataset_with_index, prepare_dataloader
from solo.methods.base import BaseMethod
from torchvision.datasets import FakeData, ImageFolder

from ssd_addon import JointEntropyLoss, StructuredTransform, StyleHeads, presets

CONFIG = """
method: style_spaces
backbone: {name: resnet18}
method_kwargs: {spaces: {content: 128, spatial: 32, color: 32}, temperature: 0.15}
data: {dataset: custom, num_large_crops: 4, num_small_crops: 0, num_classes: 10}
optimizer: {name: sgd, lr: 0.06, classifier_lr: 0.1, weight_decay: 5.0e-4, batch_size: 64, kwargs: {momentum: 0.9}}
scheduler: {name: warmup_cosine}
"""


class StyleSpaces(BaseMethod):
    """One embedding space for content and one for each group of augmentations."""

    def __init__(self, cfg, plan):
        super().__init__(cfg)
        self.plan = plan
        self.projector = StyleHeads.heads(self.features_dim, dict(cfg.method_kwargs.spaces))
        self.criterion = JointEntropyLoss("simclr", temperature=cfg.method_kwargs.temperature, gather_distributed=True)

    @property
    def learnable_params(self):
        return [*super().learnable_params, {"name": "projector", "params": self.projector.parameters()}]

    def forward(self, X):
        out = super().forward(X)
        return {**out, "z": self.projector(out["feats"])}

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)  # one dictionary of embeddings for every view
        z = {name: torch.stack([view[name] for view in out["z"]]) for name in self.plan.spaces}
        terms = self.criterion.terms(z, self.plan)
        self.log_dict({f"train_{name}": value for name, value in terms.scalars().items()}, on_epoch=True)
        return terms.loss + out["loss"]


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
    transform = StructuredTransform(**presets("color_spatial", size=args.size))
    data = dataset_with_index(FakeData)(args.images, (3, 48, 48), transform=transform)
    if args.data:
        data = dataset_with_index(ImageFolder)(args.data, transform)
        cfg.data.num_classes = len(data.classes)
    model = StyleSpaces(cfg, transform.plan)
    trainer = Trainer(
        accelerator=args.accelerator, devices=1, max_epochs=args.epochs, default_root_dir=args.out, log_every_n_steps=1
    )
    trainer.fit(model, prepare_dataloader(data, args.batch_size, args.workers))
    return trainer


if __name__ == "__main__":
    main()
