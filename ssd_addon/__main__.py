"""The command line.

    python -m ssd_addon audit MODEL [MODEL] --data DIR --out audit.html       what any backbone keeps of augmentations
    python -m ssd_addon report RUN_OR_CHECKPOINT --data DIR --out report.html  what each space of a model encodes
    python -m ssd_addon tune                                                   measure the GPU for backend="auto"

Errors of the library name its arguments; `flagged` replaces these by the names of flags.
"""

import argparse
import contextlib
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from ssd_addon._limits import LARGEST_EDGE

FLAGS = (
    "data",
    "out",
    "backbone",
    "views",
    "groups",
    "layers",
    "weights",
    "prefix",
    "pretrained",
    "output",
    "size",
    "samples",
    "explore",
    "rows",
    "batch-size",
    "bands",
    "device",
    "seconds",
    "seed",
)
ARGUMENTS = {"explored": "explore"}
"""Arguments of the library whose flag has a different name."""
DATA: dict[str, Any] = {
    "required": True,
    "metavar": "DIR_OR_DATASET",
    "help": "a folder of images (its class folders are used as labels; of val, test and train the first is used), or "
    "FILE.py:NAME or MODULE:NAME, where NAME is a data set or a function that returns one, or a pair (images, factors)",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status; an error is printed as one line on standard error, with status 1."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("samples", "explore", "batch_size", "size", "draws"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more: got {value}")
    if "seed" in args and not -(2**63) <= args.seed < 2**64:
        parser.error(f"--seed: expected a whole number of 64 bits, as torch's generators take: got {args.seed}")
    if "size" in args and args.size is not None and args.size > LARGEST_EDGE:
        parser.error(f"--size: expected {LARGEST_EDGE} or less: got {args.size}")
    try:
        {"audit": audit, "report": report, "tune": tune}[args.command](args)
    except Exception as error:
        _print(f"error: {_said(error, args)}", error=True)
        return 1
    return 0


def _said(error: Exception, args: argparse.Namespace) -> str:
    """One line for the user: the library's message with flags for arguments, other errors with their type."""
    if isinstance(error, ValueError | TypeError | OSError | ImportError) and _of_the_library(error):
        return flagged(" ".join(str(error).split()), args)
    from ssd_addon.report.text import first_line

    return f"{type(error).__name__}: {first_line(error)}"


def _of_the_library(error: BaseException) -> bool:
    """Whether the error was raised by this library, and not by torch or by the user's code."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and Path(frames[-1]).is_relative_to(Path(__file__).parent)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m ssd_addon", description="Self-supervised disentanglement as an add-on.")
    commands = p.add_subparsers(dest="command", required=True)
    _audit_parser(commands)
    _tune_parser(commands)
    r = commands.add_parser(
        "report",
        help="one HTML page that shows what each space of a trained model encodes",
        description="Measure a trained model on your images, and write one HTML page that needs no server: a headline "
        "that says whether the spaces are disentangled, what each space encodes, and an explorer of similar images.",
    )
    r.add_argument(
        "checkpoint",
        metavar="RUN_OR_CHECKPOINT",
        help="the folder of a training run, or a file written by StyleHeads.save",
    )
    r.add_argument("--data", **DATA)
    r.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write (default report.html)")
    r.add_argument(
        "--backbone", help="torchvision:NAME, timm:NAME or FILE.py:NAME (default: the one on the checkpoint's card)"
    )
    r.add_argument(
        "--views",
        help="the augmentations used in training: a preset, a JSON file or FILE.py:NAME (default: those on the card)",
    )
    r.add_argument("--size", type=int, help="height and width of the images in pixels (default: the card's size)")
    r.add_argument("--samples", type=int, default=1000, help="measure on at most this many images (default 1000)")
    r.add_argument("--explore", type=int, default=300, help="show at most this many in the explorer (default 300)")
    r.add_argument(
        "--rows",
        choices=("auto", "unit", "raw"),
        default="auto",
        help="score L2-normalized embeddings (unit) or embeddings as they are (raw); auto, the default, scores them as "
        "the training's loss sees them",
    )
    r.add_argument("--batch-size", type=int, default=64, help="images that are embedded at a time (default 64)")
    r.add_argument(
        "--bands",
        type=_bands,
        help="the channels that pictures show, one to three of them, counted from 0, such as 3,2,1 (default: images of "
        "up to three channels as they are; of more channels, the first three principal components of all pixels)",
    )
    r.add_argument("--device", default="auto", help="cpu, cuda, ...; auto, the default, takes a GPU where there is one")
    r.add_argument("--seed", type=int, default=0, help="of the views, the split and the intervals (default 0)")
    return p


def _audit_parser(commands: Any) -> None:
    a = commands.add_parser(
        "audit",
        help="one HTML page that shows what a backbone encodes of each augmentation, layer by layer, without labels",
        description="Measure how well the parameters of your augmentations can be decoded from a pretrained backbone, "
        "layer by layer, and write one HTML page that needs no server. Give two models to compare them. No labels and "
        "no training are needed.",
    )
    a.add_argument(
        "model",
        nargs="+",
        metavar="MODEL",
        help="one or two: torchvision:NAME, timm:NAME or FILE.py:NAME (a module, or a function that makes one)",
    )
    a.add_argument("--data", **DATA)
    a.add_argument("--out", type=Path, default=Path("audit.html"), help="the page to write (default audit.html)")
    a.add_argument(
        "--weights",
        action="append",
        metavar="FILE",
        help="a file of weights: a state dict, or a checkpoint of lightly, Lightning or a training script; for two "
        "models, give the flag twice in their order, with - for the model that needs no file",
    )
    a.add_argument(
        "--prefix",
        help="what the backbone's keys begin with, where the file of weights holds several networks that fit",
    )
    a.add_argument("--pretrained", action="store_true", help="load the library's own weights where no file is given")
    a.add_argument(
        "--layers", type=_layers, help="layers to measure, such as layer2,layer3 (default: the backbone's own stages)"
    )
    a.add_argument(
        "--groups",
        default="color_spatial",
        help="the augmentations: a preset, a JSON file or FILE.py:NAME (default color_spatial)",
    )
    a.add_argument("--size", type=int, default=224, help="height and width of images and views in pixels (default 224)")
    a.add_argument("--samples", type=int, default=1000, help="measure on at most this many images (default 1000)")
    a.add_argument(
        "--draws", type=int, help="pairs of views of each image and group (default: about 1000 pairs for each group)"
    )
    a.add_argument(
        "--batch-size", type=int, default=64, help="images that go through the backbone at a time (default 64)"
    )
    a.add_argument(
        "--normalize",
        choices=("auto", "imagenet", "none"),
        default="auto",
        help="how images are normalized before the backbone; auto, the default, takes the mean and standard deviation "
        "that a timm model states, and ImageNet's for other backbones",
    )
    a.add_argument("--output", help="where a backbone returns several tensors, the one to use, such as pooler_output")
    a.add_argument("--device", default="auto", help="cpu, cuda, ...; auto, the default, takes a GPU where there is one")
    a.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the views, the split, the intervals and the untrained copies (default 0)",
    )


def _tune_parser(commands: Any) -> None:
    t = commands.add_parser(
        "tune",
        help="measure on this machine's GPU which backend and which tile sizes of the loss are fastest",
        description="Measure the fused kernels on a GPU, in about a minute, and store the result in "
        "${SSD_ADDON_CACHE:-~/.cache/ssd-addon}/kernels, where backend='auto' looks first. Without it, 'auto' uses an "
        "estimate from the GPU's properties.",
    )
    t.add_argument("--device", default="cuda", help="cuda, or cuda:1 and so on if there are several GPUs")
    t.add_argument("--seconds", type=float, default=60.0, help="approximate time; more tries more tiles (default 60)")
    t.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # on a CPU, in triton's interpreter


def tune(args: argparse.Namespace) -> None:
    """Measure the kernels on a GPU and store the result.

    Raises:
        ValueError: there is no GPU on which they run.
    """
    if not args.seconds > 0:
        raise ValueError(f"seconds: expected a time above 0: got {args.seconds:g}")
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    import torch

    from ssd_addon.kernels import dispatch

    device = torch.device("cpu" if args.rehearse else args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "tune: expected a CUDA device: got none, as torch finds no GPU; on a CPU backend='auto' uses 'eager' and "
            "'streaming', which need no tuning"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if why := dispatch.why_no_triton(device, torch.float32):
        raise ValueError(f"tune: expected a device on which the fused kernels run: {why}")
    from ssd_addon.kernels import tune as tuning

    file = tuning.run(device, seconds=args.seconds, rehearse=args.rehearse, say=_print)
    use = "a rehearsal, which is not used" if args.rehearse else "backend='auto' uses it in new processes"
    _print(f"written: {file}; {use}")


def _layers(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _bands(text: str) -> tuple[int, ...]:
    from ssd_addon.display import checked_bands

    try:
        return checked_bands(tuple(int(part) for part in text.split(",")))
    except (ValueError, TypeError):
        expected = "one to three channels, counted from 0, such as 3,2,1"
        raise argparse.ArgumentTypeError(f"expected {expected}: got {text!r}") from None


def audit(args: argparse.Namespace) -> None:
    """Build the backbones, read the data, measure, and write the page."""
    from ssd_addon import auditing
    from ssd_addon import report as page
    from ssd_addon.auditing.named import named
    from ssd_addon.recipes import MEAN, STD

    page.writable(args.out)
    device = _device(args.device)
    output = int(args.output) if args.output and args.output.isdigit() else args.output
    backbones = named(
        args.model,
        weights=args.weights or (),
        prefix=args.prefix,
        pretrained=args.pretrained,
        output=output,
        say=_print,
    )
    views = auditing.views_for(args.groups, args.size)
    data = page.read(args.data, size=args.size, samples=args.samples, seed=args.seed, say=_print)
    found = auditing.write(
        args.out,
        {name: each.net.to(device) for name, each in backbones.items()},
        data,
        views,
        size=args.size,
        layers=args.layers,
        normalize={"auto": "auto", "imagenet": (MEAN, STD), "none": None}[args.normalize],
        output=output,
        draws=args.draws,
        batch_size=args.batch_size,
        seed=args.seed,
        fresh={name: each.fresh for name, each in backbones.items()},
        untrained=[name for name, each in backbones.items() if each.untrained],
        say=_print,
    )
    for each in found:
        _print("")
        for line in (f"{each.name}: {auditing.headline(each)}", *auditing.sentences(each), *each.notes):
            _print(line)
    for line in auditing.compared(*found) if len(found) == 2 else ():
        _print(line)
    _print("")
    _print(f"written: {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")


def report(args: argparse.Namespace) -> None:
    """Open the checkpoint, read the data, measure, and write the page."""
    from ssd_addon import report as page
    from ssd_addon import runs

    page.writable(args.out)
    device = _device(args.device)
    opened = runs.load(args.checkpoint, backbone=args.backbone, views=args.views, size=args.size)
    card, model = opened.card, opened.model.to(device)
    size = args.size or card.get("size")
    if opened.views is None:
        _print(
            "the views of the training are not known, so which augmentations the spaces encode will not be measured: "
            "name them with --views (a preset, a JSON file or FILE.py:NAME)"
        )
    family = card.get("family")
    on_sphere = {"unit": True, "raw": False, "auto": model.on_sphere}[args.rows]
    named = on_sphere or args.rows != "auto" or "family" in card or "on_sphere" in card
    unknown = "" if named else " (the file does not name the loss)"
    if unknown:
        _print(
            "the file does not name the loss, so embeddings are scored as they are; after SimCLR's, which compares "
            "directions, give --rows unit, or save with model.on_sphere = criterion.on_sphere"
        )
    data = page.read(args.data, size=size, samples=args.samples, seed=args.seed, say=_print)
    n = len(data.images)
    about = [
        ("spaces", ", ".join(f"{name} {width}" for name, width in model.spaces.items())),
        ("images", f"{n} of {data.total}" if data.total > n else str(n)),
        ("size", f"{data.images.shape[-2]} x {data.images.shape[-1]}"),
        ("embeddings", "L2-normalized" if on_sphere else f"as they are{unknown}"),
    ]
    about += [("family", str(family))] if family else []
    if opened.log_problem:
        about.append(("log", f"left out: {opened.log_problem}"))
        _print(f"the log is left out: {opened.log_problem}")
    found = page.write(
        args.out,
        model,
        data,
        views=opened.views,
        log=opened.log,
        title=str(card.get("name") or Path(args.checkpoint).resolve().name),
        about=about,
        on_sphere=on_sphere,
        explored=args.explore,
        batch_size=args.batch_size,
        bands=args.bands,
        seed=args.seed,
        say=_print,
    )
    head, each = page.verdict(found)
    for line in ("", head, *each, "", f"written: {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)"):
        _print(line)


def _device(name: str) -> str:
    """Check that a device can hold and return tensors, and return its name.

    Raises:
        ValueError: this machine does not have the device.
    """
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.ones(2).to(chosen).sum().item()
    except (RuntimeError, AssertionError, ImportError) as error:
        from ssd_addon.report.text import first_line

        raise ValueError(
            f"device: expected one that this machine has, such as cpu: got {chosen} ({first_line(error)})"
        ) from error
    return chosen


def flagged(message: str, args: argparse.Namespace) -> str:
    """An error message of the library with flags instead of arguments.

    "data: ..." becomes "--data: ...", if that was given, and "backbone='...'" becomes "--backbone '...'".
    """
    message = re.sub(rf"\b({'|'.join(FLAGS)})=(?=')", r"--\1 ", message)
    match = re.match(r"(\w+): ", message)
    name = "" if match is None else ARGUMENTS.get(match[1], match[1]).replace("_", "-")
    if args.command == "audit" and name == "backbone":  # there it is a positional argument
        return f"MODEL: {message[message.index(': ') + 2 :]}"
    given = name in FLAGS and getattr(args, name.replace("-", "_"), None) is not None
    if match is not None and given:
        return f"--{name}: {message[match.end() :]}"
    expected, _, got = message.partition(": got ")
    takes = "images that the model takes" in expected or "images that the backbone takes" in expected
    by_size = takes and "channel" not in got
    return f"{message}; if that is because of their size, --size brings them to another" if by_size else message


def _print(text: str, *, error: bool = False) -> None:
    """Print a line, whatever the names in it and the encoding of the terminal are."""
    with contextlib.suppress(ImportError):  # of a package that is missing, which is what the line says
        from ssd_addon.report.text import clean

        text = clean(text)
    stream = sys.stderr if error else sys.stdout
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


if __name__ == "__main__":
    sys.exit(main())
