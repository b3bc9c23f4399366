"""Triton's interpreter runs the kernels on the CPU; triton reads this when it is first imported. Shapes are checked."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import shapes

shapes.check()
