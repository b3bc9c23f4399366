"""The rules of `CollapseAlarm`: which numbers together are bad, and the sentence that says so."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 0.9
"""Share of a window's lines that have to be bad, or good again."""
FEW, ENOUGH = 1.5, 1.7
"""Effective ranks: one direction below the first, recovered above the second."""
AGREE, AGREE_AGAIN = 0.2, 0.1
"""Agreement from which pairs agree; a reported collapse ends below the second, as pairs come apart."""
ALIGNED, ALIGNED_AGAIN = 0.15, 0.3
"""The same by the misalignment, for logs without the agreement."""
EQUAL, DIFFERENT = 0.003, 0.01
"""Spread of a space in which all images have one embedding, and of one that has recovered."""
APART, TOGETHER = 0.1, 0.15
"""Agreement below which pairs are as far apart as different images, and from which they no longer are."""
REPEATS, DIFFERS = 0.9, 0.8
"""Overlap of two spaces, of which one repeats the other, and of two that no longer do."""
GROWN, STILL_GROWS, FALLS = 10.0, 1.02, 0.95
"""A weight that runs away: so many times its first value, still growing by this factor in the last third of a window,
from whose first third to its last the misalignment did not fall by this factor."""

Line = Mapping[str, float | None]


@dataclass(frozen=True)
class About:
    """What a sentence may say beside a window's lines.

    Attributes:
        lines: of the window.
        space: its name; "content/color" for two, "loss" for the whole.
        width: its dimensions, where they are known.
        first: its weight as it began, where weights adapt.
    """

    lines: Sequence[Line]
    space: str
    width: int | None = None
    first: float = 0.0

    def median(self, name: str) -> str:
        """Of a number of the space over the lines, three digits."""
        return f"{median(values(self.lines, f'{name}/{self.space}')):.3g}"

    @property
    def steps(self) -> str:
        return f"for {int((self.lines[-1]['step'] or 0) - (self.lines[0]['step'] or 0))} steps"


@dataclass(frozen=True)
class Rule:
    """A kind of event.

    Attributes:
        kind: its name.
        bad: whether a line shows it.
        good: whether a line shows that it is over.
        says: the sentence.
        now: what is said when it is over.
        window: a further test on the whole window, or None.
        late: whether it counts only late in a run.
    """

    kind: str
    bad: Callable[[Line, str], bool]
    good: Callable[[Line, str], bool]
    says: Callable[[About], str]
    now: Callable[[About], str]
    window: Callable[[About], bool] | None = None
    late: bool = False


WHOLE = ("loss", "entropy", "content_entropy", "equivariance")
BY_SPACE = ("constraint", "invariance", "effective_rank", "agreement", "spread", "overlap", "lambda")


def number(name: str, value: Any) -> float | None:
    """A finite number; None for one that is not finite, and for None itself, as in a log.

    Raises:
        TypeError: the value is no number, nor a tensor or an array of one.
    """
    if value is None:
        return None
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a number, or None for one that is not finite: got {value!r}") from error
    return found if math.isfinite(found) else None


def mostly(lines: Sequence[Line], test: Callable[[Line], bool]) -> bool:
    return sum(map(test, lines)) >= MOST * len(lines)


def values(lines: Sequence[Line], name: str) -> list[float]:
    return [value for line in lines if (value := line.get(name)) is not None]


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else math.nan


def _below(line: Line, name: str, space: str, limit: float) -> bool:
    value = line.get(f"{name}/{space}")
    return value is not None and value < limit


def _above(line: Line, name: str, space: str, limit: float) -> bool:
    value = line.get(f"{name}/{space}")
    return value is not None and value >= limit


def _agree(line: Line, space: str, agreement: float, misalignment: float) -> bool:
    """Whether pairs agree: by the agreement, or by the misalignment where a log has no agreement."""
    if f"agreement/{space}" in line:
        return _above(line, "agreement", space, agreement)
    return _below(line, "constraint", space, misalignment)


# ---- what is said


def _one_direction(a: About) -> str:
    line = a.lines[-1]
    ascent, term = f"lambda/{a.space}" in line, "equivariance" in line
    change = ["raise the DualAscent's warmup_steps or tolerance" if ascent else "lower its weight"]
    if term:
        change.append("leave out the equivariance term" if ascent else "lower the weight of the equivariance term")
    if a.space == "content" and "content_entropy" not in line:
        change.append("add content_entropy=True")
    if a.space != "content":
        change.append("leave it as it is if its group changes one number only, for which one direction is enough")
    return (
        f"its pairs agree (misalignment {a.median('constraint')}) but it uses one direction (effective rank "
        f"{a.median('effective_rank')}{f' of {a.width}' if a.width else ''} {a.steps}; healthy: 2 or more): "
        f"{', or '.join(change)}"
    )


def _one_embedding(a: About) -> str:
    return (
        f"all images have nearly the same embedding (spread {a.median('spread')} {a.steps}; healthy: 0.1 or more): "
        "lower its weight or the learning rate, and check that its head gets a gradient and that no normalization "
        "layer has a weight of 0"
    )


def _pairs_apart(a: About) -> str:
    cause = "its key shows the same image" if a.space == "content" else "its group draws something that the key shares"
    return (
        f"its pairs agree no better than different images (agreement {a.median('agreement')} {a.steps}; healthy: 0.3 "
        f"or more), so it has learned nothing: check that {cause}, weaken the other augmentations, or raise its weight"
    )


def _runs_away(a: About) -> bool:
    """Whether a weight has grown, still grows, and gained nothing."""
    weights, apart = values(a.lines, f"lambda/{a.space}"), values(a.lines, f"constraint/{a.space}")
    third = max(len(apart) // 3, 1)
    if not weights or not apart or not 0 < a.first * GROWN <= weights[-1]:
        return False
    if weights[-1] < STILL_GROWS * weights[-third]:
        return False
    return median(apart[-third:]) > FALLS * median(apart[:third])


def _runaway(a: About) -> str:
    return (
        f"its weight grew from {a.first:.3g} to {values(a.lines, f'lambda/{a.space}')[-1]:.3g}, and {a.steps} its "
        f"misalignment ({a.median('constraint')}) has not fallen: raise the DualAscent's tolerance, which is out of "
        "reach, or lower its step_size"
    )


def _repeated(a: About) -> str:
    return (
        f"the two spaces repeat each other (overlap {a.median('overlap')} {a.steps}; healthy: 0.5 or less): check that "
        "their pairs share different groups (plots.views_strip shows it), and that the entropy's coefficients are not "
        "too small"
    )


def _not_finite(a: About) -> str:
    return (
        f"{', '.join(_broken(a.lines[-1], a.space))} not finite at step {int(a.lines[-2]['step'] or 0)} and since: "
        "start again from the last checkpoint with a lower learning rate or gradient clipping (runs.Guard skips such "
        "steps), and compute the loss in 32 bits"
    )


def _broken(line: Line, space: str) -> list[str]:
    """Terms of a space that are not finite."""
    names = WHOLE if space == "loss" else [f"{k}/{space}" for k in BY_SPACE[:3]]
    return [name for name in names if name in line and line[name] is None]


def _now(what: str, name: str) -> Callable[[About], str]:
    return lambda a: f"{what} {a.median(name)}"


RULES = (
    Rule(
        "not finite",
        lambda line, s: bool(_broken(line, s)),
        lambda line, s: not _broken(line, s),
        _not_finite,
        lambda a: "its terms are finite again",
    ),
    Rule(
        "one embedding",
        lambda line, s: _below(line, "spread", s, EQUAL),
        lambda line, s: _above(line, "spread", s, DIFFERENT),
        _one_embedding,
        _now("spread", "spread"),
    ),
    Rule(
        "one direction",
        lambda line, s: _below(line, "effective_rank", s, FEW) and _agree(line, s, AGREE, ALIGNED),
        lambda line, s: _above(line, "effective_rank", s, ENOUGH) or not _agree(line, s, AGREE_AGAIN, ALIGNED_AGAIN),
        _one_direction,
        _now("effective rank", "effective_rank"),
    ),
    Rule(
        "pairs apart",
        lambda line, s: _below(line, "agreement", s, APART),
        lambda line, s: _above(line, "agreement", s, TOGETHER),
        _pairs_apart,
        _now("agreement", "agreement"),
        late=True,
    ),
    Rule(
        "weight",
        lambda line, s: _above(line, "lambda", s, 0.0),
        lambda line, s: False,
        _runaway,
        _now("weight", "lambda"),
        _runs_away,
    ),
    Rule(
        "repeats",
        lambda line, s: _above(line, "overlap", s, REPEATS),
        lambda line, s: _below(line, "overlap", s, DIFFERS),
        _repeated,
        _now("overlap", "overlap"),
    ),
)
