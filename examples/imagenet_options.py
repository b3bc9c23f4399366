"""The command line of imagenet.py, and the backbone, optimizer and learning rate that it builds."""

import argparse
import math
from pathlib import Path

import timm
import torch
import torchvision
from arguments import count, edge, named_widths, names, number, share, too_large, whole, wholes
from timm.optim import Lars
from torch import nn

from ssd_addon import presets

BASE_LR = {"simclr": 0.5, "vicreg": 0.3, "barlow": 0.2}  # LARS, for a total batch of 256; AdamW takes 1e-3
FREE = (
    "data", "out", "resume", "steps", "workers", "log_every", "save_every", "broken", "measure", "tensorboard", "keep",
    "max_broken", "max_skipped", "timeout", "compile", "stages",
)  # fmt: skip
"""Options that may differ when a run is continued."""


def parse(argv: list[str] | None, text: str | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("runs/imagenet"))
    p.add_argument("--resume", action="store_true", help="continue from the newest intact checkpoint, or start")
    p.add_argument("--method", choices=("ours", "content-only"), default="ours", help="content-only: ordinary SSL")
    p.add_argument("--family", choices=("simclr", "vicreg", "barlow"), default="simclr")
    p.add_argument("--plan", choices=("shared_query", "interleaved"), default="shared_query")
    p.add_argument(
        "--recipe",
        choices=("paper", "recommended"),
        default="paper",
        help="recommended: widths, content's keys and entropy, equivariance of ssd_addon.recipe; options override it",
    )
    p.add_argument("--preset", choices=("color_spatial", "appearance_spatial"), default="color_spatial")
    p.add_argument("--backbone", default="resnet50", help="a torchvision model, or timm:NAME")
    p.add_argument("--hidden", type=wholes, default="8192,8192", help="widths of every head's hidden layers")
    p.add_argument(
        "--widths",
        type=named_widths,
        default="",
        metavar="NAME=D,...",
        help="widths of spaces, as content=2048,color=512 (paper: 2048 if not named)",
    )
    p.add_argument(
        "--dual-ascent",
        type=number,
        metavar="TOL",
        help="raise the weight of a space until its pairs disagree by less than TOL",
    )
    p.add_argument(
        "--cross-image", type=names, default="", metavar="GROUP,...", help="groups whose keys show another image"
    )
    p.add_argument(
        "--equivariance", type=number, metavar="WEIGHT", help="weight of EquivarianceLoss (paper: 0, without it)"
    )
    p.add_argument("--size", type=edge, default=224, help="edge of the views in pixels")
    p.add_argument(
        "--load-size",
        type=edge,
        metavar="EDGE",
        help="make photographs squares of this edge before they are cropped, on the device: less work for the workers, "
        "coarser crops (default: workers crop every photograph at its full resolution)",
    )
    p.add_argument(
        "--decode",
        choices=("pil", "torchcodec"),
        default="pil",
        help="torchcodec: faster for JPEGs at full size",
    )
    p.add_argument("--batch-size", type=whole, default=64, help="images per process")
    p.add_argument(
        "--accumulate", type=whole, default=1, metavar="N", help="number of batches whose gradients make one step"
    )
    p.add_argument("--epochs", type=whole, default=100)
    p.add_argument("--warmup-epochs", type=number, default=10)
    p.add_argument("--steps", type=whole, help="stop after this step; the schedule stays that of --epochs")
    p.add_argument("--optimizer", choices=("lars", "adamw"), default="lars")
    p.add_argument(
        "--lr", type=number, help="learning rate for a total batch of 256 (default: by family and optimizer)"
    )
    p.add_argument(
        "--weight-decay", type=number, default=1e-6, help="timm's LARS adapts only tensors that decay: keep it above 0"
    )
    p.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="precision of the network; auto: bf16 or fp16 on a GPU, fp32 on a CPU (the loss is always in float32)",
    )
    p.add_argument("--compile", action="store_true", help="torch.compile the backbone")
    p.add_argument("--activation-checkpointing", action="store_true", help="recompute blocks in the backward pass")
    p.add_argument(
        "--ema", type=share, metavar="DECAY", help="keep an exponential average of the weights in the checkpoint"
    )
    p.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp", help="over processes")
    p.add_argument("--sync-batch-norm", action=argparse.BooleanOptionalAction, default=True, help="on GPUs")
    p.add_argument(
        "--broken", choices=("skip", "raise"), default="raise", help="what to do with files that cannot be decoded"
    )
    p.add_argument(
        "--max-broken", type=share, default=0.5, metavar="SHARE", help="share of broken files above which the run ends"
    )
    p.add_argument(
        "--max-skipped", type=count, default=3, help="consecutive steps that may be skipped because they are not finite"
    )
    p.add_argument(
        "--mix-shards",
        type=whole,
        metavar="N",
        help="with shards as data: read and mix N at a time (default: all in one random order, as from folders)",
    )
    p.add_argument("--workers", type=count, default=8)
    p.add_argument("--timeout", type=whole, default=600, help="seconds after which a silent worker is an error")
    p.add_argument(
        "--measure", type=count, default=500, help="number of images for the label-free matrix of every epoch; 0: none"
    )
    p.add_argument("--tensorboard", action="store_true", help="also write event files to OUT")
    p.add_argument(
        "--stages", action="store_true", help="print how many images a second each stage can process, and exit"
    )
    p.add_argument("--seed", type=count, default=0)
    p.add_argument("--log-every", type=whole, default=10)
    p.add_argument(
        "--save-every", type=whole, default=1000, help="write a checkpoint every so many steps; also after every epoch"
    )
    p.add_argument("--keep", type=whole, default=3, help="number of checkpoints to keep, including the newest")
    args = p.parse_args(argv)
    if args.lr is None:
        args.lr = BASE_LR[args.family] if args.optimizer == "lars" else 1e-3
    if args.precision == "auto":
        gpu = torch.cuda.is_available()
        args.precision = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if gpu else "fp32"
    groups = [] if args.method == "content-only" else [*presets(args.preset)["groups"]]
    there = f"those of {args.preset}: {', '.join(groups)}" if groups else "none, as content-only SSL has no groups"
    if wrong := [n for n in args.cross_image if n not in groups]:
        p.error(f"--cross-image: expected names of groups ({there}): got {', '.join(wrong)}")
    if wrong := [n for n in args.widths if n not in ("content", *groups)]:
        p.error(f"--widths: expected content and names of groups ({there}): got {', '.join(wrong)}")
    for what, images, pixels, each in (
        ("--size: expected views of a batch", args.batch_size, args.size, (len(groups) + 2) * 3 * 4),
        ("--load-size: expected images of a batch", args.batch_size, args.load_size or args.size, 3),
        ("--measure: expected images", args.measure, args.size, 3),
    ):
        if wrong := too_large(images * each * pixels**2):
            p.error(f"{what} that fit {wrong}")
    if args.equivariance and not groups:
        p.error(f"--equivariance: expected groups, whose changes it predicts: got {there}")
    of_timm, name = args.backbone.startswith("timm:"), args.backbone.removeprefix("timm:")
    if not (timm.is_model(name) or "hub:" in name if of_timm else name in torchvision.models.list_models()):
        p.error(
            f"--backbone: expected a torchvision model, such as resnet50, or timm:NAME of timm: got {args.backbone}"
        )
    return args


def config_of(args: argparse.Namespace) -> dict:
    """Settings that have to be the same when a run is continued."""
    return {k: v for k, v in vars(args).items() if k not in FREE}


def build_backbone(args: argparse.Namespace) -> nn.Module:
    if args.backbone.startswith("timm:"):
        return timm.create_model(args.backbone.removeprefix("timm:"), num_classes=0)
    return torchvision.models.get_model(args.backbone, weights=None)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
        {
            "params": [p for p in model.parameters() if p.ndim <= 1],
            "weight_decay": 0.0,
        },  # and LARS does not adapt these
    ]
    if args.optimizer == "lars":
        return Lars(groups, lr=args.lr, momentum=0.9, trust_coeff=0.001, always_adapt=False)
    return torch.optim.AdamW(groups, lr=args.lr)


def lr_at(step: int, peak: float, warmup: float, total: int) -> float:
    """Linear warm-up, then cosine from peak to 0.001 peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1.0, total - 1 - warmup)
    return peak * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
