"""Draws the pictures of the families' workflows, as the editor shows their first nodes: `python tools/thumbnails.py [NAME ...]`.

Needs chromium, playwright and the packages of the extra "editor"; it serves the editor itself, on a free port of this machine.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile

from family_workflows import FAMILIES, FOLDER
from PIL import Image
from playwright.sync_api import sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CORNER, SHOWN, WIDTH = (20, 60), (1130, 640), 660  # of the graph: from where, how much; of the picture
FREE = (120, 120)  # where on the page no bar of its own lies over the canvas


def draw(page, name: str) -> Image.Image:
    page.evaluate("(graph) => app.loadGraphData(graph)", json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
    page.wait_for_function("() => document.querySelector('.dancegrpo-panel')")
    page.evaluate("""([left, top, x, y]) => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [left - x, top - y];
                  app.canvas.setDirty(true, true); }""",
                  [*FREE, *CORNER])
    page.wait_for_timeout(1500)
    shot = page.screenshot(clip={"x": FREE[0], "y": FREE[1], "width": SHOWN[0], "height": SHOWN[1]})
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    return picture.resize((WIDTH, round(WIDTH * SHOWN[1] / SHOWN[0])), Image.Resampling.LANCZOS)


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        words = [sys.executable, "-m", "comfy_dancegrpo.trainer", "edit", str(FOLDER / f"{names[0]}.json"), "--port", "0", "--output", folder]
        editor = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            url = next(found[0] for line in editor.stdout if (found := re.search(r"http://\S+", line)))
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.goto(url)
            page.wait_for_function("() => window.app?.extensionManager && app.graph?._nodes.length")
            for name in names:
                draw(page, name).save(FOLDER / f"{name}.jpg", quality=80)
            browser.close()
        finally:
            editor.terminate()
            editor.wait()


if __name__ == "__main__":
    main(sys.argv[1:] or list(FAMILIES))
