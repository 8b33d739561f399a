"""Takes the screenshot of the interactive page, docs/demo.png: python docs/draw_demo.py

It needs the extra `demo`, Chromium, and the package playwright. It also prints the time from starting the command
`python -m mplug2.demo` to the first caption in the browser, and from a question to its answer.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Error, sync_playwright

from mplug2.flags import Parser

HERE = Path(__file__).parent
PORT = 7861


def main(arguments: list[str] | None = None) -> None:
    Parser(__doc__, "python docs/draw_demo.py").read(arguments)  # it has no flags: any argument is refused
    out = HERE / "demo.png"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1140, "height": 1120}, color_scheme="light")
        page.set_default_timeout(120_000)
        start = time.perf_counter()
        command = [sys.executable, "-m", "mplug2.demo", "--port", str(PORT)]
        server = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        try:
            while server.poll() is None:
                try:
                    page.goto(f"http://127.0.0.1:{PORT}")
                    break
                except Error:  # it is still loading
                    time.sleep(0.1)
            if server.poll() is not None:
                raise SystemExit("the page could not be served: see the message above")
            page.wait_for_function("document.querySelector('#caption textarea')?.value.includes('right')")
            print(f"first caption after {time.perf_counter() - start:.1f} s")
            page.wait_for_function("document.querySelector('#explained')?.innerText.startsWith('right')")
            page.fill("#question input", "does it move left or right")
            start = time.perf_counter()
            page.press("#question input", "Enter")
            page.wait_for_function("document.querySelectorAll('#words [role=button]').length === 7")
            print(f"an answer after {time.perf_counter() - start:.2f} s")
            page.locator("#words [role=button]").last.hover()
            page.wait_for_timeout(2000)
            page.screenshot(path=out)
        finally:
            server.terminate()
        browser.close()
    Image.open(out).convert("RGB").quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    main()
