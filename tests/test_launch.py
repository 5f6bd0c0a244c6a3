"""Runs of several processes as users start them: by the program itself, by torchrun, by accelerate; what each tells, and what is left of them."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from comfy_dancegrpo.runs import checkpoints

TRAINER = ["-m", "comfy_dancegrpo.trainer"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *TRAINER]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "comfy_dancegrpo.trainer"]

COMFYUI = {  # a ComfyUI that lends two nodes: one makes numbers of pictures, one fails in the second process alone
    "comfy/cli_args.py": "from types import SimpleNamespace\nargs = SimpleNamespace(cpu=False, front_end_root=None)\n",
    "utils/extra_config.py": "",
    "server.py": "class PromptServer:\n    def __init__(self, loop): PromptServer.instance = self\n",
    "folder_paths.py": """
folder_names_and_paths = {}
def add_model_folder_path(kind, folder, is_default=False): pass
def set_output_directory(folder): pass
set_input_directory = set_temp_directory = set_output_directory
""",
    "nodes.py": """
import os
class Brightness:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("FLOAT",), "run", "lent", (True,)
    INPUT_TYPES = classmethod(lambda cls: {"required": {"images": ("IMAGE",), "log": ("STRING", {"default": ""})}})
    def run(self, images, log):
        with open(log, "a") as file:
            file.write(f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}\\n")
        return ([float(picture.mean()) for picture in images],)
class Fails:
    RETURN_TYPES, FUNCTION, CATEGORY, EVERY_PROCESS, OUTPUT_NODE = (), "run", "lent", True, True
    INPUT_TYPES = classmethod(lambda cls: {"required": {"iteration": ("INT", {"forceInput": True})}})
    def run(self, iteration):
        if iteration == 2 and os.environ.get("RANK") == "1":
            raise ValueError("planted")
        return {}
NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = {"Brightness": Brightness, "Fails": Fails}, {}
async def init_extra_nodes(init_custom_nodes, init_api_nodes): pass
""",
}
FIGURES = ("before", "after", "gain")  # of an evaluation; its t divides by a spread that is almost nothing here
CLIP_ROUNDS = 5e-6  # 1.6e-6 was seen: a process scores its own pictures, and kernels round by how many are in a batch


def call(words, cwd, status=0, **environment):
    """Runs Python with these words; the lines of its stdout and stderr. It must leave no process."""
    process = begin(words, cwd, **environment)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        end(process)
    assert process.returncode == status, err
    return out.splitlines(), err.splitlines()


def begin(words, cwd, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    for child in [*children(process), process]:
        child.kill()
    process.stdout.close()
    process.stderr.close()
    process.wait()


def children(process):
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def verdicts(lines):
    return [line.removeprefix("dancegrpo: ") for line in lines if line.startswith("dancegrpo: ")]


def lora(folder):
    (path,) = (folder / "lora").iterdir()
    return load_file(path)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def graph(_quickstart_prompt, tmp_path_factory):
    """A folder with flow.json (the quickstart's loop, tiny; its reward is a lent node's; watched and evaluated) and the ComfyUI that lends."""
    folder = tmp_path_factory.mktemp("launch")
    for name, text in COMFYUI.items():
        (folder / "ComfyUI" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "ComfyUI" / name).write_text(text)
    prompt = json.loads(json.dumps(_quickstart_prompt))
    ids = {}
    for node_id, node in prompt.items():
        ids.setdefault(node["class_type"].removeprefix("DanceGRPO"), node_id)
    tiny = {"LoopStart": {"iterations": 2, "prompts_per_iteration": 2, "micro_batch": 4, "lora_rank": 2, "run_name": "run", "checkpoint_every": 1},
            "GroupSample": {"group_size": 3, "steps": 4}, "Update": {"optimizer_steps": 2},
            "Evaluate": {"steps": 2, "batch_size": 4, "samples_per_prompt": 1}}
    for name, values in tiny.items():
        prompt[ids[name]]["inputs"].update(values)
    held_out = prompt[ids["Evaluate"]]["inputs"]["prompts"]
    prompt[held_out[0]]["inputs"]["limit"] = 3
    sampling = {name: value for name, value in prompt[ids["Evaluate"]]["inputs"].items()
                if name in ("steps", "shift", "guidance_scale", "width", "height", "noise_seed", "samples_per_prompt", "batch_size")}
    prompt |= {
        "90": {"class_type": "Brightness", "inputs": {"images": [ids["GroupSample"], 1], "log": str(folder / "calls-1")}, "_meta": {"title": "Theirs"}},
        "91": {"class_type": "DanceGRPOScoresFromNumbers", "inputs": {"rollout": [ids["GroupSample"], 0], "numbers": ["90", 0], "name": "theirs", "weight": 1.0}},
        "92": {"class_type": "SaveImage", "inputs": {"images": [ids["GroupSample"], 1], "filename_prefix": "every"}},
        "93": {"class_type": "DanceGRPOWatch", "inputs": {
            "policy": [ids["LoopStart"], 0], "update": [ids["Update"], 0], "prompts": held_out, "reward": prompt[ids["Evaluate"]]["inputs"]["reward"],
            "every": 1, "max_drop": 0.0, "patience": 2, "below": "best", **sampling}},
    }
    prompt[ids["Advantage"]]["inputs"]["scores"] = ["91", 0]
    (folder / "flow.json").write_text(json.dumps(prompt))
    (folder / "fails.json").write_text(json.dumps(prompt | {
        "94": {"class_type": "Fails", "inputs": {"iteration": [ids["LoopStart"], 2]}, "_meta": {"title": "Fails"}}}))
    bad = json.loads(json.dumps(prompt))
    bad[ids["LoopStart"]]["inputs"]["lora_rank"] = 0
    bad[ids["GroupSample"]]["inputs"]["steps"] = "many"
    (folder / "bad.json").write_text(json.dumps(bad))
    return folder


def words(output, *more, flow="flow.json", calls="calls"):
    return ["run", flow, "--comfyui", "ComfyUI", "--output", output, "--set", f"90.log={calls}", *more]


@pytest.fixture(scope="module")
def both(graph):
    """What one process and two, started by the program, say of the same run: by their number, lines of stdout and stderr."""
    return {count: call([*TRAINER, *words(f"by-{count}", "--processes", count, calls=f"calls-of-{count}")], graph) for count in (1, 2)}


def test_two_processes_give_the_numbers_of_one(both, graph):
    one, two = (graph / f"by-{count}/run" for count in (1, 2))
    a, b = lora(one), lora(two)
    off = torch.cat([(a[name] - b[name]).double().flatten() for name in a]).norm() / torch.cat([t.double().flatten() for t in a.values()]).norm()
    print(f"LoRA off by {off:.1e}")
    assert a.keys() == b.keys() and off < 1e-4
    watched = [[row["rewards"] for row in rows(folder / "watch.jsonl")] for folder in (one, two)]
    assert [row["iteration"] for row in rows(two / "watch.jsonl")] == [0, 1, 2]
    for alone, shared in zip(*watched):
        assert shared == pytest.approx(alone, abs=CLIP_ROUNDS)
    evaluations = [json.loads((folder / "summary.json").read_text())["evaluations"] for folder in (one, two)]
    assert evaluations[0].keys() == evaluations[1].keys() and evaluations[0]
    for name, alone in evaluations[0].items():
        assert {k: evaluations[1][name][k] for k in FIGURES} == pytest.approx(
            {k: alone[k] for k in FIGURES}, abs=CLIP_ROUNDS)
    assert [row["rewards"]["theirs"] for row in rows(two / "metrics.jsonl")] == [pytest.approx(row["rewards"]["theirs"], abs=1e-6) for row in rows(one / "metrics.jsonl")]


def test_lent_nodes_savers_and_lines_come_once(both, graph):
    assert (graph / "calls-of-1").read_text().split() == ["0/1"] * 2 and (graph / "calls-of-2").read_text().split() == ["0/2"] * 2
    saved = [sorted(path.relative_to(graph / f"by-{count}") for path in (graph / f"by-{count}").rglob("*.*") if "live" not in path.parts) for count in (1, 2)]
    assert saved[0] == saved[1] and len([path for path in saved[1] if path.name.startswith("every_")]) == 12
    (out_1, err_1), (out_2, err_2) = both[1], both[2]
    assert [line.replace("by-2", "by-1") for line in out_2] == out_1

    def told(lines):  # without what was measured
        return [line.replace("by-2", "by-1") for line in lines if "Warning" not in line and " s" not in line]

    assert err_2.count("Load Policy") == 1 and told(err_2)[:8] == told(err_1)[:8]


@pytest.mark.parametrize("launcher", ["torchrun", "--config"])
def test_other_launchers(launcher, both, graph):
    """Their processes are used, as many as are asked for, and draw what one process draws."""
    output = f"by-{launcher.strip('-')}"
    run = words(output, "--iterations", 1, calls=f"calls-{output}")
    if launcher == "torchrun":
        call([*TORCHRUN, *run, "--processes", 2], graph)
    else:
        (graph / "accelerate.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmachine_rank: 0\nmixed_precision: 'no'\n"
                                               "num_machines: 1\nnum_processes: 2\nuse_cpu: false\n")
        call([*TRAINER, *run, "--config", "accelerate.yaml"], graph)
    (row,), first = rows(graph / output / "run/metrics.jsonl"), rows(graph / "by-1/run/metrics.jsonl")[0]
    assert row["rewards"] == first["rewards"] and row["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
    assert (graph / f"calls-{output}").read_text().split() == ["0/2"]


@pytest.mark.parametrize("asked, found", [([], "started this one alone"), (["--processes", "2"], "--processes: found 2, and the launcher started 1")])
def test_accelerate_that_starts_one_process_for_two(graph, asked, found):
    _, err = call([*ACCELERATE[:5], "--quiet", *ACCELERATE[5:], *words("none", *asked)], graph, status=1)  # the launcher's own
    (line,) = verdicts(err)
    assert found in line and "accepted: " in line and not (graph / "none").exists()


def test_another_number_than_was_started(graph):
    """Known at once: the processes that were announced, and will never come, are not waited for."""
    start = time.monotonic()
    _, err = call([*TRAINER, *words("none", "--processes", 2)], graph, status=2, WORLD_SIZE="3", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert verdicts(err) == ["process 1: --processes: found 2, and the launcher started 3; accepted: the same number, or none said"]
    assert time.monotonic() - start < 30 and not (graph / "none").exists()


@pytest.mark.parametrize("config, asked, found", [
    (None, [], "none.yaml, which is not there"), ("a: 1\n", [], "does not say num_processes"), ("[", [], "does not say num_processes"),
    ("num_processes: 2\nuse_cpu: true\n", [], "asks for 2 processes on CPUs (use_cpu), of which accelerate would start one"),
    ("num_processes: 2\n", ["--processes", 3], "--processes: found 3, and none.yaml says num_processes 2"),
])
def test_a_configuration_that_does_not_fit(cli, graph, monkeypatch, config, asked, found):
    monkeypatch.chdir(graph)
    (graph / "none.yaml").unlink(missing_ok=True)
    if config is not None:
        (graph / "none.yaml").write_text(config)
    done = cli(*words("none", "--config", "none.yaml", *asked))
    (line,) = done.verdict
    assert done.status == 2 and found in line


@pytest.mark.parametrize("launcher", ["torchrun", "dancegrpo"])
def test_a_bad_workflow_has_its_lines_once(graph, launcher):
    run = words("none", "--processes", 2, flow="bad.json")
    _, err = call([*(TORCHRUN if launcher == "torchrun" else TRAINER), *run], graph, status=1 if launcher == "torchrun" else 2)
    lines = verdicts(err)
    assert len(lines) == 2 and any('"lora_rank": found 0' in line for line in lines) and any("'many'" in line for line in lines)


def test_a_process_that_fails_takes_the_run_down(graph):
    start = time.monotonic()
    process = begin([*TRAINER, *words("failed", "--processes", 2, flow="fails.json")], graph)
    try:
        found = wait_for(process, "1/2 ")
        failed_since = time.monotonic()
        err = process.stderr.read().splitlines()
        assert process.wait(60) == 3 and time.monotonic() - failed_since < 30, (found, err)
        assert not any(child.is_running() for child in found)
    finally:
        end(process)
    theirs, first = verdicts(err)
    print(f"{theirs}\n{first}\nafter {time.monotonic() - start:.1f} s")
    assert theirs == 'process 1: node 94 "Fails": ValueError: planted'
    assert "another process has ended (Connection closed by peer [127.0.0.1]:" in first and "; resume with: dancegrpo run fails.json" in first
    assert checkpoints.newest(graph / "failed/run/checkpoints")[0] >= 1


def wait_for(process, said):
    """Reads on until a line begins so; the processes that there are then."""
    for line in process.stderr:
        if line.startswith(said):
            return children(process)
    raise AssertionError(f"ended with {process.wait()} before it said {said!r}")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that a test could send")
def test_stopped_resumed_killed(graph):
    """SIGTERM to all of the job, as Slurm sends it, and SIGINT to the launcher of the run that goes on, save and leave; then one of its processes, and in
    the run that goes on the launcher, are killed."""
    run, done = [*TRAINER, *words("stopped", "--processes", 2, "--iterations", 60)], 0
    for signum, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = begin(run, graph)
        try:
            found = wait_for(process, f"{done + 2}/60 ")
            assert len(found) == 2
            for one in [process, *(found if signum == signal.SIGTERM else [])]:
                one.send_signal(signum)
            err = process.stderr.read().splitlines()
            assert process.wait(60) == status, err
            assert not any(child.is_running() for child in found)
        finally:
            end(process)
        (line,) = verdicts(err)
        assert line.startswith("stopped; resume with: dancegrpo run ")
        (graph / "stopped/run/report.html").unlink()  # which none waits for who was told to stop at once
        before, done = done, checkpoints.newest(graph / "stopped/run/checkpoints")[0]
        assert before < done < 60 and [row["iteration"] for row in rows(graph / "stopped/run/metrics.jsonl")] == list(range(1, done + 1))
        run = [*TRAINER, *shlex.split(line.partition("; resume with: ")[2])[1:]]
    for victim in ("a process", "launcher"):
        process = begin(run, graph)
        try:
            found = wait_for(process, f"{done + 1}/60 ")
            (psutil.Process(process.pid) if victim == "launcher" else found[1]).kill()
            gone, alive = psutil.wait_procs(found, timeout=30)
            assert not alive
            lines = verdicts(process.stderr.read().splitlines())
            assert process.wait(30) == (-signal.SIGKILL if victim == "launcher" else 3)
        finally:
            end(process)
        done = checkpoints.newest(graph / "stopped/run/checkpoints")[0]
        if victim == "a process":
            killed, lost = sorted(lines, key=lambda line: "another process has ended" in line)
            assert killed == "process 1 was killed by SIGKILL" and "another process has ended" in lost
            assert f"; resume with: {shlex.join(['dancegrpo', *run[2:]])}" in lost
