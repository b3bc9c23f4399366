"""Content and style spaces from a folder of photographs, ImageNet's layout, on one process or many.

    python examples/imagenet.py --data DIR --out runs/imagenet                          # one GPU, or a patient CPU
    torchrun --nproc-per-node 8 examples/imagenet.py --data DIR --out runs/imagenet --batch-size 64 --load-size 288

DIR holds train/CLASS/*.jpg and, for the probes, val/CLASS/*.jpg; without train/ the folder itself is trained on. The
defaults are the paper's recipe: ResNet-50, 100 epochs, LARS with 10 warm-up epochs, a total batch of 512.

Small and quick, on a CPU, 4,000 photographs of 32 pixels in ten classes (from CIFAR-10):

    python examples/imagenet.py --data DIR --out runs/small --backbone resnet18 --size 32 --batch-size 128 --epochs 8 \
        --warmup-epochs 0.5 --hidden 512,512 --widths content=128,spatial=64,color=64 --optimizer adamw --workers 0

Expect, within 5 minutes on two cores: loss from 5.4 (step 10) to 2.9 and, on 1,000 other photographs, linear probes of
0.33 (backbone), 0.32 (content), 0.22 (spatial), 0.25 (color) against a chance of 0.10 (docs/results.md). So short a run
tells that it learns, not that it disentangles. The recipe above was not run at its full length.
OUT/ gets log.jsonl (every line a JSON object; after every epoch what each space knows of the augmentations), views.png
(what each key shares), curves.png and checkpoint.pt, from which `--resume` continues as if nothing had happened, and
`python -m ssd_addon report OUT --data DIR --out report.html` makes a page.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import time
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torchvision
from arguments import count, named_widths, names, number, whole, wholes
from photographs import Photographs, accuracies, counts, summed
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from ssd_addon import (
    DualAscent,
    EquivarianceLoss,
    JointEntropyLoss,
    Monitor,
    StructuredCollate,
    StructuredViews,
    StyleHeads,
    plots,
    presets,
    recipe,
    runs,
)
from ssd_addon.metrics import OnlineProbes
from ssd_addon.recipes import MEAN, STD

BASE_LR = {"simclr": 0.5, "vicreg": 0.3, "barlow": 0.2}  # LARS, for a total batch of 256; AdamW takes 1e-3
FREE = ("data", "out", "resume", "steps", "workers", "log_every", "save_every", "broken", "measure", "tensorboard")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("runs/imagenet"))
    p.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    p.add_argument("--method", choices=("ours", "content-only"), default="ours", help="content-only: ordinary SSL")
    p.add_argument("--family", choices=("simclr", "vicreg", "barlow"), default="simclr")
    p.add_argument("--plan", choices=("shared_query", "interleaved"), default="shared_query")
    p.add_argument(
        "--recipe",
        choices=("paper", "recommended"),
        default="paper",
        help="recommended: widths, content entropy and equivariance of ssd_addon.recipe; other options go first",
    )
    p.add_argument("--preset", choices=("color_spatial", "appearance_spatial"), default="color_spatial")
    p.add_argument("--backbone", default="resnet50", help="a torchvision model, or timm:NAME")
    p.add_argument("--hidden", type=wholes, default="8192,8192", help="widths of every head's hidden layers")
    p.add_argument(
        "--widths",
        type=named_widths,
        default="",
        metavar="NAME=D,...",
        help="content=2048,color=512: of spaces (paper: 2048 where not named)",
    )
    p.add_argument("--dual-ascent", type=number, metavar="TOL", help="adapt lambda until every constraint is below TOL")
    p.add_argument(
        "--cross-image", type=names, default="", metavar="GROUP,...", help="groups whose keys show another image"
    )
    p.add_argument("--equivariance", type=number, metavar="WEIGHT", help="of EquivarianceLoss (paper: 0, without)")
    p.add_argument("--size", type=whole, default=224, help="edge of the views in pixels")
    p.add_argument(
        "--load-size", type=whole, help="edge that photographs are loaded at, before crops (default: --size)"
    )
    p.add_argument("--batch-size", type=whole, default=64, help="images per process")
    p.add_argument("--epochs", type=whole, default=100)
    p.add_argument("--warmup-epochs", type=number, default=10)
    p.add_argument("--steps", type=whole, help="stop after this step; the schedule stays that of --epochs")
    p.add_argument("--optimizer", choices=("lars", "adamw"), default="lars")
    p.add_argument("--lr", type=number, help="for a total batch of 256 (default: by family and optimizer)")
    p.add_argument("--weight-decay", type=number, default=1e-6, help="timm's LARS adapts only what decays: keep it > 0")
    p.add_argument("--broken", choices=("skip", "raise"), default="raise", help="files that cannot be decoded")
    p.add_argument("--workers", type=count, default=8)
    p.add_argument("--measure", type=count, default=500, help="images for every epoch's label-free matrix; 0: none")
    p.add_argument("--tensorboard", action="store_true", help="event files in OUT as well")
    p.add_argument("--seed", type=count, default=0)
    p.add_argument("--log-every", type=whole, default=10)
    p.add_argument("--save-every", type=whole, default=1000, help="steps; also after every epoch")
    args = p.parse_args(argv)
    args.load_size = args.load_size or args.size
    if args.lr is None:
        args.lr = BASE_LR[args.family] if args.optimizer == "lars" else 1e-3
    groups = [] if args.method == "content-only" else [*presets(args.preset)["groups"]]
    there = f"those of {args.preset}: {', '.join(groups)}" if groups else "none, as content-only SSL has no groups"
    if wrong := [n for n in args.cross_image if n not in groups]:
        p.error(f"--cross-image: expected names of groups ({there}): got {', '.join(wrong)}")
    if wrong := [n for n in args.widths if n not in ("content", *groups)]:
        p.error(f"--widths: expected content and names of groups ({there}): got {', '.join(wrong)}")
    if args.equivariance and not groups:
        p.error(f"--equivariance: expected groups, whose changes it predicts: got {there}")
    of_timm, name = args.backbone.startswith("timm:"), args.backbone.removeprefix("timm:")
    if not (timm.is_model(name) or "hub:" in name if of_timm else name in torchvision.models.list_models()):
        p.error(
            f"--backbone: expected a torchvision model, such as resnet50, or timm:NAME of timm: got {args.backbone}"
        )
    return args


def build_model(args: argparse.Namespace, widths: dict[str, int]) -> StyleHeads:
    if args.backbone.startswith("timm:"):
        backbone = timm.create_model(args.backbone.removeprefix("timm:"), num_classes=0)
    else:
        backbone = torchvision.models.get_model(args.backbone, weights=None)
    return StyleHeads(backbone, widths | args.widths, hidden=args.hidden)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},  # nor does LARS adapt these
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


def train(args: argparse.Namespace, world: int, rank: int, device: torch.device) -> dict[str, float]:
    say = print if rank == 0 else lambda *_, **__: None
    gpu = device.type == "cuda"

    # Data. The loader hands over uint8 images of one size; the views are made on the device.
    data = Photographs(args.data / "train" if (args.data / "train").is_dir() else args.data, args.broken)
    classes, targets = len(data.files.classes), torch.tensor(data.files.targets)
    sampler = runs.ResumableSampler(data, world, rank, shuffle=True, seed=args.seed)
    draws = torch.Generator()  # of the loaders: the global generator belongs to the model
    common = {"num_workers": args.workers, "pin_memory": gpu, "generator": draws}
    loader = DataLoader(
        data, args.batch_size, sampler=sampler, collate_fn=StructuredCollate(args.load_size), drop_last=True, **common
    )
    per_epoch = len(loader)
    if not per_epoch:
        raise ValueError(f"expected at least one batch of {args.batch_size} x {world} images: got {len(data)} images")
    total, warmup = args.epochs * per_epoch, args.warmup_epochs * per_epoch
    stop = min(total, args.steps or total)

    # Views, model, loss.
    preset = "content_only" if args.method == "content-only" else args.preset
    paper, rise = args.recipe == "paper", {}
    if not paper and args.dual_ascent is not None and args.family == "simclr" and preset != "content_only":
        rise = {"tolerance": args.dual_ascent, "warmup_steps": int(warmup)}
    made = recipe(preset, family=args.family, sets=args.cross_image, size=args.size, **rise)
    views = StructuredViews(**made.views, plan=args.plan, seed=args.seed)
    torch.manual_seed(args.seed)
    widths = dict.fromkeys(views.plan.spaces, 2048) if paper else made.spaces
    core = build_model(args, widths).to(device, memory_format=torch.channels_last)
    if world > 1 and gpu:
        core = nn.SyncBatchNorm.convert_sync_batchnorm(core)
    features: dict[str, Tensor] = {}
    core.stacks[0].register_forward_pre_hook(lambda _, inputs: features.update(backbone=inputs[0].detach()))
    wrap = {"device_ids": [device.index] if gpu else None}
    model = DistributedDataParallel(core, **wrap) if world > 1 else core
    loss = {"family": args.family} if paper else made.loss
    if args.dual_ascent is not None and "weights" not in loss:
        rise = {"tolerance": args.dual_ascent, "step_size": 0.01, "warmup_steps": int(warmup)}
        loss["weights"] = DualAscent(core.spaces, **rise)
    criterion = JointEntropyLoss(**loss, gather_distributed=True).to(device)
    core.on_sphere = criterion.on_sphere
    equivariance = respond = None
    response_weight = args.equivariance
    if response_weight is None:
        response_weight = 0.0 if paper or made.equivariance is None else made.equivariance["weight"]
    if response_weight:
        equivariance = EquivarianceLoss(core.spaces, views, family=args.family, weight=response_weight).to(device)
        # Its inputs are in place already: no device_ids.
        respond = DistributedDataParallel(equivariance) if world > 1 else equivariance
    trained = core if equivariance is None else nn.ModuleList([core, equivariance])
    optimizer, peak = build_optimizer(args, trained), args.lr * args.batch_size * world / 256
    half = (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16) if gpu else None
    amp = torch.autocast(device.type, dtype=half) if gpu else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)

    # Probes on labels: on queries while training, on whole images of val/ after each epoch.
    val = probes = net = held_out = None
    if classes < 2 or targets.bincount().max() < 2:
        say(f"no probes: {classes} classes, {len(data)} images, so no class has a second image to be recognised by")
    else:
        probes = OnlineProbes({"backbone": core.in_features, **core.spaces}, classes).to(device)
        net = DistributedDataParallel(probes, **wrap) if world > 1 else probes
        probe_optimizer = torch.optim.Adam(probes.parameters(), lr=3e-3)
        if (args.data / "val").is_dir():
            held_out = Photographs(args.data / "val", args.broken, scored=True)
            if held_out.files.classes != data.files.classes:
                raise ValueError(f"{args.data}: expected the same class folders in train and val")
            mine = Subset(held_out, range(rank, len(held_out), world))
            val = DataLoader(mine, args.batch_size, collate_fn=StructuredCollate(args.size), **common)
        else:
            say("no val folder: probes report accuracy on training images (augmented queries) only")
    torch.manual_seed(args.seed + rank)

    # Where the run stands, and what `python -m ssd_addon report` has to know.
    name = args.backbone if args.backbone.startswith("timm:") else f"torchvision:{args.backbone}"
    card = {"name": args.out.name, "backbone": name, "family": args.family, "size": args.size}
    card["views"] = {"preset": preset, "size": args.size, "plan": args.plan, "cross_image": tuple(args.cross_image)}
    checkpoint, log, step = args.out / "checkpoint.pt", args.out / "log.jsonl", 0
    config = {k: v for k, v in vars(args).items() if k not in FREE}
    config |= {"processes": world, "images": len(data), "classes": classes, "device": device.type}
    parts = {"optimizer": optimizer, "scaler": scaler, "views": views, "criterion": criterion}
    parts |= {"equivariance": equivariance} if equivariance else {}
    parts |= {"probes": probes, "probe_optimizer": probe_optimizer} if probes else {}

    counted = torch.zeros(1 + len(probes.names) if probes else 1, device=device)  # queries of this epoch, and hits

    def save() -> None:
        seen = {"counted": summed(counted).cpu(), "broken": data.broken(device)}
        state = [torch.get_rng_state(), torch.cuda.get_rng_state() if gpu else None]
        states = [state]
        if world > 1:
            states = [None] * world
            dist.all_gather_object(states, state)
        if rank == 0:
            state = {"step": step, "epoch": step // per_epoch, "rng": states, **seen}
            runs.save_run(checkpoint, core, parts=parts, card=card, config=config, **state)

    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        stored = runs.restore_run(checkpoint, core, parts=parts, config=config)
        step = stored["step"]
        torch.set_rng_state(stored["rng"][rank][0])
        if gpu:
            torch.cuda.set_rng_state(stored["rng"][rank][1])
        data.replaced.copy_(stored["broken"])
        if rank == 0:  # which has the counts of all ranks; what was logged after the checkpoint happens again
            counted.copy_(stored["counted"])
            runs.cut_log(log, step)
    elif checkpoint.exists():
        raise FileExistsError(f"{args.out} holds the checkpoint of another run: give --resume, or another --out")
    elif rank == 0:
        log.write_text("")
    samples = (held_out or data).spread(args.measure) if rank == 0 else []
    images = StructuredCollate(args.size)(samples)[0] if len(samples) >= 10 else None
    monitor = Monitor(
        log,
        tensorboard=args.out if args.tensorboard else None,
        views=None if images is None else views,
        images=images,
        batch_size=args.batch_size,
    )
    say(f"{len(data)} images, {classes} classes, {world} x {args.batch_size} a step, {per_epoch} steps an epoch")

    record: dict[str, float] = {}
    first, started = step, time.perf_counter()
    while step < stop:
        epoch = step // per_epoch
        sampler.set_epoch(epoch)
        sampler.start = (step % per_epoch) * args.batch_size
        draws.manual_seed(args.seed + epoch)
        if step % per_epoch == 0:
            counted.zero_()
        for images, labels, _ in loader:
            lr = lr_at(step, peak, warmup, total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = views(images.to(device, non_blocking=True))
            if step == 0 and rank == 0:
                plots.views_strip(batch, args.out / "views.png", images=4, mean=MEAN, std=STD)
            with amp:
                z = model(batch)
            terms = criterion.terms(z)
            response = respond(z, batch) if respond else None
            optimizer.zero_grad()
            scaler.scale(terms.loss if response is None else terms.loss + response).backward()
            scaler.step(optimizer)
            scaler.update()
            criterion.weights.step(terms)
            if probes:
                labels = labels.to(device)
                queries = {"backbone": features["backbone"][: len(labels)], **{n: t[0] for n, t in z.items()}}
                logits = net(queries)
                probe_optimizer.zero_grad()
                probes.loss(logits, labels).backward()
                probe_optimizer.step()
                counted += counts(probes, logits, labels)
            step += 1
            if step % args.log_every == 0 or step == stop:
                speed = (step - first) / (time.perf_counter() - started)  # steps a second
                mean_loss = summed(terms.loss.detach()).item() / world
                rate = round(speed * args.batch_size * world, 1)
                record = {"step": step, **terms.scalars(), "loss": mean_loss, "lr": lr, "images_per_s": rate}
                if response is not None:
                    record["equivariance"] = summed(response.detach()).item() / world
                if args.dual_ascent is not None:
                    record |= {f"lambda/{n}": float(w) for n, w in criterion.lambdas(views.plan).items()}
                monitor.write(record)
                left = datetime.timedelta(seconds=round((stop - step) / speed))
                where = f"epoch {epoch + 1}/{args.epochs}  step {step}/{stop}"
                say(f"{where}  loss {mean_loss:.4f}  lr {lr:.3g}  {rate:.0f} images/s  {left} left", flush=True)
            if step == stop:
                break
            if step % args.save_every == 0 and step % per_epoch:
                save()

        # After the epoch: probes, broken files, checkpoint.
        found, broken = {"train": counted} if probes else {}, {"broken_files": int(data.broken(device).sum())}
        if val:
            found["val"] = torch.zeros_like(counted)
            core.eval(), probes.eval()
            with torch.no_grad(), amp:
                for images, labels, _ in val:
                    x = images.to(device) / 255 - torch.tensor(MEAN, device=device).view(3, 1, 1)
                    whole = core(x / torch.tensor(STD, device=device).view(3, 1, 1))
                    logits = probes({"backbone": features["backbone"], **whole})
                    found["val"] += counts(probes, logits, labels.to(device))
            core.train(), probes.train()
            broken["broken_files_val"] = int(held_out.broken(device).sum())
        scores = accuracies(probes, found)
        monitor.write({"step": step, "epoch": epoch + 1, **broken, **scores})
        monitor.epoch(core, epoch, step)
        record |= scores | broken
        shown = [f"{name.removeprefix('accuracy_')} {value:.3f}" for name, value in scores.items()]
        shown += [f"{name.replace('_', ' ')} {n}" for name, n in broken.items() if n]
        say(f"epoch {epoch + 1} ends  {'  '.join(shown)}", flush=True)
        save()
    monitor.close()
    if rank == 0 and record:
        plots.curves([json.loads(line) for line in log.read_text().splitlines()], args.out / "curves.png")
    return record


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains; returns the last numbers of the log."""
    args = parse(argv)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return train(args, world, rank, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
