"""Triton's interpreter runs the kernels on the CPU; triton reads this when it is first imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
