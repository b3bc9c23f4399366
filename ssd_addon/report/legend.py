"""How to read the numbers of a matrix: a short list that stands beside the first one."""

from ssd_addon.metrics import Exclusivity
from ssd_addon.report.readings import ENCODES, TRACE

SCALE = (
    "<b>R²</b> is the share of the variance that a probe predicts on images it was not fitted on. 1 is perfect, 0 is "
    "no better than always predicting the mean, and a negative score is worse than that: read it as 0."
)
INTERVAL = (
    "<b>Small numbers</b> are the 95 % interval over the held-out images. They do not say how much another training "
    "seed would change."
)
PROBES = (
    "<b>A linear probe</b> finds what a linear layer could use; <b>a kernel probe</b> finds nonlinear codes too, so it "
    "is the stricter one for what should not be there."
)


def legend(*, spaces: bool, backbone: bool, tests: Exclusivity | None) -> str:
    """The list as HTML.

    Args:
        spaces: the model has spaces; otherwise the rows are features.
        backbone: the matrix has a row for the backbone beside the spaces.
        tests: of what leaks, where they were made.
    """
    thing = "A space is" if spaces else "Features are"
    said = [
        SCALE,
        f"{thing} said to <b>encode</b> something from R² = {ENCODES} on, to encode it weakly from {TRACE} on, and not "
        "to encode it below that.",
        INTERVAL,
        PROBES,
    ]
    if backbone and spaces:
        said.append(
            "<b>backbone</b> is the score of the features that all spaces are made from. It is a reference point and "
            "not a bound: a space can make a parameter easier to decode."
        )
    if tests is not None:
        said.append(
            f"<b>A leak</b> is a dependence on what is not the space's own, given its own: a test rejects "
            f"independence (p of {tests.level:g} or less, corrected for the number of tests by Holm's method), and "
            f"partial R² is at least {tests.smallest:g}."
        )
    return f'<ul class="how">{"".join(f"<li>{text}</li>" for text in said)}</ul>'
