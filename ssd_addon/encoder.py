"""One space of a model as a plain module: images in, one tensor out."""

from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon._types import as_weights
from ssd_addon.pooling import Pooling

FEATURES = "backbone"
"""The name under which the pooled features are listed along with the spaces."""


def keep_still(backbone: nn.Module) -> None:
    """Put a frozen backbone back into evaluation mode: another module that shares its parts may have set theirs."""
    if any(part.training for part in backbone.modules()):
        backbone.eval()


class Encoder(nn.Module):
    """Backbone, pooling and the head of one space: images [B, C, H, W] -> [B, d]; `StyleHeads.encoder` builds it.

    The backbone of a model that was frozen stays in evaluation mode here too.
    """

    def __init__(
        self, backbone: nn.Module, pooling: Pooling, head: nn.Module, sample_ndim: int, frozen: bool = False
    ) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.pooling, self.sample_ndim, self.frozen = pooling, sample_ndim, frozen

    def train(self, mode: bool = True) -> "Encoder":
        """Set training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self._is_frozen():
            self.backbone.eval()
        return self

    def _is_frozen(self) -> bool:
        """Whether the model was frozen and still is."""
        return self.frozen and not any(p.requires_grad for p in self.backbone.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, ...] to embeddings [B, d]."""
        if x.ndim != self.sample_ndim + 1:
            raise ValueError(
                f"x: expected a batch with {self.sample_ndim + 1} dimensions [B, ...]: got {_checks.shape(x)}"
            )
        if self._is_frozen():
            keep_still(self.backbone)
        features = self.pooling(self.backbone(as_weights(x, self.backbone)), x.shape[0])
        out: Tensor = self.head(as_weights(features, self.head))
        return out
