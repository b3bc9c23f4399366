"""Saves and resumes training runs, and opens trained models without the script that trained them.

    model.save("runs/mine/model.pt", card={"backbone": "torchvision:resnet18", "views": {...}, "family": "simclr"})
    opened = load("runs/mine")                            .model, .views, .card, .log

`load` also opens your own files if they hold {"config": model.config(), "state_dict": model.state_dict(), "card": ...}.
A checkpoint of a run (`save_run`, `restore_run`) holds the same as "heads", "model" and "card", with the rest of its
state.
"""

from ssd_addon.card import check_card
from ssd_addon.runs.build import build_backbone, build_views, find
from ssd_addon.runs.checkpoint import restore_run, save_run
from ssd_addon.runs.guard import Guard, TooManySkipped, not_finite
from ssd_addon.runs.keeping import Checkpoints, Lock
from ssd_addon.runs.log import cut_log, logged, read_log
from ssd_addon.runs.open import Opened, load
from ssd_addon.runs.sampler import ResumableLoader, ResumableSampler, ShardSampler
from ssd_addon.runs.state import (
    checkpoint_activations,
    init_ranks,
    random_states,
    set_random_states,
    tensorboard,
    whole_optimizer,
)

__all__ = [
    "Checkpoints",
    "Guard",
    "Lock",
    "Opened",
    "ResumableLoader",
    "ResumableSampler",
    "ShardSampler",
    "TooManySkipped",
    "build_backbone",
    "build_views",
    "check_card",
    "checkpoint_activations",
    "cut_log",
    "find",
    "init_ranks",
    "load",
    "logged",
    "not_finite",
    "random_states",
    "read_log",
    "restore_run",
    "save_run",
    "set_random_states",
    "tensorboard",
    "whole_optimizer",
]
