"""Compile every kernel of the table, and every candidate, without a GPU, and report its registers and instructions.

    python benchmarks/resources.py                  prints a table, for sm_80, 86, 89, 90, 100 and 120
    python benchmarks/resources.py --out docs/benchmarks     also writes resources.json and resources.md
    PYTHONPATH=<folder of another triton> python benchmarks/resources.py --out docs/benchmarks     adds that version

Registers, stack and shared memory are those of ptxas for the cubin; instructions are counted in its disassembly
(`sass`). "programs": how many fit a multiprocessor by registers (65,536), shared memory (164 KB on sm_80, 228 KB on
sm_90 and sm_100, else 100 KB, 1 KB of each taken per program) and threads (2,048, on sm_86, 89 and 120 1,536). A file
that is there keeps the rows of other versions of Triton and of other architectures.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read at import

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import sass

from ssd_addon.kernels import color_tiles, resident, table, tiles

SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KB; one program may take 1 KB less
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
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
    "resident_kernel": {
        **dict.fromkeys(("a", "b"), F16),
        **dict.fromkeys(("p_id_a", "p_id_b", "p_low_a", "p_high_a", "p_low_b", "p_high_b"), IDS),
        **dict.fromkeys(("p_scale", "p_shift", "p_lse_a", "p_lse_b", "p_g_a", "p_g_b", "p_dx"), F32),
        "w_scale": "fp32",
    },
    "products_kernel": {
        **dict.fromkeys(("a", "b", "c", "d", "p_w", "p_w_second"), F16),
        "p_sum": F32,
        "w_scale": "fp32",
    },
}
# multiples of 16 in a launch
ALIGNED = {"stride_a", "stride_b", "stride_w", "stride_dx", "stride_l_a", "stride_l_b", "k0", "k1"}


def variants(mode: str, c: table.Configuration) -> list[tuple[str, dict[str, Any]]]:
    """Kernel and switches of a mode of the table."""
    levels, maximum = 2 if "_two" in mode else 1, mode.endswith("_maximum")
    both = (False, True)
    if c.resident:
        return [("resident_kernel", {"MAXIMUM": maximum})]
    if mode.startswith(("sums", "weights")):
        kernel = f"{mode.partition('_')[0]}_kernel"
        return [(kernel, {"LEVELS": levels, "SYMMETRIC": s, "MAXIMUM": maximum}) for s in both]
    return [
        ("products_kernel", {"PAIR": p, "SYMMETRIC": s, "SKIP_DIAGONAL": not p})
        for p, s in itertools.product(both, both)
    ]


def compile_one(arch: int, kernel: str, switches: dict[str, Any], c: table.Configuration) -> dict[str, Any]:
    fn = getattr(resident if c.resident else tiles, kernel)
    constants = {**switches, "DESCRIPTOR": c.descriptor, "b_M": c.block_m, "b_N": c.block_n, "b_K": c.block_k}
    if not c.resident:
        constants["GROUP"] = c.group
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


def around(arch: int) -> list[dict[str, Any]]:
    """The kernels around the tiles, in the variants that a loss launches."""
    import around_variants

    return [
        {"arch": f"sm_{arch}", "kernel": kernel, "variant": variant, **resources(source, arch, {"num_warps": 4})}
        for kernel, variant, source in around_variants.sources()
    ]


def resources(source: ASTSource, arch: int, options: dict[str, Any]) -> dict[str, Any]:
    """Compile for an architecture, and read what the program takes."""
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(done.asm["cubin"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", cubin], check=True, capture_output=True, text=True
        ).stdout
        text = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    resource = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    shared = done.metadata.shared
    threads = 32 * options["num_warps"]
    programs = min(
        65536 // (threads * -(-resource["REG"] // 8) * 8),
        SHARED[arch] * 1024 // (shared + 1024),
        THREADS[arch] // threads,
    )
    return {
        "registers": resource["REG"],
        "stack": resource["STACK"],
        "local": resource["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "shared": shared,
        "programs": programs,
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", text)),
        "asynchronous": len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", text)),
        "parts": {part: list(counts.values()) for part, counts in sass.parts(text).items()},
    }


def wanted(arch: int, modes: list[str] | None = None) -> list[dict[str, Any]]:
    """Every configuration that the table names for an architecture, in every variant of its kernel, and candidates.

    Of candidates only the triangle, which is what one process computes.
    """
    found = []
    for kind in ("configurations", "candidates"):
        every = table.table()[kind]
        for mode, buckets in {**every["default"], **every.get(f"sm_{arch}", {})}.items():
            if modes and mode not in modes:
                continue
            for bucket, values in buckets.items():
                for value in [values] if kind == "configurations" else values:
                    c = table.Configuration(*value)
                    for kernel, switches in variants(mode, c):
                        if kind == "configurations" or switches.get("SYMMETRIC", True):
                            row = {"triton": triton.__version__, "arch": f"sm_{arch}", "mode": mode, "bucket": bucket}
                            row |= {"candidate": kind == "candidates", "kernel": kernel, "configuration": list(c)}
                            found.append({**row, "switches": switches})
    return found


def rows(architectures: list[int], modes: list[str] | None = None, candidates: bool = True) -> list[dict[str, Any]]:
    """What is `wanted`, compiled."""
    found = []
    compiled: dict[str, dict[str, Any]] = {}  # several widths may have the same tile, and a candidate may be in use
    for arch in architectures:
        for row in wanted(arch, modes):
            if candidates or not row["candidate"]:
                c = table.Configuration(*row["configuration"])
                key = json.dumps([arch, row["kernel"], row["switches"], c])
                if key not in compiled:
                    compiled[key] = compile_one(arch, row["kernel"], row["switches"], c)
                found.append({**row, **compiled[key], "limit": (SHARED[arch] - 1) * 1024})
    return found


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace old rows of the same version and architecture by new ones."""
    replaced = {(r["triton"], r["arch"]) for r in new}
    kept = [r for r in old if (r["triton"], r["arch"]) not in replaced]
    return sorted(kept + new, key=lambda r: ([int(v) for v in r["triton"].split(".")[:2]], int(r["arch"][3:])))


def markdown(found: list[dict[str, Any]]) -> str:
    """One line a variant; numbers of several versions of Triton are separated by slashes."""
    versions = list(dict.fromkeys(r["triton"] for r in found))
    by_variant: dict[str, dict[str, dict[str, Any]]] = {}
    for r in found:
        key = json.dumps([r[k] for k in ("candidate", "arch", "mode", "bucket", "configuration", "switches")])
        by_variant.setdefault(key, {})[r["triton"]] = r
    sections = {False: ["## The table", ""], True: ["## Candidates", ""]}
    names = ["registers", "stack", "shared, KB", "programs", "prologue", "loop", "epilogue", "SHFL", "BAR", "exchanged"]
    for lines in sections.values():
        lines += [f"| arch | mode | variant | tile, warps, stages | {' | '.join(names)} |"]
        lines += ["|:--|:--|:--|:--|" + "--:|" * len(names)]
    for variant in sorted(by_variant.values(), key=lambda v: int(next(iter(v.values()))["arch"][3:])):
        r = next(iter(variant.values()))
        m, n, k, warps, stages, descriptor, _, registers, resides = r["configuration"]
        on = [s.lower() for s in ("SYMMETRIC", "PAIR", "SKIP_DIAGONAL") if r["switches"].get(s)]
        notes = [s for s, there in (("descriptors", descriptor), ("resident", resides)) if there]
        tile = ", ".join([f"{m} x {n} x {k}", str(warps), str(stages), *notes])
        if registers:
            tile += f", at most {registers} registers"

        def over_versions(f: Callable[[dict[str, Any]], int], variant: dict[str, dict[str, Any]] = variant) -> str:
            values = [str(f(variant[v])) if v in variant else "-" for v in versions]
            return values[0] if len(set(values)) == 1 else " / ".join(values)

        def part(name: str, kind: str, over_versions: Any = over_versions) -> str:
            return over_versions(lambda r: r["parts"][name][sass.KINDS.index(kind)])

        cells = [
            over_versions(lambda r: r["registers"]),
            over_versions(lambda r: r["stack"] + r["local"]),
            over_versions(lambda r: round(r["shared"] / 1024)),
            over_versions(lambda r: r["programs"]),
            *(part(name, "total") for name in ("prologue", "loop", "epilogue")),
            *(part("epilogue", kind) for kind in ("shfl", "bar", "exchanged")),
        ]
        start = f"| {r['arch']} | {r['mode']} | {', '.join(on)} | {tile} |"
        sections[r["candidate"]].append(f"{start} {' | '.join(cells)} |")
    return f"Triton {', '.join(versions)}.\n\n" + "\n\n".join("\n".join(lines) for lines in sections.values())


PAGE = """# What the kernels take of the hardware

Registers, shared memory and instructions of every kernel and every candidate, for six architectures. They were compiled
ahead of time by `python benchmarks/resources.py --out docs/benchmarks`; nothing here was run.

- If versions of Triton differ, slashes separate their values in the order below.
- Instructions are counted per warp, along the shortest path: that of a tile without a comparison of image ids and
  without a store across the diagonal.
- The *prologue* comes before the *loop*. One turn of the loop covers block_k columns; in resident variants it covers
  the rows of a tile of columns. The *epilogue* comes after it.
- SHFL (shuffles), BAR (barriers) and the 32-bit words that a lane *exchanges* by shuffles or through shared memory are
  those of the epilogue.
"""


def write(folder: Path, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """resources.json and resources.md: what was found, and what is there of other versions and architectures."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "resources.json"
    found = merged(json.loads(path.read_text()) if path.exists() else [], found)
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in found) + "\n]\n")
    (folder / "resources.md").write_text(f"{PAGE}\n{markdown(found)}\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--around", action="store_true", help="the kernels around the tiles alone, as JSON")
    parser.add_argument("--colors", action="store_true", help="the kernel for colors alone, as JSON")
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED))
    parser.add_argument("--modes", nargs="+", help="of the table; with --json alone")
    parser.add_argument("--no-candidates", action="store_true")
    args = parser.parse_args()
    if args.modes and args.out:
        parser.error("--modes: expected all modes where a file is written: got some")
    if args.around:
        json.dump([r for arch in args.arch for r in around(arch)], sys.stdout)
        return
    if args.colors:
        json.dump([colors(arch) for arch in args.arch], sys.stdout)
        return
    found = rows(args.arch, args.modes, not args.no_candidates)
    if args.json:
        json.dump(found, sys.stdout)
        return
    if args.out:
        found = write(args.out, found)
    print(markdown(found))


if __name__ == "__main__":
    main()
