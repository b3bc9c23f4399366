"""An error that only happened to be raised while an operation ran is not the operation's."""

import pytest
import torch

from ssd_addon import StructuredViews
from ssd_addon.operations import Operation


class Fails(Operation):
    """Multiplies by a number of its own; once armed, it raises."""

    error = None

    def draw(self, shape, generator):
        return {"factor": 0.5 + 0.5 * torch.rand(shape[0], generator=generator)}

    def apply(self, x, parameters):
        if self.error is not None:
            raise self.error
        return x * parameters["factor"].view(-1, 1, 1, 1)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "error,kind,message",
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            RuntimeError,
            r"^DataLoader worker \(pid",
        ),
        (torch.OutOfMemoryError("no memory left"), torch.OutOfMemoryError, "^no memory left"),
        (
            RuntimeError("sizes do not match"),
            ValueError,
            r"Fails could not be applied to images .*: sizes do not match",
        ),
    ],
)
def test_what_comes_from_outside_is_passed_on(error, kind, message, fast):
    operation = Fails()
    views = StructuredViews({"light": [operation]}, seed=0, fast=fast)
    views(torch.rand(4, 3, 8, 8))
    operation.error = error
    with pytest.raises(kind, match=message):
        views(torch.rand(4, 3, 8, 8))
