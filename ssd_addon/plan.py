"""Which views of an image form the positive pair of which space."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon._shapes import Ids, PerImage

PlanKind = Literal["shared_query", "interleaved"]
KINDS: tuple[PlanKind, ...] = ("shared_query", "interleaved")


class ViewPlan:
    """Which views form the positive pair of which space.

    *Shared query* (V = S + 1): view 0 is the query, view 1 redraws every group (the content key), and view 1 + m
    takes group m's parameters from the query. Pairs: content (0, 1), style m (0, 1 + m).
    *Interleaved* (V = 2): one query and one key per image; row r of the local batch serves space (r + call) mod S,
    where `call` counts the calls of `StructuredViews`.

    Source: Eastwood et al., arXiv 2311.08815, structured views; the interleaved form is its two-view variant.

    >>> ViewPlan.shared_query(("content", "color")).num_views
    3
    >>> {name: (a, b) for name, (a, b, _) in ViewPlan.shared_query(("content", "color")).pairs(4).items()}
    {'content': (0, 1), 'color': (0, 2)}
    >>> ViewPlan.interleaved(("content", "color")).pairs(5)["color"]
    (0, 1, tensor([1, 3]))
    """

    # No dataclass: frameworks take those apart, and a plan travels through them whole.
    __slots__ = ("kind", "spaces")

    kind: PlanKind
    spaces: tuple[str, ...]

    def __init__(self, kind: PlanKind, spaces: Sequence[str]) -> None:
        object.__setattr__(self, "kind", _checks.choice(kind, KINDS, "ViewPlan"))
        object.__setattr__(self, "spaces", _checks.spaces(spaces, "ViewPlan"))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"ViewPlan: expected it to stay as it was made: got a new {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ViewPlan) and (self.kind, self.spaces) == (other.kind, other.spaces)

    def __hash__(self) -> int:
        return hash((self.kind, self.spaces))

    def __reduce__(self) -> tuple[type["ViewPlan"], tuple[PlanKind, tuple[str, ...]]]:
        return ViewPlan, (self.kind, self.spaces)

    def __repr__(self) -> str:
        return f"ViewPlan({self.kind!r}, {self.spaces!r})"

    @classmethod
    def shared_query(cls, spaces: Sequence[str]) -> "ViewPlan":
        """One query, a content key, and one key per style: V = S + 1 views."""
        return cls("shared_query", spaces)

    @classmethod
    def interleaved(cls, spaces: Sequence[str]) -> "ViewPlan":
        """One query and one key per image; the space that the key serves rotates over the rows: V = 2 views."""
        return cls("interleaved", spaces)

    @property
    def num_views(self) -> int:
        """V, the views per image."""
        return 2 if self.kind == "interleaved" else len(self.spaces) + 1

    def default_space_index(self, batch: int, device: torch.device | None = None, *, call: int = 0) -> PerImage:
        """The space that each row of an interleaved batch serves: (r + call) mod S, [B] int64."""
        return (torch.arange(batch, device=device) + call % len(self.spaces)) % len(self.spaces)

    def pairs(self, batch: int, space_index: Tensor | None = None) -> dict[str, tuple[int, int, Tensor]]:
        """The positive pair of each space: name -> (view a, view b, rows [n] int64).

        Args:
            batch: B, the images in the batch.
            space_index: [B] integers, interleaved only: the space of each row. None means r mod S.
        """
        if self.kind == "shared_query":
            rows = torch.arange(batch)
            return {name: (0, 1 + s, rows) for s, name in enumerate(self.spaces)}
        index = self.default_space_index(batch) if space_index is None else space_index
        return {name: (0, 1, torch.nonzero(index == s).flatten()) for s, name in enumerate(self.spaces)}

    def __str__(self) -> str:
        kind = "a shared-query plan" if self.kind == "shared_query" else "an interleaved plan"
        return f"{len(self.spaces)} spaces ({', '.join(self.spaces)}) in {kind}"


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_ids(plan: ViewPlan, v: int, b: int, image_ids: Ids | None, space_index: PerImage | None) -> None:
    """Ids [V, B] and index [B] of a batch: integers of the right shape, an index only where the plan has one."""
    if image_ids is not None:
        if image_ids.dtype not in _INTEGERS:
            raise TypeError(f"image_ids: expected integers, one id per view and image: got {image_ids.dtype}")
        if tuple(image_ids.shape) != (v, b):
            raise ValueError(f"image_ids: expected [V, B] = [{v}, {b}]: got {_checks.shape(image_ids)}")
    if space_index is not None:
        if plan.kind != "interleaved":
            raise ValueError("space_index: only an interleaved plan gives each row a space; this plan is shared query")
        if space_index.dtype not in _INTEGERS:
            raise TypeError(f"space_index: expected integers, the space of each row: got {space_index.dtype}")
        if tuple(space_index.shape) != (b,):
            raise ValueError(f"space_index: expected [B] = [{b}]: got {_checks.shape(space_index)}")
