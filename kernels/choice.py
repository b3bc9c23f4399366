"""The number of rows N from which "auto" uses the triton backend, as pure functions of a description of the GPU.

    measured here      the user's cache, which `python -m ssd_addon tune` writes
    measured elsewhere table.json, per architecture: sm_90, on an H200
    estimated          t_other > 2.8 ms + 3 (2u / (0.4 peak16)),   u = 2 N^2 D

t_other is the estimated time of the streaming backend in float32, or in TF32 if the user allows it:
2u / (0.75 peak) of products, and 120 bytes of traffic for each of the N^2 / 2 similarities at 0.8 of the bandwidth.
Both sides grow with N^2, so the rule is a threshold for N, `estimated_rows`. For embeddings in 16 bits, N at width D:

    GPU                 D = 128      256      512    1,024    2,048
    H100 SXM              9,800    8,900    7,600    6,100    4,700
    A100 SXM, 80 GB       6,900    5,800    4,700    3,600    2,600
    RTX 4090              6,900    7,900   13,900    never    never
    L4                    3,700    4,100    5,700    never    never

The constants come from measurements on an H200 (docs/benchmarks.md). Tiles and products together reached 0.35 of peak16
at D = 256 and 0.46 to 0.57 above, hence 0.4; on other GPUs this is an assumption, hence the factor 3. 2.8 ms is the
longest time of a step that was bound by the (slow) host there (N up to 4,096). 120 bytes are what the passes of the
streaming backend read and write; from N = 8,192 on it took 1.1 to 3.2 times this estimate. On a GeForce or an L4 the
16-bit rate is only twice the float32 rate, less than the margin: run `python -m ssd_addon tune` to measure such GPUs.

Unknown properties of a GPU are replaced by values with which triton is used later rather than earlier.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ssd_addon.kernels import table

NEVER = 2**61
"""A number of rows that no batch reaches; an integer, so that ranks can exchange it."""

MARGIN, EFFICIENCY, HOST = 3.0, 0.4, 2.8e-3
"""Constants of the rule: margin on the tiles' time, share of peak16 that they reach, host time of a step in seconds."""
PRODUCTS, TRAFFIC, BANDWIDTH = 0.75, 60.0, 0.8
"""Constants of the streaming backend: share of the peak, bytes per entry of N x N, share of the bandwidth."""

RATES: Mapping[tuple[int, int], tuple[int, int]] = {
    (8, 0): (2048, 128),
    (8, 6): (512, 256),
    (8, 7): (512, 256),
    (8, 9): (512, 256),
    (9, 0): (4096, 256),
    (10, 0): (8192, 256),
    (10, 3): (8192, 256),
    (12, 0): (512, 256),
}
"""Operations per clock and multiprocessor: fp16 products with float32 sums, and float32. GeForce's rate is used for all
of 8.6, 8.9 and 12.0; workstation cards reach twice that, so their estimate is conservative. Source: NVIDIA's white
papers."""
OTHER_RATES = (512, 256)
CLOCKS = {(8, 0): 1.41e9, (8, 6): 1.7e9, (8, 9): 2.5e9, (9, 0): 1.98e9, (10, 0): 1.9e9, (12, 0): 2.4e9}
BANDWIDTHS = {(8, 0): 2.0e12, (8, 6): 0.9e12, (8, 9): 1.0e12, (9, 0): 3.35e12, (10, 0): 8.0e12, (12, 0): 1.8e12}
"""Defaults for values that torch does not report. A high bandwidth overrates streaming, which is conservative too."""


@dataclass(frozen=True)
class Gpu:
    """Description of a GPU, on which the choice depends.

    Attributes:
        name: the driver's name.
        capability: compute capability, (9, 0) for sm_90.
        multiprocessors: number of multiprocessors.
        memory: memory in bytes.
        clock: boost clock in Hz.
        bandwidth: memory bandwidth in bytes per second.
        torch, cuda, triton: versions; "none" if not installed.
        hip: ROCm's version if torch is built for it, else None.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    clock: float = 0.0
    bandwidth: float = 0.0
    torch: str = "none"
    cuda: str = "none"
    triton: str = "none"
    hip: str | None = None

    @property
    def architecture(self) -> str:
        """ "sm_90" and so on, the key of table.json."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def peak16(self) -> float:
        """Operations per second of fp16 products with float32 sums, without sparsity."""
        return RATES.get(self.capability, OTHER_RATES)[0] * self.multiprocessors * self._clock

    def peak32(self, tf32: bool) -> float:
        """Operations per second of float32 products: on the ordinary units, or in TF32 at half the 16-bit rate."""
        if tf32:
            return self.peak16 / 2
        return RATES.get(self.capability, OTHER_RATES)[1] * self.multiprocessors * self._clock

    @property
    def _clock(self) -> float:
        return self.clock or CLOCKS.get(self.capability, 2.0e9)

    @property
    def _bandwidth(self) -> float:
        return self.bandwidth or BANDWIDTHS.get(self.capability, 2.0e12)


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The description of a CUDA device."""
    p = torch.cuda.get_device_properties(device)
    clock, memory_clock, bus = (
        float(getattr(p, n, 0)) for n in ("clock_rate", "memory_clock_rate", "memory_bus_width")
    )
    return Gpu(
        name=p.name,
        capability=(p.major, p.minor),
        multiprocessors=p.multi_processor_count,
        memory=p.total_memory,
        clock=1e3 * clock,
        bandwidth=2 * 1e3 * memory_clock * bus / 8,
        torch=torch.__version__,
        cuda=str(torch.version.cuda or "none"),
        triton=triton_version(),
        hip=torch.version.hip,
    )


def triton_version() -> str:
    """The version of the package, without importing it; "none" if it is not installed."""
    from importlib import metadata

    for name in ("triton", "triton-windows"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return "none"


def why_not(gpu: Gpu, place: str) -> str | None:
    """The reason why the Triton kernels cannot run on this GPU, or None; `place` names the device in messages."""
    if gpu.hip is not None:
        return (
            f"it is written for NVIDIA GPUs, and torch {gpu.torch} is built for AMD's (ROCm {gpu.hip}), on which the "
            "kernels have not been compiled"
        )
    if gpu.capability < (8, 0):
        major, minor = gpu.capability
        return f"it needs compute capability 8.0 or higher, and {place} has {major}.{minor}"
    return None


def key(gpu: Gpu, kernels: str) -> str:
    """Name of the cache file: the GPU, the versions, and a hash of the kernels' source.

    >>> gpu = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 80 * 2**30, torch="2.11.0+cu130", cuda="13.0", triton="3.6.0")
    >>> key(gpu, "ab")
    'NVIDIA-H100-80GB-HBM3-sm_90-132-torch2.11.0-cuda13.0-triton3.6.0-ab'
    """
    version = gpu.torch.partition("+")[0]
    parts = (gpu.name, gpu.architecture, str(gpu.multiprocessors), f"torch{version}", f"cuda{gpu.cuda}",
             f"triton{gpu.triton}", kernels)  # fmt: skip
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", p).strip("-.") for p in parts)


def precise_enough(came_as: torch.dtype, tf32: bool) -> bool:
    """Whether fp16 products are precise enough: for 16-bit embeddings, and for float32 ones if TF32 is allowed, which
    has the same mantissa; never for float64."""
    return came_as.itemsize == 2 or (came_as == torch.float32 and tf32)


def estimated_rows(gpu: Gpu, width: int, tf32: bool) -> float:
    """The analytic rule: the N from which triton is estimated to be faster; infinity if it never is.

    >>> h100 = Gpu("H100", (9, 0), 132, 80 * 2**30)
    >>> [round(estimated_rows(h100, d, tf32=False), -2) for d in (256, 2048)]
    [8900.0, 4700.0]
    """
    other = 4 * width / (PRODUCTS * gpu.peak32(tf32)) + TRAFFIC / (BANDWIDTH * gpu._bandwidth)  # seconds / N^2
    tiles = MARGIN * 4 * width / (EFFICIENCY * gpu.peak16)
    return math.inf if other <= tiles else math.sqrt(HOST / (other - tiles))


def decide(
    gpu: Gpu,
    width: int,
    *,
    tf32: bool,
    measured: Mapping[str, Any] | None = None,
    packaged: Mapping[str, Any] | None = None,
) -> int:
    """The number of rows of `width` columns from which "auto" uses triton; NEVER if it does not.

    Args:
        gpu: a device that can run the kernels.
        width: D.
        tf32: whether float32 products may run in TF32.
        measured: the user's cache for this GPU (`cache.load`), which has priority.
        packaged: table.json, used next. Both hold, under "auto", rows by width for "float32" and "tf32".
    """
    arithmetic = "tf32" if tf32 else "float32"
    theirs = (packaged or {}).get("auto", {}).get(gpu.architecture, {})
    for found in ((measured or {}).get("auto", {}), theirs):
        if found.get(arithmetic):
            return int(min(table.bucket(found[arithmetic], width), NEVER))
    rows = estimated_rows(gpu, width, tf32)
    return NEVER if rows == math.inf else math.ceil(rows)
