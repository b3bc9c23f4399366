"""Count the instructions of a compiled kernel before, in and after its loop. Reads the output of `nvdisasm -c`.

A kernel's product loops are the cycles of its control flow that contain tensor-core instructions. "prologue" is the
shortest path from the entry to the first of them, "loop" the shortest turn of each, and "epilogue" the shortest path
from there to the end: the instructions of a tile that takes no optional branch (the comparison of image ids, a store
across the diagonal). "whole" counts every instruction that can be reached after the first loop. All counts are per
warp.
"""

import heapq
import re
from collections import Counter
from typing import NamedTuple

MMA = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA)\b")
JUMP = (
    "BRA",
    "BRX",
    "CALL.REL.NOINC",
)  # the latter also where ptxas lays a loop's end far from it, and nothing returns
WIDE = {"128": 4, "64": 2}
PARTS = ("prologue", "loop", "epilogue", "whole")
KINDS = ("total", "mma", "shfl", "mufu", "bar", "exchanged", "spills")


class Block(NamedTuple):
    instructions: list[str]  # operation codes
    follows: list[int]  # indices of the blocks that may come next


def blocks(text: str) -> list[Block]:
    """Basic blocks of the first function of a disassembly."""
    lines: list[tuple[list[str], str, str, list[str]]] = []  # labels, predicate, operation, targets
    labels: list[str] = []
    for line in text.splitlines():
        if lines and line.lstrip().startswith(".section"):
            break
        if found := re.match(r"(\.L_\w+):", line):
            labels.append(found[1])
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            lines.append((labels, found[1] or "", found[2], re.findall(r"\.L_\w+", found[3])))
            labels = []
    starts, begin = [], True
    for index, (names, _, operation, _) in enumerate(lines):
        if begin or names:
            starts.append(index)
        begin = operation.startswith((*JUMP, "EXIT", "RET"))
    place = {name: starts.index(index) for index, (names, *_) in enumerate(lines) for name in names}
    returns = any(operation.startswith("RET") for _, _, operation, _ in lines)
    found_blocks = []
    for number, start in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else len(lines)
        _, predicate, operation, targets = lines[stop - 1]
        # BRA.U and the like carry their condition as an operand
        conditional = bool(predicate) or operation.startswith(("BRA.U", "BRA.DIV"))
        conditional = conditional or (returns and operation.startswith("CALL"))
        follows = [place[t] for t in targets if t in place] if operation.startswith(JUMP) else []
        if (conditional or not operation.startswith((*JUMP, "EXIT", "RET"))) and number + 1 < len(starts):
            follows.append(number + 1)
        found_blocks.append(Block([line[2] for line in lines[start:stop]], follows))
    return found_blocks


def reached(every: list[Block], start: int) -> set[int]:
    found, todo = set(), list(every[start].follows)
    while todo:
        k = todo.pop()
        if k not in found:
            found.add(k)
            todo += every[k].follows
    return found


def product_loops(every: list[Block]) -> list[set[int]]:
    """Sets of blocks that reach each other and hold tensor-core instructions, in the order of the code."""
    loops: list[set[int]] = []
    after = [reached(every, k) for k in range(len(every))]
    for k, block in enumerate(every):
        if k in after[k] and any(MMA.match(i) for i in block.instructions) and not any(k in loop for loop in loops):
            loops.append({other for other in after[k] if k in after[other]})
    return loops


def shortest(every: list[Block], starts: set[int], ends: set[int], forbidden: set[int]) -> list[int]:
    """Blocks of the way with the fewest instructions from one of `starts` to one of `ends` (which is left out)."""
    queue = [(0, k, [k]) for k in starts]
    done: set[int] = set()
    while queue:
        length, k, way = heapq.heappop(queue)
        if k in ends:
            return way[:-1]
        if k in done:
            continue
        done.add(k)
        length += len(every[k].instructions)
        for follower in every[k].follows:
            if follower not in forbidden or follower in ends:
                heapq.heappush(queue, (length, follower, [*way, follower]))
    raise ValueError("a disassembly whose blocks lead from the entry through the loops to the end: found no such way")


def count(operations: list[str]) -> dict[str, int]:
    """Instructions by kind. "exchanged": 32-bit words that a lane moves by shuffles or through shared memory."""
    names = Counter(o.partition(".")[0] for o in operations)
    words = names["SHFL"]
    for o in operations:
        name, *rest = o.split(".")
        if name in ("LDS", "STS"):
            words += next((WIDE[r] for r in rest if r in WIDE), 1)
        elif name in ("LDSM", "STSM"):
            words += int(rest[-1]) if rest[-1].isdigit() else 1
    return {
        "total": len(operations),
        "mma": sum(bool(MMA.match(o)) for o in operations),
        "shfl": names["SHFL"],
        "mufu": names["MUFU"],
        "bar": names["BAR"],
        "exchanged": words,
        "spills": names["LDL"] + names["STL"],
    }


def parts(text: str) -> dict[str, dict[str, int]]:
    """Counts by part and kind of a disassembled kernel; without a product loop all is prologue."""
    every = blocks(text)
    loops = product_loops(every)
    exits = {k for k, b in enumerate(every) if b.instructions[-1].startswith("EXIT")}

    def operations(chosen: list[int]) -> list[str]:
        return [o for k in chosen for o in every[k].instructions]

    def outside(loop: set[int]) -> set[int]:
        return set(range(len(every))) - loop

    found: dict[str, list[str]] = {part: [] for part in PARTS}
    starts, part = {0}, "prologue"
    for loop in loops:
        heads = {k for k in loop if any(k in every[p].follows for p in range(len(every)) if p not in loop)}
        found[part] += operations(shortest(every, starts, heads, set()))
        turns = [[h, *shortest(every, {f for f in every[h].follows if f in loop}, {h}, outside(loop))] for h in heads]
        turn = min(turns, key=lambda turn: len(operations(turn)))
        # On sm_100 one elected thread issues the products, in a branch of its own.
        elected = [k for k in sorted(loop - set(turn)) if any(MMA.match(o) for o in every[k].instructions)]
        found["loop"] += operations(turn) + [o for o in operations(elected) if MMA.match(o)]
        starts, part = {f for k in loop for f in every[k].follows if f not in loop}, "epilogue"
    within = starts.union(*(reached(every, s) for s in starts))
    # A conditional exit is an early one, unless the kernel ends by no other.
    ends = {k for k in exits & within if not every[k].follows} or exits & within
    tails = [(shortest(every, starts, {end}, set()), end) for end in ends]
    way, end = min(tails, key=lambda t: len(operations(t[0])) + len(every[t[1]].instructions))
    found[part] += operations([*way, end])
    if loops:
        inside = set().union(*loops)
        behind = reached(every, min(loops[0])) - inside
        found["whole"] = operations(sorted(behind))
    return {name: count(o) for name, o in found.items()}
