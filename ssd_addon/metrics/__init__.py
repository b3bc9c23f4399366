"""What each space encodes: plain functions on tensors, from any source of embeddings.

    z = embed(model, images)                        name -> [n, d], the backbone too
    r2_matrix(z, factors)                           spaces x factors, where factors are known                 labelled
    parameter_matrix(model, views, images)          spaces x groups of augmentations, without labels          label_free
    exclusivity(z, factors, own)                    tests of what a space holds beside its own factors       exclusivity
    class_accuracy(z, labels)                       accuracy of a linear probe and of k-NN                    classify
    dci, mig, sap                                   one number for a matrix                                   summary
    effective_rank, uniformity, alignment           how a space lies; redundancy between spaces               geometry
    StyleIndex(z).search(7, {"color": 1})           neighbors by any weighting of the spaces                  index
    retrieval(z, attributes)                        how alike the nearest neighbors by each space are         retrieval
    image_attributes(images)                        hue, sharpness and others, measured on the pixels         attributes
    OnlineProbes(widths, classes)                   linear probes that are trained beside the model           online

Every matrix is a `ScoreTable`: `table["color", "hue"]` is a number, NaN where there is none to give, with the reason in
`.notes`; it prints, and `.to_json()` keeps it. `probe=` takes a name or a `Probe` with settings of your own.
"""

from ssd_addon.differences import parameter_differences
from ssd_addon.metrics.attributes import (
    brightness,
    colorfulness,
    dominant_hue,
    image_attributes,
    saturation,
    sharpness,
    spectral_slope,
)
from ssd_addon.metrics.classify import class_accuracy
from ssd_addon.metrics.embed import embed
from ssd_addon.metrics.exclusivity import exclusivity
from ssd_addon.metrics.geometry import alignment, effective_rank, redundancy, space_geometry, uniformity
from ssd_addon.metrics.index import StyleIndex
from ssd_addon.metrics.label_free import parameter_exclusivity, parameter_matrix
from ssd_addon.metrics.labelled import Circular, Factor, r2_matrix
from ssd_addon.metrics.leaks import Dependence, Exclusivity
from ssd_addon.metrics.online import OnlineProbes
from ssd_addon.metrics.probe import Probe
from ssd_addon.metrics.retrieval import RetrievalTable, retrieval
from ssd_addon.metrics.summary import Dci, completeness, dci, disentanglement, mig, sap
from ssd_addon.metrics.table import ScoreTable

__all__ = [
    "Circular",
    "Dci",
    "Dependence",
    "Exclusivity",
    "Factor",
    "OnlineProbes",
    "Probe",
    "RetrievalTable",
    "ScoreTable",
    "StyleIndex",
    "alignment",
    "brightness",
    "class_accuracy",
    "colorfulness",
    "completeness",
    "dci",
    "disentanglement",
    "dominant_hue",
    "effective_rank",
    "embed",
    "exclusivity",
    "image_attributes",
    "mig",
    "parameter_differences",
    "parameter_exclusivity",
    "parameter_matrix",
    "r2_matrix",
    "redundancy",
    "retrieval",
    "sap",
    "saturation",
    "sharpness",
    "space_geometry",
    "spectral_slope",
    "uniformity",
]
