"""Measures on this machine the fastest tile shapes, and the number of rows from which the triton backend is faster.

`python -m ssd_addon tune` runs `measure` and saves the record (`cache`), which "auto" then uses; `benchmarks/gpu.py`
uses the same functions. For tiles only the kernel is timed: the launches of a real step are recorded, put into a CUDA
graph and replayed, which excludes the preparation of operands and host time. Backends are compared on whole steps with
their checks, as users run them.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssd_addon.kernels import cache, check, choice, launch, table
from ssd_addon.kernels.choice import NEVER, Gpu
from ssd_addon.kernels.covariance import off_diagonal_energy
from ssd_addon.kernels.dispatch import choose_backend
from ssd_addon.kernels.fast_product import float32_products
from ssd_addon.kernels.similarity import negative_lse
from ssd_addon.kernels.table import Configuration
from ssd_addon.kernels.timing import clocked, recorded, release, replaced, replayed, rows, using

Say = Callable[[str], None]

MODES = (
    "sums", "weights", "sums_maximum", "weights_maximum", "sums_two", "weights_two", "products",
    "sums_two_maximum", "weights_two_maximum",
)  # fmt: skip
"""Kernels and forms, in the order in which they are measured."""
KERNELS = {"sums": ("sums_kernel",), "weights": ("weights_kernel", "resident_kernel"), "products": ("products_kernel",)}
USUAL = [
    Configuration(128, 128, 64, 8, 3, False, 8, 128),
    Configuration(128, 128, 64, 4, 3, False, 8),
    Configuration(64, 128, 64, 4, 4, False, 8),
    Configuration(64, 128, 64, 8, 3, False, 8),
    Configuration(128, 128, 64, 8, 3, True, 8, 128),
]
"""Candidates if the table has none."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        gpu: the device, as named in records.
        rows: N at which tiles are timed.
        widths: D for which tiles and thresholds are determined; the last also applies to all larger widths.
        sizes: N at which backends are compared, ascending.
        small: tiles to try instead of the table's, for the interpreter.
        repeats: smallest and largest number of timings of a measurement.
    """

    gpu: Gpu
    rows: int = 32768
    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    sizes: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    small: tuple[Configuration, ...] = ()
    repeats: tuple[int, int] = (3, 30)


REHEARSAL = Plan(
    Gpu("interpreter", (0, 0), 1, 2**30, torch=torch.__version__, triton=choice.triton_version()),
    rows=40,
    widths=(16, 24),
    sizes=(32, 48),
    small=(Configuration(16, 16, 16, 4, 2, False, 2), Configuration(16, 32, 16, 4, 2, False, 2)),
    repeats=(2, 2),
)
"""The same steps on a CPU in triton's interpreter, at toy sizes; the times are meaningless."""


@dataclass
class Report:
    """All timings, including unsaved ones: `candidates` by mode and width, `backends` by arithmetic, width and N."""

    record: dict[str, Any]
    candidates: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    backends: dict[str, dict[str, float]] = field(default_factory=dict)


def measure(
    device: torch.device, plan: Plan | None = None, *, seconds: float = 60.0, say: Say = lambda _: None
) -> Report:
    """Time the tiles and the backends on a device.

    Args:
        device: a CUDA device that can run the kernels, or a CPU in triton's interpreter with `REHEARSAL`.
        plan: what to measure; None for the plan of `python -m ssd_addon tune`.
        seconds: total time; two thirds are for the tiles. For what does not fit, table and estimate remain in use.
        say: called with progress messages.

    Raises:
        ValueError: the device cannot run the kernels.
        RuntimeError: the kernels fail their check there.
    """
    if why := launch.why_not(device):
        raise ValueError(
            f"tune: expected a device on which the fused kernels run: {why}; backend='auto' uses 'eager' and "
            "'streaming' here, which need no tuning"
        )
    plan = plan or Plan(choice.gpu_of(device))
    begin = time.monotonic()

    def progress(line: str) -> None:
        say(f"[{time.monotonic() - begin:4.0f} s of {seconds:.0f}] {line}")

    progress("self-check: 512 rows against float64")
    with shrunk(plan):
        if problem := check.run(device, plan.widths[0]):
            raise RuntimeError(f"tune: the kernels failed their check on {plan.gpu.name}: {problem}")
        report = Report({"auto": {}, "configurations": {}, "measured": {}})
        best = best_tiles(device, plan, begin + seconds * 2 / 3, progress, report)
        with using(best):
            thresholds(device, plan, begin + seconds, progress, report)
    measured = {"gpu": plan.gpu.name, "memory": plan.gpu.memory, "rows": plan.rows}
    report.record["measured"] = measured | {"seconds": round(time.monotonic() - begin, 1)}
    return report


# ------------------------------------------------------------------------------------------------ tiles


def best_tiles(
    device: torch.device, plan: Plan, until: float, say: Say, report: Report
) -> dict[str, dict[str, list[Any]]]:
    """The fastest tile of each mode and width, as configurations of a record."""
    best: dict[str, dict[str, list[Any]]] = report.record["configurations"]
    for mode in MODES:
        found: dict[int, Configuration] = {}
        for width in plan.widths:
            if time.monotonic() > until:
                say("the time for tiles is used up; the table's tiles remain in use for the rest")
                return best
            tried = report.candidates[f"{mode}, {width}"] = []
            step = Step(device, plan, mode, width)
            for c in candidates(plan, mode, width):
                tried.append({"configuration": list(c), **step.timed(c)})
                if time.monotonic() > until:
                    break
            worked = [t for t in tried if "ms" in t]
            if worked:
                first = min(worked, key=lambda t: float(t["ms"]))
                found[width] = Configuration(*first["configuration"])
                gain = tried[0].get("ms", math.nan) / first["ms"]
                say(f"{mode}, D = {width}: {first['ms']:.3f} ms with {shape(found[width])}, {gain:.2f}x the table's")
            else:
                say(f"{mode}, D = {width}: nothing ran: {tried[0]['failed'] if tried else 'no time'}")
            del step
            release(device)
        if len(found) == len(
            plan.widths
        ):  # a mode that was measured for some widths only would be wrong for the others
            last = plan.widths[-1]
            best[mode] = {"inf" if w == last else str(w): list(c) for w, c in found.items()}
    return best


def candidates(plan: Plan, mode: str, width: int) -> list[Configuration]:
    """The configurations to try, the table's choice first."""
    if plan.small:
        return list(plan.small)
    listed = getattr(table, "candidates", None)
    more = USUAL if listed is None else listed(plan.gpu.architecture, mode, width)
    return list(dict.fromkeys([table.configuration(plan.gpu.architecture, mode, width), *more]))


class Step:
    """A forward and backward pass that uses the kernel of a mode, whose launches can be timed alone.

    Attributes:
        right: the result with the table's tiles; a candidate with another result is rejected.
    """

    def __init__(self, device: torch.device, plan: Plan, mode: str, width: int) -> None:
        self.device, self.plan, self.mode = device, plan, mode
        self.kernel = mode.partition("_")[0]
        self.z, self.ids = rows(device, plan.rows, width)
        self.prefix = max(width // 2 // 8 * 8, 1) if "_two" in mode else None
        self.temperature = 0.01 if mode.endswith("_maximum") else 0.1
        self.right = self.run()

    def run(self) -> tuple[Tensor, Tensor]:
        leaf = self.z.detach().requires_grad_()
        if self.kernel == "products":
            value = off_diagonal_energy(leaf, backend="triton")
        else:
            value = negative_lse(leaf, self.ids, self.temperature, prefix=self.prefix, backend="triton", validate=False)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    def timed(self, c: Configuration, products: bool = True) -> dict[str, Any]:
        """{"ms": time of the kernel's launches in one step}, or {"failed": reason}.

        Args:
            products: for the weights kernel, include the matrix library's products that follow it, whose time depends
                on whether W is in the cache; a kernel that keeps the gradient in registers needs none.
        """
        products = products and self.kernel == "weights"
        try:
            with using({self.mode: {"inf": list(c)}}), recorded(KERNELS[self.kernel], products) as launches:
                result = self.run()
                off = max(_relative(a, b) for a, b in zip(result, self.right, strict=True))
            if not off < 2e-3:
                return {"failed": f"differs by {off:.2g} from the table's tiles"}
            if not launches:
                return {"failed": "the kernel was not launched"}
            return {"ms": clocked(replayed(launches, self.device), self.device, self.plan.repeats)}
        except Exception as error:
            release(self.device)
            return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def resident(c: Configuration) -> bool:
    """Whether a configuration keeps the gradient in registers, so that the kernel needs no product after it."""
    return bool(getattr(c, "resident", False))


def shape(c: Configuration) -> str:
    return f"{c.block_m} x {c.block_n} x {c.block_k}, {c.warps} warps" + (", in registers" if resident(c) else "")


# ------------------------------------------------------------------------------------------------ backends


def thresholds(device: torch.device, plan: Plan, until: float, say: Say, report: Report) -> None:
    """Measure from how many rows triton is faster than the alternative of "auto", and add it to the record."""
    for name, tf32 in (("float32", False), ("tf32", True)):
        found: dict[str, int] = {}
        for width in plan.widths:
            rows_ = _threshold(device, plan, width, tf32, until, report.backends.setdefault(name, {}))
            if rows_ is None:
                say("the time for backends is used up; the estimate remains in use for the rest")
                return
            found["inf" if width == plan.widths[-1] else str(width)] = rows_
            told = "never" if rows_ == NEVER else f"from N = {rows_:,}"
            say(f"triton against {'TF32' if tf32 else 'float32'}, D = {width}: {told}")
        report.record["auto"][name] = found


def _threshold(
    device: torch.device, plan: Plan, width: int, tf32: bool, until: float, times: dict[str, float]
) -> int | None:
    """The smallest N from which triton is faster; None if the time is used up."""
    smallest: int | None = None
    for n in plan.sizes:
        if time.monotonic() > until:
            return None
        try:
            ours, other = compared(device, plan, n, width, tf32)
        except torch.cuda.OutOfMemoryError:
            release(device)
            break
        times[f"{width}, {n}, triton"], times[f"{width}, {n}, other"] = ours, other
        if not ours < other:
            smallest = None
        elif smallest is None:
            smallest = n
        else:
            break  # faster at two consecutive sizes
    return smallest or NEVER


def compared(device: torch.device, plan: Plan, n: int, width: int, tf32: bool) -> tuple[float, float]:
    """Times of a step in milliseconds, forward and backward with checks: of triton, and of the alternative."""
    z, ids = rows(device, n, width)
    kind = {"matrix_elements": n * n, "dtype": torch.float32, "device": device, "rows": n}
    other = choose_backend("auto", **kind)  # type: ignore[arg-type]

    def step(backend: Any) -> Callable[[], None]:
        leaf = z.detach().requires_grad_()

        def f() -> None:
            leaf.grad = None
            negative_lse(leaf, ids, 0.1, backend=backend).sum().backward()

        return f

    with float32_products(tf32):
        return clocked(step("triton"), device, plan.repeats), clocked(step(other), device, plan.repeats)


@contextlib.contextmanager
def shrunk(plan: Plan) -> Iterator[None]:
    """Settings for the interpreter: small tiles in all modes, and a check with few rows."""
    if not plan.small:
        yield
        return
    every = {mode: {"inf": plan.small[0]} for mode in MODES}
    with using(every), replaced(check, "ROWS", plan.rows):
        yield


# ------------------------------------------------------------------------------------------------ the command


def run(device: torch.device, *, seconds: float = 60.0, rehearse: bool = False, say: Say = print) -> Any:
    """Measure and save, as `python -m ssd_addon tune` does. Returns the file's path."""
    plan = REHEARSAL if rehearse else Plan(choice.gpu_of(device)) if device.type == "cuda" else None
    report = measure(device, plan, seconds=seconds, say=say)
    gpu = (plan or REHEARSAL).gpu
    return cache.save(gpu, report.record)
