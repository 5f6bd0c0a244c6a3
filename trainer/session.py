"""What the commands share: the host and the registry from the options, and a workflow checked whole before anything is loaded."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from comfy_dancegrpo.addresses import Place
from comfy_dancegrpo import processes, pulse
from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.runs import trackers
from comfy_dancegrpo.workflow.host import use

from . import storing
from .console import ConsoleHost
from .hosts import ProgramHost
from .paths import ModelPaths

HostT = TypeVar("HostT", bound=ProgramHost)


@dataclass(frozen=True)
class Options:
    """The options that `run` and `validate` share; None where the user said nothing. storage: an address that runs are kept at too."""

    output: Path = Path("output")
    input: Path | None = None
    models: Path | None = None
    extra_model_paths: Path | None = None
    comfyui: Path | None = None
    run: str | None = None
    iterations: int | None = None
    seed: int | None = None
    overrides: list[str] = field(default_factory=list)
    allow_host: list[str] = field(default_factory=list)
    track: list[str] = field(default_factory=list)
    resume: bool = False
    processes: int | None = None
    config: Path | None = None
    hang_timeout: float | None = None
    storage: str | None = None
    spool: Path | None = None
    context_parallel: int | None = None

    def words(self, *names: str) -> list[str]:
        """What was said of these options, as it is said again."""
        given = {name: value if isinstance(value, list) else [value] for name in names if (value := getattr(self, name)) is not None}
        return [word for name, values in given.items() for value in values for word in ("--" + name.replace("_", "-"), str(value))]


@dataclass(frozen=True)
class Nodes:
    """Node classes by id, the names that the editor shows, and which of the classes ComfyUI lent."""

    registry: dict[str, type]
    display_names: dict[str, str]
    lent: frozenset[type] = frozenset()

    def object_info(self) -> dict[str, dict[str, Any]]:
        """ComfyUI's /object_info table of these nodes."""
        from comfy_dancegrpo.workflow.schema import object_info

        return object_info(self.registry, self.display_names)


def make_host(options: Options, kind: type[HostT] = ConsoleHost) -> tuple[HostT, Nodes]:
    """A host of this kind and its nodes. Raises WorkflowError for a paths file, a ComfyUI folder, an allowed host or a tracker that is not one."""
    if found := next(filter(None, map(trackers.problem, options.track)), None):
        raise WorkflowError(f"--track: {found}")
    root = options.comfyui
    paths = ModelPaths(options.models or (root / "models" if root else Path("models")))
    input = options.input or (root / "input" if root else Path("input"))
    for file in (root / "extra_model_paths.yaml" if root else None, options.extra_model_paths):
        if file is not None and (file is options.extra_model_paths or file.is_file()):
            paths.read(file)
    nodes = _collect(options, input, paths)
    host = kind(nodes.registry, options.output, input, paths, nodes.lent)
    host.allowed_hosts, host.trackers = tuple(map(_checked_host, options.allow_host)), tuple(options.track)
    host.context_parallel = options.context_parallel or 1
    storing.give(host, options)
    return host, nodes


def _checked_host(text: str) -> str:
    try:
        Place.parse(text)
    except ValueError as error:
        raise WorkflowError(f"--allow-host: {error}") from None
    return text


def _collect(options: Options, input: Path, paths: ModelPaths) -> Nodes:
    """Our nodes; where no ComfyUI lends its own, stand-ins for the few of ComfyUI's that training graphs contain."""
    from comfy_dancegrpo import nodes as ours

    if options.comfyui is None:
        return Nodes({**ours.HOST_CLASS_MAPPINGS, **ours.NODE_CLASS_MAPPINGS}, dict(ours.NODE_DISPLAY_NAME_MAPPINGS))
    from .lend import lend

    classes, names = lend(options.comfyui, options.output, input, paths)
    registry = {**ours.HOST_CLASS_MAPPINGS, **classes, **ours.NODE_CLASS_MAPPINGS}
    lent = frozenset(cls for name, cls in classes.items() if registry[name] is cls)
    return Nodes(registry, {**names, **ours.NODE_DISPLAY_NAME_MAPPINGS}, lent)


def prepare(workflow: Path, options: Options, kind: type[ConsoleHost] = ConsoleHost) -> ConsoleHost:
    """A host that holds the workflow, read, overridden and checked whole. Raises WorkflowError with every problem found."""
    from comfy_dancegrpo.workflow.convert import to_prompt
    from comfy_dancegrpo.workflow.overrides import apply_overrides
    from comfy_dancegrpo.workflow.read import read_workflow

    host, nodes = make_host(options, kind)

    def read() -> tuple[bytes, dict, dict | None]:
        saved = read_workflow(workflow)
        with use(host):  # the choices of a combo may be files of the model folders
            prompt = to_prompt(saved, nodes.object_info())
            prompt = apply_overrides(prompt, nodes.registry, _overrides(prompt, nodes.registry, options))
            check(prompt, nodes.registry)
        return saved.raw, prompt, {"workflow": saved.data} if saved.format == "ui" else None

    host.workflow_source, host.prompt, host.extra_pnginfo = processes.on_first(read)
    return host


def check(prompt: dict[str, Any], registry: dict[str, type]) -> None:
    """Checks a prompt whole, loops included, and brings its values to their types. Raises WorkflowError with every problem found."""
    from comfy_dancegrpo.workflow.loop import check_loops
    from comfy_dancegrpo.workflow.validate import validate

    validate(prompt, registry)
    check_loops(prompt, registry)


def _overrides(prompt: dict[str, Any], registry: dict[str, type], options: Options) -> list[str]:
    """--run, --iterations, --seed and --resume as overrides of every Loop Start, around those of --set."""
    given = {"run": ("run_name", options.run), "iterations": ("iterations", options.iterations), "seed": ("seed", options.seed),
             "resume": ("on_existing", "resume" if options.resume else None)}  # which no --set takes back: it ends the command that resumes
    given = {option: (name, value) for option, (name, value) in given.items() if value is not None}
    starts = loop_starts(prompt, registry)
    if given and not starts:
        raise WorkflowError(f"--{next(iter(given))}: the workflow has no Loop Start to set it on")
    resume = given.pop("resume", None)
    return [*(f"{start}.{name}={value}" for start in starts for name, value in given.values()), *options.overrides,
            *(f"{start}.{resume[0]}={resume[1]}" for start in starts if resume)]


def loop_starts(prompt: dict[str, Any], registry: dict[str, type]) -> list[str]:
    """The ids of the Loop Starts of a prompt that may not have been checked yet."""
    classes = {n: registry.get(str(node.get("class_type"))) for n, node in prompt.items() if isinstance(node, dict)}
    return [n for n, node_class in classes.items() if getattr(node_class, "LOOP_START", False)]


def asked_by(prompt: dict[str, Any], registry: dict[str, type]) -> int | None:
    """How many processes the workflow's Loop Starts ask for; None where they leave it open."""
    asked = [prompt[start]["inputs"].get("processes", 1) for start in loop_starts(prompt, registry)]
    return max((count for count in asked if isinstance(count, int) and count > 1), default=None)


def how_to_resume(host: ConsoleHost, workflow: Path, options: Options) -> str:
    """The end of a line: the command that goes on with the host's run, started as it was.

    The options as given, the run's name, and --resume where Loop Start is not told that. What torchrun or accelerate launch started on this machine
    alone the program starts as well; of several machines, or of accelerate's own configuration, the launcher's words are not known here.
    """
    by_another = pulse.FOLDER not in os.environ and (processes.started() or 1) > 1 and options.config is None
    ours = by_another and os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE") and not processes.sharded()
    if ours:
        options = replace(options, processes=processes.started())
    command = _command(host, workflow, options)
    return f"; resume by the same launcher with: -m comfy_dancegrpo.trainer {command}" if by_another and not ours else f"; resume with: dancegrpo {command}"


def _command(host: ConsoleHost, workflow: Path, options: Options) -> str:
    words = ["run", str(workflow), "--output", options.storage or str(options.output), "--run", host.run_folder.name]
    words += options.words("spool", "input", "models", "extra_model_paths", "comfyui", "iterations", "seed", "processes", "config", "context_parallel", "hang_timeout", "allow_host")
    words += [word for value in options.overrides for word in ("--set", value)] + options.words("track")
    told = [host.prompt[start]["inputs"].get("on_existing", "resume") for start in loop_starts(host.prompt, host.registry)]
    if options.resume or any(value != "resume" for value in told):
        words.append("--resume")
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
