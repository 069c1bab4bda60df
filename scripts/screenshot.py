"""A picture of a page, as a browser of this machine shows it: PAGE.html OUT.png --width 1200 [--dark].

It takes `pip install "transformer_jax[browser]"` and Chromium or Chrome.
"""

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """The path of a browser of this machine."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def opened(page: Path, width: int, dark: bool = False) -> Iterator[tuple[Any, list[str]]]:
    """The page in a window of that width, and a list of what it complains of or asks for beside itself."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        try:
            scheme = "dark" if dark else "light"
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, device_scale_factor=2
            )
            tab, told = context.new_page(), []
            tab.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
            tab.on("pageerror", lambda error: told.append(f"error: {error}"))
            own = page.resolve().as_uri()
            asked = lambda url: None if url == own or url.startswith("data:") else told.append(f"asks for {url}")  # noqa: E731
            tab.on("request", lambda request: asked(request.url))
            tab.goto(own)
            yield tab, told
        finally:
            browser.close()


@dataclasses.dataclass(frozen=True)
class Arguments:
    page: Annotated[Path, tyro.conf.Positional]
    """A page of `compare` or `report`."""
    out: Annotated[Path, tyro.conf.Positional]
    """Where the picture goes, as PNG."""
    width: int = 1200
    """Of the window, in CSS pixels."""
    height: int = 0
    """Of the picture, from the top; 0 is the whole page."""
    dark: bool = False
    """As people see it who prefer dark."""


def main() -> int:
    args = tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    if find_browser() is None:
        print(f"screenshot: no browser: none of {', '.join(BROWSERS)} is there.", file=sys.stderr)
        return 2
    with opened(args.page, args.width, args.dark) as (tab, _):
        clip = {"x": 0, "y": 0, "width": args.width, "height": args.height}
        tab.screenshot(path=str(args.out), full_page=True, **({"clip": clip} if args.height else {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
