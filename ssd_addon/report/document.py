"""A self-contained HTML page around its sections: style, script, and its numbers as JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from ssd_addon.report.text import clean, html


def document(title: str, sections: Sequence[str], findings: Mapping[str, Any]) -> str:
    """The page, in text that can be encoded whatever the names in it hold."""
    asset = resources.files(__package__)
    style, script = (asset.joinpath(file).read_text(encoding="utf-8") for file in ("page.css", "page.js"))
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{html(title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            *sections,
            f'<script type="application/json" id="findings">{script_json(findings)}</script>',
            f"<script>\n{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )
    return clean(page)


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
