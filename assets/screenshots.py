"""Takes the docs' pictures of the web page in a real browser: assets/page.png and assets/generation.png.

    python assets/screenshots.py out/checkpoints/best.pt
    python assets/screenshots.py out_demo/checkpoints/best.pt --folder /tmp   # leaves the old ones as they are

Needs chromium on the PATH and requirements-dev.txt.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support.cli import program_parser  # noqa: E402

PORT = 7864


def wait_for_page(server: subprocess.Popen, seconds: float = 120) -> None:
    """Until app.py answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise SystemExit("screenshots.py: app.py doesn't answer")


def take(folder: Path) -> None:
    """Opens the page, asks it to go on from its own first prompt, and waits for the text."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 760})
        page.goto(f"http://127.0.0.1:{PORT}")
        expect(page.locator("#generate")).to_be_visible()
        time.sleep(1)  # until the sliders are drawn
        page.screenshot(path=folder / "page.png", full_page=True)
        page.fill("#max_new_tokens input[type=number]", "120")
        page.fill("#temperature input", "0.8")
        page.click("#generate")
        expect(page.locator("#line")).to_contain_text("120 of 120 tokens", timeout=300_000)
        page.screenshot(path=folder / "generation.png", full_page=True)


def main(argv: Sequence[str] | None = None) -> None:
    flags = program_parser("screenshots.py", "python assets/screenshots.py CHECKPOINT [--folder DIR]", __doc__)
    flags.add_argument("checkpoint", help="of the model that writes")
    flags.add_argument("--folder", type=Path, default=ROOT / "assets", help="for the pictures (default: assets)")
    args = flags.parse_args(argv)
    command = [sys.executable, str(ROOT / "app.py"), "--checkpoint", args.checkpoint, "--port", str(PORT)]
    server = subprocess.Popen(command)
    try:
        wait_for_page(server)
        take(args.folder)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
