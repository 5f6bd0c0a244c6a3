"""`dancegrpo edit`: its one line, its end, and what it says when it cannot start; and the loaders that keep what they loaded."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import comfy_dancegrpo
if {str(ROOT)!r} not in comfy_dancegrpo.__path__:
    comfy_dancegrpo.__path__.append({str(ROOT)!r})
from comfy_dancegrpo.trainer.cli import main
try:
    main()
finally:
    print("HEAVY", [name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_prints_where_it_is_serves_and_ends_at_a_signal(tmp_path, quickstart, how):
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temp")}
    (tmp_path / "temp").mkdir()
    running = subprocess.Popen([sys.executable, "-c", PROGRAM, "edit", str(quickstart), "--port", "0", "--output", "out"], cwd=tmp_path,
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = running.stdout.readline()
        assert line.startswith("The editor is at http://127.0.0.1:") and line.endswith("/?template=quickstart&source=opened\n"), line
        base = line.split()[-1].partition("?")[0]
        with urllib.request.urlopen(base + "api/object_info") as answer:
            assert "DanceGRPOLoopEnd" in json.load(answer)
        running.send_signal(how)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 0 and err == "" and out == "HEAVY []\n"
    assert not list((tmp_path / "temp").iterdir()) and not (tmp_path / "out").exists()


def test_a_port_that_is_taken_is_one_line(cli, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cli("edit", "--port", port, "--output", tmp_path)
    assert done.status == 2 and len(done.err) == 1 and f"cannot listen on 127.0.0.1, port {port}" in done.err[0]


def test_an_address_that_is_not_here_is_one_line(cli, tmp_path):
    done = cli("edit", "--port", 0, "--listen", "192.0.2.1", "--output", tmp_path)
    assert done.status == 2 and len(done.err) == 1 and "cannot listen on 192.0.2.1" in done.err[0]


@pytest.mark.parametrize("content, said", [(None, "no such file"), ("{", "not JSON"), ('{"1": {"class_type": "X", "inputs": {}}}', "API format")])
def test_a_workflow_that_cannot_be_drawn_is_one_line(cli, tmp_path, content, said):
    if content is not None:
        (tmp_path / "flow.json").write_text(content)
    done = cli("edit", tmp_path / "flow.json", "--port", 0, "--output", tmp_path / "out")
    assert done.status == 2 and len(done.err) == 1 and said in done.err[0] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing, named", [({"aiohttp"}, "aiohttp"), ({"aiohttp", "comfyui_frontend_package"}, "aiohttp and comfyui-frontend-package")])
def test_a_missing_extra_is_one_line_that_names_it(cli, tmp_path, monkeypatch, missing, named):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    done = cli("edit", "--port", 0, "--output", tmp_path)
    assert done.status == 2 and done.err == [f'dancegrpo: edit needs {named}; pip install "comfy-dancegrpo[editor]"']


class _Load:
    """Stands in for Load Policy: counts how often it loads."""

    RETURN_TYPES, FUNCTION, loaded = ("DANCEGRPO_POLICY",), "load", 0

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"policy": ("STRING", {})}}

    def load(self, policy):
        _Load.loaded += 1
        return (f"{policy} {_Load.loaded}",)


def test_a_loader_loads_again_when_its_input_or_its_files_change_and_not_otherwise(tmp_path):
    from comfy_dancegrpo.trainer.editor.loaders import Loaders
    from comfy_dancegrpo.workflow.execute import execute
    from comfy_dancegrpo.workflow.host import Host, use

    load = type("Load", (_Load,), {"__module__": "comfy_dancegrpo.nodes.stand_in"})
    loaders = Loaders({"Load": load})
    weights = tmp_path / "models" / "diffusers" / "a" / "weights"
    weights.parent.mkdir(parents=True)
    weights.write_text("1")

    def run(name: str) -> tuple[list[str], str]:
        prompt = {"1": {"class_type": "Load", "inputs": {"policy": name}}}
        kept = loaders.retain(prompt)
        (value,), = execute(prompt, loaders.registry, [], [("1", 0)]).values()
        return kept, value

    with use(Host(models=tmp_path / "models")):
        first = run("a")[1]
        assert run("a") == (["1"], first)
        weights.write_text("22")  # another size: the file's time may not have moved
        kept, second = run("a")
        assert kept == [] and second != first
        third = run("b")[1]
        assert run("a")[0] == [] and run("a")[1] not in (first, second, third)  # only the last prompt's are kept
        loaders.clear()
        assert run("a")[0] == []
