"""Differences between the augmentation parameters of two views of the same images.

The equivariance term, `metrics.parameter_matrix` and probes of your own predict these differences. Needs torch alone.
Legend: B images, P pairs of views, k numbers of a parameter.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

View = Mapping[str, Mapping[str, Mapping[str, Tensor]]]
"""The parameters of one view: group -> operation -> parameter -> [B, ...], such as `ViewBatch.parameters[v]`."""
LARGEST = 16
"""Most numbers per image that a parameter may have; a larger one is a field of noise."""
PERIODS = {"hue_factor": 1.0, "angle": 360.0, "degrees": 360.0, "times": 4.0}
"""The period of angles and hues."""
BOX = "box"
"""Name for a crop's corners after conversion to center and size."""
THEN = "then"
"""The stage that is redrawn for every view and belongs to no group."""
SEED = "seed"
"""The parameter of an operation that is shared by seed, which does not describe the augmentation."""
NOT_DRAWN = ("order", "fn_idx", "forward_input_shape", "input_size", "output_size", "padding_size")
"""Entries that operations store with their parameters but that are not drawn, or are not numbers."""


def parameter_differences(a: View, b: View) -> dict[str, Tensor]:
    """The difference theta_b - theta_a between two views, for every parameter that a group draws.

    For losses and probes of your own, such as a head that predicts the differences from backbone features (AugSelf).

    >>> a = {"color": {"0.ColorJitter": {"brightness_factor": torch.tensor([0.5, 1.0])}}}
    >>> b = {"color": {"0.ColorJitter": {"brightness_factor": torch.tensor([1.5, 1.25])}}}
    >>> parameter_differences(a, b)
    {'color/0.ColorJitter/brightness_factor': tensor([[1.0000],
            [0.2500]])}

    Args:
        a, b: the parameters of two views, such as `batch.parameters[0]` and `batch.parameters[1]`.

    Returns:
        "group/operation/parameter" -> theta_b - theta_a [B, k] float32 on its device, in the units of the parameter.
        Differences of angles and hues are given as (cos, sin), whatever their range, so that k is the same for every
        batch. "batch_prob" is +-1 where the operation was applied in one view only. Where it was not applied in a view,
        its other parameters are replaced by their mean over the images where it was. A crop's corners are converted to
        its center and size, as fractions of the image. Fields of noise and operations in "then" are left out.

    Raises:
        ValueError: the views have different groups or operations.

    Source: the targets of AugSelf, Lee et al. 2021, arXiv 2111.09613.
    """
    for what, x, y in [("groups", a, b), *((f"operations of {g!r}", a[g], b[g]) for g in a if g in b)]:
        if x.keys() != y.keys():
            raise ValueError(f"expected two views with the same {what}: got {list(x)} and {list(y)}")
    out: dict[str, Tensor] = {}
    for group in a:
        if group != THEN:
            out |= group_differences(group, [a], [b], [])
    return out


def group_differences(
    group: str, a: Sequence[View], b: Sequence[View], skipped: list[str], *, exact: bool = False
) -> dict[str, Tensor]:
    """ "group/operation/parameter" -> theta_b - theta_a [P, k], for every parameter that one group draws.

    Args:
        group: name of the group.
        a, b: parameters of both views of the P pairs, batch after batch.
        skipped: list to which the parameters that are left out are appended, with the reason.
        exact: compute in float64 on the CPU; an angle becomes (cos, sin) only if it spans more than half of its circle.
            Otherwise compute in float32 on the parameters' device, without synchronization; every angle becomes
            (cos, sin).
    """
    each = _drawn(group, (a, b), skipped, exact)
    return {path: _difference(x, PERIODS.get(name), exact) for path, name, x in each}


def group_values(
    group: str, drawn: Sequence[View], skipped: list[str], like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """ "group/operation/parameter" -> theta [P, k], for every parameter that one group draws, float64 on the CPU.

    As in `group_differences` with exact=True: an angle that spans more than half of its circle becomes (cos, sin), and
    where an operation was not applied its other parameters are replaced by their mean. A crop's box becomes two
    parameters, "src center" and "src size".

    Args:
        group: name of the group.
        drawn: parameters of the P views, batch after batch.
        skipped: list to which the parameters that are left out are appended, with the reason.
        like: other values of this group, whose angles decide which ones become (cos, sin); None: `drawn` decides.
    """
    out: dict[str, Tensor] = {}
    for path, name, (x,) in _drawn(group, (drawn,), skipped, True):
        period = PERIODS.get(name)
        if name == BOX:
            out[f"{path} center"], out[f"{path} size"] = x[:, :2], x[:, 2:]
        elif period is not None and _on_circle(path, x, period, like):
            phase = 2 * math.pi / period * x
            out[path] = torch.cat([phase.cos(), phase.sin()], 1)
        else:
            out[path] = x
    return out


def _on_circle(path: str, x: Tensor, period: float, like: Mapping[str, Tensor] | None) -> bool:
    if like is not None and path in like:
        return like[path].shape[1] == 2 * x.shape[1]
    return float(x.max() - x.min()) > period / 2


def _drawn(
    group: str, sides: Sequence[Sequence[View]], skipped: list[str], exact: bool
) -> Iterator[tuple[str, str, list[Tensor]]]:
    """Path, name and values of every parameter that one group draws; the values are [P, k] for each side.

    Args:
        sides: for each side of the pairs, the parameters of its P views, batch after batch.
    """
    views = [view for side in sides for view in side]
    for op, parameters in sides[0][0][group].items():

        def joined(name: str, op: str = op) -> list[Tensor]:
            return [_joined([view[group][op][name] for view in side], exact) for side in sides]

        gates = None
        if "batch_prob" in parameters:
            applied = [p.round() for p in joined("batch_prob")]
            gates = [p > 0.5 for p in applied]
            yield f"{group}/{op}/batch_prob", "batch_prob", applied
        for name in parameters:
            path, kind = f"{group}/{op}/{name}", name
            if name in NOT_DRAWN or name == "batch_prob" or (name == "dst" and "output_size" in parameters):
                continue
            if name == SEED and len(parameters) == 1:
                skipped.append(f"{path}, a seed, which does not describe what was drawn")
                continue
            sizes = {view[group][op][name].shape[1:] for view in views}
            if len(sizes) > 1 or next(iter(sizes)).numel() > LARGEST:
                skipped.append(f"{path}, {'of varying size' if len(sizes) > 1 else 'a field of noise'}")
                continue
            x = joined(name)
            if name == "src" and "input_size" in parameters:
                kind = BOX
                x = [_box(corners, size) for corners, size in zip(x, joined("input_size"), strict=True)]
            yield path, kind, x if gates is None else _where_applied(x, gates)


def _joined(parameter: Sequence[Tensor], exact: bool) -> Tensor:
    """One parameter for all pairs, [P, k]."""
    values = [v.detach().cpu().double() if exact else v.detach().float() for v in parameter]
    return torch.cat([v.flatten(1) if v.ndim > 1 else v[:, None] for v in values])


def _where_applied(x: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    """A parameter of both views, replaced by its mean over applied cases where the operation was not applied."""
    applied, count = torch.cat(list(gates)), torch.stack([g.sum() for g in gates]).sum()
    mean = torch.where(applied, torch.cat(list(x)), 0).sum(0) / count.clamp(min=1)
    return [torch.where(g, t, mean) for t, g in zip(x, gates, strict=True)]


def _difference(x: Sequence[Tensor], period: float | None, exact: bool) -> Tensor:
    """theta_b - theta_a [P, k], or its cosine and sine [P, 2k] if the parameter is periodic."""
    difference, values = x[1] - x[0], torch.cat(list(x))
    if period is None or (exact and float(values.max() - values.min()) <= period / 2):
        return difference
    phase = 2 * math.pi / period * difference
    return torch.cat([phase.cos(), phase.sin()], 1)


def _box(corners: Tensor, size: Tensor) -> Tensor:
    """Center and size [P, 4], as fractions of the image, of corners [P, 8] (x, y) in pixels; (height, width) [P, 2]."""
    xy = corners.view(-1, 4, 2)
    low, high = xy.amin(1), xy.amax(1)
    return torch.cat([(low + high) / 2, high - low], 1) / size.flip(1).repeat(1, 2)
