"""What the tests of the package as a user meets it share: the quickstart, made tiny, and the command line, run in this process."""

import asyncio
import contextlib
import copy
import http.client
import io
import json
import queue
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from loopback import mine, serving  # noqa: F401 (fixtures)

WAIT = 300  # seconds until something is given up that is waited for
WORKFLOWS = sorted((Path(__file__).resolve().parent.parent / "workflows").glob("*.json"))
QUICKSTART = next(path for path in WORKFLOWS if path.stem == "quickstart")


def needs(path: Path) -> set[str]:
    """What a bundled workflow says that it needs: "ComfyUI" for nodes of its own that have no stand-in here, and models by name."""
    return set(json.loads(path.read_text(encoding="utf-8"))["extra"].get("dancegrpo", {}).get("needs", []))


def pytest_generate_tests(metafunc):
    """`bundled`: each bundled workflow. `bundled_here`: each that needs no ComfyUI. `bundled_there`: each other. `bundled_complete`: each that needs
    no model that is not in the package. `bundled_alone`: each that needs neither. `bundled_seen`: these, and of the families,
    which have one graph, one of pictures and one of videos."""
    there, alone = [path for path in WORKFLOWS if "ComfyUI" in needs(path)], [path for path in WORKFLOWS if not needs(path)]
    for name, paths in (("bundled", WORKFLOWS), ("bundled_here", [p for p in WORKFLOWS if p not in there]), ("bundled_there", there),
                        ("bundled_complete", [p for p in WORKFLOWS if needs(p) <= {"ComfyUI"}]), ("bundled_alone", alone),
                        ("bundled_seen", [*alone, *(p for p in WORKFLOWS if p.stem in ("flux_dev", "hunyuan_video"))])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, paths, ids=lambda path: path.stem)


@dataclass(frozen=True)
class Done:
    """How the program ended: its exit status, and the lines of stdout and stderr."""

    status: int
    out: list[str]
    err: list[str]

    @property
    def verdict(self) -> list[str]:
        """The lines that say what is wrong."""
        return [line.removeprefix("dancegrpo: ") for line in self.err if line.startswith("dancegrpo: ")]


def _dancegrpo(*words) -> Done:
    from comfy_dancegrpo.trainer.cli import main

    out, err, argv, hook = io.StringIO(), io.StringIO(), sys.argv, sys.excepthook
    sys.argv = ["dancegrpo", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
            main()
    finally:
        sys.argv, sys.excepthook = argv, hook  # typer sets a hook of its own
    assert "Traceback" not in err.getvalue()
    return Done(left.value.code or 0, out.getvalue().splitlines(), err.getvalue().splitlines())


@pytest.fixture
def one_thread():
    """One thread, where kernels round a row alike at every place in a batch of any size; asked for before what samples."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cli():
    """`cli("run", path, ...)`: the program's own main, with these words."""
    return _dancegrpo


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The bundled workflow, as the editor saved it."""
    return QUICKSTART


@pytest.fixture(scope="session")
def _quickstart_prompt():
    from comfy_dancegrpo import nodes
    from comfy_dancegrpo.workflow.convert import to_prompt
    from comfy_dancegrpo.workflow.read import read_workflow
    from comfy_dancegrpo.workflow.schema import object_info

    registry = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}
    return to_prompt(read_workflow(QUICKSTART), object_info(registry, nodes.NODE_DISPLAY_NAME_MAPPINGS))


@pytest.fixture
def prompt(_quickstart_prompt):
    """The bundled workflow in API format, to be changed at will."""
    return copy.deepcopy(_quickstart_prompt)


@pytest.fixture
def saved(tmp_path):
    """`saved(workflow)`: the file that holds it."""

    def save(workflow, name: str = "flow.json") -> Path:
        (tmp_path / name).write_text(json.dumps(workflow), encoding="utf-8")
        return tmp_path / name

    return save


# 6 samples in micro-batches of 4, the last padded; 3 trainable steps of which 2 are trained; 2 optimizer steps
_TINY = {"Loop Start.prompts_per_iteration": 2, "Loop Start.micro_batch": 4, "Loop Start.lora_rank": 2, "Group Sample.group_size": 3,
         "Group Sample.steps": 4, "Update.train_fraction": 0.6, "Update.optimizer_steps": 2}
_TINY_EVALUATION = {"Held-out Prompts.limit": 4, "Evaluate.steps": 2, "Evaluate.batch_size": 4}


def _words(values) -> list[str]:
    return [*(word for name, value in values.items() for word in ("--set", f"{name}={value}")), "--iterations", "2"]


_TINY_BUNDLED = {
    # what makes any bundled workflow short, by class type
    "DanceGRPOLoopStart": {"iterations": 2, "prompts_per_iteration": 2, "micro_batch": 4, "lora_rank": 2},
    "DanceGRPOGroupSample": {"group_size": 3, "steps": 4}, "DanceGRPOUpdate": {"optimizer_steps": 2},
    "DanceGRPOWatch": {"every": 1, "steps": 2, "batch_size": 4}, "DanceGRPOPromptSet": {"limit": 4}, "DanceGRPOEvaluate": {"steps": 2, "batch_size": 4, "samples_per_prompt": 1},
}


@pytest.fixture(scope="session")
def made_tiny():
    """`made_tiny(prompt)`: the same prompt with inputs that make its run short."""
    return lambda prompt: {node_id: {**node, "inputs": {**node["inputs"], **_TINY_BUNDLED.get(node["class_type"], {})}}
                           for node_id, node in prompt.items()}


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """The words that make a run of the quickstart short."""
    return _words(_TINY | _TINY_EVALUATION)


@pytest.fixture(scope="session")
def tiny_loop() -> list[str]:
    """The same for `loop_only`."""
    return _words(_TINY)


@pytest.fixture
def loop_only(prompt):
    """The quickstart's prompt without what comes after its loop: a run of it ends with Loop End."""
    return {node_id: node for node_id, node in prompt.items() if int(node_id) <= 11}


class RunningEditor:
    """The bundled editor on a free port, served by a thread of this process; its folders are `folder/output` and `folder/input`.

    Needs aiohttp. `jobs` are options of the editor's Jobs.
    """

    def __init__(self, folder: Path, address: str = "127.0.0.1", token: str | None = None, opened: Path | None = None, **jobs):
        from comfy_dancegrpo.trainer.editor import server
        from comfy_dancegrpo.trainer.editor.editor import Editor
        from comfy_dancegrpo.trainer.session import Options
        from comfy_dancegrpo.workflow.host import use

        self.folder, self.output = folder, folder / "output"
        self.editor = Editor(Options(output=self.output, input=folder / "input", models=folder / "models"),
                             server.opened(opened) if opened else None, **jobs)
        self._closed, self._loop = False, asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._using = use(self.editor.host)
        self._using.__enter__()
        self.server = self.run(self._start(server.Server, address, token))
        self.port = self.server.port

    async def _start(self, server_class, address, token):
        server = server_class(self.editor, address, 0, token)
        await server.start()
        return server

    def run(self, coroutine):
        """Runs a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.run(self.server.stop())
            self._using.__exit__(None, None, None)
            self._loop.call_soon_threadsafe(self._loop.stop)

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> "Answer":
        """One request, its path sent as it stands."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), b"" if response.status == 101 else response.read())
        finally:
            connection.close()

    def get(self, path: str):
        """The JSON that a GET gives."""
        answer = self.ask("GET", path)
        assert answer.status == 200, (path, answer)
        return json.loads(answer.body)

    def post(self, path: str, value) -> "Answer":
        return self.ask("POST", path, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def page(self, client_id: str) -> "Page":
        return Page(self, client_id)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Page:
    """An open page's WebSocket, as a context; `until` waits for a message."""

    def __init__(self, running: RunningEditor, client_id: str):
        self._running, self.client_id = running, client_id
        self._messages: queue.Queue = queue.Queue()
        self._opened = threading.Event()

    def __enter__(self) -> "Page":
        self._reading = asyncio.run_coroutine_threadsafe(self._read(), self._running._loop)
        assert self._opened.wait(WAIT)
        return self

    async def _read(self) -> None:
        import aiohttp

        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"http://127.0.0.1:{self._running.port}/ws?clientId={self.client_id}") as socket:
                self._opened.set()
                async for message in socket:
                    self._messages.put(json.loads(message.data))

    def until(self, kind: str, **wanted) -> dict:
        """The data of the next message of a kind that holds what is wanted; a value may be a test of its own."""
        while True:
            message = self._messages.get(timeout=WAIT)
            data = message["data"]
            if message["type"] == kind and all(v(data.get(k)) if callable(v) else data.get(k) == v for k, v in wanted.items()):
                return data

    def __exit__(self, *error) -> None:
        self._reading.cancel()


@pytest.fixture(scope="session")
def start_editor():
    """`start_editor(folder, ...)`: a RunningEditor, closed at the end at the latest."""
    started = []

    def start(folder: Path, **options) -> RunningEditor:
        started.append(RunningEditor(folder, **options))
        return started[-1]

    yield start
    for running in started:
        running.close()
