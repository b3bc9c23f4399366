"""Self-supervised disentanglement as an add-on: content and style in spaces of their own.

views = StructuredViews({"color": [...], "spatial": [...]})          images -> structured views      augment
batch = views(images)                                                ViewBatch [V, B, C, H, W]       batch, collate
model = StyleHeads(backbone, {"content": 256, "color": 64, ...})     backbone -> one space a group   heads
z = model(batch)                                                     Embeddings name -> [V, B, d]    batch
loss = JointEntropyLoss("simclr")(z)                                 invariance and joint entropy    losses
recipe("color_spatial")                                              settings for all of these       recipes
metrics.parameter_matrix(model, views, images)                       what each space knows           metrics
Monitor("log.jsonl", views=views, images=images)                     the same, while it trains       monitor
python -m ssd_addon report RUN --data DIR --out report.html          a page that shows it            report
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "StructuredViews": "augment",
    "presets": "recipes",
    "recipe": "recipes",
    "Recipe": "recipes",
    "ViewPlan": "batch",
    "ViewBatch": "batch",
    "Embeddings": "batch",
    "StructuredCollate": "collate",
    "StyleHeads": "heads",
    "JointEntropyLoss": "losses",
    "DualAscent": "ascent",
    "EquivarianceLoss": "equivariance",
    "Monitor": "monitor",
}
_MODULES = (
    "augment",
    "batch",
    "checkpoints",
    "collate",
    "heads",
    "kernels",
    "losses",
    "metrics",
    "monitor",
    "plots",
    "recipes",
    "report",
)
__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    """Names are resolved when asked for, so that the loss needs torch alone (PEP 562)."""
    if name in _HOME:
        return getattr(import_module(f"ssd_addon.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"ssd_addon.{name}")
    raise AttributeError(f"module 'ssd_addon' has no attribute {name!r}: it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
