"""A page in a real browser, and what it complained of."""

from pathlib import Path

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def opened(browser, file, size="desktop", **options):
    """(page, what it complained of, what it asked for)."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    complaints, requests = [], []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.goto(Path(file).as_uri())
    return page, complaints, requests
