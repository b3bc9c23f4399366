"""`StructuredViews` turns images into structured views by drawing and applying operations."""

from ssd_addon._optional import needs

with needs("ssd_addon.augment"):
    from ssd_addon.augment.views import StructuredViews
    from ssd_addon.operations import KorniaOperation, Operation

__all__ = ["KorniaOperation", "Operation", "StructuredViews"]
