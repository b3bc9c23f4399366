"""Images -> structured views: `StructuredViews`, and the operations that it draws and applies."""

from ssd_addon._optional import needs

with needs("ssd_addon.augment"):
    from ssd_addon.augment.views import StructuredViews
    from ssd_addon.operations import KorniaOperation, Operation

__all__ = ["KorniaOperation", "Operation", "StructuredViews"]
