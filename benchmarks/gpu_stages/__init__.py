"""The stages of gpu.py: each is a function without arguments, and what it returns goes into gpu.json."""

import sys
import time
import traceback
from typing import Any

from gpu_stages import fast, right
from gpu_stages.here import Here, left, set_up, synchronize
from ssd_addon.kernels import tune

STAGES = {
    f.__name__.rstrip("_"): f
    for f in (
        right.machine,
        right.self_check,
        fast.tune_,
        right.correctness,
        right.determinism,
        fast.variants,
        fast.speed,
        fast.training_step,
        fast.chosen,
        fast.covariance,
        fast.blocks,
        fast.colors,
        right.sanitizer,
    )
}
small_case = right.small_case

__all__ = ["STAGES", "run", "set_up", "small_case"]


def run(name: str, broken: str = "") -> dict[str, Any]:
    """The entry of a stage: its result, or why there is none."""
    begin = time.monotonic()
    entry: dict[str, Any] = {}
    try:
        if broken == "raise":
            raise RuntimeError("broken on purpose")
        if broken == "exit":
            sys.exit(7)
        while broken == "hang":
            time.sleep(1)
        entry["result"] = STAGES[name]()
        if name == "correctness" and (wrong := [r for r in entry["result"] if not r["ok"]]):
            entry["wrong"] = wrong
    except Exception as error:
        entry |= {"failed": f"{type(error).__name__}: {str(error)[:500]}", "where": traceback.format_exc()[-1500:]}
    entry["seconds"] = round(time.monotonic() - begin, 1)
    try:
        tune.release(Here.device)
        synchronize()
    except Exception as error:
        entry["device_fault"] = str(error)[:300]
    print(f"{name}: {entry.get('failed', 'done')}, {entry['seconds']} s, {left():.0f} s left", flush=True)
    return entry
