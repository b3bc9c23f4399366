"""Operations: what a group of augmentations is made of, and how each is drawn, applied and tried.

Operation             the two functions that make one: draw, apply
KorniaOperation       Kornia's 2-D operations, wrapped by themselves when views are built
TorchvisionOperation  the same of torchvision.transforms.v2
seeded                anything else that draws its own random numbers, shared by seed
"""

from ssd_addon._optional import needs

with needs("ssd_addon.operations"):
    from ssd_addon.operations.seeded import SeededOperation, seeded
    from ssd_addon.operations.torchvision import TorchvisionOperation
    from ssd_addon.operations.wrap import KorniaOperation, Operation

__all__ = ["KorniaOperation", "Operation", "SeededOperation", "TorchvisionOperation", "seeded"]
