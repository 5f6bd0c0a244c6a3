"""What the engine asks of wherever it runs (headless, the bundled editor, ComfyUI): progress, previews, interrupt, paths.

One host is active per process. The library and the nodes call `host()`; a program sets its own with `use(host)`.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from ..errors import Interrupted

if TYPE_CHECKING:
    from ..runs.storage import Storage


def inside(folder: Path, name: str) -> Path | None:
    """`folder / name`, or None for a name that leaves the folder, as any system would read it.

    Judged by the name: links within the folder are the user's own, and a workflow cannot make one.
    """
    parts = PureWindowsPath(name)
    if not name or parts.drive or parts.root or ".." in parts.parts:
        return None
    return folder / name


class Previews:
    """The preview pictures that output nodes wrote to a folder: a loop would fill it, and hosts empty theirs only at their start."""

    def __init__(self) -> None:
        self._made: dict[str, list[list[Path]]] = {}

    def shown(self, folder: Path, node_id: str, ui: dict[str, Any]) -> None:
        """Deletes what the node wrote two outputs ago; a page may still fetch the one before."""
        images = [i for i in ui.get("images") or () if isinstance(i, dict) and i.get("type") == "temp"]
        former = self._made.setdefault(node_id, [])
        former.append([folder / i.get("subfolder", "") / i["filename"] for i in images])
        for path in former.pop(0) if len(former) > 2 else ():
            path.unlink(missing_ok=True)


class Host:
    """A silent host with folders under the working directory; programs subclass it.

    `registry` maps a node's class type to its class, as ComfyUI's NODE_CLASS_MAPPINGS does. `workflow_source` and `prompt` are
    the workflow as given (its JSON, in bytes) and as executed, where known; `run_folder` is where a run writes, once it started;
    `trackers` are the user's, besides those of the settings; `storage` keeps the runs of the output folder elsewhere too; of several
    processes, so many as `context_parallel` draw each sample together;
    `preview_folder` is where previews go that a page fetches as files of type "temp", on a host that has pages; `allowed_hosts`
    are those that rewards may call besides the ones of the user's settings.
    """

    def __init__(self, registry: dict[str, type] | None = None, output: Path | str = "output", input: Path | str = "input",
                 models: Path | str = "models"):
        self.registry = dict(registry or {})
        self.output_folder = Path(output)
        self.input_folder = Path(input)
        self.models_folder = Path(models)
        self.workflow_source = b""
        self.prompt: dict[str, dict] = {}
        self.run_folder: Path | None = None
        self.preview_folder: Path | None = None
        self.allowed_hosts: tuple[str, ...] = ()
        self.trackers: tuple[str, ...] = ()
        self.storage: Storage | None = None
        self.context_parallel = 1

    def model_folders(self, kind: str) -> list[Path]:
        """The folders searched for models of a kind ("diffusers", "checkpoints", "reward_models", "loras"), best first."""
        return [self.models_folder / kind]

    def device(self) -> Any:
        """The `torch.device` to run on, where the host decides that; None leaves it to accelerate."""
        return None

    def load(self, model: Any) -> None:
        """Brings a policy (`policies.base.Policy`) or a reward (`rewards.Reward`) to the device, before each phase that computes
        with it: a host where others share the GPU may have moved it away since. It has `modules` and `to(device)`."""
        from .. import processes

        model.to(processes.device())

    def unload(self, model: Any) -> None:
        """A policy or a reward is to leave the device until it is loaded again. It has `leave()`."""
        model.leave()

    def make_room(self) -> None:
        """Other processes are to have the device for a while; what was loaded has been unloaded."""
        from .. import processes

        processes.empty_cache()

    def trainer(self, classes: Collection[type]) -> list[str] | None:
        """On a host with pages: the words of `dancegrpo run` by which another process finds the same folders, and nodes of these classes.

        None: this process itself is one that was started to train.
        """
        return None

    def lora_saved(self, path: Path) -> None:
        """A run's LoRA is on disk; a host that loads LoRAs makes it known there."""

    def find_model(self, kind: str, name: str) -> Path | None:
        """The first existing file or folder `name` of a kind, or None; a name that leaves its folder is never found."""
        for folder in self.model_folders(kind):
            path = inside(folder, name)
            if path and path.exists():
                return path
        return None

    def list_models(self, kind: str) -> list[str]:
        """Names of files and folders directly under a kind's folders, sorted."""
        names = {p.name for folder in self.model_folders(kind) if folder.is_dir() for p in folder.iterdir()}
        return sorted(n for n in names if not n.startswith("."))

    # -- told by the engine, in order, from the thread that executes ------------------------------------------------
    def node_started(self, node_id: str, class_type: str, title: str) -> None:
        """A node begins to execute; the ids of nodes inside a loop are those of the saved workflow."""

    def node_output(self, node_id: str, ui: dict[str, Any]) -> None:
        """An output node's `ui` value (saved or preview images, text); inside a loop, once an iteration."""

    def progress(self, value: float, total: float, text: str = "") -> None:
        """How far the running node has come; `text` is one short line (the reward moving)."""

    def say(self, line: str) -> None:
        """One line that the user should read (resumed from…, a warning)."""

    def check_interrupt(self) -> None:
        """Raises `errors.Interrupted` when the user asked to stop; called once a micro-batch."""

    def check_together(self) -> None:
        """The same where there are several processes, which all call it equally often: before every node and once a micro-batch."""
        self.check_interrupt()

    def workflow_started(self, prompt: dict[str, dict], extra_pnginfo: dict[str, Any] | None) -> None:
        """A loop begins, in this prompt; a host that did not know it takes it for the run's files."""

    def run_started(self, folder: Path, node_id: str) -> None:
        """A run writes to `folder` from now on; what stops the program later can say how to resume it. `node_id`: of its Loop End."""
        self.run_folder = Path(folder)

    def run_moved(self, folder: Path, iteration: int, iterations: int) -> None:
        """A run has begun (with what it had done before, 0 for a new one) or ended another iteration; its folder tells the rest."""

    def run_ended(self, folder: Path, state: str) -> None:
        """A run is "finished" or "stopped"; its folder is as it will stay, or gone where nothing was done."""
        if not folder.exists():
            self.run_folder = None

    def must_run(self, node_id: str) -> bool:
        """For a host that caches: whether this Loop End, though unchanged, has something to do (its last run was stopped, or starts over)."""
        return True

    def around(self, node_class: type) -> contextlib.AbstractContextManager:
        """What a node of this class is called under: classes that ComfyUI lends expect `torch.inference_mode()`."""
        return contextlib.nullcontext()


class Behind:
    """The active host as a thread sees it that works behind the one which executes, and which alone may tell the host anything.

    Models are not loaded here, lines wait until they are told, and only `stop` interrupts; all else is the host's.
    """

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._host, self._context = host(), contextvars.copy_context()  # ComfyUI knows by the latter what it executes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def run(self, work: Callable[..., None], *arguments: Any) -> None:
        """What such a thread is started with."""
        context = self._context.copy()
        context.run(_behind.set, self)
        context.run(work, *arguments)

    def load(self, model: Any) -> None:
        """The thread that executes has done it."""

    def unload(self, model: Any) -> None:
        """And will do it."""

    def say(self, line: str) -> None:
        self._lines.put(line)

    def check_interrupt(self) -> None:
        if self._stopped.is_set():
            raise Interrupted("stopped")

    def tell(self) -> None:
        """By the thread that executes: passes on what was said."""
        while not self._lines.empty():
            host().say(self._lines.get())

    def stop(self) -> None:
        self._stopped.set()


_active: list[Host] = [Host()]
_behind: contextvars.ContextVar[Behind | None] = contextvars.ContextVar("behind", default=None)


def host() -> Host:
    """The active host."""
    return _behind.get() or _active[-1]


@contextlib.contextmanager
def use(active: Host) -> Iterator[Host]:
    """Makes `active` the process's host while the block runs."""
    _active.append(active)
    try:
        yield active
    finally:
        _active.remove(active)
