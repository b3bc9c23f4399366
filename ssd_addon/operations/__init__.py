"""Operations: what a group of augmentations is made of, and how each is drawn, applied and tried.

Operation             the two functions that make one: draw, apply
KorniaOperation       Kornia's 2-D operations, wrapped by themselves when views are built
"""

from ssd_addon.operations.wrap import KorniaOperation, Operation

__all__ = ["KorniaOperation", "Operation"]
