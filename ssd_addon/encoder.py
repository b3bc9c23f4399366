"""One space of a model as a plain module: images in, one tensor out."""

from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon._types import as_weights
from ssd_addon.pooling import Pooling

FEATURES = "backbone"
"""The name under which the pooled features are listed along with the spaces."""


class Encoder(nn.Module):
    """Backbone, pooling and the head of one space: images [B, C, H, W] -> [B, d]; `StyleHeads.encoder` builds it."""

    def __init__(self, backbone: nn.Module, pooling: Pooling, head: nn.Module, sample_ndim: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.pooling, self.sample_ndim = pooling, sample_ndim

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, ...] to embeddings [B, d]."""
        if x.ndim != self.sample_ndim + 1:
            raise ValueError(
                f"x: expected a batch with {self.sample_ndim + 1} dimensions [B, ...]: got {_checks.shape(x)}"
            )
        features = self.pooling(self.backbone(as_weights(x, self.backbone)), x.shape[0])
        out: Tensor = self.head(features)
        return out
