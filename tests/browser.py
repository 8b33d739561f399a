"""Headless Chromium, for the tests that look at a page. They are marked `browser`."""

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()


def screenshot(page: Path, out: Path, width: int = 1180, height: int = 3000, dark: bool = False) -> np.ndarray:
    """Render `page` in a browser, write the image to `out`, and return it: uint8 `height width 3`."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    assert browser, f"no browser ({', '.join(NAMES)}) is installed; on Debian: apt-get install chromium"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    with TemporaryDirectory() as profile:
        command = [browser, *FLAGS, *scheme, f"--user-data-dir={profile}", f"--window-size={width},{height}",
                   f"--screenshot={out}", page.resolve().as_uri()]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.is_file(), found.stderr
    return np.asarray(Image.open(out).convert("RGB"))
