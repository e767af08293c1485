"""Pictures of the page of a running `ee-scale serve`, light and dark, for docs/serve.md (Chromium: CHROMIUM names it).

ee-scale serve model=my-model policy=threshold threshold=0.6 audit=0.2 follow=0.9
python scripts/draw_page.py --url http://127.0.0.1:8000 --question "Why is the sky blue?" --out docs/figures
"""

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Playwright, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--single-process", "--no-zygote", "--disable-gpu", "--in-process-gpu"]


def open_browser(started: Playwright) -> Browser:
    """The Chromium that CHROMIUM names, that lies on the path, or playwright's own."""
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    return started.chromium.launch(executable_path=program, args=ARGUMENTS)


def main() -> None:
    """One answer in one page; its picture in either scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--question", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with sync_playwright() as started:
        browser = open_browser(started)
        page = browser.new_page(viewport={"width": 1180, "height": 760}, color_scheme="light")
        page.set_default_timeout(0)
        page.goto(arguments.url)
        page.wait_for_selector("#shares tr")
        page.fill("#tokens", str(arguments.tokens))
        for question in arguments.question:
            page.fill("#text", question)
            page.click("#send")
            page.wait_for_timeout(500)
            while page.evaluate("abort !== null"):  # playwright's own waits are forbidden by the page's policy
                page.wait_for_timeout(100)
        page.wait_for_timeout(3000)  # /metrics is read every two seconds
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(500)
            page.screenshot(path=arguments.out / f"serve_{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()
