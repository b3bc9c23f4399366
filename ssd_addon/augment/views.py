"""Structured views: each key shares some of the query's augmentation parameters and redraws the others.

    view 0        the query, parameters theta
    view 1        the content key: every group redrawn
    view 1 + m    the key of style m: group m's parameters are the query's, every other group is redrawn

The parameters of all views are drawn first; each view then depends only on its images and parameters. So sharing is
exact, and a view can be replayed. Legend: V views, B images, M groups. Source: Eastwood et al., arXiv 2311.08815,
structured augmentations; cross-image keys are an addition of this project (docs/method.md).
"""

import functools
import multiprocessing
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from ssd_addon import _checks
from ssd_addon._shapes import Batch
from ssd_addon.augment.drawing import Drawing
from ssd_addon.augment.fast.work import Fast
from ssd_addon.augment.native import Cropped, finished
from ssd_addon.augment.samples import Samples, checked, checked_range, floats
from ssd_addon.augment.stages import THEN, Stage, check_order
from ssd_addon.batch import ViewBatch, ViewParameters
from ssd_addon.differences import parameter_differences
from ssd_addon.operations.draws import in_float32
from ssd_addon.plan import KINDS, PlanKind, ViewPlan

Groups = Mapping[str, Sequence[Any]]
INDEPENDENT = -1  # takes the place of the rank, so that no draw made in training is repeated
_IMPORTED_BY = os.getpid()  # differs in a forked process
TRIAL_SHAPES = ((3, 64, 64), (3, 256, 256), (1, 64, 64), (4, 64, 64), (3, 1024, 1024))


class StructuredViews(nn.Module):
    """Make structured views of a batch of images, on the images' device.

    >>> import kornia.augmentation as K
    >>> views = StructuredViews({"color": [K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8)],
    ...                          "spatial": [K.RandomHorizontalFlip()]}, seed=0)
    >>> batch = views(torch.rand(4, 3, 16, 16))
    >>> batch.views.shape, batch.plan.spaces
    (torch.Size([4, 4, 3, 16, 16]), ('content', 'color', 'spatial'))
    >>> hue = [p["color"]["0.ColorJitter"]["hue_factor"] for p in batch.parameters]
    >>> torch.equal(hue[2], hue[0]), torch.equal(hue[1], hue[0])  # the color key shares them, the content key does not
    (True, False)

    Args:
        groups: name -> operations, applied in the order given: Kornia's 2-D operations, torchvision's v2 transforms,
            objects with `draw` and `apply` (`operations.Operation`), or `operations.seeded(fn)` of anything else.
            Every group gets a style space of its name. `{}` is ordinary two-view SSL.
        then: operations that are redrawn for every view and image and belong to no group (a final blur, Normalize).
        plan: "shared_query" (V = M + 2) or "interleaved" (V = 2).
        key_groups, key_then: other operations for the keys, by group. A key that shares a group runs the query's.
        cross_image: groups whose key is made from another image of the batch: for group m, the image m positions away.
        constrained_crop: a number a in [0, 1). The key of a style whose group contains no crop is cropped near the
            query's box: its area is 1 - a to 1 + a times the query's, and its center lies inside that box.
        seed: seed of the draws; None takes one from torch's global generator, as layers do. Every rank, data-loader
            worker and call draws different numbers.
        rank: rank of this process; None asks torch.distributed, then the environment variable RANK, then uses 0. A
            spawned data-loader worker has no process group: views that are part of the data set arrive there with the
            rank of their process, and views that the worker imports anew need RANK, as torchrun sets it.
        fast: apply supported operations together, in few passes over the pixels (docs/views.md); `plan_of_work()` lists
            them. False applies operations one by one. The parameters are the same.
        sample_ndim: dimensions of a sample: 3 for images [C, H, W], 2 for series [C, T], 1 for tables, 4 for videos.
        value_range: (lowest, highest) value of a sample, which operations may rely on; None for no check.

    Every draw is per image, also for operations that Kornia draws once per batch. Global generators are left as they
    were. Views are computed in float32, outside autocast; on the CPU view by view, on other devices in one pass. Seed
    and call number are module state, saved in the state_dict of a surrounding module.

    Raises:
        TypeError, ValueError: an operation cannot be shared exactly (it draws once for the batch, its parameters change
            size, it draws while it is applied, or it depends on other images), or clamps pixels after another operation
            has taken them out of [0, 1]; a group draws nothing; images are not [B, C, H, W], uint8 or floating point in
            [0, 1] (or as `sample_ndim` and `value_range` require).
    """

    def __init__(
        self,
        groups: Groups,
        *,
        then: Sequence[Any] = (),
        plan: PlanKind = "shared_query",
        key_groups: Groups | None = None,
        key_then: Sequence[Any] | None = None,
        cross_image: Iterable[str] = (),
        constrained_crop: float | None = None,
        seed: int | None = None,
        rank: int | None = None,
        fast: bool = True,
        sample_ndim: int = 3,
        value_range: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        _check_groups(groups, key_groups)
        self.plan = ViewPlan(_checks.choice(plan, KINDS, "plan"), ("content", *groups))
        self.samples = Samples(_checks.width(sample_ndim, "sample_ndim"), checked_range(value_range))
        keys = key_groups or {}
        made = [Stage(name, operations, keys.get(name), self.samples) for name, operations in groups.items()]
        self.stages = {stage.name: stage for stage in (*made, Stage(THEN, then, key_then, self.samples))}
        check_order(tuple(self.stages.values()))
        self.operations = nn.ModuleList([m for stage in self.stages.values() for m in stage.modules()])
        self.cross_image = _named_groups(cross_image, groups)
        self.constrained_crop = constrained_crop
        if constrained_crop is not None:
            if not 0 <= constrained_crop < 1:
                raise ValueError(f"constrained_crop: expected a from 0 to below 1: got {constrained_crop!r}")
            if not any(stage.resizes_a_crop for stage in made):
                raise ValueError("constrained_crop: expected a RandomResizedCrop in some group: got none to constrain")
        self.seed = int(torch.randint(2**62, ())) if seed is None else _checked_seed(seed)
        self.call, self._rank = 0, rank
        self._copied_from: int | None = None  # the rank of the process that copied this module, by pickle or deepcopy
        self.drawing = Drawing(self.plan, self.stages, self.cross_image, constrained_crop)
        self.fast = bool(fast) and self.samples == Samples()
        self._fast = Fast(self.stages)

    # ------------------------------------------------------------------------------------------------ calling

    if TYPE_CHECKING:

        def __call__(self, images: Tensor | Cropped) -> ViewBatch: ...

    @torch.no_grad()
    def forward(self, images: Batch | Cropped) -> ViewBatch:
        """Views of images [B, C, H, W], uint8 or floating point in [0, 1], or of what `NativeCrops` returns."""
        if isinstance(images, Cropped):
            return finished(self, images)
        x = self._taken(images)
        b = x.shape[0]
        index = self.plan.default_space_index(b, call=self.call) if self.plan.kind == "interleaved" else None
        sources, ids = self.drawing.sources(b, index)
        seed = self.next_draw()
        self._seen = tuple(x.shape[1:])
        parameters = self.drawing.views(tuple(x.shape), seed, index)
        out = ViewBatch(
            self._made(x, sources, parameters),
            self.plan,
            image_ids=None if ids is None else ids.to(x.device),
            space_index=None if index is None else index.to(x.device),
            parameters=parameters,
        )
        out.origin, out.local_ids = seed, True
        return out

    @torch.no_grad()
    def replay(self, images: Batch, parameters: ViewParameters | Mapping[str, Any]) -> Batch:
        """Recompute the pixels of one view: `views.replay(images, batch.parameters[v])` equals `batch[v]`.

        Args:
            images: [B, C, H, W], the view's source images (for a cross-image key, images[batch.image_ids[v]]).
            parameters: one entry of `ViewBatch.parameters`.
        """
        if not isinstance(parameters, ViewParameters):
            parameters = ViewParameters(parameters)
        _checks.same_names(parameters, tuple(self.stages), "parameters", "views")
        parameters = parameters.map(Tensor.cpu)  # where they were drawn
        return self._made(self._taken(images), [None], [parameters])[0]

    @torch.no_grad()
    def independent(self, images: Batch, *, seed: int | tuple[int, ...] = 0) -> ViewBatch:
        """Two views of each image that share no parameters, both made by the query's operations; for evaluation.

        The draws depend only on `seed` and this module's seed: the views are the same at every call and on every rank,
        and the draws for training are not affected. `.parameters` holds the parameters of both views.

        Args:
            images: [B, C, H, W], uint8 or floating point in [0, 1].
            seed: a number, or a tuple of numbers.
        """
        x = self._taken(images)
        own = (self.seed, INDEPENDENT, *(seed if isinstance(seed, tuple) else (seed,)))
        drawn = [self.drawing.view(tuple(x.shape), own, view, None, None, keyed=False) for view in range(2)]
        return ViewBatch(self._made(x, [None] * 2, drawn), ViewPlan.shared_query(("content",)), parameters=drawn)

    @torch.no_grad()
    def plain(self, images: Batch) -> Batch:
        """Images without random augmentation: scaled to [0, 1], then normalized if `then` contains a Normalize."""
        x = floats(checked(images, self.samples))
        for op in (step.module for step in self.stages[THEN].query):
            if op is not None and type(op).__name__ == "Normalize":  # Kornia's or torchvision's
                x = op(x)
        return x

    def parameter_sizes(self) -> dict[str, int]:
        """The parameters that groups draw and their sizes in `parameter_differences`, by path.

        Returns:
            path such as "color/0.ColorJitter/hue_factor" -> numbers per image in `parameter_differences`.

        Raises:
            ValueError: no trial image suits the operations (call the views once first).
        """
        shapes = TRIAL_SHAPES if self.samples.ndim == 3 else ()
        for shape in (*([self._seen] if self._seen else []), *shapes):
            try:
                a, b = (self.drawing.view((2, *shape), (0, v), v, None, None, keyed=False) for v in range(2))
            except (ValueError, RuntimeError, TypeError, AssertionError, IndexError):
                continue
            return {path: t.shape[1] for path, t in parameter_differences(a, b).items()}
        takes = "operations that take RGB images: got others" if self.samples.ndim == 3 else "a first batch of samples"
        raise ValueError(f"parameter_sizes: expected {takes}; call the views first")

    def next_draw(self) -> tuple[int, ...]:
        """The seed of this call's draws; advances the call number, so that the next call gets another."""
        self.call += 1
        return self.seed, self.rank, _worker_seed(), self.call - 1

    @property
    def rank(self) -> int:
        """The rank that enters the seed of the draws."""
        if self._rank is not None:
            return self._rank
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank()
        if self._copied_from is not None and (get_worker_info() is not None or "RANK" not in os.environ):
            return self._copied_from
        if get_worker_info() is not None and "RANK" not in os.environ:
            _warn_of_ranks()
        return int(os.environ.get("RANK", 0))

    def plan_of_work(self, channels: int = 3) -> str:
        """Which operations the fast path combines for images with this many channels, and which run one by one.

        >>> import kornia.augmentation as K
        >>> print(StructuredViews({"color": [K.ColorJitter(0.4), K.RandomGamma((0.5, 2.0))]}, seed=0).plan_of_work())
        query: colors: color/0.ColorJitter; as it is: color/1.RandomGamma
        """
        return "\n".join(self._fast.plan(channels)) if self.fast else "every operation as it is (fast=False)"

    # ------------------------------------------------------------------------------------------------ making

    def _taken(self, images: Batch) -> Tensor:
        """The checked images: uint8 stays uint8 on the fast path, everything else becomes float32 in [0, 1]."""
        x = checked(images, self.samples)
        return x if self.fast and x.dtype == torch.uint8 else floats(x)

    def _made(self, x: Tensor, sources: Sequence[Tensor | None], parameters: Sequence[ViewParameters]) -> Tensor:
        """The pixels of all views [V, B, C, H, W], from images as `_taken` returns them.

        Args:
            sources: for each view the source image of each sample [B], or None if each is its own.
        """
        if self.fast:
            with in_float32(), torch.autocast(x.device.type, enabled=False):
                return self._fast.make(x, sources, parameters)
        inputs = [x if s is None else x[s.to(x.device)] for s in sources]
        if x.device.type == "cpu" or len(inputs) == 1 or any(p.from_key for p in parameters):
            out = [self._view(x, p) for x, p in zip(inputs, parameters, strict=True)]
        else:
            out = self._in_one_pass(inputs, parameters)
        if len({tuple(o.shape) for o in out}) > 1:
            raise ValueError(f"views: expected all of one size: got {_checks.names(_checks.shape(o) for o in out)}")
        return torch.stack(out)

    def _in_one_pass(self, inputs: Sequence[Tensor], parameters: Sequence[ViewParameters]) -> list[Tensor]:
        """All views, computed as one batch of V*B images; the pixels equal those computed view by view."""
        together = ViewParameters(
            {
                stage: {
                    key: {k: torch.cat([p[stage][key][k] for p in parameters]) for k in values}
                    for key, values in operations.items()
                }
                for stage, operations in parameters[0].items()
            }
        )
        return list(self._view(torch.cat(list(inputs)), together).split(len(inputs[0])))

    def _view(self, x: Tensor, parameters: ViewParameters | Mapping[str, Any]) -> Tensor:
        from_key: Mapping[str, Tensor] = parameters.from_key if isinstance(parameters, ViewParameters) else {}
        with in_float32(), torch.autocast(x.device.type, enabled=False):
            for stage in self.stages.values():
                x = stage.apply(x, parameters[stage.name], from_key.get(stage.name))
        return x

    # ------------------------------------------------------------------------------------------------ state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with a surrounding module to another device; operations stay in float32 when it is cast."""
        kept: Callable[[Tensor], Tensor] = lambda t: t.to(fn(t).device) if t.is_floating_point() else fn(t)  # noqa: E731
        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call]

    _seen: tuple[int, ...] = ()  # the sample shape of the last images

    def get_extra_state(self) -> Tensor:
        """(seed, call) as a tensor, which any checkpoint format can hold; rank 0's state restores every rank."""
        return torch.tensor([self.seed, self.call], dtype=torch.int64)

    def set_extra_state(self, state: Any) -> None:
        if not isinstance(state, Tensor) or state.numel() != 2:
            raise ValueError(f"StructuredViews state: expected a tensor (seed, call): got {state!r}")
        self.seed, self.call = (int(v) for v in state.tolist())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        here, old = prefix + "_extra_state", (prefix + "seed", prefix + "call")
        if here not in state_dict and all(k in state_dict for k in old):  # an older format
            state_dict[here] = torch.tensor([int(state_dict.pop(k)) for k in old])
        if here not in state_dict:
            warnings.warn(
                f"the state of StructuredViews is not in this checkpoint: expected its seed and call number under "
                f"{here!r}: got none; its present seed and call number are kept",
                RuntimeWarning,
                stacklevel=2,
            )
            state_dict[here] = self.get_extra_state()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _replicate_for_data_parallel(self) -> Any:
        raise TypeError(
            "StructuredViews: expected one device per process, or DistributedDataParallel: got nn.DataParallel, whose "
            "copies would draw the same views on every device and at every call; start one process per device "
            "(torchrun), or keep the views outside the wrapped module"
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_copied_from"] = self.rank  # a spawned data-loader worker has no process group
        return state

    def extra_repr(self) -> str:
        return (
            f"{self.plan}, cross_image={self.cross_image}, constrained_crop={self.constrained_crop}, seed={self.seed}"
        )


def _check_groups(groups: Groups, key_groups: Groups | None) -> None:
    if not isinstance(groups, Mapping):
        hint = '; unpack a preset: **presets("color_spatial")' if isinstance(groups, str) else ""
        raise TypeError(f"groups: expected a mapping name -> operations: got {type(groups).__name__}{hint}")
    if isinstance(groups.get("groups"), Mapping):
        raise ValueError(
            "groups: expected name -> operations: got a mapping of arguments; unpack it, "
            'StructuredViews(**presets("color_spatial"))'
        )
    for name in groups:
        if name in ("content", THEN):
            raise ValueError(f"groups: expected names other than 'content' and 'then', such as 'color': got {name!r}")
    for name in key_groups or {}:
        if name not in groups:
            raise ValueError(f"key_groups: expected names of groups ({_checks.names(groups)}): got {name!r}")


def _named_groups(cross_image: Iterable[str], groups: Groups) -> tuple[str, ...]:
    if isinstance(cross_image, str) or not isinstance(cross_image, Iterable):
        raise TypeError(f"cross_image: expected a sequence of group names: got {cross_image!r}")
    chosen = tuple(cross_image)  # an iterator is read once
    for name in chosen:
        if name not in groups:
            raise ValueError(f"cross_image: expected names of groups ({_checks.names(groups)}): got {name!r}")
    return chosen


def _checked_seed(seed: Any) -> int:
    try:
        whole = operator.index(seed)
    except TypeError:
        whole = None
    if whole is None or not -(2**63) <= whole < 2**63:
        raise ValueError(f"seed: expected a whole number of 64 bits, so that it can be saved: got {seed!r}")
    return whole


@functools.cache
def _warn_of_ranks() -> None:
    """Warn once in a spawned worker whose parent was started as a rank is by `torch.multiprocessing.spawn`.

    A forked worker has its parent's process group, and torchrun gives every process RANK.
    """
    parent = multiprocessing.parent_process()
    if os.getpid() == _IMPORTED_BY and parent is not None and parent.name != "MainProcess":
        warnings.warn(
            f"StructuredViews: expected the rank of {parent.name}, which spawned this data-loader worker: got none, "
            "because the worker imported the views anew; they draw as on rank 0, so if there are several ranks, all of "
            "them draw the same views. Make the views or the transform an attribute of the data set, which is then "
            'sent to the workers with its rank, or set os.environ["RANK"] before the workers start',
            RuntimeWarning,
            stacklevel=3,
        )


def _worker_seed() -> int:
    info = get_worker_info()
    return 0 if info is None else int(info.seed)
