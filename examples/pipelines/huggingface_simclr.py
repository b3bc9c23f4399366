"""The same training with style spaces: python examples/pipelines/huggingface_simclr.py --data DIR"""

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, load_dataset
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments, ViTConfig, ViTModel

from ssd_addon import JointEntropyLoss, StructuredCollate, StructuredViews, StyleHeads, presets


def read_of(backbone, size, pool):
    """What the heads read: the class token, the mean of all tokens, or of a CNN its pooled maps."""
    if backbone.eval()(torch.rand(1, 3, size, size)).last_hidden_state.ndim == 4:
        return {"output": "pooler_output"}
    token = any("cls_token" in name or "class_embedding" in name for name, _ in backbone.named_parameters())
    return {"output": "last_hidden_state", "pool": {"auto": "cls" if token else "mean"}.get(pool, pool)}


def freeze_unread(heads, size):
    """Freeze what the features do not depend on, such as a pooling layer: DistributedDataParallel refuses it."""
    heads.eval().features(torch.rand(1, 3, size, size)).sum().backward()
    for parameter in heads.backbone.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    heads.train().zero_grad()


class Model(nn.Module):
    def __init__(self, backbone, size, pool="auto"):
        super().__init__()
        self.views = StructuredViews(**presets("color_spatial", size=size), seed=0)
        spaces = {"content": 128, "spatial": 32, "color": 32}
        self.heads = StyleHeads(backbone, spaces, **read_of(backbone, size, pool))
        freeze_unread(self.heads, size)
        self.criterion = JointEntropyLoss("simclr", gather_distributed=True)

    def forward(self, images):
        batch = self.views(images)
        return {"loss": self.criterion(self.heads(batch), batch)}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", help="folder of images; without it, random images")
    p.add_argument("--model", help="a name on the hub; without it, a small ViT with random weights")
    p.add_argument("--pool", default="auto", choices=["auto", "cls", "mean"], help="auto: by the model")
    p.add_argument("--out", type=Path, default=Path("runs/huggingface"))
    p.add_argument("--size", type=int, default=32, help="of the views; a ViT takes one size, such as 224")
    p.add_argument("--images", type=int, default=256, help="number of random images")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--resume", action="store_true")
    args = p.parse_args(argv)

    if args.model:
        backbone = AutoModel.from_pretrained(args.model)
    else:
        config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
        config.image_size, config.patch_size = args.size, 8
        backbone = ViTModel(config, add_pooling_layer=False)
    if args.data:
        data = load_dataset("imagefolder", data_dir=args.data, split="train")
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (args.images, 48, 48, 3), dtype=np.uint8)
        data = Dataset.from_dict({"image": list(pixels)}, features=Features({"image": Image()}))
    collate = StructuredCollate(args.size * 3 // 2, label_key=False)

    def images(rows):
        return {"images": collate(rows)[0]}

    trainer = Trainer(
        Model(backbone, args.size, args.pool),
        TrainingArguments(
            args.out,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps,
            save_steps=max(1, args.steps // 2),
            logging_steps=max(1, args.steps // 10),
            remove_unused_columns=False,
            report_to="none",
        ),
        data_collator=images,
        train_dataset=data,
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    return trainer


if __name__ == "__main__":
    main()
