"""The picture of a site in the README: one of its pages in a headless chromium.

clipsteer sae browse RUN --out SITE
python -m benchmarks.browse_picture SITE benchmarks/results/browse.png
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--at", default="#/", help="such as '#/feature/12?strength=2' (default: all features)")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 820))
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        width, height = args.size
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto((args.site.resolve() / "index.html").as_uri() + args.at)
        page.wait_for_load_state("networkidle")
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    picture.convert("RGB").save(args.out, optimize=True)
    print(f"{args.at}: {args.out}, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
