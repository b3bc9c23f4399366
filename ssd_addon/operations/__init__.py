"""The operations in a group of augmentations: how they are drawn, applied and checked.

Operation             the protocol: two functions, draw and apply
KorniaOperation       wraps Kornia's 2-D operations; views do this automatically
TorchvisionOperation  wraps transforms of torchvision.transforms.v2, likewise automatically
seeded                wraps any other function that draws its own random numbers: views share its seed
"""

from ssd_addon._optional import needs

with needs("ssd_addon.operations"):
    from ssd_addon.operations.seeded import SeededOperation, seeded
    from ssd_addon.operations.torchvision import TorchvisionOperation
    from ssd_addon.operations.wrap import KorniaOperation, Operation

__all__ = ["KorniaOperation", "Operation", "SeededOperation", "TorchvisionOperation", "seeded"]
