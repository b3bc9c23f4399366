"""The parts of the page that are made of images: structured views, and the explorer of nearest neighbors."""

import base64
import io
import json
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssd_addon.display import Display, display
from ssd_addon.report.data import Data
from ssd_addon.report.document import script_json
from ssd_addon.report.findings import Findings
from ssd_addon.report.text import html, name

TILE = 96
"""Longest edge of an embedded picture in pixels."""


def views_section(f: Findings) -> str:
    """Structured views: a row per image, a column per view, with what each shares."""
    out = ["<section>", "<h2>What the views share</h2>"]
    if f.views is None:
        why = f.reasons.get("views", "the views of the training are not known")
        return "\n".join([*out, f'<p class="na">n/a: {html(why)}</p>', "</section>"])
    x, plan = f.views.views, f.views.plan
    show = f.display if f.display and f.display.channels == x.shape[2] else display(x)  # a model that takes gray alone
    count = min(6, x.shape[1])
    if plan.kind == "shared_query":
        heads = [("query", ""), ("content key", "shares the image alone")]
        heads += [(f"{name(s, 60)} key", f"shares {name(s, 60)} with the query") for s in plan.spaces[1:]]
        side = [""] * count
        text = (
            "Each row is one image. A key shares with the query what its heading says; everything else is drawn anew."
        )
    else:
        heads, index = [("query", ""), ("key", "")], f.views.space_index
        serves = [i % len(plan.spaces) if index is None else int(index[i]) for i in range(count)]
        side = [f'<th scope="row">for {html(plan.spaces[s])}</th>' for s in serves]
        text = "Each row is one image, with the pair of views for the named space. The two share that group alone."
    rows = []
    for i in range(count):
        cells = "".join(
            f'<td><img src="{picture(x[v, i], show)}" alt="{html(f"image {i + 1}, {heads[v][0]}")}"></td>'
            for v in range(x.shape[0])
        )
        rows.append(f"<tr>{side[i]}{cells}</tr>")
    head = ("<th></th>" if side[0] else "") + "".join(f'<th scope="col">{_heading(*h)}</th>' for h in heads)
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return "\n".join(
        [
            *out,
            f"<p>{text}</p>",
            shown(show),
            f'<div class="wide"><table class="strip">{table}</table></div>',
            "</section>",
        ]
    )


def _heading(what: str, shares: str) -> str:
    return html(what) + (f" <small>{html(shares)}</small>" if shares else "")


def explorer_section(f: Findings, data: Data) -> str:
    """The images, and for a chosen one the nearest by each space and by a mix of them."""
    spaces = [name(s) for s in f.similarity]
    captions = [_caption(data, int(i)) for i in f.explored]
    rows = "".join(
        f'<div class="by">By {html(s)}</div><div class="row" data-space="{html(s)}" data-index="{k}"></div>'
        for k, s in enumerate(spaces)
    )
    data_json = script_json(
        {"spaces": spaces, "names": captions, "similarity": [_int16(t) for t in f.similarity.values()]}
    )
    mix = _mix(f, spaces) if len(spaces) > 1 else ""
    first = picture(data.images[int(f.explored[0])], f.display)
    return "\n".join(
        [
            "<section>",
            "<h2>Which images are close to each other?</h2>",
            f"<p>Choose an image with the mouse or the arrow keys. Of the n = {len(captions)} images here, each row "
            "shows the nearest in one space, with the cosine similarity. "
            + ("In your mix, a negative weight asks for images that differ in that space." if mix else "")
            + "</p>"
            + shown(f.display)
            + "<noscript><p>The explorer needs JavaScript.</p></noscript>",
            '<div class="explorer" id="explorer">'
            f'<div class="picker" id="picker" role="listbox" aria-label="Images">{_tiles(f, data, captions)}</div>'
            f'<div><div class="chosen"><img id="chosen-image" src="{first}" alt="">'
            f'<div id="chosen-name" aria-live="polite"></div></div>{rows}{mix}</div></div>'
            f'<script type="application/json" id="explorer-data">{data_json}</script>',
            "</section>",
        ]
    )


def _tiles(f: Findings, data: Data, captions: Sequence[str]) -> str:
    tiles = []
    for k, i in enumerate(f.explored.tolist()):
        state = 'aria-selected="true" tabindex="0"' if k == 0 else 'aria-selected="false" tabindex="-1"'
        label = html(captions[k] or f"image {k + 1}")
        image = f'<img src="{picture(data.images[i], f.display)}" alt="">'
        tiles.append(f'<button type="button" role="option" {state} title="{label}">{image}</button>')
    return "".join(tiles)


def _mix(f: Findings, spaces: Sequence[str]) -> str:
    """Sliders for the weights of all spaces, and buttons for the mixes that are asked for most."""
    first, styles = 0, range(1, len(f.spaces))
    start = {first: 1, **({1: -1} if styles else {})}
    sliders = "".join(
        f'<label for="slider{k}">{html(s)}</label>'
        f'<input type="range" id="slider{k}" data-space="{html(s)}" data-index="{k}" min="-1" max="1" step="0.1" '
        f'value="{start.get(k, 0)}"><output id="out-slider{k}" for="slider{k}"></output>'
        for k, s in enumerate(spaces)
    )
    mixes = [(f"same {spaces[first]}, other {spaces[k]}", {first: 1, k: -1}) for k in styles]
    mixes += [(f"same {spaces[k]}, other {spaces[first]}", {k: 1, first: -1}) for k in styles]
    presets = "".join(
        f'<button type="button" data-mix="{html(json.dumps([mix.get(k, 0) for k in range(len(spaces))]))}">{html(text)}'
        "</button>"
        for text, mix in mixes
    )
    return (
        '<div class="by">By your mix</div><div class="row" id="by-mix"></div>'
        f'<div class="sliders">{sliders}</div><div class="presets">{presets}</div>'
    )


def _caption(data: Data, i: int) -> str:
    """The image's own name, or its known classes and numbers."""
    if data.names[i]:
        return name(data.names[i])
    parts = []
    for factor, values in data.factors.items():
        if isinstance(values, Tensor) and values.ndim == 1:
            known, value = data.classes.get(factor), values[i]
            parts.append(f"{factor} {known[int(value)] if known else f'{value.item():.3g}'}")
    return name(", ".join(parts[:6]))


def shown(show: Display | None) -> str:
    """A line on which bands the pictures show; "" for gray and RGB images as they are."""
    return f'<p class="note">The pictures show {html(show.text)}.</p>' if show is not None and show.text else ""


def picture(x: Tensor, show: Display | None = None) -> str:
    """An image [C, H, W], uint8 or in [0, 1], as a data address of at most TILE pixels a side."""
    t = ((show or display(x))(x) * 255).round().to(torch.uint8)
    image = Image.fromarray(np.ascontiguousarray(t.permute(1, 2, 0).numpy()))
    image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _int16(similarity: Tensor) -> str:
    values = (similarity.clamp(-1, 1) * 32767).round().to(torch.int16).contiguous().numpy()
    return base64.b64encode(values.astype("<i2").tobytes()).decode()
