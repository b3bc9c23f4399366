"""Variants of the kernels around the tiles, and of those for unit rows, that a loss launches: for `resources.py`."""

from collections.abc import Iterator
from typing import Any

from triton.compiler import ASTSource

from ssd_addon.kernels import around, unit, unit_tiles

FLOATS = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}
IDS = {"p_given_ids": "*i64", "p_ids": "*i32", "p_low": "*i32", "p_high": "*i32"}
NUMBERS = {"tau", "longest", "limit", "log_n", "root", "spaces", "smallest", "constant", "term_constant"}
COUNTS = {"n", "d", "d0", "k0", "s0", "blocks", "start", "stop", "end", "slots", "count", "parts"}
PAIRS = {
    "VIEWS": 3,
    "PAIRS": (0 + 256 * 1) + ((0 + 256 * 2) << 16),
    "COUNT": 2,
    "b_B": unit.IMAGES,
    "b_K": unit.COLUMNS,
}


def sources() -> Iterator[tuple[str, str, ASTSource]]:
    """(kernel, variant, what to compile)."""
    for kind, pointer in FLOATS.items():
        own = {"z": pointer, "p_x": "*fp16", "p_other": None, "p_rows": None, "p_tau": None, "p_longest": None}
        own["stride_zc"] = 1
        tile = {"EXACT": False, "b_M": 128, "b_R": 16, "b_K": 64}
        yield _source(around.prepare_kernel, kind, own, tile)
        both = own | {"p_other": "*fp16", "p_rows": "*fp32", "p_tau": "*fp32", "p_longest": "*fp32"}
        yield _source(around.prepare_kernel, f"{kind}, two parts, a learned temperature", both, tile | {"EXACT": True})
        across = own | {"p_given_ids": None, "p_longest": "*fp32", "stride_z": 1, "stride_zc": "i32"}
        yield _source(around.prepare_kernel, f"{kind}, columns", across, tile)
        lse = {"p_dz": pointer, "p_rows": "*fp16", "stride_dxc": 1}
        lse |= dict.fromkeys(("p_term", "p_diagonal", "p_third", "p_fourth"))
        yield _source(around.finish_kernel, kind, lse | {"p_part": None}, {"b_M": 32, "b_K": 64})
        yield _source(around.finish_kernel, f"{kind}, a learned temperature", lse, {"b_M": 32, "b_K": 64})
        rows = {"p_dz": pointer, "p_rows": "*fp16", "p_term": "*fp16", "p_part": None, "stride_dxc": 1}
        yield _source(around.finish_kernel, f"{kind}, energy by rows", rows, {"b_M": 32, "b_K": 64})
    for maximum in (False, True):
        tops = {} if maximum else {"p_near_max": None, "p_far_max": None}
        for first in (False, True):
            name = ("maxima" if maximum else "a shift") + (", first strip" if first else "")
            yield _source(around.fold_kernel, name, tops, {"FIRST": first, "b_T": 16, "b_N": 64})
        log = {"p_shift": None} if maximum else {"p_log": None}
        yield _source(around.coefficients_kernel, "maxima" if maximum else "a shift", log, {"b_N": 64})
    yield _source(around.energy_kernel, "by columns", {"p_diagonal": None}, {"b_N": 1024})
    yield _source(around.energy_kernel, "by rows", {}, {"b_N": 1024})
    yield _source(unit_tiles.unit_kernel, "three views", {"stride_zk": 1}, PAIRS)
    yield _source(unit_tiles.unit_grad_kernel, "three views", {"stride_gk": 1, "stride_cb": 1}, PAIRS)


def _source(fn: Any, name: str, own: dict[str, Any], constants: dict[str, Any]) -> tuple[str, str, ASTSource]:
    signature, fixed, attributes = {}, dict(constants), {}
    for place, argument in enumerate(fn.arg_names):
        kind = own.get(argument, IDS.get(argument, _usual(argument)))
        if argument in constants:
            kind = "constexpr"
        elif kind is None or isinstance(kind, int):
            fixed[argument], kind = kind, "constexpr"
        elif kind.startswith("*") and argument not in ("p_cosine", "p_grad_cosine"):
            attributes[(place,)] = [["tt.divisibility", 16]]
        signature[argument] = kind
    return fn.__name__, name, ASTSource(fn=fn, signature=signature, constexprs=fixed, attrs=attributes)


def _usual(argument: str) -> str:
    if argument in NUMBERS:
        return "fp32"
    return "i32" if argument in COUNTS or argument.startswith("stride") else "*fp32"
