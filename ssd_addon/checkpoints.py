"""Alias of `ssd_addon.runs`, under the module's original name."""

from ssd_addon.runs import Opened, build_backbone, build_views, check_card, find, load, read_log

__all__ = ["Opened", "build_backbone", "build_views", "check_card", "find", "load", "read_log"]
