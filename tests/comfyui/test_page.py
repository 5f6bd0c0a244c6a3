"""Real ComfyUI in a browser, with the frontend of its own environment and with the one that is installed beside the tests."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
from frontend import MANY, shortened

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
THEIRS = re.compile("|".join([  # seen with ComfyUI alone too
    "^404 |^Failed to load resource: the server responded with a status of 404",  # addresses that it does not have
    "^Failed to load resource: net::ERR_NAME_NOT_RESOLVED",  # it asks for its newest release, and for the models of its own default workflow
    "JobsApiError: Failed to fetch jobs: 404",  # 1.58 asks for what ComfyUI 0.3.64 does not have
    # 1.27: the onChange of Comfy.Canvas.NavigationMode sets another setting, which is registered after it
    r"^TypeError: Cannot read properties of undefined \(reading 'id'\)\n +at onChange .*/assets/index",
]))


@pytest.fixture(scope="module", params=["of ComfyUI's environment", "of the tests' environment"])
def served(request, start_comfyui):
    """A server with one of the frontends."""
    if request.param == "of ComfyUI's environment":
        server = start_comfyui()
    else:
        package = pytest.importorskip("comfyui_frontend_package")
        server = start_comfyui("--front-end-root", str(Path(package.__file__).parent / "static"))
    server.post("/settings/Comfy.TutorialCompleted", True)  # a new user's page begins with a dialog over it
    return server


@pytest.fixture
def page(served, visit):
    opened = visit(f"http://127.0.0.1:{served.port}/")
    print("frontend", opened.page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__"))
    return opened


def template(server, name: str) -> dict:
    """As the page fetches it from its template browser."""
    assert name in server.get("/workflow_templates")["comfy-dancegrpo"]
    return server.get(f"/api/workflow_templates/comfy-dancegrpo/{quote(name)}.json")


def ours(errors: list[str]) -> list[str]:
    """What is wrong on the page, less what ComfyUI's page says of its own."""
    return [error for error in errors if "dancegrpo" in error or not THEIRS.search(error)]


@pytest.fixture
def runs(served):
    """What compare_lora loads: the frontend calls a name that is not there an error."""
    made = [served.output / name / "lora" / f"{name}.safetensors" for name in ("quickstart", "several_rewards")]
    for path in made:
        path.parent.mkdir(parents=True)
        path.touch()
    yield
    for path in made:
        shutil.rmtree(path.parent.parent)


def test_every_template_opens(runs, served, page):
    for path in WORKFLOWS:
        page.open_graph(template(served, path.stem))
        assert page.amiss(json.loads(path.read_text(encoding="utf-8"))) == [], path.stem
        page.shot(f"comfyui-{path.stem}")
    assert ours(page.errors) == []


def test_the_quickstart_is_run_by_a_click_watched_reloaded_and_stopped(served, page):
    page.open_graph(shortened(next(path for path in WORKFLOWS if path.stem == "quickstart")))
    page.look_at_loop_end()
    page.until("No run to show yet", "empty-title")
    page.page.get_by_test_id("queue-button").click()
    first = page.until_done(3)
    curve, pictures = page.curve(), page.pictures()
    assert curve > 0 and len(pictures) == 4 and "broken" not in pictures
    then = page.until_done(first + 3)
    assert page.curve() > curve  # it grew
    page.reload()
    page.look_at_loop_end()
    then = page.until_done(then)  # the server's state, not the page's
    page.until_done(then + 1)  # and it moves on
    assert page.overlaps() == []
    page.shot("comfyui-reloaded")
    page.panel("stop").click()
    page.until("stopped", "state")
    record = json.loads((served.output / "quickstart" / "run.json").read_text(encoding="utf-8"))
    assert record["state"] == "stopped" and page.done() == record["iterations"] < MANY
    assert ours(page.errors) == []
