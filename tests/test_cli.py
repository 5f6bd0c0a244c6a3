"""The command line, in a process of its own, with stand-in nodes: exit statuses, one line a fault, and nothing heavy imported."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import comfy_dancegrpo

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in comfy_dancegrpo.__path__:
    comfy_dancegrpo.__path__.append(str(ROOT))

PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import comfy_dancegrpo
if {str(ROOT)!r} not in comfy_dancegrpo.__path__:
    comfy_dancegrpo.__path__.append({str(ROOT)!r})
import stand_in_nodes
sys.modules["comfy_dancegrpo.nodes"] = comfy_dancegrpo.nodes = stand_in_nodes
from comfy_dancegrpo.trainer import launch
launch._accelerators = lambda: 0  # counting them takes torch; nothing else here does
from comfy_dancegrpo.trainer.cli import main
try:
    main()
finally:
    heavy = [name for name in ("torch", "diffusers", "transformers") if name in sys.modules]
    if heavy:
        print("HEAVY", heavy)
"""

GRAPH = {
    "1": {"class_type": "Start", "inputs": {"run_name": "run", "iterations": 3, "seed": 0, "on_existing": "new"}, "_meta": {"title": "My start"}},
    "2": {"class_type": "Body", "inputs": {"x": ["1", 0], "fault": "none"}, "_meta": {"title": "My body"}},
    "3": {"class_type": "End", "inputs": {"x": ["2", 0]}},
    "4": {"class_type": "Result", "inputs": {"x": ["3", 0]}},
}


@pytest.fixture
def dancegrpo(tmp_path):
    """Runs the program in a folder of its own, where flow.json is the graph above."""
    (tmp_path / "flow.json").write_text(json.dumps(GRAPH))

    def call(*words, program=PROGRAM):
        done = subprocess.run([sys.executable, "-c", program, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr or "--debug" in words, done.stderr
        return done

    return call


def test_runs_a_workflow_with_a_line_per_iteration(dancegrpo, tmp_path):
    done = dancegrpo("run", "flow.json")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "/3 " in line] == ["1/3 reward 1.000", "2/3 reward 2.000", "3/3 reward 3.000"]
    assert "result 3" in done.stderr.splitlines()
    assert done.stderr.splitlines().count("My body") == 1
    assert done.stdout.splitlines() == [str(Path("output/run")), str(Path("output/images/a.png"))]
    assert (tmp_path / "output/run/workflow.json").read_bytes() == (tmp_path / "flow.json").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="no pty on Windows")
def test_a_terminal_gets_a_bar_with_the_reward(tmp_path):
    import pty

    (tmp_path / "flow.json").write_text(json.dumps(GRAPH))
    ours, theirs = pty.openpty()
    done = subprocess.Popen([sys.executable, "-c", PROGRAM, "run", "flow.json"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs,
                            env={**os.environ, "TERM": "xterm", "COLUMNS": "120"})
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # Linux: the other end was closed
        pass
    os.close(ours)
    assert done.wait(60) == 0
    assert b"3/3" in shown and b"reward 3.000" in shown and b"result 3" in shown and b"\x1b[" in shown


def test_options_reach_loop_start_and_any_node(dancegrpo, tmp_path):
    done = dancegrpo("run", "flow.json", "--output", "out", "--run", "second", "--iterations", 2, "--seed", 5, "--set", "My body.fault=none")
    assert done.returncode == 0 and "result 7" in done.stderr.splitlines()
    assert (tmp_path / "out/second/workflow.json").is_file()


@pytest.mark.parametrize("words, lines", [
    (["--set", "My bdy.fault=none"], ["My bdy", "My body"]),
    (["--set", "2.foult=none"], ["node 2", "foult", "fault"]),
    (["--set", "2.fault=odd"], ["node 2", "'odd'"]),
    (["--iterations", "0"], ["node 1", "iterations", "0"]),
    (["--comfyui", "nowhere"], ["nowhere: not a ComfyUI folder"]),
    (["--extra-model-paths", "nowhere.yaml"], ["nowhere.yaml: cannot be read"]),
])
@pytest.mark.parametrize("command", ["run", "validate"])
def test_what_the_user_asked_wrongly_is_one_line_and_status_2(dancegrpo, tmp_path, command, words, lines):
    done = dancegrpo(command, "flow.json", *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and all(part in done.stderr for part in lines), done.stderr
    assert done.stdout == "" and not (tmp_path / "output").exists()


def test_every_problem_of_a_workflow_has_its_line(dancegrpo, tmp_path):
    graph = json.loads(json.dumps(GRAPH))
    graph["1"]["inputs"]["seed"] = 100
    graph["2"]["inputs"]["fault"] = "odd"
    (tmp_path / "flow.json").write_text(json.dumps(graph))
    done = dancegrpo("validate", "flow.json")
    assert done.returncode == 2 and [line.split(":")[1][:7] for line in done.stderr.splitlines()] == [" node 1", " node 2"]


def test_a_loop_that_is_none_is_found_before_the_run(dancegrpo, tmp_path):
    graph = GRAPH | {"3": {"class_type": "Body", "inputs": {"x": ["2", 0], "fault": "none"}}}
    (tmp_path / "flow.json").write_text(json.dumps(graph))
    done = dancegrpo("run", "flow.json")
    assert done.returncode == 2 and done.stderr == 'dancegrpo: node 1 "My start" (Start): no Loop End closes this loop\n'


def test_loop_options_need_a_loop_start(dancegrpo, tmp_path):
    (tmp_path / "flow.json").write_text(json.dumps({"2": {"class_type": "Body", "inputs": {"x": 1, "fault": "none"}}}))
    done = dancegrpo("run", "flow.json", "--seed", 1)
    assert done.returncode == 2 and "--seed: the workflow has no Loop Start" in done.stderr


RESUME = "; resume with: dancegrpo run flow.json --output output --run run --set {} --resume"


@pytest.mark.parametrize("fault, status, line", [
    ("value", 3, 'node 2 "My body" (Body): ValueError: not like this'),
    ("run", 3, 'node 2 "My body" (Body): the reward is nan'),
    ("disk", 3, 'the disk is full: node 2 "My body" (Body): OSError: [Errno 28] No space left on device'),
    ("wrapped disk", 3, 'the disk is full: node 2 "My body" (Body): RuntimeError: I/O error: No space left on device (os error 28)'),
    ("keyboard", 130, "stopped"),
    ("sigint", 130, "stopped"),
    ("sigterm", 143, "stopped"),
    ("sigint twice", 130, "stopped"),
])
@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process outright on Windows, and words are quoted in another way")
def test_faults_and_stops_are_one_line_that_says_how_to_resume(dancegrpo, fault, status, line):
    done = dancegrpo("run", "flow.json", "--set", f"2.fault={fault}")
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1] == f"dancegrpo: {line}{RESUME.format(shlex.quote(f'2.fault={fault}'))}"
    assert "2/3" not in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_the_traceback_and_its_cause(dancegrpo):
    done = dancegrpo("run", "flow.json", "--set", "2.fault=value", "--debug")
    assert done.returncode == 3 and "Traceback" in done.stderr and "and not like that" in done.stderr


def test_a_bad_command_is_status_2(dancegrpo):
    assert dancegrpo("walk").returncode == 2
    assert dancegrpo("run").returncode == 2


def test_nodes_prints_the_object_info_table(dancegrpo):
    info = json.loads(dancegrpo("nodes", "--json").stdout)
    assert info["Start"]["display_name"] == "Loop Start" and info["Body"]["input"]["required"]["x"][0] == "INT"
    assert set(info) == {"Start", "Body", "End", "Runner", "Result"}
    assert "Loop Start" in dancegrpo("nodes").stdout


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["nodes", "--json"], ["nodes"], ["validate", "flow.json"], ["run", "nowhere.json"]])
def test_nothing_heavy_is_imported(dancegrpo, words):
    done = dancegrpo(*words)
    assert done.returncode == (2 if "run" in words else 0), done.stderr
    assert "HEAVY" not in done.stdout
    if words == ["--version"]:
        assert done.stdout == f"dancegrpo {comfy_dancegrpo.__version__}\n"


COMFYUI = {  # as much of ComfyUI as lending its registry touches
    "comfy/cli_args.py": "from types import SimpleNamespace\nargs = SimpleNamespace(cpu=False, front_end_root=None)\n",
    "utils/extra_config.py": "",
    "server.py": "class PromptServer:\n    def __init__(self, loop): PromptServer.instance = self\n",
    "folder_paths.py": """
folder_names_and_paths = {"loras": ([], set()), "custom_nodes": ([], set())}
def add_model_folder_path(kind, folder, is_default=False): folder_names_and_paths[kind][0].insert(0, folder)
def set_output_directory(folder): pass
set_input_directory = set_temp_directory = set_output_directory
""",
    "nodes.py": """
import torch, folder_paths
class Mode:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = ("INT",), "run", "lent", True
    INPUT_TYPES = classmethod(lambda cls: {"required": {"x": ("INT", {"default": 1})}})
    def run(self, x):
        from server import PromptServer
        assert PromptServer.instance
        print("inference mode", torch.is_inference_mode_enabled(), folder_paths.folder_names_and_paths)
        return (x,)
class Theirs(Mode): pass
NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = {"Body": Theirs}, {}
async def init_extra_nodes(init_custom_nodes, init_api_nodes):
    assert init_custom_nodes and not init_api_nodes
    NODE_CLASS_MAPPINGS["Mode"] = Mode
""",
}


def test_comfyui_lends_its_registry_and_ours_win(dancegrpo, tmp_path):
    for name, text in COMFYUI.items():
        (tmp_path / "ComfyUI" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ComfyUI" / name).write_text(text)
    (tmp_path / "flow.json").write_text(json.dumps(GRAPH | {"5": {"class_type": "Mode", "inputs": {"x": 1}}}))
    assert "unknown node type 'Mode'" in dancegrpo("run", "flow.json").stderr
    done = dancegrpo("run", "flow.json", "--comfyui", "ComfyUI")
    assert done.returncode == 0 and "result 3" in done.stderr, done.stderr
    loras = [str(tmp_path / "ComfyUI/models/loras")]
    assert done.stdout.splitlines()[0] == f"inference mode True {{'loras': ({loras}, set()), 'custom_nodes': ([], set())}}"


def test_a_comfyui_that_does_not_import_is_one_line(dancegrpo, tmp_path):
    (tmp_path / "ComfyUI/comfy").mkdir(parents=True)
    (tmp_path / "ComfyUI/nodes.py").write_text("")
    done = dancegrpo("validate", "flow.json", "--comfyui", "ComfyUI")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "requirements.txt" in done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich", "yaml"])
def test_without_the_extra_one_line_says_what_to_install(dancegrpo, missing):
    done = dancegrpo("--help", program=PROGRAM.replace("import sys\n", f"import sys\nsys.modules[{missing!r}] = None\n", 1))
    assert done.returncode == 2
    assert done.stderr == f'dancegrpo: {missing} is not installed; the command line needs: pip install "comfy-dancegrpo[headless]"\n'


def test_extra_model_paths_are_read_as_comfyui_reads_them(tmp_path, monkeypatch):
    from comfy_dancegrpo.trainer.paths import ModelPaths

    monkeypatch.setenv("STORE", str(tmp_path / "store"))
    file = tmp_path / "extra_model_paths.yaml"
    file.write_text("""
comfyui:
    base_path: $STORE
    is_default: true
    loras: a
    clip: |
        clip
        more/clip

other:
    loras: b/
    diffusers: /elsewhere
    checkpoints: models/checkpoints
empty:
""")
    paths = ModelPaths(tmp_path / "models")
    paths.read(file)
    assert paths.folders("loras") == [tmp_path / "store/a", tmp_path / "models/loras", tmp_path / "b"]
    assert paths.folders("text_encoders") == [tmp_path / "store/more/clip", tmp_path / "store/clip", tmp_path / "models/text_encoders", tmp_path / "models/clip"]
    assert paths.folders("diffusers") == [tmp_path / "models/diffusers", Path("/elsewhere")]
    assert paths.folders("checkpoints") == [tmp_path / "models/checkpoints"]


@pytest.mark.parametrize("text, message", [("a: [", "not YAML"), ("- a", "found list"), ("a: b", "section 'a'"), ("a:\n  loras: 3", "loras: found 3")])
def test_a_broken_paths_file_is_one_line(tmp_path, text, message):
    from comfy_dancegrpo.errors import WorkflowError
    from comfy_dancegrpo.trainer.paths import ModelPaths

    file = tmp_path / "paths.yaml"
    file.write_text(text)
    with pytest.raises(WorkflowError, match=message) as caught:
        ModelPaths(tmp_path).read(file)
    assert len(str(caught.value).splitlines()) == 1
