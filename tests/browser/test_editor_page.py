"""The bundled editor in a browser: its workflows open, a run is watched, reloaded and stopped, and what is saved runs headless."""

import json
from pathlib import Path

import pytest
from frontend import MANY, SHORT, shortened

pytest.importorskip("aiohttp")
pytest.importorskip("comfyui_frontend_package")
pytest.importorskip("playwright.sync_api")


@pytest.fixture
def tiny_quickstart(quickstart, tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(shortened(quickstart)), encoding="utf-8")
    return path


def test_bundled_workflows_open(bundled_seen, start_editor, visit, tmp_path):
    """No missing node, no error, nothing asked of another host, and no node lies on another."""
    saved = json.loads(bundled_seen.read_text(encoding="utf-8"))
    for node in saved["nodes"]:
        if node["type"] == "DanceGRPOLoadLora":  # the page marks a node whose file is not listed
            path = tmp_path / "output" / node["widgets_values"][0]
            path.parent.mkdir(parents=True)
            path.touch()
    page = visit(start_editor(tmp_path, opened=bundled_seen).server.url)
    assert page.amiss(saved) == []
    page.shot(f"open-{bundled_seen.stem}")
    assert page.page.evaluate("""() => {
        const boxes = app.graph._nodes.map((n) => [n.title, n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]), found = [];
        for (const a of boxes) for (const b of boxes)
            if (a !== b && a[0] < b[0] && a[1] < b[3] && b[1] < a[3] && a[2] < b[4] && b[2] < a[4]) found.push(`${a[0]} over ${b[0]}`);
        return found; }""") == []
    assert page.errors == [] and page.foreign == []


def test_a_run_is_watched_reloaded_stopped_and_saved(tiny_quickstart, start_editor, visit, tmp_path, cli):
    editor = start_editor(tmp_path / "editor", opened=tiny_quickstart)
    page = visit(editor.server.url)
    page.look_at_loop_end()
    page.until("No run to show yet", "empty-title")
    page.shot("run-0-empty")

    page.page.get_by_test_id("queue-button").click()
    first = page.until_done(3)
    pictures, curve = page.pictures(), page.curve()
    assert len(pictures) == SHORT["DanceGRPOGroupSample"]["group_size"] and "broken" not in pictures and curve > 0
    page.shot("run-1-begun")
    then = page.until_done(first + 3)
    page.page.wait_for_function("(former) => document.querySelector('.dancegrpo-picture').src !== former", arg=pictures[0])
    assert page.curve() > curve  # it grew
    assert "broken" not in page.pictures() and not set(page.pictures()) & set(pictures)
    advantages = [float(t.replace("−", "-")) for t in page.panel("advantage").all_text_contents()]
    assert len(advantages) == len(pictures) and advantages == sorted(advantages, reverse=True)
    assert page.panel("state").text_content() == "running" and page.panel("left").text_content().endswith(" left")

    # saved while it runs, under the name of its tab
    page.page.keyboard.press("Control+s")
    page.page.get_by_role("dialog").get_by_role("textbox").press("Enter")
    saved = editor.output / "user" / "workflows" / "tiny.json"
    page.page.wait_for_function("() => app.extensionManager.workflow.activeWorkflow.isPersisted")
    page.page.reload()
    page.loaded()
    page.look_at_loop_end()
    assert page.until_done(then) >= then  # the server's state, not the page's
    page.until_done(page.done() + 1)  # and it moves on
    assert page.overlaps() == []
    page.shot("run-2-reloaded")

    page.panel("stop").click()
    page.until("stopped", "state")
    page.panel("stop").wait_for(state="hidden")
    page.panel("cell-name").first.wait_for()  # Evaluate's figures, after the run
    assert page.overlaps() == []
    page.shot("run-3-stopped")
    assert page.errors == [] and page.foreign == []

    run = editor.output / "quickstart"
    iterations = json.loads((run / "run.json").read_text(encoding="utf-8"))["iterations"]
    assert page.done() == iterations < MANY
    graph = json.loads(saved.read_text(encoding="utf-8"))
    end = next(node for node in graph["nodes"] if node["type"] == "DanceGRPOLoopEnd")
    assert end.get("widgets_values", []) == [] and not end.get("widgets_values_named")  # the panel leaves nothing in the file
    done = cli("run", saved, "--output", tmp_path / "headless", "--iterations", iterations)
    assert done.status == 0, done.err
    equal(run, tmp_path / "headless" / "quickstart")


def equal(run: Path, other: Path) -> None:
    """The LoRAs of two runs, bit for bit."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "lora" / "quickstart.safetensors") for folder in (run, other))
    assert ours.keys() == theirs.keys() and ours
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize("nodes", ["drawn on the canvas", "elements of the page"])
def test_a_finished_run_is_opened_again_from_its_folder(nodes, quickstart, start_editor, visit, tmp_path):
    """Without a server that trained it: the folder is enough. Both ways in which the frontend draws nodes."""
    import numpy as np
    from PIL import Image

    run = tmp_path / "output" / "long ago"
    (run / "live").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"state": "finished", "iterations": 40}))
    rows = [{"iteration": i, "reward_mean": i / 100, "reward_std": 0.05, "clip_fraction": 0.1, "approx_kl": 1e-7} for i in range(1, 41)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    watched = [{"iteration": 10 * k, "rewards": {"clip_score": 0.5 - k / 10, "shapes_agreement": 0.7}} for k in range(5)]
    (run / "watch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in watched))
    samples = [{"file": f"40-{i}.jpg", "score": 0.9 - i / 10, "advantage": 1.5 - i} for i in range(4)]
    for i, sample in enumerate(samples):
        Image.fromarray(np.full((64, 64, 3), 60 * i, np.uint8)).save(run / "live" / sample["file"])
    prompt = "<img src=x onerror=alert(1)> a prompt"
    (run / "live" / "state.json").write_text(json.dumps({"iteration": 40, "iterations": 40, "seconds_left": 0.0, "prompt": prompt,
                                                         "reward": "clip_score", "samples": samples}))
    evaluation = {"before": 0.25, "after": 0.3, "gain": 0.05, "ci95": [0.04, 0.06], "t": 9.0, "n": 160}
    (run / "summary.json").write_text(json.dumps({"evaluations": {"clip_score": evaluation}}))

    editor = start_editor(tmp_path, opened=quickstart)
    assert editor.post("/settings/Comfy.VueNodes.Enabled", nodes == "elements of the page").status == 200
    page = visit(editor.server.url)
    page.look_at_loop_end()
    page.until("No run to show yet", "empty-title")  # it is not of this graph's name
    page.panel("select").select_option("long ago")
    page.until("finished", "state")
    assert len(page.pictures()) == 4 and "broken" not in page.pictures()
    assert len({page.panel("tile").nth(i).bounding_box()["y"] for i in range(4)}) == 1  # in one row
    assert page.panel("prompt").text_content() == prompt  # text, not a tag
    assert page.panel("readout").first.text_content() == "0.4 ± 0.05"
    assert page.panel("cell").all_text_contents() == ["0.25", "0.3", "+0.05 ± 0.01"]
    page.page.locator(".dancegrpo-small .uplot").nth(3).wait_for()  # clip fraction, KL, and one for each watch reward
    assert page.panel("curve-title").all_text_contents()[3:] == ["clip_score", "shapes_agreement"]
    assert page.panel("readout").all_text_contents()[3:5] == ["0.1 (−0.4)", "0.7 (0)"]
    over = page.page.locator(".dancegrpo-curve-main .u-over")
    over.hover(position={"x": 1, "y": 10})
    page.until("iteration 1:  0.01 ± 0.05", "readout")
    page.page.evaluate("() => { app.canvas.ds.scale = 0.8; app.canvas.setDirty(true, true); }")  # the cursor stays true on a zoomed canvas
    page.page.wait_for_timeout(500)
    box = over.bounding_box()
    page.page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 10)
    page.until("iteration 40:  0.4 ± 0.05", "readout")
    assert page.overlaps() == []
    page.shot(f"reopened-{nodes.split()[0]}")
    assert page.errors == [] and page.foreign == []
