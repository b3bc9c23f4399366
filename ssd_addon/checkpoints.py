"""Opening what a run has left: the public names of `ssd_addon.runs` under their first name."""

from ssd_addon.runs import Opened, build_backbone, build_views, check_card, find, load, read_log

__all__ = ["Opened", "build_backbone", "build_views", "check_card", "find", "load", "read_log"]
