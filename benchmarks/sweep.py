"""Try every family of timm and torchvision as a backbone: what works, what does not, and why.

    python benchmarks/sweep.py --out docs/benchmarks      writes sweep.json and sweep.md, in a quarter of an hour

The smallest model of each family is built without data on torch's meta device and wrapped with every pooling. Checked
are the width, whether each parameter gets a gradient, whether the caller's module is unchanged, and whether the
exported weights have the keys of the library's own model without a classifier and load into it. Then, with random
weights and images, whether the features are that model's output.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from ssd_addon import StyleHeads

SPACES = {"content": 4, "color": 2}
"""Of the heads; a family is judged by its backbone alone."""


ALSO = ("coat_lite_tiny", "deit_tiny_distilled_patch16_224", "mvitv2_small_cls", "pit_ti_distilled_224",
        "vit_medium_patch16_reg4_gap_256", "vit_relpos_base_patch16_clsgap_224", "vit_small_patch16_dinov3",
        "vit_base_patch16_siglip_224")  # fmt: skip
"""Models of timm whose tokens or heads differ from those of the smallest of their module."""


@dataclass
class Result:
    """How a model did.

    Attributes:
        library, family, name: "timm" or "torchvision", its module there, and the model.
        parameters: how many the model has with its classifier.
        pools: pooling -> width of the features, "refused", or what is wrong.
        refusals: pooling -> the message of what is refused.
        keys: "same", or how the exported keys differ from those of the library's model without a classifier.
        numbers: "same", "", or the largest difference to that model's output, relative to its size.
    """

    library: str
    family: str
    name: str
    parameters: int = 0
    pools: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    keys: str = ""
    numbers: str = ""

    @property
    def faults(self) -> list[str]:
        """What is wrong, in words."""
        found = {**self.pools, "keys": self.keys, "numbers": self.numbers}
        fine = ("", "same", "refused")
        return [f"{what}: {how}" for what, how in found.items() if not (how.isdigit() or how in fine)]


@dataclass
class Case:
    """A model of a library: how it is built with a classifier and without."""

    library: str
    family: str
    name: str
    make: Callable[[], nn.Module]
    bare: Callable[[], nn.Module]
    size: tuple[int, ...]


# ---------------------------------------------------------------------------------------------------- models


def timm_case(name: str) -> Case:
    config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    family = timm.models._registry._model_to_module[name]
    size = tuple(config.input_size) if config is not None else (3, 224, 224)
    return Case(
        "timm", family, name, lambda: timm.create_model(name), lambda: timm.create_model(name, num_classes=0), size
    )


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def timm_cases() -> Iterator[Case]:
    """The smallest model of each of timm's modules, then `ALSO`."""
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        yield timm_case(min(names, key=lambda name: parameters(on_meta(timm_case(name).make))))
    yield from map(timm_case, ALSO)


def torchvision_cases() -> Iterator[Case]:
    """The smallest classification model of each of torchvision's classes."""
    cases = [torchvision_case(name) for name in torchvision.models.list_models(module=torchvision.models)]
    for family in dict.fromkeys(case.family for case in cases):
        yield min((c for c in cases if c.family == family), key=lambda c: parameters(on_meta(c.make)))


def torchvision_case(name: str) -> Case:
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}

    def make() -> nn.Module:
        return torchvision.models.get_model(name, **options)

    def bare() -> nn.Module:
        net = make()
        for part in ("fc", "classifier", "head", "heads", "AuxLogits", "aux1", "aux2"):
            if hasattr(net, part):
                setattr(net, part, nn.Identity())
        return net

    size = 299 if name == "inception_v3" else 224
    return Case("torchvision", type(on_meta(make)).__name__, name, make, bare, (3, size, size))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return make()
    except NotImplementedError:  # torchvision's RegNet computes its widths with tensors
        return make().to("meta")


# ---------------------------------------------------------------------------------------------------- checks


def portrait(net: nn.Module) -> list[Any]:
    """All that a module consists of, by identity: parts, tensors, modes, hooks and attributes."""
    return [
        (name, id(m), {k: id(v) for k, v in vars(m).items()}, list(map(id, m._modules.values())),
         list(map(id, (*m._parameters.values(), *m._buffers.values()))), list(m._modules), m.training,
         len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in net.named_modules(remove_duplicate=False)
    ]  # fmt: skip


def check_pool(net: nn.Module, pool: Any, size: tuple[int, ...]) -> tuple[StyleHeads, str]:
    """The model, and its width or what is wrong."""
    before = portrait(net)
    with torch.device("meta"):
        model = StyleHeads(net, SPACES, hidden=(), pool=pool)
    if portrait(net) != before:
        return model, "the caller's module was changed"
    z, features = model(torch.rand(3, 2, *size, device="meta"), features=True)
    width = model.in_features
    if [tuple(t.shape) for t in z.values()] != [(3, 2, d) for d in SPACES.values()] or features.shape[-1] != width:
        return model, f"features {tuple(features.shape)}"
    sum(t.sum() for t in z.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    net.zero_grad()
    return model, f"without a gradient: {', '.join(idle)}" if idle else str(width)


def differences(weights: dict[str, torch.Tensor], bare: nn.Module) -> str:
    own = bare.state_dict()
    lacking, more = [k for k in own if k not in weights], [k for k in weights if k not in own]
    other = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    found = (("lacks", lacking), ("more", more), ("other shape", other))
    return "; ".join(f"{what} {', '.join(keys)}" for what, keys in found if keys) or "same"


def check(case: Case, pools: tuple[str, ...] = ("auto", "mean", "cls")) -> Result:
    """One model with every pooling, without data."""
    result = Result(case.library, case.family, case.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, bare = on_meta(case.make), on_meta(case.bare)
        result.parameters = parameters(net)
        for pool in pools:
            try:
                model, result.pools[pool] = check_pool(net, pool, case.size)
            except Exception as error:
                refused = isinstance(error, ValueError) and pool != "auto" and str(error).startswith("pool: expected")
                result.pools[pool] = "refused" if refused else f"{type(error).__name__}: {error}"
                if refused:
                    result.refusals[pool] = str(error)
                continue
            if pool == "auto":
                result.keys = differences(model.export_backbone(), bare)
                if result.keys == "same":
                    bare.load_state_dict(model.export_backbone(), strict=True)
    return result


def check_numbers(case: Case) -> str:
    """Features of random images beside the output of the library's model without a classifier."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net, bare = case.make(), case.bare().eval()
        model = StyleHeads(net, SPACES, hidden=()).eval()
        bare.load_state_dict(model.export_backbone(), strict=False)
        x = torch.rand(2, *case.size)
        want, got = bare(x), model.features(x)
        want = want.unflatten(1, (got.shape[1], -1)).flatten(2).mean(2)  # of maps, also flattened ones
        if want.shape != got.shape:
            return f"{tuple(got.shape)}, not {tuple(want.shape)}"
        error = float((want - got).norm() / want.norm())
    return "same" if error < 1e-6 else f"{error:.1e}"


# ---------------------------------------------------------------------------------------------------- the page


def page(results: list[Result]) -> str:
    faults = {r.name: r.faults for r in results if r.faults}
    refused = [f"- {r.name} ({r.library} {r.family}): {r.refusals['mean']}" for r in results if "mean" in r.refusals]
    heads = "| library | family | model | parameters | auto | mean | cls | keys | numbers |"
    rows = []
    for r in results:
        pools = [r.pools[pool].replace("refused", "-") for pool in ("auto", "mean", "cls")]
        cells = (r.library, r.family, r.name, f"{r.parameters / 1e6:.1f} M", *pools, r.keys, r.numbers)
        rows.append(f"| {' | '.join(cells)} |")
    families = {of: len({r.family for r in results if r.library == of}) for of in ("timm", "torchvision")}
    return "\n".join([
        "<!-- written by benchmarks/sweep.py -->",
        "",
        "# Backbones: every family of timm and torchvision",
        "",
        f"`StyleHeads` takes {len(results) - len(faults)} of {len(results)} models: the smallest of each of "
        f"{families['timm']} families of timm and {families['torchvision']} of torchvision, and {len(ALSO)} more of "
        "timm whose tokens differ.",
        "",
        "A model passes if",
        "",
        "- `StyleHeads` finds the width of its features,",
        "- every parameter that requires a gradient gets one,",
        "- the module that was given is unchanged,",
        "- `export_backbone()` has the keys of the library's model without a classifier (timm: `num_classes=0`) and "
        "loads into it strictly (column *keys*: same),",
        "- the features of random images are that model's output, averaged if it is a map (column *numbers*: same, to "
        "1e-6).",
        "",
        "The columns *auto*, *mean* and *cls* give the width of the features with that `pool`. \"-\" means that it is "
        "refused: *cls* because there is no class token, *mean* for the reasons below.",
        "",
        f"timm {timm.__version__}, torchvision {torchvision.__version__.partition('+')[0]}, torch "
        f"{torch.__version__.partition('+')[0]}.",
        "",
            "## Exceptions",
        "",
        *(f"- {name}: {'; '.join(found)}" for name, found in faults.items()),
        *refused,
        "- volo: `pool=\"mean\"` averages as timm does, which includes VOLO's class token.",
        "- efficientvim: `weights`, with which the classifier fuses its parts, is frozen on a copy, as timm's own "
        "`reset_classifier(0)` freezes it.",
        "",
        "## Models",
        "",
        heads,
        "| --- | --- | --- | --: | --: | --: | --: | --- | --- |",
        *rows,
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of sweep.json and sweep.md")
    args = parser.parse_args()
    results = []
    for case in (*torchvision_cases(), *timm_cases()):
        result = check(case)
        result.numbers = check_numbers(case)
        print(case.library, case.family, case.name, "; ".join(result.faults) or "passes", flush=True)
        results.append(result)
    (args.out / "sweep.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    (args.out / "sweep.md").write_text(page(results))


if __name__ == "__main__":
    main()
