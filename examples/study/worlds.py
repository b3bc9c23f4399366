"""The data of a study: batches of structured views, and labeled samples to score.

A world has `.plan`, `.widths` (of its spaces), `.backbone()` with `.features` outputs, `.sample_ndim`,
`.batch(n, generator)`, `.scores(z, model, unit)`: tables of what each space encodes; images are on `.device`.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from latents import CausalLatents
from objects import draw_objects, render_objects, scored_objects
from sprites import draw_factors, render, scored
from study import tasks
from study.tasks import knn_accuracy, linear_accuracy
from synthetic import GROUPS, ConvNet, mlp
from torch import Tensor, nn

from ssd_addon import StructuredViews, ViewBatch, ViewPlan, presets
from ssd_addon.collate import ImageFiles, StructuredCollate
from ssd_addon.metrics import (
    Exclusivity,
    exclusivity,
    image_attributes,
    parameter_exclusivity,
    parameter_matrix,
    r2_matrix,
    retrieval,
)
from ssd_addon.runs import build_views

Config = dict[str, Any]
Table = dict[str, dict[str, float]]

ONE_SPACE = ("content-only", "augself")  # methods without style spaces, of two views


def photograph_groups(name: str, size: int) -> Any:
    """Kornia's operations by group: "kinds" as a user would group them, "each" by itself; other names are presets."""
    crop = ["RandomResizedCrop", {"size": [size, size], "scale": [0.3, 1.0], "ratio": [1.0, 1.0], "p": 1.0}]
    turn = ["RandomRotation", {"degrees": 180.0, "p": 1.0}]

    def jitter(**ranges: list[float]) -> list[Any]:
        return ["ColorJitter", {**ranges, "p": 1.0}]

    gain, hue = [0.5, 1.5], [-0.5, 0.5]
    if name == "kinds":
        return {"spatial": [turn, crop], "color": [jitter(brightness=gain, saturation=gain, hue=hue)]}
    if name == "each":
        blur = ["RandomGaussianBlur", {"kernel_size": [7, 7], "sigma": [0.1, 2.0], "p": 1.0}]
        each = {"rotation": turn, "crop": crop, "gain": jitter(brightness=gain), "hue": jitter(hue=hue)}
        each |= {"saturation": jitter(saturation=[0.0, 2.0]), "blur": blur}
        return {group: [op] for group, op in each.items()}
    return name


def tables(matrices: dict[str, Any]) -> dict[str, Table]:
    """Name -> space -> factor -> score, rounded to three digits, without NaN."""
    out: dict[str, Table] = {}
    for name, m in matrices.items():
        rows = {s: {f: round(float(m[s, f]), 3) for f in m.factors} for s in m.spaces}
        out[name] = {s: {f: v for f, v in row.items() if not math.isnan(v)} for s, row in rows.items()}
    return out


def leaks(tested: Exclusivity) -> dict[str, dict[str, list[float]]]:
    """Space -> factor that is not its own -> [corrected p, effect], of `exclusivity`."""
    out: dict[str, dict[str, list[float]]] = {}
    for (space, factor), test in (tested.parts or tested).tests.items():
        if not math.isnan(test.corrected):
            out.setdefault(space, {})[factor] = [round(test.corrected, 4), round(test.effect, 3)]
    return out


class LatentWorld(CausalLatents):
    """Latents: content 4 wide and two styles of 2, in spaces of 16 and 8, unless the configuration says otherwise."""

    def __init__(self, c: Config, seed: int) -> None:
        self.config = c
        super().__init__(
            seed,
            content=c["content"],
            styles=c["styles"],
            style=c["style"],
            dependent=c["dependent"],
            content_dependent=c["content_dependent"],
            cross_image=c["cross"],
            plan=c["plan"],
            structured=c["method"] != "unstructured pairs",
            spaces=c["method"] not in ONE_SPACE,
        )
        self.widths = {"content": c["content_width"], **dict.fromkeys(self.plan.spaces[1:], c["style_width"])}
        self.features = 256

    def backbone(self) -> nn.Module:
        return mlp(self.width)

    def scores(self, z: Any, model: Any, unit: bool) -> dict[str, Any]:
        x, factors = self.labelled(self.config["samples"], torch.Generator().manual_seed(10_000))
        e = (
            z(x) if z is not None else {n: torch.as_tensor(f) for n, f in factors.items()} | {"backbone": x}
        )  # the truth
        out = {
            "linear": r2_matrix(e, factors, probe="ridge", bootstrap=0),
            "kernel": r2_matrix(e, factors, probe="kernel", bootstrap=0),
            "conditional": r2_matrix(e, factors, probe="kernel", given=("content",), bootstrap=0),
        }
        return {"tables": tables(out)}


class ImageWorld:
    """The parts that sprites and photographs share: views from a recipe, and the label-free matrix."""

    sample_ndim, features = 3, 256

    def __init__(self, c: Config, seed: int, groups: Any, widths: dict[str, int]) -> None:
        self.config, self.groups, self.device = c, groups, torch.device(c.get("device", "cpu"))
        grouped = c["method"] not in ("unstructured pairs", "content-only")
        options: Config = {"plan": c["plan"], "cross_image": c["cross"] or ()} if grouped else {}
        if grouped and c["constrained_crop"]:
            options["constrained_crop"] = c["constrained_crop"]
        if isinstance(groups, str):  # a preset
            names = tuple(presets(groups, size=c["size"])["groups"])
            recipe = presets(groups if grouped else "content_only", size=c["size"])
            self.views = StructuredViews(**recipe, **options, seed=seed)
        else:
            names = tuple(groups)
            recipe = (
                {"groups": groups} if grouped else {"groups": {}, "then": [op for ops in groups.values() for op in ops]}
            )
            self.views = build_views(recipe | options, seed=seed)
        spaces = ("content",) if c["method"] in ONE_SPACE else ("content", *names)
        self.plan = ViewPlan(c["plan"] if len(spaces) > 1 else "shared_query", spaces)
        self.widths = {n: widths[n] for n in spaces}

    def backbone(self) -> nn.Module:
        return ConvNet()

    def views_of_groups(self) -> StructuredViews:
        """Views that differ by groups, whatever the method trains on."""
        groups, size = self.groups, self.config["size"]
        return build_views({"preset": groups, "size": size} if isinstance(groups, str) else {"groups": groups}, seed=0)

    def structured(self, images: Tensor) -> ViewBatch:
        if (
            self.config["method"] == "unstructured pairs"
        ):  # a query and as many keys as ours has, none of which shares a group
            first, *more = (self.views(images).views for _ in range(self.plan.num_views - 1))
            return ViewBatch(torch.cat([first, *(v[1:] for v in more)]), self.plan)
        if self.config["method"] == "augself":  # the query and the content key, whose parameters are drawn by group
            batch = self.views(images)
            return ViewBatch(batch.views[:2], self.plan, parameters=batch.parameters[:2])
        return self.views(images)

    def label_free(self, model: Any, images: Tensor, unit: bool) -> dict[str, Any]:
        made = parameter_matrix(model, self.views_of_groups(), images, on_sphere=unit, bootstrap=0)
        parts = {} if made.parts is None else {"label-free, each": made.parts}
        return {"label-free": made, **parts}


def style_width(c: Config, group: str, default: int) -> int:
    """The width of a group's space: its own, or that of all styles, or the world's."""
    return int(c.get(f"{group}_width") or c.get("style_width") or default)


class DrawnWorld(ImageWorld):
    """Images with known factors, new ones for every batch or a fixed set: (n, generator) -> images, scored factors."""

    groups_of_all: ClassVar[dict[str, Any]] = GROUPS
    own: ClassVar[dict[str, tuple[str, ...]]] = {
        "content": ("shape",),
        "color": ("hue", "brightness"),
        "spatial": ("x", "y", "scale", "rotation"),
    }

    def __init__(self, c: Config, seed: int) -> None:
        widths = {"color": style_width(c, "color", 32), "spatial": style_width(c, "spatial", 128)}
        super().__init__(c, seed, self.groups_of_all, {"content": c["content_width"], **widths})
        kept = c.get("images")  # a fixed set of this size; None: new images for every batch
        self.kept = self.drawn(kept, torch.Generator().manual_seed(20_000 + seed))[0] if kept else None

    def drawn(self, n: int, g: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        raise NotImplementedError

    def batch(self, n: int, g: torch.Generator) -> ViewBatch:
        if self.kept is None:
            return self.structured(self.drawn(n, g)[0])
        return self.structured(self.kept[torch.randint(len(self.kept), (n,), generator=g).to(self.device)])

    def scores(self, z: Any, model: Any, unit: bool) -> dict[str, Any]:
        x, known = self.drawn(self.config["samples"], torch.Generator().manual_seed(10_000))
        e = {n: t.cpu() for n, t in z(x).items()}
        out = {
            name: r2_matrix(e, known, probe=p, bootstrap=0) for name, p in (("linear", "ridge"), ("kernel", "kernel"))
        }
        made = self.label_free(model, x[: self.config["scored"]], unit) if self.config["scored"] else {}
        scores: dict[str, Any] = {"tables": tables(out | made)}
        if self.config.get("leaks"):
            own = {s: tuple(f for f in names if f in known) for s, names in self.own.items() if s in e}
            scores["leaks"] = leaks(exclusivity(e, known, own, independent=True))
        return scores

    def quick(self, z: Any) -> dict[str, Table]:
        """Only the linear table, of 1,500 images, for curves during training."""
        x, known = self.drawn(1500, torch.Generator().manual_seed(30_000))
        e = {n: t.cpu() for n, t in z(x).items()}
        return tables({"linear": r2_matrix(e, known, probe="ridge", bootstrap=0)})


class SpriteWorld(DrawnWorld):
    def drawn(self, n: int, g: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        factors = draw_factors(n, g)
        return render({k: v.to(self.device) for k, v in factors.items()}, self.config["size"]), scored(factors)


class ObjectWorld(DrawnWorld):
    """Irregular objects on textured grounds; shifts mirror the border, so that no streak reveals the shift."""

    groups_of_all: ClassVar[dict[str, Any]] = {
        **GROUPS,
        "spatial": [["RandomAffine", {**GROUPS["spatial"][0][1], "padding_mode": "reflection"}]],  # type: ignore[dict-item]
    }
    own: ClassVar[dict[str, tuple[str, ...]]] = DrawnWorld.own | {"content": ("shape", "texture", "ground")}

    def drawn(self, n: int, g: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        factors = draw_objects(n, g)
        there = {k: v.to(self.device) for k, v in factors.items()}
        images = render_objects(there, self.config["size"], textured=self.config.get("textured", True))
        known = scored_objects(factors)
        if not self.config.get("textured", True):
            known = {k: v for k, v in known.items() if k not in ("texture", "ground")}
        return images, known


class PhotographWorld(ImageWorld):
    """A folder of photographs in memory. DIR/train/CLASS/*.jpg and, for labels, DIR/val/CLASS/*.jpg.

    With "split" 1, as many of the training images as val has are held out instead, and val is trained on: settings that
    were chosen on val are then scored on images that were not used to choose them.
    """

    def __init__(self, c: Config, seed: int) -> None:
        groups = photograph_groups(c["groups"], c["size"])
        names = tuple(groups) if isinstance(groups, dict) else tuple(presets(groups, size=c["size"])["groups"])
        super().__init__(c, seed, groups, {"content": c["content_width"], **{n: style_width(c, n, 32) for n in names}})
        root = Path(c["data"])
        self.images, self.labels = self.read(root / "train")
        self.held_out = self.read(root / "val") if (root / "val").is_dir() else None
        if self.held_out is not None and c.get("split"):
            order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(c["split"]))
            out, kept = (rows.to(self.device) for rows in order.tensor_split([len(self.held_out[0])]))
            images, labels = self.images, self.labels
            self.images = torch.cat([images[kept], self.held_out[0]])
            self.labels = torch.cat([labels[kept.cpu()], self.held_out[1]])
            self.held_out = images[out], labels[out.cpu()]
        if self.held_out is None:  # every second photograph is only for the probes
            self.scored = self.images[1::2]
            self.images, self.labels = self.images[::2], self.labels[::2]
        else:
            self.scored = self.held_out[0][: c["scored"]]

    def read(self, folder: Path) -> tuple[Tensor, Tensor]:
        files, collate = ImageFiles(folder), StructuredCollate(self.config["load_size"])
        images, labels, _ = collate([files[i] for i in range(len(files))])
        return images.to(self.device), torch.as_tensor(labels)

    def batch(self, n: int, g: torch.Generator) -> ViewBatch:
        rows = torch.randint(len(self.images), (n,), generator=g)
        return self.structured(self.images[rows.to(self.device)])

    def scores(self, z: Any, model: Any, unit: bool) -> dict[str, Any]:
        out: dict[str, Any] = {"tables": tables(self.label_free(model, self.scored, unit))}
        if self.held_out:
            images, labels = self.held_out
            seen, known = z(self.plain(self.images)), z(self.plain(images))
            out["accuracy"] = {
                name: {
                    "linear": linear_accuracy(seen[name], self.labels, known[name], labels),
                    "neighbours": knn_accuracy(seen[name], self.labels, known[name], labels),
                }
                for name in known
            }
            if self.config.get("split"):  # searches, judged by what the images show
                found = image_attributes(images.cpu()) | {"class": labels}
                made = retrieval({s: t.cpu() for s, t in known.items()}, found, bootstrap=0)
                out["retrieval"] = tables({"": made})[""]
            if self.config.get("tasks"):
                out["tasks"] = tasks.of_spaces(z, self.plain, (self.images, self.labels), self.held_out)
        if self.config.get("leaks") and self.config["method"] not in ONE_SPACE:
            out["leaks"] = leaks(parameter_exclusivity(model, self.views_of_groups(), self.scored, on_sphere=unit))
        return out

    def plain(self, images: Tensor) -> Tensor:
        return self.views.plain(images)


WORLDS = {"latents": LatentWorld, "sprites": SpriteWorld, "objects": ObjectWorld, "photographs": PhotographWorld}
