"""The flags of examples/imagenet.py with one another: every pair of values is in some run of two steps.

What must not change the first loss (recomputed activations, compilation, the average of weights, the optimizer, how
weights lie over processes) is compared with a run that has none of it. In full precision the two agree to 1e-5; in half
precision a compiled network rounds less often, and 1e-2 is asked for.
"""

import copy
import functools
import itertools
import json
import os
import subprocess
import sys

import flag_runs
import pytest
import torch
from imagenet_runs import ROOT, draw, log_of

from ssd_addon import runs

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

FACTORS = {
    "compile": ("off", "on"),
    "processes": ("1", "2 ddp", "2 fsdp"),
    "precision": ("fp32", "bf16", "fp16"),
    "family": ("simclr", "vicreg", "barlow"),
    "plan": ("shared_query", "interleaved"),
    "recipe": ("paper", "recommended"),
    "accumulate": ("1", "2"),
    "activation-checkpointing": ("off", "on"),
    "ema": ("off", "0.9"),
    "dual-ascent": ("off", "0.1"),
    "optimizer": ("lars", "adamw"),
    "sync-batch-norm": ("on", "off"),
}
NEUTRAL = ("compile", "activation-checkpointing", "ema", "optimizer", "sync-batch-norm")
RARE = ("compile", "on")  # takes seconds


def pairs_of(row):
    return set(itertools.combinations(row.items(), 2))


def all_pairs(factors):
    two = itertools.combinations(factors.items(), 2)
    return {((a, x), (b, y)) for (a, xs), (b, ys) in two for x in xs for y in ys}


def gain(name, value, *, row, left, rare):
    """How many pairs a row gains by a value; those with the rare one first."""
    new = {p for other in row.items() for p in ((other, (name, value)), ((name, value), other))}
    return sum(100 if rare in p else 1 for p in new & left)


def covering(factors, rare):
    """Rows that hold every pair of values, greedily; as few with the rare value as can be."""
    left, rows = all_pairs(factors), []
    while left:
        start = min(left, key=lambda p: (rare not in p, list(factors).index(p[0][0]), p))
        row = dict(start)
        row.setdefault(rare[0], next(v for v in factors[rare[0]] if v != rare[1]))
        for name in factors:
            if name not in row:
                row[name] = max(factors[name], key=functools.partial(gain, name, row=dict(row), left=left, rare=rare))
        row = {name: row[name] for name in factors}
        left -= pairs_of(row)
        rows.append(row)
    return rows


ROWS = covering(FACTORS, RARE)
RESUMED = next(
    row for row in ROWS if {"2 fsdp", "simclr", "recommended", "0.9"} <= set(row.values()) and row["compile"] == "off"
)
"""A sharded run with the networks of the equivariance and an average of weights."""


def arguments(row, index, data, out, steps):
    single = row["processes"] == "1"
    strategy = ("ddp", "fsdp")[index % 2] if single else row["processes"].split()[1]
    given = {n: row[n] for n in ("precision", "family", "plan", "recipe", "accumulate", "optimizer")}
    given |= {"strategy": strategy, "batch-size": 8 if single else 4, "data": data, "out": out, "steps": steps}
    given |= {n: row[n] for n in ("ema", "dual-ascent") if row[n] != "off"}
    flags = [f"--{n}" for n in ("compile", "activation-checkpointing") if row[n] == "on"]
    flags += ["--sync-batch-norm" if row["sync-batch-norm"] == "on" else "--no-sync-batch-norm"]
    flags += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*flags, "--widths", "content=16,spatial=8,color=8"]


def plain(row):
    """The same without what must not change the first loss."""
    processes = {"2 fsdp": "2 ddp"}.get(row["processes"], row["processes"])
    return row | {n: FACTORS[n][0] for n in NEUTRAL} | {"processes": processes}


def named(row):
    return "_".join(row.values()).replace(" ", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of all rows and of what they are compared with; those of two processes in one pair of them."""
    folder = tmp_path_factory.mktemp("flags")
    draw(folder / "data" / "train", 48)
    todo = {named(row): (row, i, 2) for i, row in enumerate(ROWS)}
    todo = {named(plain(row)): (plain(row), 0, 1) for row in ROWS} | todo
    lists = {name: arguments(row, i, folder / "data", folder / name, steps) for name, (row, i, steps) in todo.items()}
    alone = {name for name, (row, _, _) in todo.items() if row["processes"] == "1"}
    together = [words for name, words in lists.items() if name not in alone]
    for steps in (1, 2):
        together.append([*arguments(RESUMED, 0, folder / "data", folder / "halves", steps), "--resume"])
    (folder / "runs.json").write_text(json.dumps(together))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "tests/support/flag_runs.py", str(folder / "runs.json")]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "examples", "tests/support"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-20000:]
    for name in alone:
        flag_runs.run(lists[name])
    return folder


def losses(folder, row):
    return [line["loss"] for line in log_of(folder / "data", named(row)) if "loss" in line]


def test_every_pair_of_values_is_in_a_run():
    assert set().union(*map(pairs_of, ROWS)) == all_pairs(FACTORS)
    assert sum(row["compile"] == "on" for row in ROWS) == 3 and len(ROWS) < 20
    small = {"a": ("0", "1"), "b": ("0", "1"), "c": ("0", "1")}
    assert set().union(*map(pairs_of, covering(small, ("a", "1")))) == all_pairs(small)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_flags_work_together(folder, row):
    found = losses(folder, row)
    assert len(found) == 2 and torch.tensor(found).isfinite().all()
    (first,) = losses(folder, plain(row)) if named(plain(row)) != named(row) else found[:1]
    assert found[0] == pytest.approx(first, rel=1e-5 if row["precision"] == "fp32" else 1e-2)
    opened = runs.load(folder / named(row))
    assert opened.model.spaces == {"content": 16, "spatial": 8, "color": 8}
    stored = torch.load(folder / named(row) / "checkpoint.pt", weights_only=True)
    assert stored["step"] == 2 and not runs.not_finite(stored) and ("ema" in stored) == (row["ema"] != "off")


def test_a_sharded_run_with_an_average_and_equivariance_is_continued_exactly(folder):
    a, b = (torch.load(folder / out / "checkpoint.pt", weights_only=True) for out in (named(RESUMED), "halves"))
    for part in ("model", "ema", "equivariance", "criterion"):
        assert a[part].keys() == b[part].keys() and all(torch.equal(t, b[part][k]) for k, t in a[part].items())
    assert any(not torch.equal(a["model"][k], a["ema"][f"module.{k}"]) for k in a["model"])


def test_recomputed_blocks_that_are_compiled_are_the_same_and_count_a_batch_once():
    torch.manual_seed(0)
    plain, x = flag_runs.Blocks(), torch.randn(4, 3, 16, 16)
    again = copy.deepcopy(plain)
    assert runs.checkpoint_activations(again) == ["0", "1"]
    again.compile(backend="aot_eager")
    for net in (plain, again):
        net(x).square().mean().backward()
    pairs = [*zip(plain.state_dict().values(), again.state_dict().values(), strict=True)]
    pairs += [(p.grad, q.grad) for p, q in zip(plain.parameters(), again.parameters(), strict=True)]
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    assert plain[0].norm.num_batches_tracked == 1
