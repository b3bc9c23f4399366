"""lightly's distributed scripts on the ranks of torchrun: each trains; after is equal to one process."""

import sys
import warnings
from pathlib import Path

import torch
from scripts import script
from torch import nn
from torchvision.datasets import FakeData
from torchvision.transforms.functional import to_tensor

from ssd_addon import JointEntropyLoss, StyleHeads, ViewPlan

SPACES = {"content": 8, "spatial": 4, "color": 4}
OPTIONS = ["--images", "8", "--batch-size", "4", "--size", "16", "--accelerator", "cpu"]


class Small(nn.Module):
    """Without batch statistics, which would be of the rank."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 512, 5, 4), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)


class Fixed:
    """Four views without chance, so that any split of the images gives the same."""

    plan = ViewPlan.shared_query(tuple(SPACES))

    def __init__(self, **_):
        pass

    def __call__(self, image):
        x = to_tensor(image).to(torch.get_default_dtype())
        return [x, x.flip(-1), x * 0.5, 1 - x.roll(3, -2)]


class Heads:
    @staticmethod
    def heads(width, spaces):
        return StyleHeads.heads(width, spaces, hidden=())


def make(module):
    """The script around a small network, from one start on every rank."""
    module.resnet18 = Small
    if hasattr(module, "SPACES"):
        module.SPACES = SPACES
    torch.manual_seed(0)
    return module


def weights(method, steps):
    """The weights after steps of one process on all eight images."""
    torch.manual_seed(0)
    small = Small()
    backbone = nn.Sequential(*list(small.children())[:-1])
    heads = Heads.heads(512, SPACES)
    found = [*backbone.parameters(), *heads.parameters()]
    optimizer = torch.optim.SGD(found, lr=0.06)
    views = torch.stack([torch.stack(x) for x, _ in FakeData(8, (3, 48, 48), transform=Fixed())], dim=1).flatten(0, 1)
    for _ in range(steps):
        optimizer.zero_grad()
        JointEntropyLoss(method)(heads(backbone(views).flatten(1)), Fixed.plan).backward()
        optimizer.step()
    return found


def main(folder):
    warnings.filterwarnings("ignore")
    done = []
    for method in ("simclr", "vicreg", "barlow"):
        for name in ("before", "after"):
            module = make(script("before/lightly_distributed" if name == "before" else "lightly_distributed"))
            model = module.main([*OPTIONS, "--method", method, "--epochs", "1", "--out", str(folder / method / name)])
            assert model.trainer.world_size == 2 and model.trainer.global_step == 1
            assert torch.isfinite(model.trainer.callback_metrics["train_loss"])
            done.append(f"{name}/{method}")
        torch.set_default_dtype(torch.float64)  # columns of eight rows vary so little that float32 is off by 4e-4
        module = make(script("lightly_distributed"))
        module.StructuredTransform, module.StyleHeads = Fixed, Heads
        model = module.main([*OPTIONS, "--method", method, "--epochs", "2", "--out", str(folder / method / "equal")])
        assert model.trainer.global_step == 2
        start, want = weights(method, steps=0), weights(method, steps=2)
        change, wanted = (
            torch.cat([(p - s).detach().flatten() for p, s in zip(ps, start, strict=True)])
            for ps in (model.parameters(), want)
        )
        error = float((change - wanted).norm() / wanted.norm())
        assert error < 1e-9, f"{method}: what two steps change is off by {error:.1e}"
        done.append(f"equal/{method}")
        torch.set_default_dtype(torch.float32)
    (folder / f"{model.global_rank}.txt").write_text("\n".join(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
