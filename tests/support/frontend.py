"""A browser that reaches this machine alone, and what the tests do in it, over the bundled editor and over ComfyUI.

DANCEGRPO_SCREENSHOTS names a folder that keeps the tests' screenshots; without it they go to the tests' temporary folder.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest

WAIT = 600_000  # ms for anything to appear: a busy machine is slow, and only a broken one waits so long
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MANY = 2000  # iterations: more than a test waits for
SHORT = {"DanceGRPOLoopStart": {"iterations": MANY, "prompts_per_iteration": 1, "lora_rank": 2, "micro_batch": 4},
         "DanceGRPOGroupSample": {"group_size": 4, "steps": 3}, "DanceGRPOUpdate": {"optimizer_steps": 1},
         "DanceGRPOPromptSet": {"limit": 2}, "DanceGRPOEvaluate": {"steps": 2, "batch_size": 4, "samples_per_prompt": 1}}
LOOP_END = "app.graph._nodes.find((node) => node.comfyClass === 'DanceGRPOLoopEnd')"


def shortened(workflow: Path) -> dict:
    """A saved workflow with widgets that make an iteration short, and the iterations many, as the editor would save it."""
    from comfy_dancegrpo import nodes

    graph = json.loads(workflow.read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        if changes := dict(SHORT.get(node["type"], {})):
            inputs = nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
            names = [name for group in ("required", "optional") for name, spec in inputs.get(group, {}).items()
                     if isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN")]
            assert len(names) >= len(node["widgets_values"])  # inputs are only ever added, at the end
            node["widgets_values"] = [changes.pop(name, value) for name, value in zip(names, node["widgets_values"])]
            assert not changes
    return graph


class FrontendPage:
    """A page of ComfyUI's frontend. `errors` are the console's, exceptions and answers from 400 on; `foreign` what it asked of other hosts."""

    def __init__(self, browser, shots: Path):
        self.context = browser.new_context(viewport={"width": 1600, "height": 1000})
        self.context.set_default_timeout(WAIT)
        self.page, self.shots = self.context.new_page(), shots
        self.errors, self.foreign = [], []
        self.page.on("console", lambda m: self.errors.append(f"{m.text} ({m.location.get('url')})") if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(error.stack or str(error)))  # the stack says whose it is
        self.page.on("response", lambda r: self.errors.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        self.page.on("request", lambda r: self.foreign.append(r.url) if urlsplit(r.url).hostname not in ("127.0.0.1", None) else None)
        self.page.on("dialog", lambda dialog: dialog.accept())  # a changed workflow asks before it is left

    def open(self, url: str) -> None:
        """Loads the page and waits until its graph is drawn."""
        self.page.goto(url)
        self.loaded()

    def open_graph(self, graph: dict) -> None:
        """Opens a saved workflow, as the page itself does with one from its templates."""
        self.page.evaluate("(graph) => app.loadGraphData(graph)", graph)
        self.loaded()

    def reload(self) -> None:
        self.page.reload()
        self.loaded()

    def loaded(self) -> None:
        self.page.get_by_test_id("queue-button").wait_for()
        self.page.wait_for_function("() => window.app?.extensionManager && app.graph?._nodes.length > 0 && (!" + LOOP_END + " || document.querySelector('.dancegrpo-panel'))")

    def amiss(self, saved: dict) -> list:
        """Nodes of the saved workflow that are not there, and those that are and should not be, are not known or are in error."""
        shown = self.page.evaluate(
            "() => app.graph._nodes.map((node) => [node.type, !!node.has_errors, !!node.constructor.nodeData || node.isVirtualNode === true])")
        wanted, found = Counter(node["type"] for node in saved["nodes"]), Counter(kind for kind, *_ in shown)
        return [*(wanted - found), *(found - wanted), *(node for node in shown if node[1] or not node[2])]

    def look_at_loop_end(self) -> None:
        """Moves the canvas, at full size, to where the panel is in the middle."""
        self.page.evaluate("() => { const node = " + LOOP_END + "; const view = app.canvas.ds; view.scale = 1;"
                           "view.offset = [800 - node.pos[0] - node.size[0] / 2, 500 - node.pos[1] - node.size[1] / 2];"
                           "app.canvas.setDirty(true, true); }")

    def panel(self, part: str):
        return self.page.locator(f".dancegrpo-{part}")

    def until(self, text: str, part: str) -> None:
        """Waits until a part of the panel has this text."""
        self.page.wait_for_function("([part, text]) => document.querySelector(`.dancegrpo-${part}`)?.textContent === text", arg=[part, text])

    def done(self) -> int:
        """Iterations done, as the panel says."""
        return int(self.panel("iteration").text_content().split(" / ")[0])

    def until_done(self, least: int) -> int:
        """Waits until the panel says that so many iterations are done; gives how many it says then."""
        self.page.wait_for_function("(least) => parseInt(document.querySelector('.dancegrpo-iteration')?.textContent) >= least", arg=least)
        return self.done()

    def pictures(self) -> list[str]:
        """The addresses of the shown pictures, all of them loaded."""
        self.panel("tile").first.wait_for()
        return self.page.evaluate("() => [...document.querySelectorAll('.dancegrpo-picture')].map((p) => p.naturalWidth ? p.src : 'broken')")

    def curve(self) -> int:
        """How many of the reward plot's pixels have the curve's colour."""
        return self.page.evaluate("""() => {
            const canvas = document.querySelector('.dancegrpo-curve-main canvas');
            const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            let found = 0;
            for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200 && data[i + 2] > data[i] + 60) found++;
            return found; }""")

    def overlaps(self) -> list[str]:
        """Parts of the panel that cover each other or stand out of it, and texts that are cut off without saying so."""
        return self.page.evaluate("""() => {
            const panel = document.querySelector('.dancegrpo-panel');
            const name = (e) => e.className + ' ' + e.textContent.slice(0, 30);
            const parts = [...panel.querySelectorAll('select, button, span, img, .uplot')].filter((e) => e.offsetParent && !e.closest('.dancegrpo-tiles'));
            const boxes = parts.map((e) => e.getBoundingClientRect()), whole = panel.getBoundingClientRect(), found = [];
            parts.forEach((e, i) => {
                const a = boxes[i];
                if (a.left < whole.left - 1 || a.right > whole.right + 1 || a.bottom > whole.bottom + 1) found.push('outside: ' + name(e));
                for (let j = i + 1; j < parts.length; j++) {
                    const b = boxes[j];
                    const deep = Math.min(Math.min(a.right, b.right) - Math.max(a.left, b.left), Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top));
                    if (deep > 1 && !e.contains(parts[j])) found.push(name(e) + ' over ' + name(parts[j]));
                }
            });
            return found; }""")

    def shot(self, name: str) -> None:
        self.page.screenshot(path=self.shots / f"{name}.png")


@pytest.fixture(scope="module")  # while playwright is open an event loop runs in this thread, and other tests could start none
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"])  # no other host is reached
        yield running
        running.close()


@pytest.fixture
def visit(browser, tmp_path):
    """`visit(url)`: a FrontendPage that has loaded it."""
    shots = Path(os.environ.get("DANCEGRPO_SCREENSHOTS") or tmp_path / "screenshots")
    shots.mkdir(parents=True, exist_ok=True)
    opened = []

    def open_page(url: str) -> FrontendPage:
        opened.append(FrontendPage(browser, shots))
        opened[-1].open(url)
        return opened[-1]

    yield open_page
    for page in opened:
        page.context.close()
