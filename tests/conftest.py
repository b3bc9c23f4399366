"""Triton's interpreter runs the kernels on the CPU; triton reads this when it is first imported. Shapes are checked.

One thread for each process: the tests' tensors are small, and two processes of two threads on two cores wait for each
other.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import shapes

shapes.check()


@pytest.fixture(autouse=True)
def environment_kept():
    """Frameworks leave seeds and ranks in the environment, which other tests would go by."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)
