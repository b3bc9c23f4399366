"""Groups for images that are not RGB photographs, tried on pictures that the script draws (scenes.py).

    python examples/domains.py --domain multispectral --out runs/multispectral
    python examples/domains.py --domain histology --out runs/histology
    python examples/domains.py --domain gray --out runs/gray

multispectral   12 bands. "geometry": rotation, shift, scale; "sensor": gain and offset of every band
histology       stained tissue. "spatial": right-angle rotations and flips; "stain": jitter of hematoxylin and eosin
gray            one channel, as in radiology. "spatial": rotation, shift, scale; "acquisition": gamma and noise

Each takes one to two minutes on one or two cores and writes metrics.json, matrix.png, views.png, curves.png, log.jsonl
and model.pt. The measured matrices are in docs/domains.md. To make a report of a run:

    python -m ssd_addon report runs/multispectral --data examples/domains.py:multispectral_data --bands 3,2,1 \\
        --backbone examples/domains.py:multispectral_net --views examples/domains.py:multispectral_views
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arguments import count, whole
from scenes import DOMAINS, Noise
from synthetic import ConvNet
from torch import Tensor
from training import score, train, write

from ssd_addon import StructuredViews, plots, recipe
from ssd_addon.metrics import Factor
from ssd_addon.report import Data


def data(domain: str, samples: int = 1000) -> Data:
    """Images of a domain and their factors, for `report --data`."""
    images, factors = held_out(domain, samples, 10_001)
    return Data(images, factors, classes=DOMAINS[domain].classes)


def held_out(domain: str, samples: int, seed: int) -> tuple[Tensor, dict[str, Factor]]:
    """Images to measure on, with the noise that views have: the model never saw images without noise."""
    generator = torch.Generator().manual_seed(seed)
    images, factors = DOMAINS[domain].draw(samples, generator)
    noise = Noise(DOMAINS[domain].noise)
    return noise.apply(images, noise.draw(tuple(images.shape), generator)), factors


def net(domain: str) -> ConvNet:
    """The backbone, for `report --backbone`."""
    return ConvNet(channels=DOMAINS[domain].channels)


def views(domain: str, seed: int = 0) -> StructuredViews:
    """The views, for `report --views`."""
    return StructuredViews(DOMAINS[domain].groups(), then=DOMAINS[domain].then(), seed=seed)


multispectral_data, multispectral_net, multispectral_views = (partial(f, "multispectral") for f in (data, net, views))
histology_data, histology_net, histology_views = (partial(f, "histology") for f in (data, net, views))
gray_data, gray_net, gray_views = (partial(f, "gray") for f in (data, net, views))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--domain", choices=tuple(DOMAINS), required=True)
    p.add_argument("--steps", type=whole, default=500)
    p.add_argument("--batch-size", type=whole, default=64)
    p.add_argument("--content", type=whole, default=None, help="width of the content space (default: the domain's)")
    p.add_argument("--style", type=whole, default=8, help="width of each style space")
    p.add_argument("--samples", type=whole, default=3000, help="number of images for the probes")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=count, default=0)
    p.add_argument("--out", type=Path, default=None, help="default runs/DOMAIN")
    args = p.parse_args(argv)
    args.out = args.out or Path("runs") / args.domain

    torch.manual_seed(args.seed)
    domain = DOMAINS[args.domain]
    args.content = args.content or domain.content
    drawn = views(args.domain, args.seed)
    settings = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    r = recipe(domain.groups(), content=args.content, style=args.style)
    model, log = train(net(args.domain), drawn, r, domain.draw, **settings)
    images, factors = held_out(args.domain, args.samples, args.seed + 10_000)
    clean = domain.draw(min(1000, args.samples), torch.Generator().manual_seed(args.seed + 20_000))[0]
    tables = score(model, drawn, images, factors, clean)
    result = write(args.out, model, tables, log, vars(args), {"size": images.shape[-1]})
    plots.views_strip(drawn(clean[:4]), args.out / "views.png", bands=domain.bands)
    print(f"\nWritten to {args.out}: metrics.json, matrix.png, views.png, curves.png, log.jsonl, model.pt")
    return result


if __name__ == "__main__":
    main()
