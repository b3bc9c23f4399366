"""Short runs of examples/imagenet.py on pictures of noise."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from examples import imagenet

ROOT = Path(__file__).parents[2]
SMALL = "--backbone timm:test_resnet --size 32 --hidden 16 --widths content=16,spatial=8,color=8 --batch-size 4"
SMALL += " --epochs 3 --warmup-epochs 1 --workers 0 --log-every 1"


def draw(folder: Path, count: int) -> None:
    """`count` pictures of noise, in three classes."""
    noise = np.random.default_rng(count)
    for k in range(count):
        path = folder / "abc"[k % 3] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def run(data: Path, out: str, *more: str) -> dict[str, float]:
    return imagenet.main([*SMALL.split(), "--data", str(data), "--out", str(data.parent / out), *more])


def log_of(data: Path, out: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (data.parent / out / "log.jsonl").read_text().splitlines()]


def parameters_of(data: Path, out: str) -> dict[str, torch.Tensor]:
    return torch.load(data.parent / out / "checkpoint.pt", weights_only=True)["model"]


def spoil(folder: Path, files: int) -> None:
    for path in sorted(folder.glob("*/*.png"))[:files]:
        path.write_bytes(b"")
