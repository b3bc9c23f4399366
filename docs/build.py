"""Write docs/api.md from the docstrings: `python docs/build.py`. A test holds the page to them."""

import inspect
import re
from importlib import import_module
from pathlib import Path

PAGE = Path(__file__).parent / "api.md"
NAMES = {
    "augment": ("StructuredViews",),
    "operations": ("Operation", "KorniaOperation", "TorchvisionOperation", "seeded"),
    "transform": ("StructuredTransform",),
    "plan": ("ViewPlan",),
    "batch": ("ViewBatch",),
    "collate": ("StructuredCollate", "ImageFiles"),
    "crops": ("NativeCrops", "Cropped"),
    "heads": ("StyleHeads",),
    "projection": ("ProjectionHeads",),
    "encoder": ("Encoder",),
    "embeddings": ("Embeddings",),
    "large_batch": ("two_pass",),
    "losses": (
        "JointEntropyLoss",
        "Terms",
        "Family",
        "SimCLR",
        "VICReg",
        "BarlowTwins",
        "SIGReg",
        "FroSSL",
        "MMCR",
        "DualAscent",
        "FixedWeights",
        "EquivarianceLoss",
        "IndependenceLoss",
    ),
    "recipes": ("recipe", "Recipe", "presets", "overwrites", "Overwrites"),
    "metrics": (
        "embed",
        "r2_matrix",
        "Circular",
        "parameter_matrix",
        "parameter_differences",
        "Probe",
        "ScoreTable",
        "dci",
        "Dci",
        "disentanglement",
        "completeness",
        "sap",
        "mig",
        "effective_rank",
        "uniformity",
        "alignment",
        "space_geometry",
        "redundancy",
        "StyleIndex",
        "OnlineProbes",
        "class_accuracy",
        "exclusivity",
        "parameter_exclusivity",
        "Exclusivity",
        "Dependence",
        "retrieval",
        "RetrievalTable",
        "image_attributes",
        "dominant_hue",
        "saturation",
        "brightness",
        "colorfulness",
        "sharpness",
        "spectral_slope",
    ),
    "auditing": ("audit", "write", "load_weights", "named_backbones"),
    "monitor": ("Monitor",),
    "alarm": ("CollapseAlarm", "CollapseEvent"),
    "lightning": ("StructuredTraining", "StructuredStep"),
    "runs": (
        "load",
        "Opened",
        "build_backbone",
        "build_views",
        "check_card",
        "save_run",
        "restore_run",
        "ResumableSampler",
        "ShardSampler",
        "ResumableLoader",
        "read_log",
        "cut_log",
    ),
    "report": ("write", "read", "Data", "measure", "Findings", "verdict"),
    "plots": ("matrix", "matrix_figure", "curves", "views_strip"),
    "kernels": ("negative_lse", "off_diagonal_energy"),
}
"""Module -> public names, in the order of the data flow."""


def signature(name: str, thing: object) -> str:
    """`name(arguments)`, one argument a line where the line gets long; types by their last name."""
    sig = inspect.signature(thing)  # type: ignore[arg-type]
    arguments, starred = [], False
    for p in sig.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not starred:
            starred = True
            arguments.append("*")
        arguments.append(_short(str(p)))
    known = sig.return_annotation not in (sig.empty, None)
    result = f" -> {_short(inspect.formatannotation(sig.return_annotation))}" if known else ""
    line = f"{name}({', '.join(arguments)}){result}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {x},\n" for x in arguments) + f"){result}"


def _short(annotation: str) -> str:
    """The last names of types; a shape as [B, C, H, W]."""

    def shape(found: re.Match[str]) -> str:
        sizes = ", ".join("..." if size.startswith("*") else size for size in found[1].split())
        return f"Tensor[{sizes}]" if sizes else "Tensor"

    annotation = re.sub(r"(?:\w+\.)*Annotated\[(?:\w+\.)*Tensor, '([^']*)'\]", shape, annotation)
    return re.sub(r"'([A-Z]\w*)'", r"\1", re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", annotation))


def methods(thing: object) -> list[tuple[str, object]]:
    """Public methods with a docstring of their own."""
    if not inspect.isclass(thing):
        return []
    found = [(n, m.__func__ if isinstance(m, classmethod | staticmethod) else m) for n, m in vars(thing).items()]
    return [(n, m) for n, m in found if not n.startswith("_") and inspect.isfunction(m) and m.__doc__]


def page() -> str:
    out = [
        "# API\n\n",
        "Written by `python docs/build.py` from the docstrings; every name in the order of the data flow.\n",
    ]
    for module, names in NAMES.items():
        home = import_module(f"ssd_addon.{module}")
        out.append(f"\n## ssd_addon.{module}\n\n{(home.__doc__ or '').strip().splitlines()[0]}\n")
        for name in names:
            thing = getattr(home, name)
            out.append(f"\n### {name}\n\n```python\n{signature(name, thing)}\n```\n")
            out.append(f"\n```text\n{inspect.getdoc(thing)}\n```\n")
            for method, function in methods(thing):
                out.append(f"\n```python\n{signature('.' + method, function)}\n```\n")
                out.append(f"\n```text\n{inspect.getdoc(function)}\n```\n")
    return "".join(out)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
