"""Runs of examples/imagenet.py with given flags, one after the other; as a script under torchrun, of several ranks.

torchrun --nproc-per-node 2 tests/support/flag_runs.py RUNS.json        a list of lists of arguments
"""

import json
import os
import sys

import torch
from timm.models import register_model
from torch import nn

from examples import imagenet

SMALL = "--backbone timm:tiny_blocks --size 16 --hidden 16 --epochs 6 --warmup-epochs 1 --workers 0 --log-every 1"
SMALL += " --measure 0 --seed 3"


class Block(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Blocks(nn.Sequential):
    """Two blocks that can be recomputed: a backbone that compiles in seconds."""

    num_features = 8

    def __init__(self):
        super().__init__(Block(3, 8), Block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@register_model
def tiny_blocks(pretrained=False, num_classes=1000, **options):
    return Blocks()


def run(arguments: list[str]) -> None:
    torch._dynamo.reset()
    imagenet.main([*SMALL.split(), *arguments])


def main() -> None:
    for attempt, arguments in enumerate(json.loads(open(sys.argv[1]).read())):  # noqa: SIM115
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)  # the ranks meet anew
        print(f"run {attempt}: {' '.join(arguments)}", file=sys.stderr, flush=True)
        run(arguments)


if __name__ == "__main__":
    main()
