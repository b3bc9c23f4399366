"""A family defines how misaligned two embeddings of a pair are, and how spread out all embeddings are.

    loss = (1/S) sum_s weight_s * mean alignment(a_s, b_s)  +  entropy(joint)

`Objective` computes the loss's terms from two such functions; `Family` takes a user's own. SimCLR, VICReg and Barlow
Twins compute theirs over ranks without gathering embeddings. Legend: V views, B images (N over all ranks), S spaces.
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
    """Base class of families: the misalignment of the two embeddings of a pair, and the entropy of all embeddings.

    Attributes:
        name: name used in messages, `Terms` and files.
        weight: lambda of each space if `JointEntropyLoss` is given no weights.
        on_sphere: whether every space is L2-normalized before comparison.
        defaults: coefficients that `JointEntropyLoss` accepts for this family, with their defaults.
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
        """Misalignment [n] of the embeddings a and b [n, d], per sample; 0 is perfect."""
        raise NotImplementedError

    def entropy(self, joint: Joint, ids: Ids) -> Scalar:
        """The scalar that is minimized to spread out the joint embeddings [V, B, D] of all ranks; ids [V, B]."""
        raise NotImplementedError

    @property
    def scalar(self) -> float | Tensor:
        """A number of the family that may be on the device; it is read together with the results of the checks."""
        return 0.0

    # ------------------------------------------------------------------------------------------------ the terms

    def parts(self, rows: Rows) -> Parts:
        """The terms of a batch; families with other statistics override this."""
        z = self.prepared(rows)
        views = {n: t.unbind(0) for n, t in z.items()}  # once, as the gradient of each indexing would copy all views
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
        """Write the entropy of the joint embedding and, if wanted, that of content alone, into the parts."""
        joint = torch.cat(list(z.values()), dim=-1)
        if self.on_sphere:
            joint = joint / math.sqrt(len(z))
        whole = _dist.gather(joint.transpose(0, 1), rows.shards).transpose(0, 1)
        ids = _dist.gather(rows.ids.T.contiguous(), rows.shards).T
        out.entropy = self._entropy(whole, ids)
        if rows.content_entropy:
            out.content_entropy = self._entropy(whole[..., columns_of(z)["content"]], ids)

    def prepared(self, rows: Rows) -> dict[str, Tensor]:
        """Every space [V, B, d] in the form that the family compares, such as L2-normalized."""
        if not self.on_sphere:
            return dict(rows.z)
        return {n: unit_rows(t, rows.types.get(n)) for n, t in rows.z.items()}

    def misalignment(self, guess: Matrix, target: Matrix, mask: Vector | None, shards: Shards | None = None) -> Scalar:
        """Misalignment of guesses and targets [n, d], on the scale of the family's loss; for `EquivarianceLoss`.

        Computed over the samples of this process, or of all ranks if `shards` is given; 0 if the mask is empty.
        """
        s = Shards(None, (len(guess),), 0) if shards is None else shards
        both = torch.stack([guess, target])
        z = self.prepared(Rows({"pair": both}, {}, torch.arange(len(guess)).expand(2, -1), s))["pair"]
        return self.weight * self._pair(z, Pair(0, 1, mask), Rows({}, {}, z, s))[0]

    def largest(self, dtype: torch.dtype, width: int, joint: int, rows: int) -> float:
        """The largest entry whose squares can be summed in the dtype; beyond it the loss would be wrong or NaN.

        Args:
            dtype: dtype in which the loss is computed.
            width, joint: width of the space, and of all spaces together.
            rows: number of samples over all ranks.
        """
        return math.sqrt(torch.finfo(dtype).max / (4 * max(width, rows, 1)))

    def triton_from(self, z: Mapping[str, Tensor], rows: int, backend: Backend, content_entropy: bool) -> int:
        """Number of samples from which backend "auto" uses triton in this process (`dispatch.rows_for_triton`).

        Args:
            z: spaces [V, B, d] in their original dtype.
            rows: N over all ranks and views, estimated by this process.
        """
        return NEVER

    def refuse_backend(self, backend: str) -> None:
        """Raise if a backend is requested by name and the family offers no choice."""
        if backend not in ("auto", "eager"):
            raise ValueError(
                f"backend: expected 'auto' or 'eager', as family {self.name!r} computes its entropy itself: got "
                f"{backend!r}; simclr, vicreg and barlow have other backends"
            )

    # ------------------------------------------------------------------------------------------------ inside

    def _pair(self, z: Tensor | Sequence[Tensor], pair: Pair, rows: Rows) -> tuple[Tensor, int | Tensor]:
        a, b = z[pair.a], z[pair.b]
        values = self._outside_autocast(self.alignment, a, b)
        if not isinstance(values, Tensor) or values.shape != a.shape[:1]:
            got = _checks.shape(values) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"family {self.name!r}, alignment: expected the misalignment of each sample, [{len(a)}]: got {got}"
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
    """A custom family for the joint-entropy loss, made of an alignment and an entropy function.

    >>> from ssd_addon import JointEntropyLoss
    >>> def alignment(a, b):  # [n, d], [n, d] -> [n]
    ...     return (a - b).abs().mean(dim=1)
    >>> def entropy(joint, ids):  # [V, B, D], [V, B] -> scalar; smaller is more spread out
    ...     return -torch.stack([torch.logdet(torch.cov(view.T) + torch.eye(view.shape[1])) for view in joint]).mean()
    >>> criterion = JointEntropyLoss(Family("log det", alignment=alignment, entropy=entropy, weight=5.0))
    >>> criterion({"content": torch.randn(3, 16, 4), "color": torch.randn(3, 16, 2)}).shape
    torch.Size([])

    Weights, trim, content_keys, content_entropy (the entropy of the content columns alone), interleaved plans, ranks,
    `Terms` and `DualAscent` work for every family.

    Args:
        name: name used in messages, `Terms` and files.
        alignment: (a [n, d], b [n, d]) -> [n], the misalignment of each sample; 0 is perfect.
        entropy: (joint [V, B, D], ids [V, B]) -> scalar to be minimized. It gets the embeddings of all ranks, gathered
            with the right gradient; embeddings with the same id show the same image. The result must be the same on
            every rank: a function that draws random numbers must draw the same ones everywhere.
        weight: lambda of each space if `JointEntropyLoss` is given no weights.
        on_sphere: L2-normalize every space before comparison; the joint embedding is then the concatenation divided by
            sqrt(S), which has unit length too.

    Both functions run outside autocast, forward and backward, in max(float32, dtype of the embeddings). They may be
    modules with parameters, which are registered and trained as parameters of the criterion.

    Raises:
        TypeError: alignment or entropy is not callable.
        ValueError: when called: the alignment is not [n], or the entropy is not a scalar.

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
