"""Compile every kernel of the table for sm_80 and sm_90, without a GPU, and report what it takes.

    python benchmarks/resources.py                  prints a table
    python benchmarks/resources.py --out docs/benchmarks     writes resources.json and resources.md

Registers, stack and shared memory are those of ptxas for the cubin; tensor-core and asynchronous-copy instructions are
counted in its disassembly. "programs": how many fit a multiprocessor by registers (65,536), shared memory (164 KB on
sm_80, 228 KB on sm_90, 1 KB of each taken per program) and threads (2,048).
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read at import

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssd_addon.kernels import color_tiles, table, tiles

SHARED = {80: 164, 90: 228}
LIMIT = {80: 163, 90: 227}  # KB that one program may take
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
F16, F32, IDS = "*fp16", "*fp32", "*i32"

SIGNATURES: dict[str, dict[str, str]] = {
    "sums_kernel": {
        **dict.fromkeys(("a", "b"), F16),
        **dict.fromkeys(("p_id_a", "p_id_b", "p_low_a", "p_high_a", "p_low_b", "p_high_b"), IDS),
        **dict.fromkeys(("p_scale", "p_shift", "p_near", "p_near_max", "p_far", "p_far_max"), F32),
    },
    "weights_kernel": {
        **dict.fromkeys(("a", "b", "p_w", "p_w_first"), F16),
        **dict.fromkeys(("p_id_a", "p_id_b", "p_low_a", "p_high_a", "p_low_b", "p_high_b"), IDS),
        **dict.fromkeys(("p_scale", "p_shift", "p_lse_a", "p_lse_b", "p_g_a", "p_g_b"), F32),
        "w_scale": "fp32",
    },
    "products_kernel": {
        **dict.fromkeys(("a", "b", "c", "d", "p_w", "p_w_second"), F16),
        "p_sum": F32,
        "w_scale": "fp32",
    },
}
ALIGNED = {"stride_a", "stride_b", "stride_w", "stride_l_a", "stride_l_b", "k0", "k1"}  # multiples of 16 in a launch


def variants(mode: str) -> list[tuple[str, dict[str, Any]]]:
    """Kernel and switches of a mode of the table."""
    levels = 2 if "_two" in mode else 1
    both = (False, True)
    if mode.startswith(("sums", "weights")):
        kernel, maximum = f"{mode.partition('_')[0]}_kernel", mode.endswith("_maximum")
        found = [(kernel, {"LEVELS": levels, "SYMMETRIC": s, "MAXIMUM": maximum}) for s in both]
    else:
        found = [
            ("products_kernel", {"PAIR": p, "SYMMETRIC": s, "SKIP_DIAGONAL": not p})
            for p, s in itertools.product(both, both)
        ]
    return found


def compile_one(arch: int, kernel: str, switches: dict[str, Any], c: table.Configuration) -> dict[str, Any]:
    fn = getattr(tiles, kernel)
    constants = {
        **switches,
        "DESCRIPTOR": c.descriptor,
        "GROUP": c.group,
        "b_M": c.block_m,
        "b_N": c.block_n,
        "b_K": c.block_k,
    }
    signature, attributes = {}, {}
    for place, name in enumerate(fn.arg_names):
        kind = "constexpr" if name in constants else SIGNATURES[kernel].get(name, "i32")
        if c.descriptor and name in ("a", "b", "c", "d"):
            kind = f"tensordesc<fp16[{c.block_m if name in 'ac' else c.block_n},{c.block_k}]>"
        elif kind.startswith("*") or name in ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
        signature[name] = kind
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    options: dict[str, Any] = {"num_warps": c.warps, "num_stages": c.stages}
    if c.registers:
        options["maxnreg"] = c.registers
    return resources(source, arch, options)


def colors(arch: int, columns: int = 6) -> dict[str, Any]:
    """The kernel for colors, with so many instructions."""
    fn = color_tiles.colors_kernel
    constants = {"COLUMNS": columns, "PLACES": triton.next_power_of_2(columns), "ENDS": True, "b_P": color_tiles.BLOCK}
    kinds = {"p_x": F32, "p_codes": IDS, "p_numbers": F32, "p_ends": F32, "pixels": "i32"}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in fn.arg_names}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs={})
    return {"arch": f"sm_{arch}", **resources(source, arch, {"num_warps": 4})}


def resources(source: ASTSource, arch: int, options: dict[str, Any]) -> dict[str, Any]:
    """Compile for an architecture, and read what the program takes."""
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(done.asm["cubin"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", cubin], check=True, capture_output=True, text=True
        ).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    resource = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    shared = done.metadata.shared
    threads = 32 * options["num_warps"]
    programs = min(
        65536 // (threads * -(-resource["REG"] // 8) * 8), SHARED[arch] * 1024 // (shared + 1024), 2048 // threads
    )
    return {
        "registers": resource["REG"],
        "stack": resource["STACK"],
        "local": resource["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": shared,
        "programs": programs,
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA)\b", sass)),
        "asynchronous": len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", sass)),
    }


def rows(architectures: list[int]) -> list[dict[str, Any]]:
    """Every configuration that the table names for an architecture, in every variant of its kernel."""
    found, every = [], table.table()["configurations"]
    for arch in architectures:
        modes = {**every["default"], **every.get(f"sm_{arch}", {})}
        for mode, buckets in modes.items():
            for values in sorted({tuple(v) for v in buckets.values()}):
                c = table.Configuration(*values)
                for kernel, switches in variants(mode):
                    r = {"arch": f"sm_{arch}", "mode": mode, "kernel": kernel, "configuration": list(c), **switches}
                    found.append({**r, **compile_one(arch, kernel, switches, c), "limit": LIMIT[arch] * 1024})
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    lines = [
        "| arch | mode | variant | tile, warps, stages | registers | stack | shared, KB | programs | tensor-core "
        "| async copies |",
        "|:--|:--|:--|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for r in found:
        m, n, k, warps, stages, descriptor, *_ = r["configuration"]
        on = [s.lower() for s in ("SYMMETRIC", "MAXIMUM", "PAIR", "SKIP_DIAGONAL") if r.get(s)]
        tile = f"{m} x {n} x {k}, {warps}, {stages}{', descriptors' if descriptor else ''}"
        lines.append(
            f"| {r['arch']} | {r['mode']} | {', '.join(on)} | {tile} | {r['registers']} | {r['stack'] + r['local']} "
            f"| {r['shared'] / 1024:.0f} | {r['programs']} | {r['tensor_core']} | {r['asynchronous']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--colors", action="store_true", help="the kernel for colors alone, as JSON")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    args = parser.parse_args()
    if args.colors:
        json.dump([colors(arch) for arch in args.arch], sys.stdout)
        return
    found = rows(args.arch)
    if args.json:
        json.dump(found, sys.stdout)
        return
    text = markdown(found)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "resources.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "resources.md").write_text(
            f"# What the kernels take\n\nWritten by `python benchmarks/resources.py --out docs/benchmarks`, Triton "
            f"{triton.__version__}. Compiled ahead of time; nothing here was run.\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
