"""Takes the screenshot of the interactive page, docs/demo.png: python docs/draw_demo.py [--port 7860]

The page must be open: python -m mplug2.demo. It needs Chromium, and the package playwright. It also prints the time
from a click to the answer, as a user sees it.
"""

import shutil
import sys
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from browser import NAMES  # noqa: E402

HERE = Path(__file__).parent


def explained(page: Page, start: str) -> None:
    """Wait until the explanation of a word starts like this."""
    page.wait_for_function("start => document.querySelector('#explained')?.innerText.startsWith(start)", arg=start)


def main(port: str = "7860") -> None:
    out = HERE / "demo.png"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=next(filter(None, map(shutil.which, NAMES))),
                                         args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1140, "height": 1120}, color_scheme="light")
        page.goto(f"http://127.0.0.1:{port}")
        explained(page, "right: written")
        page.fill("#question input", "does it move left or right")
        start = time.perf_counter()
        page.press("#question input", "Enter")
        page.wait_for_function("document.querySelectorAll('#words [role=button]').length === 7")
        print(f"an answer after {time.perf_counter() - start:.2f} s")
        page.locator("#words [role=button]").last.hover()
        page.wait_for_timeout(3000)
        page.screenshot(path=out)
        browser.close()
    Image.open(out).convert("RGB").quantize(128).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main(*sys.argv[2:])
