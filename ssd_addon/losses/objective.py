"""A family: how far apart two embeddings of a pair are, and how spread out all embeddings are.

    loss = (1/S) sum_s weight_s * mean alignment(a_s, b_s)  +  entropy(joint)

`Objective` makes the loss's terms of any two such functions; `Family` is one of a user's own. SimCLR, VICReg and Barlow
Twins compute theirs over ranks without gathering all rows. Legend: V views, B images (N over all ranks), S spaces.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd_addon import _checks, _dist
from ssd_addon._autocast import outside_autocast
from ssd_addon._dist import Shards
from ssd_addon._shapes import Ids, Joint, Matrix, Scalar, Vector
from ssd_addon._types import KeepsType
from ssd_addon._unit import unit_rows
from ssd_addon.kernels.choice import NEVER
from ssd_addon.kernels.dispatch import Backend
from ssd_addon.losses.rows import Pair, Parts, Rows, columns_of, mean_of_rows, mean_over_keys

Alignment = Callable[[Tensor, Tensor], Tensor]
Entropy = Callable[[Tensor, Tensor], Tensor]


class Objective(KeepsType):
    """What a family is: how far apart the two embeddings of a pair are, and how spread out all embeddings are.

    Attributes:
        name: for messages, `Terms` and files.
        weight: lambda of a space where `JointEntropyLoss` is given no weights.
        on_sphere: whether every space is L2-normalized before it is compared.
        defaults: coefficients that `JointEntropyLoss` takes as arguments for this family.
    """

    defaults: ClassVar[dict[str, float | None]] = {}

    def __init__(self, name: str, *, weight: float = 1.0, on_sphere: bool = False) -> None:
        super().__init__()
        if not isinstance(name, str) or not name:
            raise TypeError(f"Family: expected a name, such as 'mine': got {name!r}")
        self.name = name
        self.weight = _checks.not_negative(weight, "weight", "of a space's invariance, where none is given")
        self.on_sphere = bool(on_sphere)

    def alignment(self, a: Matrix, b: Matrix) -> Vector:
        """Misalignment of each row of a, b [n, d]: [n], 0 is perfect."""
        raise NotImplementedError

    def entropy(self, joint: Joint, ids: Ids) -> Scalar:
        """What is minimized to spread out joint [V, B, D] of all ranks, ids [V, B]: a scalar."""
        raise NotImplementedError

    @property
    def scalar(self) -> float | Tensor:
        """A number of the family's that may be on the device; it is read with the checks, in one go."""
        return 0.0

    # ------------------------------------------------------------------------------------------------ the terms

    def parts(self, rows: Rows) -> Parts:
        """The terms of a batch; a family with statistics of its own has its own."""
        z = self.prepared(rows)
        views = {n: t.unbind(0) for n, t in z.items()}  # once: the gradient of each index would be a copy of all views
        found = {n: [self._pair(views[n], p, rows) for p in pairs] for n, pairs in rows.pairs.items()}
        means = {n: mean_over_keys(each, rows.shards) for n, each in found.items()}
        invariance = {n: value for n, (value, _) in means.items()}
        out = Parts(
            invariance,
            dict(invariance),
            {n: count for n, (_, count) in means.items()},
            next(iter(z.values())).new_zeros(()),
            seen={n: t[0].detach() for n, t in z.items()},
            pairs={n: (views[n][p.a], views[n][p.b], p.mask) for n, (p, *_) in rows.pairs.items()},
        )
        self.spread(out, z, rows)
        return out

    def spread(self, out: Parts, z: Mapping[str, Tensor], rows: Rows) -> None:
        """Write the entropy of the joint embedding, and that of content alone, into the parts."""
        joint = torch.cat(list(z.values()), dim=-1)
        if self.on_sphere:
            joint = joint / math.sqrt(len(z))
        whole = _dist.gather(joint.transpose(0, 1), rows.shards).transpose(0, 1)
        ids = _dist.gather(rows.ids.T.contiguous(), rows.shards).T
        out.entropy = self._entropy(whole, ids)
        if rows.content_entropy:
            out.content_entropy = self._entropy(whole[..., columns_of(z)["content"]], ids)

    def prepared(self, rows: Rows) -> dict[str, Tensor]:
        """Every space [V, B, d] as the family compares it."""
        if not self.on_sphere:
            return dict(rows.z)
        return {n: unit_rows(t, rows.types.get(n)) for n, t in rows.z.items()}

    def misalignment(self, guess: Matrix, target: Matrix, mask: Vector | None, shards: Shards | None = None) -> Scalar:
        """How far guesses [n, d] are from targets [n, d], on the scale of the family's loss: `EquivarianceLoss`.

        Of the rows of this process alone, or of all ranks where it is said how the rows lie over them; 0 where the mask
        leaves no row.
        """
        s = Shards(None, (len(guess),), 0) if shards is None else shards
        both = torch.stack([guess, target])
        z = self.prepared(Rows({"pair": both}, {}, torch.arange(len(guess)).expand(2, -1), s))["pair"]
        return self.weight * self._pair(z, Pair(0, 1, mask), Rows({}, {}, z, s))[0]

    def largest(self, dtype: torch.dtype, width: int, joint: int, rows: int) -> float:
        """The largest entry whose squares can be summed in the type: beyond it the loss would be wrong or NaN.

        Args:
            dtype: that the loss computes in.
            width, joint: columns of the space, and of all spaces.
            rows: over all ranks.
        """
        return math.sqrt(torch.finfo(dtype).max / (4 * max(width, rows, 1)))

    def triton_from(self, z: Mapping[str, Tensor], rows: int, backend: Backend, content_entropy: bool) -> int:
        """From how many rows on this process takes triton where "auto" chooses (`dispatch.rows_for_triton`).

        Args:
            z: spaces [V, B, d] as they came.
            rows: N over all ranks and views, as far as this process can tell.
        """
        return NEVER

    def refuse_backend(self, backend: str) -> None:
        """Raise where a backend is asked for by name and the family has none to choose from."""
        if backend not in ("auto", "eager"):
            raise ValueError(
                f"backend: the family {self.name!r} computes its entropy itself, so expected 'auto' or 'eager': got "
                f"{backend!r}; simclr, vicreg and barlow have others"
            )

    # ------------------------------------------------------------------------------------------------ inside

    def _pair(self, z: Tensor | Sequence[Tensor], pair: Pair, rows: Rows) -> tuple[Tensor, int | Tensor]:
        a, b = z[pair.a], z[pair.b]
        values = self._outside_autocast(self.alignment, a, b)
        if not isinstance(values, Tensor) or values.shape != a.shape[:1]:
            got = _checks.shape(values) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"family {self.name!r}, alignment: expected the misalignment of each row, [{len(a)}]: got {got}"
            )
        return mean_of_rows(values, lambda: values, pair, rows.trim, rows.shards)

    def _entropy(self, joint: Tensor, ids: Tensor) -> Tensor:
        value = self._outside_autocast(lambda x: self.entropy(x, ids), joint)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = _checks.shape(value) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"family {self.name!r}, entropy: expected a scalar: got {got}")
        return value.reshape(())

    def _outside_autocast(self, f: Callable[..., Any], *tensors: Tensor) -> Any:
        return outside_autocast(f, *tensors, parameters=tuple(self.parameters()))


class Family(Objective):
    """What the joint-entropy loss compares and spreads out.

    >>> from ssd_addon import JointEntropyLoss
    >>> def alignment(a, b):  # [n, d], [n, d] -> [n]
    ...     return (a - b).abs().mean(dim=1)
    >>> def entropy(joint, ids):  # [V, B, D], [V, B] -> scalar: the smaller, the further spread out
    ...     return -torch.stack([torch.logdet(torch.cov(view.T) + torch.eye(view.shape[1])) for view in joint]).mean()
    >>> criterion = JointEntropyLoss(Family("log det", alignment=alignment, entropy=entropy, weight=5.0))
    >>> criterion({"content": torch.randn(3, 16, 4), "color": torch.randn(3, 16, 2)}).shape
    torch.Size([])

    Weights, trim, content_keys, content_entropy (the entropy of the content columns alone), interleaved plans, ranks,
    `Terms` and `DualAscent` work for every family.

    Args:
        name: for messages, `Terms` and files.
        alignment: (a [n, d], b [n, d]) -> [n], the misalignment of each row; 0 is perfect.
        entropy: (joint [V, B, D], ids [V, B]) -> scalar to be minimized, over the rows of all ranks: they are gathered
            before the call, with the right gradient. Rows of equal id show one image. It must give the same on every
            rank: a function that draws must draw alike everywhere.
        weight: lambda of a space where `JointEntropyLoss` is given no weights.
        on_sphere: L2-normalize every space before it is compared; the joint embedding is then the concatenation over
            sqrt(S), of unit length too.

    Both functions run outside autocast, forward and backward, in max(float32, type of the embeddings). Modules with
    parameters may stand in their place: they are registered, and trained with the criterion's parameters.

    Raises:
        TypeError: something that cannot be called.
        ValueError: in use: an alignment that is not [n], an entropy that is no scalar.

    Source: Eastwood et al., arXiv 2311.08815, the general form of the objective.
    """

    def __init__(
        self, name: str, *, alignment: Alignment, entropy: Entropy, weight: float = 1.0, on_sphere: bool = False
    ) -> None:
        super().__init__(name, weight=weight, on_sphere=on_sphere)
        for what, f in (("alignment", alignment), ("entropy", entropy)):
            if not callable(f):
                raise TypeError(f"Family {name!r}, {what}: expected a function of two tensors: got {type(f).__name__}")
        self.align, self.spread_out = alignment, entropy

    def alignment(self, a: Matrix, b: Matrix) -> Tensor:
        return self.align(a, b)

    def entropy(self, joint: Joint, ids: Ids) -> Tensor:
        return self.spread_out(joint, ids)

    def extra_repr(self) -> str:
        return f"{self.name!r}, weight={self.weight}, on_sphere={self.on_sphere}"
