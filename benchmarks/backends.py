"""Compare eager with streaming log-sums on this CPU, to find where "auto" should change from one to the other.

    python benchmarks/backends.py            # half a minute; the table of docs/benchmarks.md

Forward and backward of `negative_lse` alone in float32. The backends take turns, in reversed order every second round;
the ratio is the median over rounds of eager / streaming, with the smallest and the largest.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from ssd_addon.kernels import negative_lse

SHAPES = ((128, 32), (256, 32), (256, 512), (512, 32), (512, 512), (1024, 32), (1024, 512), (2048, 128), (4000, 128))
SHAPES += ((4000, 1024),)
ROUNDS = 6


def seconds(z: torch.Tensor, ids: torch.Tensor, backend: str) -> float:
    """Seconds of one forward and backward pass: the mean over enough passes to take some hundredths of a second."""
    n = len(z)
    repeats = max(1, 2**21 // n**2)
    start = time.perf_counter()
    for _ in range(repeats):
        z.grad = None
        negative_lse(z, ids, 0.1, backend=backend).mean().backward()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads\n")
    print("| N x D | eager, ms | streaming, ms | eager / streaming |\n|--|--:|--:|--:|")
    for n, d in SHAPES:
        z = F.normalize(torch.randn(n, d), dim=1).requires_grad_()
        ids = torch.arange(n // 2).repeat(2)
        found: dict[str, list[float]] = {"eager": [], "streaming": []}
        for round_ in range(ROUNDS + 1):
            for backend in sorted(found, reverse=bool(round_ % 2)):
                t = seconds(z, ids, backend)
                if round_:  # the first one warms up
                    found[backend].append(t)
        ratios = [a / b for a, b in zip(found["eager"], found["streaming"], strict=True)]
        each = " | ".join(f"{1000 * statistics.median(t):.2f}" for t in found.values())
        print(
            f"| {n} x {d} | {each} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
