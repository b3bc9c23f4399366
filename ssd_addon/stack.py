"""Heads of equal depth as one batched product. Legend: N rows, F backbone width, S spaces, h hidden, d_s width."""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class HeadStack(nn.Module):
    """Heads of equal hidden widths, run side by side: [N, F] -> name -> [N, d_s].

    One product makes the first hidden layer of all heads, one batched product each further one; the batch norm of
    all heads is one layer over their channels, which is what each head would do alone. Weights are stored stacked
    (first layer [S*h, F], further ones [S, h, h'], norms and biases one-dimensional).
    """

    def __init__(self, in_features: int, hidden: tuple[int, ...], widths: Mapping[str, int]) -> None:
        super().__init__()
        self.hidden, self.widths = hidden, dict(widths)
        s = len(widths)
        self.first = nn.Linear(in_features, s * hidden[0], bias=False) if hidden else None
        self.norms = nn.ModuleList([nn.BatchNorm1d(s * h) for h in hidden])
        self.products = nn.ParameterList()
        for h_in, h_out in itertools.pairwise(hidden):
            layers = [nn.Linear(h_in, h_out, bias=False).weight.detach() for _ in widths]
            self.products.append(nn.Parameter(torch.stack(layers)))
        last = hidden[-1] if hidden else in_features
        self.last = nn.ModuleList([nn.Linear(last, d) for d in widths.values()])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.first is None:
            return {n: layer(x) for n, layer in zip(self.widths, self.last, strict=True)}
        s, n = len(self.widths), x.shape[0]
        y = torch.relu(_normed(self.norms[0], self.first(x)))  # [N, S*h]
        for weight, norm in zip(self.products, self.norms[1:], strict=True):
            per_head = torch.einsum("nsi,soi->nso", y.view(n, s, -1), weight)
            y = torch.relu(_normed(norm, per_head.reshape(n, -1)))
        each = y.view(n, s, -1).unbind(1)
        return {name: layer(h) for name, layer, h in zip(self.widths, self.last, each, strict=True)}

    def head(self, name: str) -> nn.Sequential:
        """The head of one space as Linear, BatchNorm1d, ReLU, ..., Linear; a copy. Sharded weights are gathered: it is
        called on every rank then."""
        k = list(self.widths).index(name)
        layers: list[nn.Module] = []
        for i, (h, norm) in enumerate(zip(self.hidden, self.norms, strict=True)):
            part = slice(k * h, (k + 1) * h)
            if i == 0:
                assert self.first is not None
                weight = whole(self.first.weight)[part]
            else:
                weight = whole(self.products[i - 1])[k]
            linear = nn.Linear(weight.shape[1], h, bias=False, device=weight.device, dtype=weight.dtype)
            assert isinstance(norm, nn.modules.batchnorm._BatchNorm)  # SyncBatchNorm too
            single = nn.BatchNorm1d(h, norm.eps, norm.momentum, device=weight.device, dtype=weight.dtype)
            assert single.num_batches_tracked is not None and norm.num_batches_tracked is not None
            with torch.no_grad():
                linear.weight.copy_(weight)
                for attribute in ("weight", "bias", "running_mean", "running_var"):
                    getattr(single, attribute).copy_(whole(getattr(norm, attribute))[part])
                single.num_batches_tracked.copy_(norm.num_batches_tracked)
            layers += [linear, single, nn.ReLU()]
        last = self.last[k]
        assert isinstance(last, nn.Linear)
        weight, bias = whole(last.weight), whole(last.bias)
        linear = nn.Linear(weight.shape[1], len(weight), device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        layers.append(linear)
        return nn.Sequential(*layers).train(self.training)


def whole(t: Tensor) -> Tensor:
    """A tensor, gathered from all ranks where it is sharded over them (FSDP2)."""
    gathered: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return gathered.detach()


def _normed(norm: nn.Module, y: Tensor) -> Tensor:
    """Batch norm in the type of its statistics, which FSDP2's mixed precision leaves as they are."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    kind = y.dtype if norm.running_mean is None else norm.running_mean.dtype
    if norm.weight.dtype == kind:
        out: Tensor = norm(y)
        return out
    parameters = {"weight": norm.weight.to(kind), "bias": norm.bias.to(kind)}
    wide: Tensor = torch.func.functional_call(norm, parameters, (y.to(kind),))
    return wide.to(y.dtype)
