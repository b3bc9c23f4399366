"""Self-supervised disentanglement as an add-on: a content space, and a style space for each group of augmentations.

views = StructuredViews({"color": [...], "spatial": [...]})          images -> structured views      augment
StructuredTransform({"color": [...]})                                the same in data-loader workers  transform
NativeCrops(views)                                                   crops at full resolution, in workers  crops
batch = views(images)                                                ViewBatch [V, B, C, H, W]       batch
model = StyleHeads(backbone, {"content": 256, "color": 64, ...})     backbone -> one space a group   heads
z = model(batch)                                                     Embeddings name -> [V, B, d]    embeddings
loss = JointEntropyLoss("simclr")(z)                                 invariance and joint entropy    losses
recipe("color_spatial")                                              settings for all of these       recipes
metrics.parameter_matrix(model, views, images)                       what each space encodes         metrics
Monitor("log.jsonl", views=views, images=images)                     the same, while it trains       monitor
runs.load("runs/mine")                                               a trained model again           runs
python -m ssd_addon report RUN --data DIR --out report.html          a page that shows it            report
python -m ssd_addon audit MODEL --data DIR --out audit.html          what any backbone keeps         auditing
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssd_addon import auditing as auditing
    from ssd_addon import augment as augment
    from ssd_addon import checkpoints as checkpoints
    from ssd_addon import collate as collate
    from ssd_addon import heads as heads
    from ssd_addon import kernels as kernels
    from ssd_addon import lightning as lightning
    from ssd_addon import losses as losses
    from ssd_addon import metrics as metrics
    from ssd_addon import monitor as monitor
    from ssd_addon import operations as operations
    from ssd_addon import plots as plots
    from ssd_addon import recipes as recipes
    from ssd_addon import report as report
    from ssd_addon import runs as runs
    from ssd_addon.alarm import CollapseAlarm as CollapseAlarm
    from ssd_addon.alarm import CollapseWarning as CollapseWarning
    from ssd_addon.auditing.measure import audit as audit
    from ssd_addon.augment import StructuredViews as StructuredViews
    from ssd_addon.batch import ViewBatch as ViewBatch
    from ssd_addon.collate import StructuredCollate as StructuredCollate
    from ssd_addon.crops import NativeCrops as NativeCrops
    from ssd_addon.embeddings import Embeddings as Embeddings
    from ssd_addon.heads import StyleHeads as StyleHeads
    from ssd_addon.large_batch import two_pass as two_pass
    from ssd_addon.losses import DualAscent as DualAscent
    from ssd_addon.losses import EquivarianceLoss as EquivarianceLoss
    from ssd_addon.losses import IndependenceLoss as IndependenceLoss
    from ssd_addon.losses import JointEntropyLoss as JointEntropyLoss
    from ssd_addon.monitor import Monitor as Monitor
    from ssd_addon.plan import ViewPlan as ViewPlan
    from ssd_addon.recipes import Recipe as Recipe
    from ssd_addon.recipes import presets as presets
    from ssd_addon.recipes import recipe as recipe
    from ssd_addon.transform import StructuredTransform as StructuredTransform

__version__ = "0.2.0"

_HOME = {
    "audit": "auditing.measure",
    "CollapseAlarm": "alarm",
    "CollapseWarning": "alarm",
    "StructuredViews": "augment",
    "StructuredTransform": "transform",
    "presets": "recipes",
    "recipe": "recipes",
    "Recipe": "recipes",
    "ViewPlan": "plan",
    "ViewBatch": "batch",
    "Embeddings": "embeddings",
    "StructuredCollate": "collate",
    "NativeCrops": "crops",
    "StyleHeads": "heads",
    "JointEntropyLoss": "losses",
    "DualAscent": "losses",
    "EquivarianceLoss": "losses",
    "IndependenceLoss": "losses",
    "Monitor": "monitor",
    "two_pass": "large_batch",
}
_MODULES = (
    "auditing",
    "augment",
    "checkpoints",
    "collate",
    "heads",
    "kernels",
    "lightning",
    "losses",
    "metrics",
    "monitor",
    "operations",
    "plots",
    "recipes",
    "report",
    "runs",
)
__all__ = [
    "CollapseAlarm",
    "CollapseWarning",
    "DualAscent",
    "Embeddings",
    "EquivarianceLoss",
    "IndependenceLoss",
    "JointEntropyLoss",
    "Monitor",
    "NativeCrops",
    "Recipe",
    "StructuredCollate",
    "StructuredTransform",
    "StructuredViews",
    "StyleHeads",
    "ViewBatch",
    "ViewPlan",
    "__version__",
    "audit",
    "auditing",
    "augment",
    "checkpoints",
    "collate",
    "heads",
    "kernels",
    "lightning",
    "losses",
    "metrics",
    "monitor",
    "operations",
    "plots",
    "presets",
    "recipe",
    "recipes",
    "report",
    "runs",
    "two_pass",
]

if not TYPE_CHECKING:  # otherwise a type checker would accept any name

    def __getattr__(name: str) -> Any:
        """Import names on first access, so that the loss needs torch alone (PEP 562)."""
        if name in _HOME or name in _MODULES:
            with import_module("ssd_addon._optional").needs(f"ssd_addon.{name}"):
                module = import_module(f"ssd_addon.{_HOME.get(name, name)}")
            return getattr(module, name) if name in _HOME else module
        raise AttributeError(f"module 'ssd_addon' has no attribute {name!r}: it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
