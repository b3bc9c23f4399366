"""GPUs that are not here, as "auto" would see them, and the interpreter in the place of one."""

import functools

from ssd_addon.kernels import cache, check, choice, dispatch
from ssd_addon.kernels.choice import Gpu

GIB = 2**30
VERSIONS = {"torch": "2.11.0+cu130", "cuda": "13.0", "triton": "3.6.0"}
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 80 * GIB, 1.98e9, 3.35e12, **VERSIONS)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 80 * GIB, 1.41e9, 2.04e12, **VERSIONS)
L4 = Gpu("NVIDIA L4", (8, 9), 58, 24 * GIB, 2.04e9, 0.3e12, **VERSIONS)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 24 * GIB, 2.52e9, 1.008e12, **VERSIONS)
V100 = Gpu("Tesla V100-SXM2-16GB", (7, 0), 80, 16 * GIB, 1.53e9, 0.9e12, **VERSIONS)
FUTURE = Gpu("NVIDIA Something", (13, 1), 200, 64 * GIB, **VERSIONS)
MI300 = Gpu("AMD Instinct MI300X", (9, 4), 304, 192 * GIB, hip="6.4.1", **VERSIONS)


def pretend(monkeypatch, gpu=H100, *, triton_from=64, folder=None):
    """The interpreter's CPU passes for this GPU, whose table says from how many rows on triton is the fastest."""
    monkeypatch.setattr(dispatch, "KINDS", ("cuda", "cpu"))
    monkeypatch.setattr(choice, "gpu_of", lambda device: gpu)
    if folder is not None:
        monkeypatch.setenv("SSD_ADDON_CACHE", str(folder))
        monkeypatch.setattr(cache, "of_device", functools.cache(lambda device: cache.load(gpu)))
    if triton_from is not None:
        auto = {gpu.architecture: {"float32": {"inf": triton_from}, "tf32": {"inf": triton_from}}}
        monkeypatch.setattr(dispatch.table, "table", lambda: {"auto": auto})
    monkeypatch.setattr(check, "_passed", set())
    monkeypatch.setattr(check, "_failed", {})
    monkeypatch.setattr(check, "ROWS", 48)
