"""What waits for the device, or for other ranks: counted while something runs on the CPU."""

import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount",
    "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
"""Their result, or its shape, needs values of the device."""
METHODS = ("tolist", "numpy", "cpu")
"""They read values too, and on a CPU without an operator."""


class Counted(TorchDispatchMode):
    """`with Counted() as c:` gives c.reads and c.collectives, by name and in order."""

    def __init__(self):
        super().__init__()
        self.reads, self.collectives = [], []

    def __enter__(self):
        for name in METHODS:
            setattr(torch.Tensor, name, self._noting(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        for name in METHODS:
            delattr(torch.Tensor, name)  # those of the base class are behind

    def _noting(self, name, method):
        @functools.wraps(method)
        def noted(*args, **kwargs):
            self.reads.append(name)
            return method(*args, **kwargs)

        return noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            self.collectives.append(name)
        elif name in OPERATORS:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))
