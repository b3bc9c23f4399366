"""Losses: joint entropy over content and style spaces, its families, adaptive weights, equivariance, independence.

    criterion = JointEntropyLoss("simclr", weights=DualAscent(spaces, tolerance=0.1, step_size=0.01))
    terms = criterion.terms(z)                            the loss and its terms
    criterion.weights.step(terms)                         after the optimizer's step
    Family("mine", alignment=..., entropy=...)            a custom objective

Needs torch alone.
"""

from ssd_addon._checks import Diverged
from ssd_addon.losses.ascent import DualAscent
from ssd_addon.losses.barlow import BarlowTwins
from ssd_addon.losses.equivariance import EquivarianceLoss
from ssd_addon.losses.families import FAMILIES, FamilyName, resolve_family
from ssd_addon.losses.independence import IndependenceLoss
from ssd_addon.losses.joint import JointEntropyLoss
from ssd_addon.losses.objective import Family, Objective
from ssd_addon.losses.simclr import SimCLR
from ssd_addon.losses.spread import MMCR, FroSSL, SIGReg
from ssd_addon.losses.terms import Terms
from ssd_addon.losses.vicreg import VICReg
from ssd_addon.losses.weights import FixedWeights, Weights

__all__ = [
    "FAMILIES",
    "MMCR",
    "BarlowTwins",
    "Diverged",
    "DualAscent",
    "EquivarianceLoss",
    "Family",
    "FamilyName",
    "FixedWeights",
    "FroSSL",
    "IndependenceLoss",
    "JointEntropyLoss",
    "Objective",
    "SIGReg",
    "SimCLR",
    "Terms",
    "VICReg",
    "Weights",
    "resolve_family",
]
