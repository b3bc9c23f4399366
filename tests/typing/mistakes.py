"""Mistakes that a type checker must find: each marked line has one, and no other line has any.

`tests/typing.sh` compares the marks with what mypy --strict and pyright say against the installed wheel.
"""

import torch
from torch import Tensor, nn

import ssd_addon
from ssd_addon import DualAscent, JointEntropyLoss, Monitor, StructuredViews, StyleHeads, ViewBatch, ViewPlan, recipe
from ssd_addon.losses import Family
from ssd_addon.metrics import ScoreTable, r2_matrix


def mistakes(batch: ViewBatch, model: StyleHeads, table: ScoreTable, z: dict[str, Tensor]) -> None:
    JointEntropyLoss("nonsense")  # mistake
    JointEntropyLoss(backend="cuda")  # mistake
    JointEntropyLoss(temprature=0.1)  # mistake
    JointEntropyLoss(content_keys="some")  # mistake
    JointEntropyLoss(validate="yes")  # mistake
    JointEntropyLoss("simclr", 0.1)  # mistake
    JointEntropyLoss()(torch.rand(3))  # mistake
    print(JointEntropyLoss().terms(z).invarianse)  # mistake
    JointEntropyLoss().terms(z, 5)  # mistake
    batch.to(3.5)  # mistake
    batch.to(["cuda"])  # mistake
    batch.to("cuda", "float16")  # mistake
    StyleHeads(nn.Identity(), {"content": 3}, pool="max")  # mistake
    StyleHeads(nn.Identity(), ["content"])  # mistake
    StyleHeads(nn.Identity(), {"content": 3}, in_feature=3)  # mistake
    model("image.jpg")  # mistake
    StructuredViews({}, plan="both")  # mistake
    StructuredViews({}, sed=1)  # mistake
    ViewPlan("both", ("content",))  # mistake
    DualAscent(("content",), tolerance=0.1)  # mistake
    Family("mine", alignment=None, entropy=None)  # mistake
    r2_matrix(z, z, probe="forest")  # mistake
    table["color"]  # mistake
    recipe(family="byol")  # mistake
    Monitor("log.jsonl", evry=2)  # mistake
    print(ssd_addon.JointEntropyLos)  # mistake
