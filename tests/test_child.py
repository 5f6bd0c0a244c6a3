"""Loop Start's `processes`: in the editor the headless trainer trains the loop, and the page sees and stops it as ever; headless it counts like --processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from spmd import distance

import comfy_dancegrpo
from comfy_dancegrpo.errors import Interrupted, RunError
from comfy_dancegrpo.rewards import Reward
from comfy_dancegrpo.rewards.base import Deferred
from comfy_dancegrpo.runs import child
from comfy_dancegrpo.workflow import loop
from comfy_dancegrpo.workflow.host import Host, use


@pytest.fixture
def graph(prompt, made_tiny):
    """The quickstart, tiny, with two processes asked for; ids by class."""
    tiny, ids = made_tiny(prompt), {node["class_type"]: node_id for node_id, node in prompt.items()}
    tiny[ids["DanceGRPOLoopStart"]]["inputs"]["processes"] = 2
    return tiny, ids


def lora(folder):
    (path,) = (folder / "lora").iterdir()
    return load_file(path)


def record(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture
def editor(start_editor, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    running = start_editor(tmp_path / "editor", grace=0.0)
    yield running
    running.close()


def post(editor, page, prompt):
    extra = {"extra_pnginfo": {"workflow": {"nodes": [], "links": [], "drawn": "by the user"}}}
    answer = editor.post("/api/prompt", {"client_id": page.client_id, "prompt": prompt, "extra_data": extra})
    assert answer.status == 200, answer
    return json.loads(answer.body)["prompt_id"]


def trainers(editor):
    found = psutil.Process(editor.editor.jobs.worker.pid).children(recursive=True)
    return [process for process in found if "comfy_dancegrpo.trainer" in process.cmdline()]


@pytest.mark.skipif(sys.platform == "win32", reason="there a process that is killed leaves files open, and one that is told to end cannot save")
def test_two_processes_behind_a_page(editor, graph, cli, saved, tmp_path, one_thread):
    """Its worker is killed, and no process is left; the run goes on, and the stop button stops it; it goes on again, and its LoRA is the graph's."""
    prompt, ids = graph
    start, end, folder = prompt[ids["DanceGRPOLoopStart"]]["inputs"], ids["DanceGRPOLoopEnd"], editor.output / "quickstart"
    start |= {"iterations": 500, "checkpoint_every": 1, "on_existing": "resume"}
    with editor.page("page") as page:
        job = post(editor, page, prompt)
        page.until("dancegrpo.run", state="running", iteration=0)
        page.until("executing", node=ids["DanceGRPOGroupSample"])
        preview = page.until("executed", node=ids["PreviewImage"])["output"]["images"][0]
        assert preview["type"] == "temp" and editor.ask("GET", f"/view?filename={preview['filename']}&type=temp").status == 200
        page.until("progress", node=end, value=1, max=500)
        started = trainers(editor)
        assert len(started) == 3  # the one that watches, and two that train
        editor.editor.jobs.worker.kill()
        page.until("execution_error", prompt_id=job)
        assert not psutil.wait_procs(started, timeout=30)[1]

        job = post(editor, page, prompt)
        done = page.until("dancegrpo.run", state="running")["iteration"]  # what it goes on after
        page.until("dancegrpo.run", state="running", iteration=done + 1)
        assert editor.post("/api/interrupt", {}).status == 200
        page.until("execution_interrupted", prompt_id=job)
        assert not trainers(editor)
        now = record(folder)
        assert now["state"] == "stopped" and 1 <= done < now["iterations"] < 500
        rows = [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows == list(range(1, now["iterations"] + 1))

        start["iterations"] = now["iterations"] + 1
        job = post(editor, page, prompt)
        page.until("dancegrpo.run", state="running", iteration=now["iterations"])
        page.until("dancegrpo.run", state="finished")
        page.until("executing", node=ids["DanceGRPOEvaluate"])
        page.until("execution_success", prompt_id=job)
    assert record(folder)["state"] == "finished" and (folder / "live/state.json").is_file()
    assert json.loads((folder / "workflow.json").read_text())["drawn"] == "by the user"
    assert json.loads((folder / "prompt.json").read_text()).keys() == prompt.keys()

    assert cli("run", saved(prompt), "--output", tmp_path / "alone", "--processes", 1).status == 0  # which counts in place of Loop Start's
    alone = tmp_path / "alone/quickstart"
    assert record(folder)["fingerprint"] == record(alone)["fingerprint"]
    assert lora(folder).keys() == lora(alone).keys() and distance(lora(folder), lora(alone)) < 1e-3
    found = [json.loads((path / "summary.json").read_text())["evaluations"] for path in (folder, alone)]
    assert found[0].keys() == found[1].keys() and all(found[0][name]["after"] == pytest.approx(found[1][name]["after"], abs=1e-4) for name in found[0])


class Page(Host):
    def trainer(self, classes):
        return ["--output", str(self.output_folder)]


def body_of(prompt, ids):
    from comfy_dancegrpo import nodes

    return loop.find_body(prompt, ids["DanceGRPOLoopEnd"], {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS})


def test_what_the_trainer_is_given(graph):
    prompt, ids = graph
    prompt[ids["DanceGRPOLoopStart"]]["inputs"]["processes"] = ["any", 0]
    found = child.part(prompt, body_of(prompt, ids), 2)
    after = {ids[name] for name in ("DanceGRPOEvaluate", "DanceGRPOSaveLora", "DanceGRPOPlotMetrics")}
    assert ids["PreviewImage"] in found and ids["DanceGRPOLoadPolicy"] in found and not after & found.keys()
    assert found[ids["DanceGRPOLoopStart"]]["inputs"]["processes"] == 2


@pytest.mark.parametrize("fault, line", [
    ("missing", 'typer is not installed; the command line needs: pip install "comfy-dancegrpo[headless]"'),
    ("bad", "input \"steps\": found 'many'"), ("stopped", None),
])
def test_what_goes_wrong_is_one_line(graph, tmp_path, monkeypatch, fault, line):
    """A missing extra, what the trainer refuses, and a stop before it has begun."""
    prompt, ids = graph
    if fault == "missing":
        (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if fault == "bad":
        prompt[ids["DanceGRPOGroupSample"]]["inputs"]["steps"] = "many"
    with use(Page(output=tmp_path / "output")) as host:
        host.prompt = prompt
        if fault == "stopped":
            def stop():
                raise Interrupted("stopped")

            host.check_interrupt = stop
            with pytest.raises(Interrupted):
                child.train(body_of(prompt, ids), 2, host.trainer(set()))
        else:
            with pytest.raises(RunError) as caught:
                child.train(body_of(prompt, ids), 2, host.trainer(set()))
            assert line in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("told, found", [
    ('err("dancegrpo: process 1: node 5 \\"Group Sample\\": planted; resume with: x"); err("dancegrpo: another process has ended"); exit(3)',
     'process 1: node 5 "Group Sample": planted; another process has ended'),
    ("exit(7)", "the processes that train ended with status 7"), ("exit(0)", "the processes that train ended with status 0"),
    ('err("dancegrpo: out of memory"); time.sleep(0.3); out(["run_started", "DIR/run", "1"]); out("printed by a node"); exit(0)', None),
])
def test_what_the_trainer_tells(tmp_path, told, found):
    """What failed in one of several, what ended without a word, and what was started again with half the micro-batch."""
    code = "import json, sys, time\nout = lambda value: print(json.dumps(value))\nerr = lambda line: print(line, file=sys.stderr, flush=True)\n"
    command = [sys.executable, "-c", code + told.replace("DIR", tmp_path.as_posix())]
    with use(Page(output=tmp_path)) as host:
        said = []
        host.say = said.append
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if found is None:
            assert child._follow(process).path == host.run_folder == tmp_path / "run" and said == ['"printed by a node"']
        else:
            with pytest.raises(RunError) as caught:
                child._follow(process)
            assert str(caught.value) == found


def test_a_plain_clone_is_found(monkeypatch):
    """By the folder that holds the package, whatever PYTHONPATH says."""
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    root, other = child._environment()["PYTHONPATH"].split(os.pathsep)
    assert (Path(root) / "comfy_dancegrpo/__init__.py").samefile(comfy_dancegrpo.__file__) and other == "elsewhere"


def test_headless_it_counts_like_the_option(graph, cli, saved, tmp_path, monkeypatch):
    from comfy_dancegrpo.trainer import launch

    started = []
    monkeypatch.setattr(launch, "launch", lambda count, *rest: started.append(count) or 0)
    monkeypatch.setattr(launch, "_accelerators", lambda: 0)
    prompt, _ = graph
    assert cli("run", saved(prompt), "--output", tmp_path).status == 0
    assert cli("run", saved(prompt), "--output", tmp_path, "--processes", 3).status == 0
    assert started == [2, 3]
    monkeypatch.setattr(launch, "_accelerators", lambda: 1)
    done = cli("run", saved(prompt), "--output", tmp_path)
    assert done.status == 2 and done.verdict == ["Loop Start's \"processes\": found 2, accepted: up to 1, the GPUs that are visible"]


def test_a_reward_that_is_not_loaded_yet_need_not_leave():
    """The page's process makes room for those that train, and loads nothing for it."""
    places = []

    class Weights(torch.nn.Module):
        def to(self, device):
            places.append(device)

    reward = Reward("any", Deferred(Weights))
    reward.leave()
    assert places == []
    reward.to("cuda")
    reward.leave()
    assert places == ["cuda", "cpu"]
