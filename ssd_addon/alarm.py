"""A training run says that a space collapses: which space, which number, and what to change.

    alarm = CollapseAlarm(total_steps=20_000, widths=model.spaces)
    log.write(alarm.watch({"step": step, **terms.scalars()}))      every ten steps or so: warns, and adds "alarm"

`Monitor` does this by itself, in plain loops and under Lightning. No number is a verdict alone: a rank of 2 may hold
all classes or nothing, and it dips in the first steps of runs that end well. So an event needs two numbers together
(pairs that agree *and* one direction), for a whole window of steps, and a space that was reported is reported again
only after it has recovered.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ssd_addon import _checks
from ssd_addon._collapse import BY_SPACE, RULES, WHOLE, About, Line, Rule, mostly, number

WINDOW, SHARE_OF_RUN = 300, 1 / 50
"""Steps for which a number must stay bad: at least so many, and at least this share of the run."""
WARMUP = 0.05
"""Share of the run in which nothing is said but that terms are not finite."""
LATE, WINDOWS_UNTIL_LATE = 0.5, 5
"""From when on pairs are expected to agree: half of the run, or five windows where its length is not known."""
OF_OTHER_STAGES = ("val", "test", "eval", "sanity")
"""How names begin that are not of training."""
LINES, KEPT = 5, 60
"""Lines that a window needs at least, and about how many of a window are kept."""


class CollapseWarning(UserWarning):
    """A space collapses or has recovered."""


@dataclass(frozen=True)
class CollapseEvent:
    """A report of the alarm.

    Attributes:
        step: step of the line that completed the window.
        space: name of the space; "content/color" for two that repeat each other, "loss" for the loss as a whole.
        kind: "not finite", "one embedding", "one direction", "pairs apart", "weight" or "repeats".
        text: one sentence.
        over: True if the space has recovered.
    """

    step: int
    space: str
    kind: str
    text: str
    over: bool = False

    def to_json(self) -> dict[str, Any]:
        """As it stands in the log, under "alarm"."""
        return asdict(self)


class CollapseAlarm:
    """Reads the lines of a training log and reports which space collapses, by which number, and what to change.

    >>> alarm, said = CollapseAlarm(), []
    >>> for step in range(0, 1000, 20):
    ...     line = {"step": step, "constraint/color": 0.01, "effective_rank/color": 1.1 if step > 200 else 6.0}
    ...     said += alarm(line)
    >>> [(event.step, event.space, event.kind) for event in said]
    [(500, 'color', 'one direction')]

    Lines hold the names of `Terms.scalars` ("constraint/content", "effective_rank/content", "agreement/content",
    "spread/content", "overlap/content/color") and, where weights adapt, "lambda/content"; of any family. What a line
    does not have is not judged. Names may have one prefix, such as "train/", and numbers may be of NumPy or tensors.

    Args:
        total_steps: length of the run, if known. Windows are then at least 2 % of it, nothing is reported in the first
            5 %, and pairs are expected to agree from the middle of the run on (otherwise after five windows).
        widths: space -> dimensions (`StyleHeads.spaces`). A low rank is not reported for spaces of one or two.
        window: steps for which a number must stay bad; None: 300, or 2 % of the run where that is more.
        spaces: names of the spaces to watch; None: all. Leave out a style whose group changes one number only, as one
            direction is enough for it.

    Attributes:
        active: (kind, space) -> event, for every report from which the space has not recovered.

    If a line's step is not larger than the previous one, the run was resumed from an earlier step, and the later lines
    are forgotten. The state (`state_dict`) is JSON.

    Raises:
        ValueError: counts below 1. TypeError: counts that are no whole numbers, spaces in one string.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        widths: Mapping[str, int] | None = None,
        *,
        window: int | None = None,
        spaces: Iterable[str] | None = None,
    ) -> None:
        self.total_steps = None if total_steps is None else _checks.width(total_steps, "total_steps")
        self._window = None if window is None else _checks.width(window, "window")
        if isinstance(spaces, str):
            raise TypeError(f"spaces: expected several names, such as [{spaces!r}]: got {spaces!r}")
        self.spaces = None if spaces is None else frozenset(spaces)
        self.widths = dict(widths or {})
        self.active: dict[tuple[str, str], CollapseEvent] = {}
        self._lines: list[dict[str, Any]] = []
        self._first: dict[str, float] = {}  # the weights as they began

    @property
    def window(self) -> int:
        """Steps for which a number must stay bad."""
        return self._window or max(WINDOW, math.ceil((self.total_steps or 0) * SHARE_OF_RUN))

    def __call__(self, record: Mapping[str, Any]) -> list[CollapseEvent]:
        """The events that this line completes; nearly always none.

        Args:
            record: name -> number, with "step"; None, as in a log, is a number that is not finite. A record without
                a step or without terms ("constraint/...") is ignored.
        """
        line = self._read(record)
        if line is None or not self._take(line):
            return []
        said = []
        for space in self._subjects(line):
            for rule in RULES:
                if event := self._judged(rule, space, line):
                    said.append(event)
                if (rule.kind, space) in self.active:
                    break  # one report for each space at a time
        return said

    def watch(self, record: Mapping[str, Any], *, stacklevel: int = 2) -> dict[str, Any]:
        """The record with its events under "alarm"; emits a `CollapseWarning` for each.

        Args:
            record: name -> number, with "step".
            stacklevel: as in `warnings.warn`.
        """
        events = self(record)
        for event in events:
            warnings.warn(f"step {event.step}: {event.text}", CollapseWarning, stacklevel=stacklevel)
        return {**record, "alarm": [event.to_json() for event in events]} if events else dict(record)

    # ------------------------------------------------------------------------------------------------ lines

    def _read(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """The numbers that are judged; None where the record is no line of terms."""
        step = number("step", record.get("step"))
        if step is None:
            return None
        line: dict[str, Any] = {"step": int(step)}
        prefix = _prefix(record)
        for full, value in record.items():
            if not full.startswith(prefix):
                continue
            name = full.removeprefix(prefix)
            kind, _, space = name.partition("/")
            watched = self.spaces is None or set(space.split("/")) <= self.spaces
            if (space and kind in BY_SPACE and watched) or name in WHOLE:
                line[name] = number(full, value)
        return line if any(name.startswith("constraint/") for name in line) else None

    def _take(self, line: dict[str, Any]) -> bool:
        """Keep a line, unless it comes too soon after the one before it to add anything."""
        step = line["step"]
        if self._lines and step <= self._lines[-1]["step"]:
            self._lines = [kept for kept in self._lines if kept["step"] < step]
            self.active = {k: event for k, event in self.active.items() if event.step < step}
            if not self._lines:
                self._first = {}
        for name, value in line.items():
            if name.startswith("lambda/") and value is not None:
                self._first.setdefault(name, value)
        soon = self._lines and step - self._lines[-1]["step"] < self.window / KEPT
        if soon and None not in line.values() and None not in self._lines[-1].values():
            return False
        horizon = step - (WINDOWS_UNTIL_LATE + 1) * self.window
        while len(self._lines) > LINES * WINDOWS_UNTIL_LATE and self._lines[1]["step"] < horizon:
            del self._lines[0]
        self._lines.append(line)
        return True

    def _subjects(self, line: Line) -> list[str]:
        """ "loss", the spaces, and pairs of spaces."""
        found = [name.partition("/")[2] for name in line if name.startswith(("constraint/", "overlap/"))]
        return ["loss", *dict.fromkeys(found)]

    # ------------------------------------------------------------------------------------------------ rules

    def _judged(self, rule: Rule, space: str, line: Line) -> CollapseEvent | None:
        key, step = (rule.kind, space), int(line["step"] or 0)
        if rule.kind == "one direction" and self.widths.get(space, 3) < 3:
            return None
        if not (rule.good if key in self.active else rule.bad)(line, space):
            return None
        if key in self.active:
            lines = self._last(max(self.window // 3, 1), LINES - 2)
            if not lines or not mostly(lines, lambda one: rule.good(one, space)):
                return None
            began = self.active.pop(key)
            text = f"{space}: recovered, {rule.now(self._about(lines, space))} (reported at step {began.step})"
            return CollapseEvent(step, space, rule.kind, text, over=True)
        lines = self._bad_for(rule, step)
        if not lines or not mostly(lines, lambda one: rule.bad(one, space)):
            return None
        about = self._about(lines, space)
        if rule.window is not None and not rule.window(about):
            return None
        self.active[key] = CollapseEvent(step, space, rule.kind, f"{space}: {rule.says(about)}")
        return self.active[key]

    def _about(self, lines: Sequence[Line], space: str) -> About:
        return About(lines, space, self.widths.get(space), self._first.get(f"lambda/{space}", 0.0))

    def _bad_for(self, rule: Rule, step: int) -> list[dict[str, Any]]:
        """The lines that have to be bad; [] as long as there are too few."""
        if rule.kind == "not finite":
            return self._lines[-2:] if len(self._lines) > 1 else []
        if not rule.late:
            return self._last(self.window, LINES)
        if self.total_steps is None:
            return self._last(WINDOWS_UNTIL_LATE * self.window, LINES)
        return self._last(self.window, LINES) if step >= LATE * self.total_steps else []

    def _last(self, steps: int, least: int) -> list[dict[str, Any]]:
        """The lines of the last so many steps, and not fewer than `least`; [] where they do not reach back so far."""
        begin = WARMUP * (self.total_steps or 0)
        lines = [kept for kept in self._lines if kept["step"] >= begin]
        if not lines or lines[-1]["step"] - lines[0]["step"] < steps or len(lines) < least:
            return []
        last = [kept for kept in lines if kept["step"] >= lines[-1]["step"] - steps]
        return last if len(last) >= least else lines[-least:]

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The lines, first weights and active events, as JSON types."""
        return {
            "lines": [dict(line) for line in self._lines],
            "first": dict(self._first),
            "active": [event.to_json() for event in self.active.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: the state does not belong to a `CollapseAlarm`.
        """
        if missing := [k for k in ("lines", "first", "active") if k not in state]:
            raise ValueError(f"CollapseAlarm: expected a state with lines, first and active: got none of {missing}")
        self._lines = [dict(line) for line in state["lines"]]
        self._first = dict(state["first"])
        events = [CollapseEvent(**event) for event in state["active"]]
        self.active = {(event.kind, event.space): event for event in events}

    def told(self, total_steps: float, widths: Mapping[str, int]) -> None:
        """Set the length of the run (infinite or negative: unknown) and the widths, unless they were given before."""
        if self.total_steps is None and 0 < total_steps < math.inf:
            self.total_steps = int(total_steps)
        self.widths = {**widths, **self.widths}

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Read the log of a run that is being resumed; its events were reported then."""
        for record in records:
            self(record)


def _prefix(record: Mapping[str, Any]) -> str:
    """What stands before the names of terms, such as "train/"; "" where some stand alone, or where it is not clear."""
    found = {name.partition("constraint/")[0] for name in record if "constraint/" in name}
    found = {p for p in found if not p.startswith(OF_OTHER_STAGES)}
    return found.pop() if len(found) == 1 else ""
