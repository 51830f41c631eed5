"""Takes the README's pictures of the web page in a real browser: assets/page.png and assets/generation.png.

    python assets/screenshots.py out/shakespeare/checkpoints/best.pt

Needs chromium on the PATH and requirements-dev.txt.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

HERE = Path(__file__).resolve().parent
PORT = 7864
PROMPT = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


def take(page: Page) -> None:
    page.goto(f"http://127.0.0.1:{PORT}")
    expect(page.locator("#generate")).to_be_visible()
    time.sleep(1)  # until the sliders are drawn
    page.screenshot(path=HERE / "page.png", full_page=True)
    page.fill("#prompt textarea", PROMPT)
    page.fill("#max_new_tokens input[type=number]", "120")
    page.fill("#temperature input", "0.8")
    page.click("#generate")
    expect(page.locator("#line")).to_contain_text("120 of 120 tokens", timeout=300_000)
    page.screenshot(path=HERE / "generation.png", full_page=True)


def main(checkpoint: str) -> None:
    command = [sys.executable, str(HERE.parent / "app.py"), "--checkpoint", checkpoint, "--port", str(PORT)]
    server = subprocess.Popen(command)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}", timeout=5)
                break
            except OSError:
                time.sleep(1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            take(browser.new_page(viewport={"width": 1000, "height": 760}))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
