"""A real ComfyUI on the CPU for the tests of this folder: COMFYUI_PATH names its folder; nothing is written there.

COMFYUI_PYTHON names the Python of its environment, where that is not the one that runs the tests.
"""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from frontend import browser, visit  # noqa: F401 (fixtures)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PATIENCE = 600  # seconds for what takes a few on an idle machine


class ComfyUI:
    """A server process in a folder of its own."""

    def __init__(self, folder: Path, *options: str):
        self.folder, self.output, self.counts = folder, folder / "output", folder / "counts.json"
        packs = folder / "packs"
        packs.mkdir(parents=True)
        (packs / "comfy-dancegrpo").symlink_to(ROOT)
        (packs / "another_pack").symlink_to(HERE / "pack")
        (folder / "paths.yaml").write_text(f"here:\n  custom_nodes: {packs}\n")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = (folder / "log.txt").open("w")
        words = ["--cpu", "--port", str(self.port), "--extra-model-paths-config", folder / "paths.yaml", "--output-directory", self.output,
                 "--temp-directory", folder / "t", "--input-directory", folder / "input", "--user-directory", folder / "user",
                 "--database-url", "sqlite:///:memory:", "--disable-all-custom-nodes", "--whitelist-custom-nodes", "comfy-dancegrpo", "another_pack", *options]
        for made in ("input", "user"):
            (folder / made).mkdir()
        self.process = subprocess.Popen(
            [os.environ.get("COMFYUI_PYTHON", sys.executable), HERE / "start.py", os.environ["COMFYUI_PATH"], *map(str, words)], stdout=self.log, stderr=self.log,
            env={**os.environ, "DANCEGRPO_TEST_COUNTS": str(self.counts)})
        until = time.monotonic() + PATIENCE
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise AssertionError(self.said)
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            self.get("/system_stats")
        except OSError:
            return False
        return True

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        self.log.close()

    @property
    def said(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE) as answer:
            return json.load(answer) if answer.headers.get_content_type() == "application/json" else answer.read()

    def post(self, path: str, data):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read() or "{}")

    def run(self, prompt, workflow=None, react=lambda message: None) -> list[dict]:
        """Queues, and returns every message of the page's socket until the prompt is done; `react` sees each as it comes."""
        return asyncio.run(self._run(prompt, workflow, react))

    async def _run(self, prompt, workflow, react):
        import aiohttp

        messages = []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"http://127.0.0.1:{self.port}/ws?clientId=test") as page:
            await page.receive()
            body = {"prompt": prompt, "client_id": "test", "extra_data": {"extra_pnginfo": {"workflow": workflow}} if workflow else {}}
            prompt_id = (await asyncio.to_thread(self.post, "/prompt", body))["prompt_id"]
            while True:
                message = await page.receive(PATIENCE)
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                message = json.loads(message.data)
                messages.append(message)
                await asyncio.to_thread(react, message)
                if message["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    assert message["data"]["prompt_id"] == prompt_id
                    return messages

    def counted(self) -> dict[str, int]:
        return json.loads(self.counts.read_text()) if self.counts.exists() else {}


@pytest.fixture(scope="module")
def start_comfyui(tmp_path_factory):
    """`start_comfyui(*options)`: a server of the module's own, with these options of ComfyUI's."""
    if "COMFYUI_PATH" not in os.environ:
        pytest.skip("set COMFYUI_PATH to ComfyUI's folder to run the pack inside it")
    started = []

    def start(*options: str) -> ComfyUI:
        started.append(ComfyUI(tmp_path_factory.mktemp("comfyui"), *options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def comfyui(start_comfyui):
    return start_comfyui()


@pytest.fixture
def named(prompt, request):
    """The quickstart's prompt, made short, its run named after the test."""
    name = re.sub(r"\W", "_", request.node.name)
    start = {"run_name": name, "iterations": 2, "prompts_per_iteration": 2, "micro_batch": 4, "lora_rank": 2}
    for node, values in (("4", start), ("5", {"group_size": 3, "steps": 4}), ("9", {"optimizer_steps": 2}),
                         ("14", {"limit": 4}), ("16", {"steps": 2, "batch_size": 4})):
        prompt[node]["inputs"] |= values
    return prompt
