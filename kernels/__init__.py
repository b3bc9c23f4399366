"""Batch-wide operations of the losses: log-sum-exp of similarities, and off-diagonal energy of covariances.

    negative_lse          log-sum-exp over the other images' embeddings, one value each  (SimCLR family)
    off_diagonal_energy   squared off-diagonal entries of X^T Y                          (VICReg, Barlow Twins families)

Backends: "eager" is the readable reference, "streaming" needs O(N D) memory on any device, "triton" runs fused kernels
on CUDA. Importing this package needs torch alone.
"""

if __name__ != "ssd_addon.kernels":
    raise ImportError(f"kernels: expected to be imported as ssd_addon.kernels: got {__name__!r}; install ssd-addon")

from ssd_addon.kernels.covariance import off_diagonal_energy
from ssd_addon.kernels.dispatch import BACKENDS, Backend, choose_backend
from ssd_addon.kernels.similarity import negative_lse

__all__ = ["BACKENDS", "Backend", "choose_backend", "negative_lse", "off_diagonal_energy"]
