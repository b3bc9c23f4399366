"""The batch-wide arithmetic of the losses: similarities with their entropy, and covariances with their energy.

    negative_lse          log-sum-exp over the other images' rows, one value per row     (SimCLR family)
    off_diagonal_energy   squared off-diagonal entries of X^T Y                          (VICReg, Barlow Twins families)

Backends: "eager" is the readable truth, "streaming" needs O(N D) memory on any device, "triton" runs fused kernels on
CUDA. Imports torch alone.
"""

if __name__ != "ssd_addon.kernels":
    raise ImportError(f"import this package as ssd_addon.kernels, not as {__name__!r}: install ssd-addon first")

from ssd_addon.kernels.covariance import off_diagonal_energy
from ssd_addon.kernels.dispatch import BACKENDS, Backend, choose_backend
from ssd_addon.kernels.similarity import negative_lse

__all__ = ["BACKENDS", "Backend", "choose_backend", "negative_lse", "off_diagonal_energy"]
