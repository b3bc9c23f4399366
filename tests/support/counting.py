"""What waits for the device, or for other ranks: counted while something runs on the CPU."""

import functools
from collections import Counter

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from ssd_addon.kernels import energies, launch

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


NO_LAUNCH = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view",
    "_reshape_alias", "lift_fresh", "is_same_size", "promote_types", "result_type",
}  # fmt: skip
"""Beside views: they allocate or describe, and nothing runs on the device."""
TILES = {"sums_kernel", "weights_kernel", "products_kernel"}


class Launches(TorchDispatchMode):
    """What a step launches, counted inside the package's own operators too: `with Launches() as c:`.

    c.calls: ATen operators that launch something and the Triton kernels around the tiles, by name; c.tiles: the tiles'
    kernels; c.products: the matrix library's; c.free: views and allocations.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.tiles, self.free, self.products = Counter(), Counter(), Counter(), 0
        self._depth = 0

    def __enter__(self):
        if not self._depth:
            self._run, self._product = GridExecutor.__call__, energies.add_product
            GridExecutor.__call__ = functools.partialmethod(_launched, self, self._run)
            launch.add_product = energies.add_product = self._multiplied
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self._depth -= 1
        if not self._depth:
            GridExecutor.__call__ = self._run
            launch.add_product = energies.add_product = self._product

    def _multiplied(self, *args):
        self.products += 1
        with _disable_current_modes():
            self._product(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        full = func._schema.name
        namespace, _, name = full.partition("::")
        if namespace == "ssd_addon":
            with self:  # what is inside it
                return OPDEFS[full]._init_fn(*args, **(kwargs or {}))
        (self.free if func.is_view or name in NO_LAUNCH else self.calls)[name] += 1
        return func(*args, **(kwargs or {}))


def _launched(executor, counted, run, *args, **kwargs):
    name = executor.fn.__name__
    (counted.tiles if name in TILES else counted.calls)[name] += 1
    with _disable_current_modes():  # the interpreter copies its arguments with torch
        return run(executor, *args, **kwargs)
