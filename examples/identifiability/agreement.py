"""Compare the code written here from the equations with the authors' code, which is imported from a checkout.

Losses are compared in value and gradient on the same numbers, encoders by their number of weights, and generators by
the covariance of many draws and the condition numbers of their mixings.
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from identifiability.generators import ContentStyle, Mixing, PartialViews
from identifiability.methods import Theirs, TheirsPartial, contrast
from torch import Tensor

DRAWS = 400_000


@contextlib.contextmanager
def modules(folder: Path, names: Sequence[str]) -> Iterator[list[ModuleType]]:
    """Import modules of a folder by their bare names, and forget them again: both checkouts use the same names."""
    if not (folder / f"{names[0]}.py").is_file():
        raise SystemExit(f"agree: expected a checkout with {names[0]}.py: got {folder}")
    before = dict(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if name not in before and str(getattr(module, "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


def compare(pair: Path, partial: Path) -> dict[str, Any]:
    """All comparisons: the largest differences, and the sizes of what is compared."""
    return {"pair": _pair(pair), "partial": _partial(partial)}


def _difference(ours: Tensor, theirs: Tensor, inputs: Sequence[Tensor]) -> dict[str, float]:
    a, b = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, theirs))
    gradients = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    return {
        "loss": ours.item(),
        "loss, difference": abs(ours.item() - theirs.item()),
        "gradient, difference": gradients,
    }


def _pair(folder: Path) -> dict[str, Any]:
    with modules(folder, ("losses", "spaces", "latent_spaces", "encoders", "invertible_network_utils")) as found:
        losses, spaces, latent_spaces, encoders, networks = found
        z = [torch.randn(64, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        out: dict[str, Any] = _difference(
            contrast([z[0], z[1]], [z[2]]), losses.LpSimCLRLoss()(None, None, None, *z)[0], z
        )
        theirs = encoders.get_mlp(10, 5, [100, 500, 500, 500, 500, 100])
        world = ContentStyle(0, change=0.75, statistical=True, causal=True)
        ours = Theirs({"pairs": "content", "encoder": (10, 50, 50, 50, 50, 10)}, world)
        out["weights"], out["weights, theirs"] = (sum(p.numel() for p in m.parameters()) for m in (ours, theirs))
        out |= _conditions(networks)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - their sampler reads the legacy generator
        sigma = [f @ f.T for f in (world.of_content, world.of_style, world.of_change)]
        blocks = [_block(spaces, latent_spaces, sigma[0], None), _block(spaces, latent_spaces, sigma[1], sigma[2])]
        space = latent_spaces.ProductLatentSpace(spaces=blocks, a=world.offset, B=world.slope)
        marginal = space.sample_marginal(size=DRAWS)
        changed = space.sample_conditional(marginal, size=DRAWS)
        g = torch.Generator().manual_seed(0)
        c, s = world.latents(DRAWS, g)
        out |= _moments(torch.cat([c, s, world.augmented(s, g)], 1), torch.cat([marginal, changed[:, 5:]], 1))
        out["content, changed"] = float((marginal[:, :5] - changed[:, :5]).abs().max())
        out["styles changed"] = round(float((world.augmented(s, g) != s).float().mean()), 4)
        out["styles changed, theirs"] = round(float((marginal[:, 5:] != changed[:, 5:]).float().mean()), 4)
    return out


def _block(spaces: ModuleType, latent_spaces: ModuleType, marginal: Tensor, change: Tensor | None) -> Any:
    def draw(space: Any, size: int, device: str = "cpu") -> Tensor:
        found: Tensor = space.normal(None, 1.0, size, device, Sigma=marginal.numpy())
        return found

    def again(space: Any, z: Tensor, size: int, device: str = "cpu") -> Tensor:
        if change is None:
            return z
        found: Tensor = space.normal(z, 1.0, size, device, change_prob=0.75, Sigma=change.numpy())
        return found

    return latent_spaces.LatentSpace(spaces.NRealSpace(5), draw, again)


def _moments(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Largest differences of means and covariances, in units of the standard deviations."""
    scale = theirs.std(0)
    mean = ((ours.mean(0) - theirs.mean(0)) / scale).abs().max()
    covariance = ((ours.T.cov() - theirs.T.cov()) / (scale[:, None] * scale)).abs().max()
    return {"means, difference": round(float(mean), 4), "covariances, difference": round(float(covariance), 4)}


def _conditions(networks: ModuleType, width: int = 10) -> dict[str, Any]:
    """Mean and largest condition number of the layers of several mixings."""
    np.random.seed(0)  # noqa: NPY002 - their networks read the legacy generator
    theirs = []
    for _ in range(3):
        net = networks.construct_invertible_mlp(n=width, n_layers=3, cond_thresh_ratio=0.001, n_iter_cond_thresh=25000)
        theirs += [float(torch.linalg.cond(m.weight)) for m in net if hasattr(m, "weight")]
    ours = [c for k in range(3) for c in Mixing(width, torch.Generator().manual_seed(k)).conditions]
    return {
        f"condition numbers{of}": {"mean": round(float(np.mean(v)), 3), "largest": round(max(v), 3)}
        for of, v in (("", ours), (", theirs", theirs))
    }


def _partial(folder: Path) -> dict[str, Any]:
    with modules(folder, ("losses", "encoders", "invertible_network_utils")) as (losses, encoders, networks):
        world = PartialViews(0)
        method = TheirsPartial({"encoder": (10, 50, 50, 50, 50, 10)}, world)
        z = [torch.randn(8, 32, 5, dtype=torch.float64, requires_grad=True)]
        samples, negatives = z[0][:4], z[0][4:]
        ours = torch.stack(
            [
                contrast(*([one[k][:, at[k]] for k in subset] for one in (samples, negatives)))
                for subset, at in method.places.items()
            ]
        ).sum()
        theirs, _, _ = losses.UnifiedCLLoss(losses.LpSimCLRLoss()).loss(method.places, list(samples), list(negatives))
        out: dict[str, Any] = _difference(ours, theirs, z)
        net = encoders.get_mlp(5, 5, [50, 250, 250, 250, 250, 50])
        out["weights"], out["weights, theirs"] = (sum(p.numel() for p in m.parameters()) for m in (method.nets[0], net))
        return out | _conditions(networks, 5)
