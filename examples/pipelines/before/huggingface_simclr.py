"""SimCLR with transformers and datasets: python examples/pipelines/before/huggingface_simclr.py --data DIR"""

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, load_dataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments, ViTConfig, ViTModel


class Model(nn.Module):
    def __init__(self, backbone, size):
        super().__init__()
        self.backbone = backbone
        self.head = SimCLRProjectionHead(backbone.config.hidden_size, 512, 128)
        self.criterion = NTXentLoss(temperature=0.15, gather_distributed=True)

    def forward(self, x0, x1):
        z0, z1 = (self.head(self.backbone(x).last_hidden_state[:, 0]) for x in (x0, x1))
        return {"loss": self.criterion(z0, z1)}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", help="folder of images; without it, random images")
    p.add_argument("--model", help="a name on the hub; without it, a small ViT with random weights")
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
    transform = SimCLRTransform(input_size=args.size)

    def views(rows):
        pairs = [transform(image.convert("RGB")) for image in rows["image"]]
        return {"x0": [x0 for x0, _ in pairs], "x1": [x1 for _, x1 in pairs]}

    trainer = Trainer(
        Model(backbone, args.size),
        TrainingArguments(
            args.out,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps,
            save_steps=max(1, args.steps // 2),
            logging_steps=max(1, args.steps // 10),
            remove_unused_columns=False,
            report_to="none",
        ),
        train_dataset=data.with_transform(views),
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    return trainer


if __name__ == "__main__":
    main()
