"""The files of clusters/, run for real with two tasks on this machine: Slurm's and Kubernetes' own parts are stood in for, and nothing else."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from spmd import free_port

from comfy_dancegrpo.runs import checkpoints
from comfy_dancegrpo.trainer import launch

EXAMPLES = Path(__file__).resolve().parent.parent / "clusters"  # not "examples": ComfyUI would serve that folder in the place of the workflows
WAIT = 240  # seconds
posix = pytest.mark.skipif(sys.platform == "win32", reason="Slurm and Kubernetes' containers are not on Windows")

SLURM = {  # srun starts its command SLURM_NTASKS times; told to stop itself it kills them, as the real one does ("forcing job termination")
    "srun": """
import os, signal, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
state, count = Path(os.environ["FAKE_SLURM"]), int(os.environ["SLURM_NTASKS"])
tasks = [subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(k), "SLURM_LOCALID": str(k), "SLURM_NODEID": "0"}) for k in range(count)]
(state / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
sys.exit(max(task.wait() % 256 for task in tasks))
""",
    "scancel": """
import os, signal, sys
from pathlib import Path
assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
for pid in (Path(os.environ["FAKE_SLURM"]) / "tasks").read_text().split():
    os.kill(int(pid), signal.SIGTERM)
""",
    "scontrol": """
import os, sys
from pathlib import Path
if sys.argv[1:3] == ["show", "hostnames"]:
    assert sys.argv[3] == "node[1-2]"
    print("127.0.0.1\\nanother")
else:
    with (Path(os.environ["FAKE_SLURM"]) / "told").open("a") as file:
        file.write(" ".join(sys.argv[1:]) + "\\n")
""",
    "dancegrpo": "from comfy_dancegrpo.trainer.cli import main\nmain()\n",
}


@pytest.fixture(scope="module")
def words(_quickstart_prompt, tiny_loop, tmp_path_factory):
    """The words of a tiny run, which saves each iteration."""
    path = tmp_path_factory.mktemp("flow") / "flow.json"
    path.write_text(json.dumps({node_id: node for node_id, node in _quickstart_prompt.items() if int(node_id) <= 11}))
    return [str(path), *tiny_loop, "--set", "Loop Start.checkpoint_every=1", "--run", "run"]


def begin(command, folder, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "ACCELERATE", "FSDP"))}
    return subprocess.Popen([*map(str, command)], cwd=folder, env={**clean, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(process, said):
    """Reads on until a line begins so; the lines until then."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(said):
            return lines
    raise AssertionError(f"ended with {process.wait(WAIT)} before it said {said!r}: {''.join(lines)}")


def end(process):
    """What a test that fails may leave."""
    try:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    except psutil.NoSuchProcess:
        pass
    process.kill()
    process.stderr.close()
    process.wait()


def iterations(folder):
    return [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- Slurm ------------------------------------------------------------------------------------------------------------------------
@posix
def test_slurm(words, tmp_path):
    """Two tasks; told before its time is over it saves, leaves with 143 and is queued again; the next one goes on."""
    (tmp_path / "bin").mkdir()
    for name, code in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{code}")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path), "SLURM_JOB_ID": str(free_port() - 20000 + 20000 * 3),
                   "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script, run = ["bash", EXAMPLES / "slurm.sh", *words], tmp_path / "output/run"
    process = begin([*script, "--iterations", 60], tmp_path, **environment)
    try:
        wait_for(process, "2/60 ")
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(WAIT) == 143 and "stopped; resume " in said, said
    finally:
        end(process)
    assert (tmp_path / "told").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    done = checkpoints.newest(run / "checkpoints")
    assert 2 <= done.iterations < 60 and done.processes == 2 and iterations(run) == list(range(1, done.iterations + 1))
    process = begin([*script, "--iterations", done.iterations + 1], tmp_path, **environment)
    try:
        said = process.stderr.read()
        assert process.wait(WAIT) == 0 and f"goes on after iteration {done.iterations}" in said, said
    finally:
        end(process)
    assert (tmp_path / "told").read_text().count("requeue") == 1 and iterations(run) == list(range(1, done.iterations + 2))


def test_what_slurm_is_asked_for():
    text = (EXAMPLES / "slurm.sh").read_text()
    assert subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sh")]).returncode == 0
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and "gpus-per-task" not in asked  # LOCAL_RANK counts the GPUs that a task sees
    assert asked["signal"].startswith("B:TERM@") and "requeue" in asked and asked["open-mode"] == "append"
    assert text.index("#SBATCH --output") < text.index("\nset -u")  # Slurm reads no further than the first command


# -- Kubernetes -------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def kubernetes():
    """The Service and the Job."""
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    return service, job


def test_what_kubernetes_is_asked_for(kubernetes):
    service, job = kubernetes
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (service["apiVersion"], service["kind"], job["apiVersion"], job["kind"]) == ("v1", "Service", "batch/v1", "Job")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]} and pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] and pod["restartPolicy"] == "Never"
    options = dict(word.lstrip("-").split("=", 1) for word in container["command"] if word.startswith("--") and "=" in word)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert (int(options["nnodes"]), int(options["nproc-per-node"])) == (spec["completions"], gpus)
    assert int(options["processes"]) == spec["completions"] * gpus and int(options["master-port"]) == service["spec"]["ports"][0]["port"]
    environment = {e["name"]: e.get("value") for e in container["env"]}
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert sorted(mounts.values()) == sorted(volume["name"] for volume in pod["volumes"])
    for path in ("/workflow/flow.json", options["models"], options["spool"], environment["HF_HOME"]):
        assert any(Path(mount) in (Path(path), *Path(path).parents) for mount in mounts)


def command_of(kubernetes, node, port, folder, words):
    """The container's command and environment in pod `node`, with places of this machine for those of the file, and a process a pod."""
    (container,) = kubernetes[1]["spec"]["template"]["spec"]["containers"]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    environment = {e["name"]: e["value"] if "value" in e else {index: str(node)}[e["valueFrom"]["fieldRef"]["fieldPath"]] for e in container["env"]}
    assert environment["RUNS"].startswith("s3://")
    environment |= {"MASTER_ADDR": "127.0.0.1", "RUNS": f"file://{folder}/bucket", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "models/huggingface")}
    command = [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word) for word in container["command"]]
    here = {"--nproc-per-node=8": "--nproc-per-node=1", "--processes=16": "--processes=2", "--master-port=29500": f"--master-port={port}",
            "--models=/models": f"--models={folder}/models", "--spool=/spool": f"--spool={folder}/spool-{node}", "/workflow/flow.json": words[0]}
    assert command[0] == "torchrun" and here.keys() <= set(command)
    return [sys.executable, "-m", "torch.distributed.run", *(here.get(word, word) for word in command[1:]), *words[1:]], environment


@posix
def test_kubernetes(kubernetes, words, tmp_path):
    """Two pods; the second is drained, which ends both; new ones with empty spools go on from the storage, which the first process alone has written."""
    def pods(count, saying=""):
        port = free_port()
        started = []
        for node in (0, 1):
            command, environment = command_of(kubernetes, node, port, tmp_path, words)
            started.append(begin([*command, "--iterations", count], tmp_path, **environment))
        return started

    def ended(started):
        try:
            said = [process.stderr.read() for process in started]
            return [process.wait(WAIT) for process in started], "".join(said)
        finally:
            for process in started:
                end(process)

    started = pods(60)
    try:
        wait_for(started[0], "2/60 ")
        started[1].send_signal(signal.SIGTERM)
    except BaseException:
        ended([p for p in started if p.kill() is None])
        raise
    told = time.monotonic()
    statuses, said = ended(started)
    print(f"{time.monotonic() - told:.1f} s after SIGTERM: {statuses}")
    assert 0 not in statuses and "is in file://" in said, said
    stored = tmp_path / "bucket/run"
    done = checkpoints.newest(stored / "checkpoints")
    assert 2 <= done.iterations < 60 and done.processes == 2 and iterations(stored)[-1] == done.iterations
    assert not (tmp_path / "spool-1/run").exists()
    shutil.rmtree(tmp_path / "spool-0")
    statuses, said = ended(pods(done.iterations + 1))
    assert statuses == [0, 0] and f"goes on after iteration {done.iterations}" in said, said
    assert iterations(stored) == list(range(1, done.iterations + 2)) and not (tmp_path / "spool-1/run").exists()


# -- accelerate -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["accelerate_ddp.yaml", "accelerate_fsdp2.yaml"])
def test_accelerate_reads_them(name, monkeypatch):
    """accelerate's own parser takes every key, and gives its processes what this program reads."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env

    path, settings = EXAMPLES / name, yaml.safe_load((EXAMPLES / name).read_text())
    assert launch.configured(path) == 16 == 8 * settings["num_machines"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(
        ["--config_file", str(path), "--machine_rank", "1", "--main_process_ip", "10.0.0.1", "-m", "comfy_dancegrpo.trainer", "run", "flow.json"]))
    assert (arguments.machine_rank, arguments.num_machines, arguments.num_processes, arguments.main_process_ip) == (1, 2, 16, "10.0.0.1")
    environment = prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, str(arguments.node_rank)) == ("2", "8", "1")
    for variable in [v for v in os.environ if v.startswith(("FSDP", "ACCELERATE"))]:
        monkeypatch.delenv(variable)
    for variable, value in environment.items():
        if variable.startswith(("FSDP", "ACCELERATE")):
            monkeypatch.setenv(variable, value)
    from comfy_dancegrpo import sharding

    sharded = environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    assert sharded == (name == "accelerate_fsdp2.yaml") and (not sharded or sharding.problem() is None)


@posix
def test_accelerate_on_two_machines(words, tmp_path):
    """Which are one here: the file for FSDP2, a process a machine."""
    settings = yaml.safe_load((EXAMPLES / "accelerate_fsdp2.yaml").read_text())
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**settings, "num_processes": 2, "main_process_port": free_port()}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "two.yaml", "-m", "comfy_dancegrpo.trainer", "run", *words,
               "--iterations", 1, "--processes", 2, "--output", tmp_path]
    started = [begin([*command[:5], "--machine_rank", rank, *command[5:]], tmp_path, OMP_NUM_THREADS="1") for rank in (0, 1)]
    try:
        said = [process.stderr.read() for process in started]
        assert [process.wait(WAIT) for process in started] == [0, 0], said
    finally:
        for process in started:
            end(process)
    found = checkpoints.newest(tmp_path / "run/checkpoints")
    assert (found.iterations, found.processes) == (1, 2)
