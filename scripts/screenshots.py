"""Pictures of the chat page for the docs: make screenshots (or python -m scripts.screenshots --model DIR).

Serves the model on loopback, opens the page in a headless Chromium and asks its first and its third example, greedily,
so the same model gives the same pictures. Needs the extra web, playwright (pip install playwright) and Chromium.
"""

import argparse
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nanochat_hf.cli.chat_web import build_site
from nanochat_hf.cli.chat_web import parse as parse_server
from nanochat_hf.config import user_errors

# name, width and height in pixels, colours
VIEWS = (("page_narrow", 390, 760, "light"), ("page_wide", 1100, 760, "dark"))
ASKED = (0, 2)  # which of the examples
ANSWERING = 120_000  # milliseconds that an answer may take


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of a server of `model`, in this process."""
    import uvicorn

    from nanochat_hf.serving.app import build_app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(build_app(build_site(parse_server(["--model", model]))), port=port, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def chromium() -> str:
    """The program; ValueError where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        raise ValueError("no Chromium on this machine; install the package chromium")
    return found


def photograph(address: str, folder: Path) -> list[Path]:
    """Ask, and write a picture of each view; returns the files."""
    from playwright.sync_api import sync_playwright

    written = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        for name, width, height, colours in VIEWS:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
            page.goto(address)
            page.wait_for_selector("#examples button")
            questions = page.locator("#examples button").all_inner_texts()
            written += [folder / f"{name}_{moment}.png" for moment in ("start", "chat")]
            page.screenshot(path=written[-2])
            for count, example in enumerate(ASKED, 1):
                page.fill("#text", questions[example])
                page.keyboard.press("Enter")
                page.locator(".note").nth(count - 1).wait_for(timeout=ANSWERING)
            for call in page.locator("details.call summary").all()[:1]:
                call.click()
            page.screenshot(path=written[-1])
        browser.close()
    return written


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Write the pictures, and say where."""
    parser = argparse.ArgumentParser(prog="python -m scripts.screenshots", description=__doc__)
    parser.add_argument("--model", default="runs/quickstart/sft/final", help="a chat model (default: %(default)s)")
    parser.add_argument("--output", default="docs/pictures", help="folder for the pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    chromium()
    with served(args.model) as address:
        for path in photograph(address, Path(args.output)):
            print(path)


if __name__ == "__main__":
    main()
