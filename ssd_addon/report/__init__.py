"""A report: one page that shows what each space of a model encodes.

    python -m ssd_addon report RUN_OR_CHECKPOINT --data DIR --out report.html
    write("report.html", model, images, views=views, factors=factors)                    the same, in Python

`data` reads images and what is known of them, `findings` measures, `problems` judges, `verdict` and `advice` put it in
words, `page` makes HTML of it.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ssd_addon.metrics import Factor
from ssd_addon.metrics.embed import Model
from ssd_addon.report.data import Data, Say, read
from ssd_addon.report.findings import EXPLORED, Findings, measure
from ssd_addon.report.page import LIMIT, render
from ssd_addon.report.verdict import verdict

__all__ = ["Data", "Findings", "measure", "read", "render", "verdict", "write"]


def write(
    out: str | Path,
    model: Model,
    images: Tensor | Data,
    *,
    views: Any = None,
    factors: Mapping[str, Factor] | None = None,
    names: Sequence[str] = (),
    log: Sequence[Mapping[str, Any]] = (),
    title: str = "",
    about: Sequence[tuple[str, str]] = (),
    on_sphere: bool | None = None,
    explored: int = EXPLORED,
    batch_size: int = 64,
    bands: Sequence[int] | None = None,
    own: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    say: Say | None = None,
) -> Findings:
    """Measure a model on a data set and write the page: self-contained, below 10 MB whatever the images' size.

    Args:
        out: the HTML file; its folder is made where it is missing.
        model: `StyleHeads`, or any callable [n, C, H, W] -> space -> [n, d], content first, or -> features [n, F],
            which are called "backbone". Measuring changes nothing, see `metrics.embed`.
        images: [n, C, H, W], uint8 or in [0, 1], not normalized (Normalize of the views' `then` is applied), or `Data`.
            Gray images are repeated to 3 channels where the model does not take one, and color images made gray where
            it does not take three.
        views: the `StructuredViews` used in training; without them the page has no label-free matrix.
        factors: name -> a value for each image, as in `metrics.r2_matrix`.
        names: a caption for each image.
        log: entries of the run's JSON-lines log, for the curves.
        title, about: name of the run, and (what, value) pairs for the head of the page.
        on_sphere: True scores L2-normalized embeddings, as the SimCLR family's loss sees them; None asks the model for
            its attribute `on_sphere`, False where it has none.
        explored: images in the explorer, at most; fewer where there are many spaces.
        batch_size: images at a time.
        bands: one to three channels that pictures show, counted from 0. None shows one to three channels as they are
            (two as magenta and green), and of more the first three principal directions of all pixels. The page says
            which. Measures are of all channels.
        own: space -> the names of its own factors, such as {"color": ("hue",), "content": ("shape",)}: then every other
            factor is tested as in `metrics.exclusivity`, and one that leaks is in the verdict. None: it is not known
            which factors belong where, and only the augmentations are tested.
        seed: of views, splits and resamples.
        say: called with a line on what is being done; the library itself prints nothing.

    Returns:
        What the page shows. What could not be measured is in `.reasons`.

    Raises:
        OSError: `out` cannot be written; raised before anything is computed.
        ValueError, TypeError: images that are not [n, C, H, W], names or factors that are not one for each image, bands
            that are not one to three of the channels, names in `own` that are no space or no factor, and what
            `metrics.embed` refuses.
    """
    path = writable(out)
    data = images if isinstance(images, Data) else Data(images, factors or {}, list(names))
    data.check()
    if isinstance(explored, bool) or not isinstance(explored, int) or explored < 1:
        raise ValueError(f"explored: expected a whole number of images, 1 or more: got {explored!r}")
    found = measure(
        model,
        data,
        views=views,
        log=log,
        title=title,
        about=about,
        on_sphere=on_sphere,
        explored=explored,
        batch_size=batch_size,
        bands=bands,
        own=own,
        seed=seed,
        say=say,
    )
    page = render(found, data)
    while len(page.encode("utf-8")) > LIMIT and len(found.explored) > 50:  # many large pictures: explore fewer
        explored = len(found.explored) // 2
        found = measure_fewer(found, explored)
        page = render(found, data)
    path.write_text(page, encoding="utf-8")
    return found


def measure_fewer(found: Findings, explored: int) -> Findings:
    """The same findings with fewer images in the explorer."""
    similarity = {s: t[:explored, :explored] for s, t in found.similarity.items()}
    return replace(found, explored=found.explored[:explored], similarity=similarity)


def writable(out: str | Path) -> Path:
    """The path, with its folder made; refuses one that cannot be written before time is spent on it."""
    path = Path(out)
    if path.is_dir():
        raise IsADirectoryError(f"out: expected a file to write, such as {path / 'report.html'}: got a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".report")
        os.close(handle)
        os.unlink(name)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError("the file is there and may not be written")
    except OSError as error:
        raise OSError(f"out: expected a place that can be written: {path} cannot ({error})") from error
    return path
