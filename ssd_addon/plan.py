"""`ViewPlan` defines which views of an image form the positive pairs of each space."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon._shapes import Ids, PerImage

PlanKind = Literal["shared_query", "interleaved"]
KINDS: tuple[PlanKind, ...] = ("shared_query", "interleaved")
ViewPairs = dict[str, tuple[tuple[int, int], ...]]


class ViewPlan:
    """Defines which views form the positive pair of each space.

    *Shared query* (V = S + 1): view 0 is the query, view 1 redraws every group (the content key), and view 1 + m
    takes group m's parameters from the query. Pairs: content (0, 1), style m (0, 1 + m).
    *Interleaved* (V = 2): one query and one key per image; image r of the local batch serves space (r + call) mod S,
    where `call` counts the calls of `StructuredViews`.

    *Explicit pairs*: given for each space, for multi-crop and for views that come from data collection. The invariance
    term of a space is the mean over its pairs; V is one more than the largest view index, and every view counts for the
    entropy.

    Source: Eastwood et al., arXiv 2311.08815, structured views; the interleaved form is its two-view variant.

    >>> ViewPlan.shared_query(("content", "color")).num_views
    3
    >>> {name: (a, b) for name, (a, b, _) in ViewPlan.shared_query(("content", "color")).pairs(4).items()}
    {'content': (0, 1), 'color': (0, 2)}
    >>> ViewPlan.interleaved(("content", "color")).pairs(5)["color"]
    (0, 1, tensor([1, 3]))
    >>> ViewPlan(pairs={"content": [(0, 1), (0, 3)], "color": [(0, 2)]}).num_views
    4

    Args:
        kind: "shared_query" or "interleaved", with `spaces`.
        spaces: names, content first.
        pairs: instead of both: name -> positive pairs (view a, view b), content first.

    Raises:
        ValueError: unknown kind; content is not the first space; a space has no pair; a view is paired with itself; a
            pair occurs twice.
    """

    # Not a dataclass: frameworks rebuild those field by field, and a plan must pass through them whole.
    __slots__ = ("_pairs", "kind", "spaces")

    kind: Literal["shared_query", "interleaved", "pairs"]
    spaces: tuple[str, ...]
    _pairs: ViewPairs

    def __init__(
        self,
        kind: PlanKind | None = None,
        spaces: Sequence[str] | None = None,
        *,
        pairs: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        if pairs is not None:
            if kind is not None or spaces is not None:
                raise ValueError("ViewPlan: expected pairs alone, or a kind and spaces: got both")
            found = _checked_pairs(pairs)
            object.__setattr__(self, "kind", "pairs")
            object.__setattr__(self, "spaces", tuple(found))
        else:
            object.__setattr__(self, "kind", _checks.choice(kind, KINDS, "ViewPlan"))
            object.__setattr__(self, "spaces", _checks.spaces(() if spaces is None else spaces, "ViewPlan"))
            keys = range(1, len(self.spaces) + 1) if kind == "shared_query" else [1] * len(self.spaces)
            found = {name: ((0, key),) for name, key in zip(self.spaces, keys, strict=True)}
        object.__setattr__(self, "_pairs", found)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"ViewPlan: expected no assignment, as plans are immutable: got a new {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ViewPlan) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self.kind, self.spaces, tuple(self._pairs.items())

    def __reduce__(self) -> tuple[Any, ...]:
        return _plan, (self.kind, self.spaces, self._pairs)

    def __repr__(self) -> str:
        if self.kind == "pairs":
            return f"ViewPlan(pairs={ {name: list(each) for name, each in self._pairs.items()} })"
        return f"ViewPlan({self.kind!r}, {self.spaces!r})"

    @classmethod
    def shared_query(cls, spaces: Sequence[str]) -> "ViewPlan":
        """One query, a content key, and one key per style: V = S + 1 views."""
        return cls("shared_query", spaces)

    @classmethod
    def interleaved(cls, spaces: Sequence[str]) -> "ViewPlan":
        """One query and one key per image; the space that the key serves rotates over the images: V = 2 views."""
        return cls("interleaved", spaces)

    @property
    def num_views(self) -> int:
        """V, the views per image."""
        return 1 + max(view for each in self._pairs.values() for pair in each for view in pair)

    @property
    def view_pairs(self) -> ViewPairs:
        """Name -> positive pairs (view a, view b); interleaved, only the images that serve the space use them."""
        return dict(self._pairs)

    def default_space_index(self, batch: int, device: torch.device | None = None, *, call: int = 0) -> PerImage:
        """The space that each image of an interleaved batch serves: (r + call) mod S, [B] int64."""
        return (torch.arange(batch, device=device) + call % len(self.spaces)) % len(self.spaces)

    def pairs(self, batch: int, space_index: Tensor | None = None) -> dict[str, tuple[int, int, Tensor]]:
        """The positive pair of each space: name -> (view a, view b, rows [n] int64).

        Args:
            batch: B, the number of images in the batch.
            space_index: [B] integers, only for an interleaved plan: the space of each image. None means r mod S.
        """
        if self.kind != "interleaved":
            rows = torch.arange(batch)
            if several := [name for name, each in self._pairs.items() if len(each) > 1]:
                raise ValueError(
                    f"pairs: expected one pair of views for each space: got several for {_checks.names(several)}; "
                    "use view_pairs"
                )
            return {name: (*each[0], rows) for name, each in self._pairs.items()}
        index = self.default_space_index(batch) if space_index is None else space_index
        return {name: (0, 1, torch.nonzero(index == s).flatten()) for s, name in enumerate(self.spaces)}

    def __str__(self) -> str:
        kinds = {
            "shared_query": "a shared-query plan",
            "interleaved": "an interleaved plan",
            "pairs": "a plan of pairs",
        }
        return f"{len(self.spaces)} spaces ({', '.join(self.spaces)}) in {kinds[self.kind]}"


def _plan(kind: Any, spaces: tuple[str, ...], pairs: ViewPairs) -> ViewPlan:
    return ViewPlan(pairs=pairs) if kind == "pairs" else ViewPlan(kind, spaces)


def _checked_pairs(pairs: Mapping[str, Sequence[tuple[int, int]]]) -> ViewPairs:
    if not isinstance(pairs, Mapping):
        raise TypeError(
            f"ViewPlan: expected pairs as a mapping space -> [(view, view), ...]: got {type(pairs).__name__}"
        )
    out: ViewPairs = {}
    for name in _checks.spaces(tuple(pairs), "ViewPlan"):
        each = []
        for pair in pairs[name]:
            views = tuple(pair) if isinstance(pair, tuple | list) else ()
            whole = all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in views)
            if len(views) != 2 or not whole or views[0] == views[1]:
                raise ValueError(
                    f"ViewPlan: expected pairs (view, view) of two views from 0 on: got {pair!r} for {name!r}"
                )
            if views in each or views[::-1] in each:
                raise ValueError(f"ViewPlan: expected distinct pairs: got {pair!r} twice for {name!r}")
            each.append((views[0], views[1]))
        if not each:
            raise ValueError(f"ViewPlan: expected at least one pair for every space: got none for {name!r}")
        out[name] = tuple(each)
    return out


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_ids(plan: ViewPlan, v: int, b: int, image_ids: Ids | None, space_index: PerImage | None) -> None:
    """Check ids [V, B] and index [B] of a batch: integers of the right shape, an index only in an interleaved plan."""
    if image_ids is not None:
        if image_ids.dtype not in _INTEGERS:
            raise TypeError(f"image_ids: expected integers, one id per view and image: got {image_ids.dtype}")
        if tuple(image_ids.shape) != (v, b):
            raise ValueError(f"image_ids: expected [V, B] = [{v}, {b}]: got {_checks.shape(image_ids)}")
    if space_index is not None:
        if plan.kind != "interleaved":
            raise ValueError(f"space_index: expected it only with an interleaved plan: got it with {plan}")
        if space_index.dtype not in _INTEGERS:
            raise TypeError(f"space_index: expected integers, the space of each image: got {space_index.dtype}")
        if tuple(space_index.shape) != (b,):
            raise ValueError(f"space_index: expected [B] = [{b}]: got {_checks.shape(space_index)}")
