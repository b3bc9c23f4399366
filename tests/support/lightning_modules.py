"""A small LightningModule of either package, its images and loaders, for the tests of `ssd_addon.lightning`."""

import importlib
import warnings

import kornia.augmentation as K
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ssd_addon import DualAscent, EquivarianceLoss, JointEntropyLoss, StructuredViews, StyleHeads
from ssd_addon.lightning import StructuredTraining
from ssd_addon.runs import ResumableLoader

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
SPACES = {"content": 6, "color": 3}
SIZE = 12
ADVICE = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*"),
]
"""Marks of tests, for the advice of Lightning that does not matter here."""


class Images(Dataset):
    """(image, label) pairs."""

    def __init__(self, count=12):
        self.images = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index


def loader(batch_size=4, **options):
    return DataLoader(Images(), batch_size, **options)


def views(**options):
    return StructuredViews({"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0)]}, **{"seed": 3, **options})


class Backbone(nn.Module):
    """Without batch statistics, so that two ranks can equal one process."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)

    def forward(self, x):
        return self.conv(x).relu()


def heads():
    torch.manual_seed(0)
    return StyleHeads(Backbone(), SPACES, hidden=())


def ascent(**options):
    return DualAscent(SPACES, **{"tolerance": 0.01, "step_size": 0.5, **options})


def module(package=PACKAGES[0], *, adapt=True, equivariance=False, optimizer=None, body=(), **criterion):
    """A LightningModule with the mixin; `body` are its further attributes, such as hooks."""
    base = importlib.import_module(package).LightningModule

    class Mine(StructuredTraining, base):
        def __init__(self):
            super().__init__()
            self.views, self.model = views(), heads()
            options = {"temperature": nn.Parameter(torch.tensor(0.2)), **criterion}
            self.criterion = JointEntropyLoss("simclr", weights=ascent() if adapt else None, **options)
            if equivariance:
                torch.manual_seed(1)
                self.equivariance = EquivarianceLoss(SPACES, self.views, hidden=(5,))

        def configure_optimizers(self):
            make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
            return make(self.parameters())

    cls = type("Mine", (Mine,), dict(body)) if body else Mine
    return cls()


def trainer(package=PACKAGES[0], **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return importlib.import_module(package).Trainer(
        accelerator="cpu", **{**quiet, "enable_model_summary": False, "max_epochs": 1, **options}
    )


def fit(mine, data=None, *, package=PACKAGES[0], ckpt_path=None, **options):
    made = trainer(package, **options)
    made.fit(mine, loader() if data is None else data, ckpt_path=ckpt_path)
    return made


def resumable(workers=0):
    return ResumableLoader(Images(), batch_size=3, shuffle=True, seed=1, num_workers=workers)


def checkpoints(folder, package=PACKAGES[0], **options):
    made = importlib.import_module(f"{package}.callbacks").ModelCheckpoint
    return made(folder, **{"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}", **options})


def trained(folder, data, ckpt_path=None, package=PACKAGES[0], callbacks=(), body=(), **options):
    checkpoint = checkpoints(folder, package)
    mine = module(package, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01), body=body)
    options = {"max_epochs": 3, "enable_checkpointing": True, **options}
    fit(mine, data, package=package, ckpt_path=ckpt_path, callbacks=[*callbacks, checkpoint], **options)
    return state(mine)


def state(mine):
    return {k: v.clone() for k, v in mine.state_dict().items()}


def differences(a, b):
    """The names of the entries that are not bit-equal."""
    return sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k]))


def quiet():
    warnings.simplefilter("ignore")
