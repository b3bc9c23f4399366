"""Tensor annotations with shapes; for type checkers and at run time each is a plain Tensor.

The tests check every annotated function with jaxtyping (tests/support/shapes.py): a letter stands for one size per
call. Legend: n samples, d width of a space, D joint width, V views, B images of size [C, H, W], P pairs.
"""

from typing import Annotated

from torch import Tensor

Scalar = Annotated[Tensor, ""]
Vector = Annotated[Tensor, "n"]
Matrix = Annotated[Tensor, "n d"]
Matrices = Annotated[Tensor, "*n d"]
Columns = Annotated[Tensor, "d"]
PerImage = Annotated[Tensor, "B"]
Embedded = Annotated[Tensor, "V B d"]
Joint = Annotated[Tensor, "V B D"]
Ids = Annotated[Tensor, "V B"]
PairRows = Annotated[Tensor, "P B"]
Batch = Annotated[Tensor, "B ..."]
Picture = Annotated[Tensor, "C H W"]
Pictures = Annotated[Tensor, "B C H W"]
Resized = Annotated[Tensor, "C H2 W2"]
View = Annotated[Tensor, "B C H2 W2"]
