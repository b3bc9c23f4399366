"""Draws the parameters of every view and chooses its source images; computes no pixels."""

from collections.abc import Mapping
from dataclasses import dataclass

import kornia.augmentation as K
import torch
from torch import Tensor

from ssd_addon.augment.crop import near
from ssd_addon.augment.stages import THEN, Stage, Step, check_order
from ssd_addon.batch import ViewParameters
from ssd_addon.operations.draws import Parameters, Seed, clone, generator, in_float32, rows_from
from ssd_addon.plan import ViewPlan


@dataclass(frozen=True)
class Drawing:
    """Which parameters views share with the query and which they redraw.

    Attributes:
        plan: which space a view, or an image of an interleaved key, serves.
        stages: name -> stage, in the order in which they are applied.
        cross_image: groups whose key is made from another image.
        constrained_crop: largest relative change of area for keys that are cropped near the query's box, or None.
    """

    plan: ViewPlan
    stages: Mapping[str, Stage]
    cross_image: tuple[str, ...]
    constrained_crop: float | None

    def sources(self, b: int, index: Tensor | None) -> tuple[list[Tensor | None], Tensor | None]:
        """The source image of each sample: per view [B], or None if each is its own; and image ids [V, B] or None."""
        v = self.plan.num_views
        if not self.cross_image:
            return [None] * v, None
        own = torch.arange(b)
        ids = own.repeat(v, 1)
        for name in self.cross_image:
            m = self.plan.spaces.index(name)
            rows = own if index is None else torch.nonzero(index == m).flatten()
            if len(rows) == 0:
                continue
            if len(rows) == 1:
                raise ValueError(
                    f"cross_image: expected two or more images for the key of {name!r}, which is made from another "
                    f"image: got one in a batch of {b}"
                )
            shift = m
            while shift % len(rows) == 0:
                shift += 1
            ids[1 if index is not None else 1 + m, rows] = rows.roll(shift)
        return [None if torch.equal(row, own) else row for row in ids], ids

    def _shared_rows(self, view: int, stage: str, index: Tensor | None) -> bool | Tensor:
        """Which samples of a view take this group's parameters from the query: all, none, or a mask [B]."""
        if view == 0 or stage == THEN:
            return False
        m = self.plan.spaces.index(stage)
        return view == 1 + m if index is None else index == m

    def _near_rows(self, view: int, b: int, index: Tensor | None) -> Tensor:
        """Mask [B] of the samples cropped near the query: those that serve a style whose group contains no crop."""
        free = torch.tensor([n == "content" or self.stages[n].crops for n in self.plan.spaces])
        if index is not None:
            return ~free[index]
        return torch.full((b,), view >= 1 and not bool(free[view - 1]))

    def views(self, shape: tuple[int, ...], seed: Seed, index: Tensor | None) -> list[ViewParameters]:
        """The parameters of all views of images of shape [B, C, H, W]."""
        out: list[ViewParameters] = []
        for view in range(self.plan.num_views):
            out.append(self.view(shape, seed, view, out[0] if view else None, index))
        return out

    @in_float32()
    def view(
        self,
        shape: tuple[int, ...],
        seed: Seed,
        view: int,
        query: ViewParameters | None,
        index: Tensor | None,
        *,
        keyed: bool = True,
    ) -> ViewParameters:
        mine = ViewParameters()
        late = any(s.traits is None for stage in self.stages.values() for s in (*stage.query, *(stage.key or ())))
        for i, stage in enumerate(self.stages.values()):
            shared = False if query is None else self._shared_rows(view, stage.name, index)
            if shared is True:
                assert query is not None
                mine[stage.name] = {key: clone(p) for key, p in query[stage.name].items()}
                for step in stage.query:
                    shape = step.shape_after(shape, mine[stage.name][step.key])
                continue
            from_key = keyed and view > 0 and stage.key is not None
            drawn: dict[str, Parameters] = {}
            for step in stage.steps(from_key):
                place = (view, i, step.place)
                drawn[step.key] = step.draw(shape, (*seed, *place, 0))
                if self.constrained_crop is not None and query is not None and stage.name != THEN:
                    self._keep_near(step, drawn[step.key], query[stage.name], shape, (*seed, *place, 1), view, index)
                shape = step.shape_after(shape, drawn[step.key])
            stage.check_varies()
            if isinstance(shared, Tensor):
                assert query is not None
                drawn = _merged(stage.name, drawn, query[stage.name], shared)
            if from_key:
                mine.from_key[stage.name] = ~shared if isinstance(shared, Tensor) else torch.ones(shape[0]).bool()
            mine[stage.name] = drawn
        if late:  # no trial sample suited some operations, so these images were their trial
            check_order(tuple(self.stages.values()))
        return mine

    def _keep_near(
        self,
        step: Step,
        drawn: Parameters,
        query: Mapping[str, Parameters],
        shape: tuple[int, ...],
        seed: Seed,
        view: int,
        index: Tensor | None,
    ) -> None:
        """Replace crops by constrained ones, near the query's box, for the samples that need it."""
        rows = self._near_rows(view, shape[0], index)
        if not isinstance(step.module, K.RandomResizedCrop) or step.key not in query or not rows.any():
            return
        a = self.constrained_crop or 0.0
        boxes = near(query[step.key]["src"], a, step.module, (shape[-2], shape[-1]), generator(*seed))
        drawn["src"] = torch.where(rows[:, None, None], boxes.to(drawn["src"].dtype), drawn["src"])


def _merged(
    stage: str, key: Mapping[str, Parameters], query: Mapping[str, Parameters], shared: Tensor
) -> dict[str, Parameters]:
    """The query's values where `shared` is true and the key's elsewhere, for every operation of either."""
    out = {}
    for name in dict.fromkeys((*query, *key)):
        if name in query and name in key:
            same = {k: t.shape for k, t in query[name].items()} == {k: t.shape for k, t in key[name].items()}
            if not same:
                raise ValueError(
                    f"{stage}: {name} draws different parameters in query and key; put them at other places"
                )
            out[name] = rows_from(key[name], query[name], shared)
        else:
            out[name] = clone(query.get(name) or key[name])
    return out
