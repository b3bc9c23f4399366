"""`python -m ssd_addon report RUN_OR_CHECKPOINT --data DIR --out report.html`: what each space of a model knows."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m ssd_addon", description="Self-supervised disentanglement as an add-on.")
    commands = p.add_subparsers(dest="command", required=True)
    r = commands.add_parser(
        "report",
        help="one HTML page that says what each space of a trained model knows",
        description="Measure a trained model on a data set and write one self-contained HTML page.",
    )
    r.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run's folder, or a file of StyleHeads.save")
    r.add_argument(
        "--data",
        required=True,
        metavar="DIR_OR_DATASET",
        help="a folder of images (class folders are labels; val/ is taken where there is one), or FILE.py:NAME or "
        "MODULE:NAME, where NAME is a data set, or makes one or a pair (images, factors)",
    )
    r.add_argument("--out", type=Path, default=Path("report.html"))
    r.add_argument("--backbone", help="torchvision:NAME, timm:NAME or FILE.py:NAME, instead of what the card says")
    r.add_argument("--views", help="a preset, a JSON file or FILE.py:NAME, instead of what the card says")
    r.add_argument("--size", type=int, help="edge of the images in pixels (default: what the card says, else 224)")
    r.add_argument("--samples", type=int, default=1000, help="images to measure on, at most (default 1000)")
    r.add_argument("--explore", type=int, default=300, help="images in the explorer, at most (default 300)")
    r.add_argument(
        "--rows",
        choices=("auto", "unit", "raw"),
        default="auto",
        help="score unit-length rows (as SimCLR's loss sees them) or raw ones; auto asks the card's family",
    )
    r.add_argument("--batch-size", type=int, default=64)
    r.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    r.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    for name in ("samples", "explore", "batch_size", "size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name.replace('_', '-')}: expected 1 or more: got {value}")
    try:
        report(args)
    except (ValueError, TypeError, OSError, ImportError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # torch's: images that the backbone does not take, a device without memory
        print(f"error: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def report(args: argparse.Namespace) -> None:
    import torch

    from ssd_addon import checkpoints
    from ssd_addon import report as page

    def say(text: str) -> None:
        print(text, flush=True)

    page.writable(args.out)
    opened = checkpoints.load(args.checkpoint, backbone=args.backbone, views=args.views)
    card, model = opened.card, opened.model
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: expected one that this machine has, such as cpu: got {device} ({reason})"
        ) from error
    size = args.size or card.get("size") or 224
    family = card.get("family")
    unit = args.rows == "unit" or (args.rows == "auto" and family in (None, "simclr"))
    data = page.read(args.data, size=size, samples=args.samples, seed=args.seed, say=say)
    widths = ", ".join(f"{name} {width}" for name, width in model.spaces.items())
    n = len(data.images)
    about = [
        ("spaces", widths),
        ("images", f"{n} of {data.total}" if data.total > n else str(n)),
        ("size", f"{data.images.shape[-2]} x {data.images.shape[-1]}"),
        ("rows", "of unit length" if unit else "as they are"),
    ]
    about += [("family", str(family))] if family else []
    if opened.log_problem:
        about.append(("log", f"left out: {opened.log_problem}"))
        say(f"the log is left out: {opened.log_problem}")
    found = page.write(
        args.out,
        model,
        data,
        views=opened.views,
        log=opened.log,
        title=str(card.get("name") or Path(args.checkpoint).resolve().name),
        about=about,
        unit=unit,
        explored=args.explore,
        batch_size=args.batch_size,
        seed=args.seed,
        say=say,
    )
    head, each = page.verdict(found)
    for line in ("", head, *each, "", f"written: {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)"):
        say(line)


if __name__ == "__main__":
    sys.exit(main())
