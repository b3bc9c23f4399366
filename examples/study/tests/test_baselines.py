"""The baselines of docs/results.md against loops written from their papers' equations."""

import math

import kornia.augmentation as K
import pytest
import torch
from study.augself import AugSelf
from study.looc import LooCLoss

from ssd_addon import StructuredViews
from ssd_addon.metrics import parameter_differences


def looc(z: dict[str, torch.Tensor], tau: float) -> float:
    """Every sum of the equation, a number at a time."""
    names = list(z)
    b = z[names[0]].shape[1]

    def e(space: str, q: int, view: int, image: int) -> float:
        u, v = z[space][0, q], z[space][view, image]
        return math.exp(float(u @ v / (u.norm() * v.norm())) / tau)

    total = 0.0
    for q in range(b):
        for i, space in enumerate(names):
            positive = e(space, q, 1 + i, q)
            own = [e(space, q, 1 + j, q) for j in range(len(names))] if i else [positive]
            others = [e(space, q, 1 + j, n) for j in range(len(names)) for n in range(b) if n != q]
            total -= math.log(positive / (sum(own) + sum(others))) / (len(names) * b)
    return total


def embeddings(views: int = 4, b: int = 5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        n: torch.randn(views, b, d, generator=g).double() for n, d in (("content", 4), ("color", 3), ("spatial", 2))
    }


def test_looc_is_its_equation():
    z = embeddings()
    assert LooCLoss(0.3)(z).item() == pytest.approx(looc(z, 0.3), abs=1e-12)
    assert LooCLoss()(z).item() == pytest.approx(looc(z, 0.2), abs=1e-12)
    half = {n: t.bfloat16() for n, t in z.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert LooCLoss(0.3)(half).dtype == torch.float32


def test_looc_repels_the_keys_of_the_same_image_that_differ_in_its_augmentation():
    z = embeddings()
    before = LooCLoss(0.3)(z)
    z["color"][3] = z["color"][0]  # color cannot tell the query from the spatial key, whose colors differ
    assert LooCLoss(0.3)(z) > before


def test_looc_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="3 spaces need 4 views"):
        LooCLoss()(embeddings(views=3))
    with pytest.raises(ValueError, match="temperature"):
        LooCLoss(0.0)


def test_augself_is_the_squared_error_of_standardized_differences():
    torch.manual_seed(0)
    loss = AugSelf(3, {"hue": 2, "angle": 1}, hidden=4)
    a, b = torch.randn(2, 6, 3)
    differences = {"hue": 5 * torch.randn(6, 2) + 1, "angle": torch.randn(6, 1)}
    expected = 0.0
    for predict, t in zip(loss.predict, differences.values(), strict=True):
        target = (t - t.mean(0)) / (t.var(0, unbiased=False) + 1e-10).sqrt()
        expected += (predict(torch.cat([a, b], 1)) - target).square().mean().item()
    assert loss(a, b, differences).item() == pytest.approx(expected, rel=1e-5)
    layers = [type(m).__name__ for m in loss.predict[0]]
    assert layers == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]  # three layers, as in the paper
    with pytest.raises(ValueError, match="targets"):
        AugSelf(3, {})


def test_augself_can_be_learned():
    torch.manual_seed(0)
    loss = AugSelf(2, {"shift": 1}, hidden=32)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for _ in range(150):
        a, b = torch.randn(2, 64, 2)
        value = loss(a, b, {"shift": b[:, :1] - a[:, :1]})
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value.item() < 0.15  # 1 is knowing nothing


class TestParameterDifferences:
    def drawn(self, **values: torch.Tensor) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        return {"color": {"0.ColorJitter": values}}

    def test_second_minus_first(self):
        a, b = (
            self.drawn(contrast_factor=torch.tensor([1.0, 2.0])),
            self.drawn(contrast_factor=torch.tensor([4.0, 1.0])),
        )
        out = parameter_differences(a, b)
        assert out["color/0.ColorJitter/contrast_factor"].tolist() == [[3.0], [-1.0]]

    def test_a_whole_circle_is_cosine_and_sine(self):
        a, b = self.drawn(hue_factor=torch.tensor([-0.5, 0.0])), self.drawn(hue_factor=torch.tensor([0.5, 0.25]))
        (out,) = parameter_differences(a, b).values()
        torch.testing.assert_close(out, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), atol=1e-6, rtol=0)

    def test_an_operation_that_fired_nowhere_gives_numbers(self):
        never = self.drawn(batch_prob=torch.zeros(3), contrast_factor=torch.tensor([1.0, 2.0, 3.0]))
        out = parameter_differences(never, never)
        assert all(bool((t == 0).all()) for t in out.values()) and len(out) == 2

    def test_a_crop_is_its_center_and_size_in_shares_of_the_image(self):
        batch = StructuredViews({"spatial": [K.RandomResizedCrop((4, 4), p=1.0)]}, seed=0)(torch.rand(5, 3, 20, 10))
        a, b = batch.parameters[:2]
        corners = [p["spatial"]["0.RandomResizedCrop"]["src"] for p in (a, b)]  # [B, 4, (x, y)]
        boxes = []
        for c in corners:
            low, high = c.amin(1), c.amax(1)
            size = torch.tensor([10.0, 20.0])
            boxes.append(torch.cat([(low + high) / 2 / size, (high - low) / size], 1))
        (found,) = (v for k, v in parameter_differences(a, b).items() if k.endswith("src"))
        torch.testing.assert_close(found, boxes[1] - boxes[0], atol=1e-6, rtol=1e-5)
        assert found.dtype == torch.float32

    def test_then_belongs_to_no_group(self):
        a = self.drawn(contrast_factor=torch.ones(2)) | {"then": {"0.Noise": {"std": torch.ones(2)}}}
        assert list(parameter_differences(a, a)) == ["color/0.ColorJitter/contrast_factor"]

    def test_other_groups_and_operations_are_refused(self):
        a = self.drawn(contrast_factor=torch.ones(2))
        with pytest.raises(ValueError, match="same groups"):
            parameter_differences(a, {"spatial": {}})
        with pytest.raises(ValueError, match="operations of 'color'"):
            parameter_differences(a, {"color": {}})
