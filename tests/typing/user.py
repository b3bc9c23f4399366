"""A user's script: what a type checker must accept, and the types that it must know.

`tests/typing.sh` checks it with mypy --strict and pyright against the installed wheel.
"""

from typing import assert_type

import kornia.augmentation as K
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssd_addon import (
    DualAscent,
    Embeddings,
    EquivarianceLoss,
    JointEntropyLoss,
    Monitor,
    StructuredCollate,
    StructuredViews,
    StyleHeads,
    ViewBatch,
    ViewPlan,
    metrics,
    recipe,
    runs,
)
from ssd_addon.collate import ImageFiles
from ssd_addon.kernels import negative_lse, off_diagonal_energy
from ssd_addon.losses import Family, Terms
from ssd_addon.metrics import ScoreTable


def alignment(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(1)


def entropy(joint: Tensor, ids: Tensor) -> Tensor:
    return -joint.var(1).log().mean()


class Gain:
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        return {"gain": torch.rand(shape[0], generator=generator)}

    def apply(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return x * parameters["gain"].view(-1, 1, 1, 1)


def train(images: Tensor, backbone: nn.Module) -> None:
    views = StructuredViews({"color": [K.ColorJitter(0.4)], "gain": [Gain()]}, plan="shared_query", seed=0)
    batch = views(images)
    assert_type(batch, ViewBatch)
    assert_type(batch.to("cuda", torch.float16, non_blocking=True), ViewBatch)
    assert_type(ViewBatch.cat([batch.rows([0, 1]), batch.rows(slice(2, 4))]), ViewBatch)
    model = StyleHeads(backbone, {"content": 64, "color": 32, "gain": 32}, hidden=(256,), pool="mean")
    z = model(batch)
    assert_type(z, Embeddings)
    assert_type(model.features(batch), Tensor)
    ascent = DualAscent(model.spaces, tolerance=0.1, step_size=0.01)
    criterion = JointEntropyLoss("simclr", temperature=0.2, weights=ascent, backend="streaming")
    assert_type(criterion(z), Tensor)
    terms = criterion.terms(z, batch)
    assert_type(terms, Terms)
    assert_type(terms.invariance["content"], Tensor)
    assert_type(terms.scalars(), dict[str, float])
    criterion.weights.step(terms)
    equivariance = EquivarianceLoss(model.spaces, views, weight=0.5)
    loss = criterion(z) + equivariance(z, batch)
    assert_type(loss, Tensor)
    mine = JointEntropyLoss(Family("mine", alignment=alignment, entropy=entropy, on_sphere=True), trim=0.1)
    assert_type(mine({"content": images}, ViewPlan.shared_query(("content",))), Tensor)
    assert_type(negative_lse(images, torch.arange(4), 0.1), Tensor)
    assert_type(off_diagonal_energy(images), Tensor)
    model.save("model.pt", card={"family": "simclr"})
    assert_type(runs.load("model.pt").model, StyleHeads)
    r = recipe("color_spatial", family="vicreg", size=64)
    assert_type(r.spaces, dict[str, int])


def measure(model: StyleHeads, views: StructuredViews, images: Tensor) -> None:
    table = metrics.parameter_matrix(model, views, images)
    assert_type(table, ScoreTable)
    assert_type(table["color", "color"], float)
    assert_type(metrics.r2_matrix({"content": images}, {"hue": images}, probe="kernel"), ScoreTable)
    with Monitor("log.jsonl", views=views, images=images) as monitor:
        monitor.step(1, {"loss": 0.5})
    loader = DataLoader(ImageFiles("photographs", broken="skip"), collate_fn=StructuredCollate(64, views=views))
    for batch, _, _ in loader:
        assert isinstance(batch, ViewBatch)
