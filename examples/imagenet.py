"""Train content and style spaces on a folder of photographs in ImageNet's layout, in one process or many.

    python examples/imagenet.py --data DIR --out runs/imagenet                          # one GPU, or slowly on a CPU
    torchrun --nproc-per-node 8 --max-restarts 3 examples/imagenet.py --data DIR --out runs/imagenet --resume \
        --batch-size 64

DIR holds train/CLASS/*.jpg and, for the probes, val/CLASS/*.jpg; or class folders alone; or shards (shards.py). The
defaults are the paper's recipe: ResNet-50, 100 epochs, LARS with 10 warm-up epochs, a total batch of 512.

A small, fast run on a CPU, with 4,000 photographs of 32 pixels in ten classes (from CIFAR-10):

    python examples/imagenet.py --data DIR --out runs/small --backbone resnet18 --size 32 --batch-size 128 --epochs 8 \
        --warmup-epochs 0.5 --hidden 512,512 --widths content=128,spatial=64,color=64 --optimizer adamw --workers 0

It takes 5 minutes on two cores. The loss falls from 5.4 (step 10) to 2.9, and on 1,000 other photographs linear probes
reach 0.33 (backbone), 0.32 (content), 0.22 (spatial) and 0.25 (color); chance is 0.10 (docs/results.md). So short a run
shows that training works, not that it disentangles. The recipe above was not run at its full length.
OUT/ gets log.jsonl (one JSON object a line), views.png (what each key shares), curves.png, checkpoint.pt and earlier
checkpoints; `python -m ssd_addon report OUT --data DIR --out report.html` makes a page of them. `--resume` continues
from the newest intact checkpoint, or starts if there is none. Exit codes: 143 and 130 after SIGTERM and SIGINT (a
checkpoint was written), 4 after too many steps that were not finite, 1 after any other error.
"""

import contextlib
import datetime
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from imagenet_options import build_backbone, build_optimizer, config_of, lr_at, parse
from photographs import Loaders, Probing, summed
from stages import described, stages
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssd_addon import DualAscent, EquivarianceLoss, JointEntropyLoss, Monitor, StructuredCollate, StructuredViews

from ssd_addon import CollapseAlarm, StyleHeads, plots, recipe, runs  # fmt: skip  # isort: skip
from ssd_addon.losses import Diverged, Terms
from ssd_addon.recipes import MEAN, STD


def train(args, world: int, rank: int, device: torch.device) -> dict[str, float]:
    say = (lambda *a: print(*a, flush=True)) if rank == 0 else lambda *_: None
    gpu = device.type == "cuda"
    args.out.mkdir(parents=True, exist_ok=True)
    saved = runs.Checkpoints(args.out, keep=args.keep)
    if saved.there() and not args.resume:
        raise FileExistsError(f"{args.out} holds the checkpoint of another run: give --resume, or another --out")

    # Views and data. The loader makes the crops (uint8), and the device does all other operations.
    preset = "content_only" if args.method == "content-only" else args.preset
    given = {"family": args.family, "sets": args.cross_image, "size": args.size}
    made = recipe(preset, **given)
    views = StructuredViews(**made.views, plan=args.plan, seed=args.seed)
    loaders = Loaders(args, views, world, rank, gpu)
    data, held_out, classes, per_epoch = loaders.data, loaders.held_out, loaders.classes, loaders.steps
    total, warmup = args.epochs * per_epoch, args.warmup_epochs * per_epoch
    stop = min(total, args.steps or total)

    # Model and loss.
    paper, rise = args.recipe == "paper", {}
    if not paper and args.dual_ascent is not None and args.family == "simclr" and preset != "content_only":
        rise = {"tolerance": args.dual_ascent, "warmup_steps": int(warmup)}
        made = recipe(preset, **given, **rise)
    torch.manual_seed(args.seed)
    widths = dict.fromkeys(views.plan.spaces, 2048) if paper else made.spaces
    core = StyleHeads(build_backbone(args), widths | args.widths, hidden=args.hidden)
    if args.activation_checkpointing:
        runs.checkpoint_activations(core.backbone)
    sharded = args.strategy == "fsdp" and world > 1  # FSDP takes only contiguous weights
    core = core.to(device, memory_format=torch.contiguous_format if sharded else torch.channels_last)
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in core.modules())
    if world > 1 and norms and not (gpu and args.sync_batch_norm):
        say("batch norm: statistics are of each process, not of the whole batch (synchronized ones need GPUs)")
    elif world > 1 and norms:
        core = nn.SyncBatchNorm.convert_sync_batchnorm(core)
    ema = AveragedModel(core, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    if args.compile:
        core.backbone.compile()
    for part in [core, *([ema.module] if ema else [])] if sharded else []:
        fully_shard(part)
    model = core if sharded or world == 1 else DistributedDataParallel(core, device_ids=[device.index] if gpu else None)
    loss = {"family": args.family} if paper else made.loss
    if args.dual_ascent is not None and "weights" not in loss:
        rise = {"tolerance": args.dual_ascent, "step_size": 0.01, "warmup_steps": int(warmup)}
        loss["weights"] = DualAscent(core.spaces, **rise)
    criterion = JointEntropyLoss(**loss, gather_distributed=True).to(device)
    core.on_sphere = criterion.on_sphere
    equivariance, respond, weight = None, None, args.equivariance
    if weight is None:
        weight = 0.0 if paper or made.equivariance is None else made.equivariance["weight"]
    if weight:
        term = {"family": args.family, "weight": weight, "gather_distributed": True}
        equivariance = EquivarianceLoss(core.spaces, views, **term).to(device)
        respond = DistributedDataParallel(equivariance) if world > 1 else equivariance  # its inputs are in place
    trained = core if equivariance is None else nn.ModuleList([core, equivariance])
    optimizer, peak = build_optimizer(args, trained), args.lr * args.batch_size * world * args.accumulate / 256
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    amp = torch.autocast(device.type, dtype=kind) if kind else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=kind is torch.float16)

    # Probes on labels: on queries during training, on whole images of val/ after each epoch.
    probing = None
    if loaders.unscored:
        say(loaders.unscored)
    else:
        probing = Probing({"backbone": core.in_features, **core.spaces}, classes, device, world)
        if not held_out:
            say("no val folder: probes report accuracy on training images (augmented queries) only")
    torch.manual_seed(args.seed + rank)
    if args.stages:
        found = stages(data, loaders.loader, loaders.loader.collate_fn, views, core, criterion, amp, device)
        say("\n".join(described(found, args.workers)))
        return found

    # The state of the run, and what `python -m ssd_addon report` needs.
    name = args.backbone if args.backbone.startswith("timm:") else f"torchvision:{args.backbone}"
    card = {"name": args.out.name, "backbone": name, "family": args.family, "size": args.size}
    card["views"] = {"preset": preset, "size": args.size, "plan": args.plan, "cross_image": tuple(args.cross_image)}
    log, step = args.out / "log.jsonl", 0
    config = config_of(args) | {"processes": world, "images": len(data), "classes": classes, "device": device.type}
    config["files"] = data.digest
    parts = {"optimizer": runs.whole_optimizer(trained, optimizer) if sharded else optimizer, "scaler": scaler}
    parts |= {"views": views, "criterion": criterion}
    parts |= {"equivariance": equivariance} if equivariance else {}
    parts |= {"probes": probing.probes, "probe_optimizer": probing.optimizer} if probing else {}
    parts |= {"ema": ema} if ema else {}

    def save() -> None:
        state = {"step": step, "epoch": step // per_epoch, "rng": runs.random_states(device)}
        state |= {"counted": summed(probing.counted).cpu() if probing else None, "broken": data.broken(device)}
        if bad := runs.not_finite([core.state_dict(), *(part.state_dict() for part in parts.values())]):
            raise runs.TooManySkipped(f"step {step}: expected a finite state to save: got NaN in {bad}", step)

        def write(path: Path) -> None:
            if rank == 0 or sharded:  # all ranks gather a sharded state
                runs.save_run(path, core, parts=parts, card=card, config=config, **state)

        saved.save(step, write)

    stored = saved.restore(lambda path: runs.restore_run(path, core, parts=parts, config=config), say)
    if stored is None:
        say("starting: there is no checkpoint yet")
    else:
        step = stored["step"]
        runs.set_random_states(stored["rng"], device)
        data.replaced.copy_(stored["broken"])
        if probing and rank == 0:  # the file has the counts of all ranks
            probing.counted.copy_(stored["counted"])
    if rank == 0:  # steps after the checkpoint are logged again
        runs.cut_log(log, step, unfinished=("partial",)) if stored else log.write_text("")
    samples = (held_out or data).spread(args.measure) if rank == 0 or sharded else []
    images = StructuredCollate(args.size)(samples)[0] if len(samples) >= 10 else None
    board = runs.tensorboard(args.out, after=step) if args.tensorboard and rank == 0 else None
    measured = {"views": None if images is None else views, "images": images, "batch_size": args.batch_size}
    monitor = Monitor(log, tensorboard=board, alarm=CollapseAlarm(total, core.spaces), **measured)
    say(f"{len(data)} images, {classes} classes, {world} x {args.batch_size} a step, {per_epoch} steps an epoch")

    def normalized(x):
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
        return (x.to(device) / 255 - mean) / std

    def end_of_epoch(epoch: int, **more: bool) -> dict[str, float]:
        """Log probes, matrices and broken files; the checkpoint is already written."""
        record = probing.accuracies("train", probing.counted) if probing else {}
        if held_out and probing:
            with amp, held_out.watched():
                counted = probing.scored(core, ((normalized(x), labels) for x, labels, _ in loaders.val))
            record |= probing.accuracies("val", counted)
            record["broken_files_val"] = int(held_out.broken(device).sum())
            held_out.check_broken(held_out.broken(device), args.max_broken)
        record["broken_files"] = int(data.broken(device).sum())
        monitor.write({"step": step, "epoch": epoch + 1, **record, **more})
        monitor.epoch(core, epoch, step)
        shown = [f"{key.removeprefix('accuracy_')} {v:.3f}" for key, v in record.items() if key.startswith("acc")]
        shown += [f"{key.replace('_', ' ')} {n}" for key, n in record.items() if key.startswith("broken") and n]
        say(f"epoch {epoch + 1} ends  {'  '.join(shown)}")
        return record

    record: dict[str, float] = {}
    if step and step % per_epoch == 0 and not runs.logged(log, step, "epoch"):  # killed during scoring
        record = end_of_epoch(step // per_epoch - 1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    first, started = step, time.perf_counter()
    with runs.Guard([trained, criterion], max_skipped=args.max_skipped) as guard:
        while step < stop and not guard.stopping:
            epoch = step // per_epoch
            if probing and step % per_epoch == 0:
                probing.counted.zero_()
            batches = loaders.epoch(epoch, begin=step % per_epoch)
            for _ in range(per_epoch - step % per_epoch):
                lr = lr_at(step, peak, warmup, total)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                guard.begin()
                each, responses, queries, seen = [], [], [], views.get_extra_state()
                for k in range(args.accumulate):
                    with data.watched():
                        images, labels, names = next(batches)
                    batch = views(images.to(device, non_blocking=True))
                    if step == k == 0 and rank == 0:
                        plots.views_strip(batch, args.out / "views.png", images=4, mean=MEAN, std=STD)
                    last = k == args.accumulate - 1
                    quiet = model.no_sync() if world > 1 and not sharded and not last else contextlib.nullcontext()
                    if sharded:
                        model.set_requires_gradient_sync(last)
                    try:
                        with quiet:
                            with amp:
                                z, features = model(batch, features=True)
                            terms = criterion.terms(z, batch)
                            response = respond(z, batch) if respond else torch.zeros((), device=device)
                            scaler.scale((terms.loss + response) / args.accumulate).backward()
                    except Diverged as error:
                        each = error
                        break
                    each.append(terms), responses.append(response.detach())
                    own = {"backbone": features[0].detach(), **{n: t[0].detach() for n, t in z.items()}}
                    queries.append((own, labels))
                found = each if isinstance(each, Diverged) else torch.stack([t.loss.detach() for t in each]).sum()
                scaled = scaler.is_enabled() and scaler.get_scale() >= 1  # it skips steps that overflow in float16
                try:
                    fine = guard.fine(step, found, () if scaled else parameters)
                except runs.TooManySkipped:
                    images = images if isinstance(images, torch.Tensor) else images.state_dict()
                    bad = {"images": images, "labels": labels, "names": list(names), "views": seen, "step": step}
                    torch.save(bad | {"model": core.state_dict()}, args.out / f"not-finite-{step}-rank{rank}.pt")
                    raise
                if fine:
                    scaler.step(optimizer)
                    scaler.update()
                    terms = Terms.mean(each)
                    criterion.weights.step(terms)
                    if ema:
                        ema.update_parameters(core)
                    if probing:  # after the decision on which all ranks agree: its gradients are exchanged too
                        probing.step(queries)
                optimizer.zero_grad()
                step += 1
                if not fine:
                    say(f"step {step}/{stop}  skipped: loss or gradients are not finite ({guard.skipped} in a row)")
                    monitor.write({"step": step, "skipped": 1})
                elif step % args.log_every == 0 or step == stop:
                    speed = (step - first) / (time.perf_counter() - started)  # steps a second
                    mean_loss = summed(torch.stack([t.loss.detach() for t in each]).mean()).item() / world
                    rate = round(speed * args.batch_size * args.accumulate * world, 1)
                    record = {"step": step, **terms.scalars(), "loss": mean_loss, "lr": lr, "images_per_s": rate}
                    if respond:
                        record["equivariance"] = summed(torch.stack(responses).mean()).item() / world
                    monitor.write(record)
                    left = datetime.timedelta(seconds=round((stop - step) / speed))
                    where = f"epoch {epoch + 1}/{args.epochs}  step {step}/{stop}"
                    say(f"{where}  loss {mean_loss:.4f}  lr {lr:.3g}  {rate:.0f} images/s  {left} left")
                if step == stop or guard.stopping:
                    break
                if step % args.save_every == 0 and step % per_epoch:
                    save()
            data.check_broken(data.broken(device), args.max_broken)
            save()
            if not guard.stopping:
                record |= end_of_epoch(epoch, **({"partial": True} if step % per_epoch else {}))
    monitor.close()
    if rank == 0 and (entries := runs.read_log(log)):
        plots.curves(entries, args.out / "curves.png")
    if guard.stopping:
        say(f"stopped by signal {guard.stopping} at step {step}: a checkpoint was written")
        raise SystemExit(guard.exit_code)
    return record


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train; returns the last numbers of the log."""
    args = parse(argv, __doc__)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    world, rank = runs.init_ranks("nccl" if device.type == "cuda" else "gloo")
    lock = runs.Lock(args.out) if rank == 0 else contextlib.nullcontext()
    try:
        with lock:
            record = train(args, world, rank, device)
    except runs.TooManySkipped as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(4) from error
    if world > 1:  # not after an error: ranks that torchrun restarts would find dead addresses
        dist.destroy_process_group()
    return record


if __name__ == "__main__":
    main()
