"""What each space encodes: plain functions on tensors, from any source of embeddings.

    z = embed(model, images)                        name -> [n, d], the backbone too
    r2_matrix(z, factors)                           spaces x factors, where factors are known                 labelled
    parameter_matrix(model, views, images)          spaces x groups of augmentations, without labels          label_free
    exclusivity(z, factors, own)                    tests for leaks of factors into other spaces             exclusivity
    class_accuracy(z, labels)                       accuracy of a linear probe and of k-NN                    classify
    dci, mig, sap                                   summaries of a matrix in one number                       summary
    effective_rank, uniformity, alignment           geometry of a space; redundancy between spaces            geometry
    StyleIndex(z).search(7, {"color": 1})           nearest neighbors by any weighting of the spaces          index
    retrieval(z, attributes)                        how similar the nearest neighbors in each space are       retrieval
    image_attributes(images)                        hue, sharpness and others, computed from pixels           attributes
    OnlineProbes(widths, classes)                   linear probes that are trained along with the model       online

Every matrix is a `ScoreTable`: `table["color", "hue"]` is a number, or NaN if there is no score, with the reason in
`.notes`. Tables print, and `.to_json()` makes them serializable. `probe=` takes a name or a `Probe` with your settings.
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
