import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

QUIET = (
    "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync"
)


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    assert found, "expected Chromium (apt-get install chromium), or its path in CHROMIUM: got none"
    with sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=found, args=[f"--{flag}" for flag in (*QUIET.split(), "disable-sync")]
        )
        yield chromium
        chromium.close()
