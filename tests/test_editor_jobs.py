"""Jobs in the editor, over its real server, trained by its worker process: equal to headless, stopped, queued, killed, reloaded."""

import json
import os
import signal
import sys

import pytest

# 6 samples in micro-batches of 4, the last padded; 2 optimizer steps
TINY = {"DanceGRPOLoopStart": {"prompts_per_iteration": 2, "micro_batch": 4, "lora_rank": 2, "iterations": 2},
        "DanceGRPOGroupSample": {"group_size": 3, "steps": 4}, "DanceGRPOUpdate": {"train_fraction": 0.6, "optimizer_steps": 2}}
LOOP = range(1, 12)  # the quickstart's nodes up to Save LoRA


@pytest.fixture(scope="module")
def editor(start_editor, tmp_path_factory):
    """One for all these tests, so that they share a worker; a second interrupt kills at once."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")  # of the worker, as `one_thread` is of the headless run
    running = start_editor(tmp_path_factory.mktemp("editor"), grace=0.0)
    yield running
    running.close()
    patch.undo()


@pytest.fixture
def workflow(quickstart):
    """`workflow(run_name, **of_loop_start)`: the quickstart's loop as the editor saves it, tiny, and its prompt."""
    from comfy_dancegrpo import nodes
    from comfy_dancegrpo.workflow.convert import to_prompt
    from comfy_dancegrpo.workflow.read import read_workflow
    from comfy_dancegrpo.workflow.schema import object_info

    def make(run_name: str, **of_loop_start):
        saved = json.loads(quickstart.read_text(encoding="utf-8"))
        saved["nodes"] = [node for node in saved["nodes"] if node["id"] in LOOP]
        saved["links"] = [link for link in saved["links"] if link[1] in LOOP and link[3] in LOOP]
        kept = {link[0] for link in saved["links"]}
        changes = {**TINY, "DanceGRPOLoopStart": {**TINY["DanceGRPOLoopStart"], "run_name": run_name, **of_loop_start}}
        for node in saved["nodes"]:
            for output in node["outputs"]:
                output["links"] = [link for link in output["links"] or () if link in kept]
            widgets = [one["widget"]["name"] for one in node["inputs"] if "widget" in one]
            for name, value in changes.get(node["type"], {}).items():
                node["widgets_values"][widgets.index(name)] = value
        registry = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}
        return saved, to_prompt(read_workflow(json.dumps(saved).encode()), object_info(registry, nodes.NODE_DISPLAY_NAME_MAPPINGS))

    return make


@pytest.fixture
def queue(editor, workflow):
    """`queue(page, run_name, ...)`: posts it as the frontend does; the job's id."""

    def put(page, run_name: str, body=None, **of_loop_start) -> str:
        saved, prompt = workflow(run_name, **of_loop_start)
        answer = editor.post("/api/prompt", {"client_id": page.client_id, "prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": saved}},
                                             **(body or {})})
        assert answer.status == 200, answer
        found = json.loads(answer.body)
        assert found["node_errors"] == {}
        return found["prompt_id"]

    return put


def tensors(path):
    from safetensors.torch import load_file

    return load_file(path)


def equal(one, other) -> bool:
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lora(editor, run_name: str):
    return tensors(editor.output / run_name / "lora" / f"{run_name}.safetensors")


def job(editor, job_id: str) -> dict:
    return editor.get(f"/api/jobs/{job_id}")


def run_state(editor, run_name: str) -> dict:
    return json.loads((editor.output / run_name / "run.json").read_text())


def test_a_run_equals_the_headless_run_of_the_same_saved_json(editor, queue, cli, one_thread, tmp_path):
    with editor.page("a") as page:
        done = queue(page, "equal")
        assert page.until("execution_start", prompt_id=done)["timestamp"] > 0
        assert page.until("execution_cached", prompt_id=done)["nodes"] == []
        page.until("dancegrpo.run", state="running", iteration=1, iterations=2, run="equal", node="10", prompt_id=done)
        page.until("dancegrpo.run", state="finished")
        page.until("executed", node="10")
        page.until("execution_success", prompt_id=done)
        assert page.until("executing")["node"] is None
        # again: the loaders have nothing to do, and a policy that was trained before is as good as new
        again = queue(page, "again")
        assert sorted(page.until("execution_cached", prompt_id=again)["nodes"]) == ["1", "3"]
        page.until("execution_success", prompt_id=again)
    saved = editor.output / "equal" / "workflow.json"
    headless = cli("run", saved, "--output", tmp_path / "headless")
    assert headless.status == 0, headless.err
    alone = tensors(tmp_path / "headless/equal/lora/equal.safetensors")
    assert any(tensor.abs().max() > 0 for tensor in alone.values())
    assert equal(lora(editor, "equal"), alone)
    assert equal(lora(editor, "again"), alone)
    assert (tmp_path / "headless/equal/prompt.json").read_text() == (editor.output / "equal/prompt.json").read_text()


def test_previews_are_fetched_while_they_move_and_the_panel_reads_the_run(editor, queue):
    with editor.page("a") as page:
        done = queue(page, "shown")
        shown = [page.until("executed", node="8")["output"]["images"] for _ in range(2)]
        assert [len(images) for images in shown] == [6, 6] and shown[0] != shown[1]
        for image in shown[1]:
            answer = editor.ask("GET", f"/api/view?filename={image['filename']}&type=temp&subfolder=")
            assert answer.status == 200 and answer.body.startswith(b"\x89PNG")
        page.until("execution_success", prompt_id=done)
    run = editor.get("/api/dancegrpo/runs/shown")
    assert run["state"] == "finished" and run["columns"]["iteration"] == [1, 2] and len(run["group"]["samples"]) == 3
    assert editor.get("/dancegrpo/runs")["active"] is None
    found = job(editor, done)
    assert found["status"] == "completed" and found["outputs"]["8"]["images"] == shown[1]
    assert found["workflow_id"] == found["workflow"]["extra_data"]["extra_pnginfo"]["workflow"]["id"]
    history = editor.get(f"/history/{done}")[done]
    assert history["status"]["status_str"] == "success" and [m[0] for m in history["status"]["messages"]] == [
        "execution_start", "execution_cached", "execution_success"]
    assert editor.post("/history", {"delete": [done]}).status == 200 and editor.get(f"/history/{done}") == {}


def test_a_fault_is_shown_on_its_node_and_the_next_job_runs(editor, queue):
    (editor.output / "taken").mkdir(parents=True)  # a folder that is no run's
    with editor.page("a") as page:
        failed = queue(page, "taken", on_existing="restart")
        error = page.until("execution_error", prompt_id=failed)
        assert error["node_id"] == "10" and error["node_type"] == "DanceGRPOLoopEnd" and "is not a run of this program" in error["exception_message"]
        assert page.until("executing")["node"] is None
        page.until("execution_success", prompt_id=queue(page, "after a fault"))
    assert job(editor, failed)["status"] == "failed" and job(editor, failed)["execution_error"]["node_id"] == "10"
    assert not any((editor.output / "taken").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is not there")
def test_a_worker_that_does_not_react_is_killed_by_a_second_interrupt(editor, queue):
    with editor.page("a") as page:
        stuck = queue(page, "stuck", iterations=1000)
        page.until("dancegrpo.run", run="stuck", iteration=1)
        pid = editor.editor.jobs.worker.pid
        os.kill(pid, signal.SIGSTOP)
        for _ in range(2):
            assert editor.post("/interrupt", {"prompt_id": stuck}).status == 200
        page.until("execution_interrupted", prompt_id=stuck)
    assert job(editor, stuck)["status"] == "cancelled" and editor.editor.jobs.worker.pid is None


def test_jobs_wait_are_cancelled_and_survive_a_reload_and_an_interrupt_keeps_what_was_trained(editor, queue):
    with editor.page("a") as page:
        first = queue(page, "first", iterations=1000)
        second, third = queue(page, "second"), queue(page, "third")
        front = queue(page, "front", body={"front": True})
        assert [item[1] for item in editor.get("/queue")["queue_running"]] == [first]
        assert [item[1] for item in editor.get("/queue")["queue_pending"]] == [front, second, third]
        assert editor.get("/prompt") == {"exec_info": {"queue_remaining": 4}}
        listed = editor.get("/api/jobs?status=in_progress,pending&limit=3")
        assert [row["status"] for row in listed["jobs"]] == ["in_progress", "pending", "pending"]
        assert listed["pagination"] == {"offset": 0, "limit": 3, "total": 4, "has_more": True}
        assert editor.post("/prompt", {"prompt": editor.get(f"/jobs/{third}")["workflow"]["prompt"], "prompt_id": third}).status == 400
        assert editor.post("/queue", {"delete": [second]}).status == 200
        assert editor.post("/interrupt", {"prompt_id": third}).status == 200  # not the one that runs: nothing happens
        page.until("dancegrpo.run", run="first", iteration=1)
    with editor.page("a") as page:  # loaded again, in mid-run
        assert page.until("status", sid="a")["status"] == {"exec_info": {"queue_remaining": 3}}
        page.until("execution_start", prompt_id=first)
        assert "10" in page.until("progress_state", prompt_id=first)["nodes"]
        assert page.until("executing")["node"] in ("5", "6", "7", "8", "9", "10")
        active = editor.get("/dancegrpo/runs")["active"]
        assert active["run"] == "first" and active["prompt_id"] == first and active["iterations"] == 1000
        page.until("dancegrpo.run", run="first", state="running")
        assert editor.post("/interrupt", {}).status == 200
        stopped = page.until("execution_interrupted", prompt_id=first)
        assert stopped["node_id"] in ("5", "6", "7", "8", "9", "10")
        for job_id in (front, third):
            page.until("execution_success", prompt_id=job_id)
    assert [job(editor, one)["status"] for one in (first, second, third, front)] == ["cancelled", "cancelled", "completed", "completed"]
    assert not (editor.output / "second").exists()
    record = run_state(editor, "first")
    assert record["state"] == "stopped" and 0 < record["iterations"] < 1000
    assert lora(editor, "first") and list((editor.output / "first/checkpoints").iterdir())


def test_a_killed_worker_is_an_error_on_the_node_the_run_goes_on_and_the_editors_own_end_keeps_what_was_trained(editor, queue):
    with editor.page("a") as page:
        killed = queue(page, "killed", iterations=1000, checkpoint_every=1)
        page.until("dancegrpo.run", run="killed", iteration=2)
        os.kill(editor.editor.jobs.worker.pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        error = page.until("execution_error", prompt_id=killed)
        assert error["node_id"] in job(editor, killed)["workflow"]["prompt"] and "the training process" in error["exception_message"]
        assert "resume" in error["exception_message"]
        assert editor.get("/api/queue") == {"queue_running": [], "queue_pending": []}
        resumed = queue(page, "killed", iterations=1000, checkpoint_every=0, on_existing="resume")
        page.until("dancegrpo.run", run="killed", prompt_id=resumed, iteration=lambda iteration: iteration >= 3)
        editor.close()
    record = run_state(editor, "killed")
    assert record["state"] == "stopped" and record["iterations"] >= 3 and lora(editor, "killed")
