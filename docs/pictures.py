"""Pictures of a report for these pages: `python docs/pictures.py report.html docs/results`. Needs Chromium.

Writes report-desktop.png (verdict and matrices), report-explorer.png (an image, its neighbours, a mix) and
report-phone.png (the same page on a phone, in the dark).
"""

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("report", type=Path)
    p.add_argument("out", type=Path)
    args = p.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        page.goto(args.report.resolve().as_uri())
        page.screenshot(path=args.out / "report-desktop.png")
        page.locator("#picker button").nth(3).click()
        page.locator("#explorer").screenshot(path=args.out / "report-explorer.png")
        phone = browser.new_page(viewport={"width": 390, "height": 1000}, color_scheme="dark")
        phone.goto(args.report.resolve().as_uri())
        phone.screenshot(path=args.out / "report-phone.png")
        browser.close()


if __name__ == "__main__":
    main()
