"""The commands of `dancegrpo`: their options, what is printed, and the exit status; the work is elsewhere."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Optional

import typer

from comfy_dancegrpo import __version__, processes
from comfy_dancegrpo.errors import DanceGRPOError, Interrupted, WorkflowError
from comfy_dancegrpo.policies import DTYPES
from comfy_dancegrpo.policies.places import Parts
from comfy_dancegrpo.policies.quantization import KINDS, NONE

HANG_TIMEOUT = 3600.0

app = typer.Typer(help="Runs saved ComfyUI graphs that train image and video models by reinforcement.", no_args_is_help=True,
                  add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})

Workflow = Annotated[Path, typer.Argument(help="A saved workflow: the editor's JSON, API JSON, or a PNG that holds one.")]
Output = Annotated[Path, typer.Option(help="Where runs and pictures are written.")]
OutputOrAddress = Annotated[str, typer.Option(metavar="PATH or ADDRESS", help="Where runs and pictures are written; an address (s3://bucket/runs) keeps runs there too.")]
Models = Annotated[Optional[Path], typer.Option(help="The models folder: models, or ComfyUI's with --comfyui.", show_default=False)]
ExtraModelPaths = Annotated[Optional[Path], typer.Option(metavar="FILE", help="ComfyUI's extra_model_paths.yaml.", show_default=False)]
Input = Annotated[Optional[Path], typer.Option(help="Where Load Image looks: input, or ComfyUI's with --comfyui.", show_default=False)]
ComfyUI = Annotated[Optional[Path], typer.Option("--comfyui", help="A ComfyUI folder that lends its nodes.", show_default=False)]
Run = Annotated[Optional[str], typer.Option(metavar="NAME", help="The run's name: its folder under the output folder.", show_default=False)]
Set = Annotated[Optional[list[str]], typer.Option("--set", metavar="NODE.INPUT=VALUE", show_default=False,
                                                       help="Changes a widget; NODE is a title or an id. Repeatable.")]
Iterations = Annotated[Optional[int], typer.Option(help="How many iterations the loop runs.", show_default=False)]
Seed = Annotated[Optional[int], typer.Option(help="The run's seed.", show_default=False)]
AllowHost = Annotated[Optional[list[str]], typer.Option("--allow-host", metavar="HOST[:PORT]", show_default=False,
                                                        help="Lets the workflow's rewards call this host, besides those of your settings. Repeatable.")]
RunGiven = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run, or its name in the output folder.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Shows the traceback of a fault.")]


@app.callback(invoke_without_command=True)
def _program(version: Annotated[bool, typer.Option("--version", help="Shows the version.")] = False) -> None:
    if version:
        print(f"dancegrpo {__version__}")
        raise typer.Exit


@app.command()
def run(workflow: Workflow, output: OutputOrAddress = "output", models: Models = None, extra_model_paths: ExtraModelPaths = None,
        input: Input = None, comfyui: ComfyUI = None, run: Run = None, set_: Set = None, iterations: Iterations = None,
        seed: Seed = None, allow_host: AllowHost = None,
        processes: Annotated[Optional[int], typer.Option(min=1, help="How many train together: every visible GPU, or 1.", show_default=False)] = None,
        config: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Starts them by accelerate, as this file of its says.", show_default=False)] = None,
        track: Annotated[Optional[list[str]], typer.Option(metavar="NAME", show_default=False,
                                                           help="Logs the run: tensorboard, wandb, or another of accelerate's trackers. Repeatable.")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Goes on with the run of that name, as Loop Start's on_existing=resume does.")] = False,
        context_parallel: Annotated[Optional[int], typer.Option(min=1, help="How many of them draw each sample together, each a part of its tokens: for long videos.", show_default=False)] = None,
        hang_timeout: Annotated[float, typer.Option(min=1.0, metavar="SECONDS", help="Ends processes none of which has moved for so long.")] = HANG_TIMEOUT,
        spool: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help="Where runs of an address are trained: a folder of your cache.", show_default=False)] = None,
        tell: Annotated[Optional[Path], typer.Option(hidden=True, help="Tells the one that started it, which wrote this file, in JSON.")] = None,
        previews: Annotated[Optional[Path], typer.Option(hidden=True, help="Where that one's page finds previews.")] = None,
        debug: Debug = False) -> None:
    """Runs a workflow: checks it whole, then trains, on every visible GPU."""
    from . import launch
    from .console import ConsoleHost
    from .session import Options, asked_by, how_to_resume, prepare
    from .storing import placed, stored
    from .telling import TellingHost

    host = None
    launch.end_with_the_launcher(lambda: host is not None and host.stopping)
    folder, address = placed(output, spool)
    options = Options(folder, input, models, extra_model_paths, comfyui, run, iterations, seed, set_ or [], allow_host or [], track or [], resume,
                      processes, config, hang_timeout if hang_timeout != HANG_TIMEOUT else None, address, spool, context_parallel)

    def how() -> str:
        return how_to_resume(host, workflow, options) if host and host.run_folder else ""

    def how_of(folder: str) -> str:
        host.run_folder = Path(folder) if folder else None
        return how()

    with _reported(debug, how):
        from comfy_dancegrpo import processes as together
        from comfy_dancegrpo.workflow.execute import execute
        from comfy_dancegrpo.workflow.host import use

        count, what = launch.asked(processes, config), "--processes"
        launch.check_started(count)
        host = prepare(workflow, options, TellingHost if tell is not None else ConsoleHost)
        if tell is not None:
            host.stand_behind(tell, previews)
        if config is not None and launch.started() is None:
            raise typer.Exit(launch.accelerate(config, sys.argv[1:]))
        if count is None:
            count, what = asked_by(host.prompt, host.registry), 'Loop Start\'s "processes"'
            together.on_first(lambda: launch.check_started(count, what))
        if (number := launch.wanted(count, what)) > 1:
            raise typer.Exit(launch.launch(number, sys.argv[1:], hang_timeout, how_of))
        with use(host), host.running(), stored(host):
            try:
                execute(host.prompt, host.registry, extra_pnginfo=host.extra_pnginfo)
            except Interrupted:  # raised in all, at the same call
                together.end()
                raise
            together.end()
        if host.shows and tell is None:
            for written in ([host.run_folder] if host.run_folder else []) + list(host.files):
                print(written)


@app.command()
def validate(workflow: Workflow, output: OutputOrAddress = "output", models: Models = None, extra_model_paths: ExtraModelPaths = None,
             input: Input = None, comfyui: ComfyUI = None, run: Run = None, set_: Set = None, iterations: Iterations = None,
             seed: Seed = None, allow_host: AllowHost = None,
             memory: Annotated[bool, typer.Option("--memory", help="Estimates what training will need of memory.")] = False,
             debug: Debug = False) -> None:
    """Checks a workflow as run does, and loads nothing."""
    from .session import Options, prepare
    from .storing import placed

    with _reported(debug):
        host = prepare(workflow, Options(placed(output, None)[0], input, models, extra_model_paths, comfyui, run, iterations, seed, set_ or [], allow_host or []))
        print(f"{workflow}: {len(host.prompt)} nodes, no problems found")
        if memory:
            from comfy_dancegrpo.workflow.host import use

            from .memory import report

            with use(host):
                print(*report(host), sep="\n")


@app.command()
def edit(workflow: Annotated[Optional[Path], typer.Argument(help="Opened as a copy; what the page saves is kept in the output folder.",
                                                            show_default=False)] = None,
         port: Annotated[int, typer.Option(min=0, max=65535, help="Where the page is served; 0 takes any that is free.")] = 8189,
         listen: Annotated[str, typer.Option(metavar="ADDRESS", help="Any but this machine's own asks for a token.")] = "127.0.0.1",
         token: Annotated[Optional[str], typer.Option(envvar="DANCEGRPO_TOKEN", show_default=False,
                                                      help="Asked of whoever opens the page; made up where one is needed and none given.")] = None,
         output: Output = Path("output"), models: Models = None, extra_model_paths: ExtraModelPaths = None, input: Input = None,
         comfyui: ComfyUI = None, debug: Debug = False) -> None:
    """Serves ComfyUI's editor with our nodes; what it runs is trained here, in a process of its own."""
    with _reported(debug):
        _need("edit", "editor", "aiohttp", "comfyui_frontend_package")
        from .editor.server import serve
        from .session import Options

        serve(Options(output, input, models, extra_model_paths, comfyui), workflow, listen, port, token or None)


def _with_parts(command: Callable) -> Callable:
    """The command with an option for each of the parts that Load Policy takes after --policy, in place of `**parts`."""
    options = [inspect.Parameter(part.name, inspect.Parameter.KEYWORD_ONLY, default=part.default, annotation=Annotated[str, typer.Option(
        metavar="NAME", show_default=False, help="Of a single file: the diffusers folder with all that no file gives, as Load Policy names it."
        if part.name == "components" else f"A file in place of the policy's {part.name}, as Load Policy names it.")]) for part in fields(Parts)]
    signature = inspect.signature(command, eval_str=True)
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY), *(options if parameter.name == "policy" else ())]
    command.__signature__ = signature.replace(parameters=parameters)
    return command


@app.command()
@_with_parts
def sample(prompt: Annotated[Optional[list[str]], typer.Option(help="What to draw. Repeatable.", show_default=False)] = None,
           prompts: Annotated[str, typer.Option(metavar="FILE", help="A .txt, .jsonl or .csv file in the input folder.", show_default=False)] = "",
           policy: Annotated[str, typer.Option(help="As Load Policy names it.")] = "embedded",
           lora: Annotated[Optional[Path], typer.Option(metavar="FILE", help="A LoRA that a run saved.", show_default=False)] = None,
           width: Annotated[int, typer.Option(min=16)] = 64, height: Annotated[int, typer.Option(min=16)] = 64,
           frames: Annotated[int, typer.Option(min=1, help="Of a video; 1 draws pictures.")] = 1,
           fps: Annotated[float, typer.Option(min=0.1, max=240.0, help="Frames a second of a video's file.")] = 16.0,
           steps: Annotated[int, typer.Option(min=1)] = 28, guidance_scale: Annotated[float, typer.Option(min=0.0)] = 3.5,
           seed: Annotated[int, typer.Option(min=0)] = 0, count: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 1,
           guidance_scale_2: Annotated[float, typer.Option(min=0.0, help="Of Wan 2.2 A14B's expert of low noise; 0 takes the other's.")] = 0.0,
           dtype: Annotated[str, typer.Option(help=f"Of the frozen weights: {', '.join(DTYPES)}.")] = "float32",
           quantization: Annotated[str, typer.Option(help=f"Of the denoiser's frozen weights: {', '.join(KINDS)}.")] = NONE,
           output: Output = Path("output"), models: Models = None, extra_model_paths: ExtraModelPaths = None,
           input: Input = None, debug: Debug = False, **parts: str) -> None:
    """Draws with a policy, and with a LoRA, by the model's own pipeline: pictures as .png, videos as .mp4."""
    with _reported(debug):
        from comfy_dancegrpo.workflow.host import use

        from .drawing import Wanted, draw_and_save
        from .session import Options, make_host

        host, _ = make_host(Options(output, input, models, extra_model_paths))
        with use(host):
            print(*draw_and_save(Wanted(tuple(prompt or ()), prompts, policy, lora, width, height, frames, steps, guidance_scale,
                                        seed, count, dtype, guidance_scale_2, Parts(**parts), quantization, fps)), sep="\n")


@app.command()
def report(run: RunGiven, output: Output = Path("output"),
           to: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Where it is written; report.html in the run's folder.", show_default=False)] = None,
           debug: Debug = False) -> None:
    """Makes a page of a run: one HTML file that opens anywhere."""
    with _reported(debug):
        from comfy_dancegrpo.runs import overview
        from comfy_dancegrpo.runs.report import write

        print(write(overview.find(run, output), to))


@app.command()
def runs(output: Output = Path("output"), debug: Debug = False) -> None:
    """Lists runs: their state, how far they are, and what their reward did."""
    with _reported(debug):
        from .listing import show

        show(output)


@app.command()
def compare(first: Annotated[str, typer.Argument(metavar="A", help="The folder of a run, or its name in the output folder.", show_default=False)],
            second: Annotated[str, typer.Argument(metavar="B", help="Another.", show_default=False)], output: Output = Path("output"),
            debug: Debug = False) -> None:
    """Compares two runs: settings that differ, rewards, evaluations, time."""
    with _reported(debug):
        from comfy_dancegrpo.runs import overview

        from .comparing import show

        show(overview.find(first, output), overview.find(second, output))


@app.command("check-reward")
def check_reward(name: Annotated[str, typer.Argument(help="As Load Reward names it.")],
                 pictures: Annotated[list[Path], typer.Argument(help="Pictures or videos.")],
                 prompt: Annotated[Optional[str], typer.Option(help="Of all of them; else each has its own from the table.", show_default=False)] = None,
                 published: Annotated[Optional[Path], typer.Option(
                     metavar="FILE", help="A .csv or .jsonl table of published scores: reward, picture, prompt, score, weights, source. "
                                          "Without it, the project's own.", show_default=False)] = None,
                 model: Annotated[str, typer.Option(help="As Load Reward names it.")] = "embedded",
                 base: Annotated[str, typer.Option(help="As Load Reward names it.")] = "published",
                 device: Annotated[str, typer.Option(help="Such as cuda:1; empty for the fastest here.")] = "",
                 models: Models = None, extra_model_paths: ExtraModelPaths = None, debug: Debug = False) -> None:
    """Scores pictures, and prints published scores of them beside ours."""
    with _reported(debug):
        from comfy_dancegrpo.workflow.host import use

        from .checking import check, lines
        from .session import Options, make_host

        host, _ = make_host(Options(models=models, extra_model_paths=extra_model_paths))
        with use(host):
            print(*lines(check(name, pictures, prompt, published, model, base, device)), sep="\n")


@app.command("convert-lora")
def convert_lora(source: Annotated[Path, typer.Argument(metavar="IN", help="A LoRA in the names of diffusers, ComfyUI, kohya or this program.", show_default=False)],
                 target: Annotated[Optional[Path], typer.Argument(metavar="OUT", help="A new .safetensors file; without one, says what IN is.", show_default=False)] = None,
                 names: Annotated[str, typer.Option(help="ours (which ComfyUI and diffusers both read), diffusers, or kohya.")] = "ours",
                 policy: Annotated[str, typer.Option(help="The base model, as Load Policy names it, where the names alone do not tell enough; its weights are not read.",
                                                     show_default=False)] = "",
                 models: Models = None, extra_model_paths: ExtraModelPaths = None, debug: Debug = False) -> None:
    """Writes a LoRA in other names, alpha folded in; parts for text encoders are left out. Of two experts OUT is two files."""
    with _reported(debug):
        from comfy_dancegrpo.lora import convert
        from comfy_dancegrpo.workflow.host import use

        from .session import Options, make_host

        if names not in convert.NAMES:
            raise WorkflowError(f"--names: found {names!r}, accepted: {', '.join(convert.NAMES)}")
        if target is not None and target.suffix != ".safetensors":
            raise WorkflowError(f"OUT: found {target}, accepted: a .safetensors file")
        with use(make_host(Options(models=models, extra_model_paths=extra_model_paths))[0]):
            found = convert.read(source, policy)
            print(*found.summary() if target is None else convert.write(found, target, names), sep="\n")


@app.command("serve-reward")
def serve_reward(name: Annotated[str, typer.Argument(help="As Load Reward names it.", show_default=False)],
                 model: Annotated[str, typer.Option(help="As Load Reward takes it.")] = "embedded",
                 base: Annotated[str, typer.Option(help="As Load Reward takes it.")] = "published",
                 batch_size: Annotated[int, typer.Option(min=1, help="Pictures scored at once, of one request or several.")] = 32,
                 frames: Annotated[int, typer.Option(min=1, help="Of a video that are scored.")] = 8,
                 frame_score: Annotated[str, typer.Option(help="What a video gets of its scored frames: their mean, or the worst.")] = "mean",
                 fps: Annotated[float, typer.Option(min=0.1, help="Frames a second, for rewards of whole videos.")] = 8.0,
                 device: Annotated[str, typer.Option(help="Such as cuda:1.", show_default=False)] = "",
                 listen: Annotated[str, typer.Option("--host", "--listen", metavar="ADDRESS",
                                                     help="Any but this machine's own asks for a token.")] = "127.0.0.1",
                 port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8190,
                 token: Annotated[Optional[str], typer.Option(envvar="DANCEGRPO_TOKEN", show_default=False,
                                                              help="Asked of whoever calls; made up where one is needed and none given.")] = None,
                 most_megabytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 256,
                 models: Models = None, extra_model_paths: ExtraModelPaths = None, debug: Debug = False) -> None:
    """Serves a reward over HTTP, for Remote Reward on another GPU or machine."""
    with _reported(debug):
        _need("serve-reward", "editor", "aiohttp")
        from comfy_dancegrpo import rewards
        from comfy_dancegrpo.workflow.host import use

        from .hosts import ProgramHost
        from .reward_server import RewardServer, serve
        from .session import Options, make_host

        host, nodes = make_host(Options(models=models, extra_model_paths=extra_model_paths), ProgramHost)
        with use(host):
            fits = nodes.registry["DanceGRPOLoadReward"].VALIDATE_INPUTS(name, model, base, device)
            if fits is not True:
                raise WorkflowError(f"serve-reward: {fits}")
            if frame_score not in rewards.FRAME_SCORES:
                raise WorkflowError(f"serve-reward: --frame-score: found {frame_score!r}, accepted: {', '.join(rewards.FRAME_SCORES)}")
            reward = rewards.load(name, model, batch_size, base, fps, frames=frames, frame_score=frame_score, device=device)
            serve(RewardServer(reward, listen, port, token or None, most_megabytes * 2**20))


def _need(command: str, extra: str, *packages: str) -> None:
    """Raises WorkflowError, one line, for packages that are not installed."""
    missing = [package.replace("_", "-") for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise WorkflowError(f'{command} needs {" and ".join(missing)}; pip install "comfy-dancegrpo[{extra}]"')


@app.command()
def nodes(as_json: Annotated[bool, typer.Option("--json", help="Prints ComfyUI's /object_info table.")] = False,
          models: Models = None, extra_model_paths: ExtraModelPaths = None, input: Input = None, comfyui: ComfyUI = None,
          debug: Debug = False) -> None:
    """Lists the node types that workflows may use."""
    from .session import Options, make_host

    with _reported(debug):
        from comfy_dancegrpo.workflow.host import use

        host, found = make_host(Options(input=input, models=models, extra_model_paths=extra_model_paths, comfyui=comfyui))
        with use(host):
            info = found.object_info()
        print(json.dumps(info, indent=1, default=str)) if as_json else _print_table(info)


def _print_table(info: dict[str, dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "name", "inputs", "outputs", highlight=False)
    for name, node in sorted(info.items()):
        inputs = [i for kind in ("required", "optional") for i in node["input"].get(kind, {})]
        table.add_row(name, node["display_name"], ", ".join(inputs), ", ".join(map(str, node["output_name"])))
    Console(markup=False).print(table)


@contextlib.contextmanager
def _reported(debug: bool, resume: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turns what goes wrong in the block into a line on stderr (a line a problem for a bad workflow) and an exit status.

    `resume()` ends the line with how to go on, where there is something to go on with.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, typer.Exit):
            raise
        if debug:
            traceback.print_exc()
        rank = processes.rank()  # how to go on is said by the first alone, or by the launcher where it starts them again
        for line in [] if rank and _told_by_first(error) else _lines(error, str if rank or _status(error) == processes.AGAIN else resume):
            print(f"dancegrpo: {f'process {rank}: ' if rank else ''}{line}", file=sys.stderr)
        raise typer.Exit(_status(error)) from None


def _told_by_first(error: BaseException) -> bool:
    """Whether the first process says it too: where all were told to stop, or have lost another, one line is enough."""
    return getattr(error, "from_first", False) or isinstance(error, (KeyboardInterrupt, Interrupted, processes.Lost))


def _lines(error: BaseException, resume: Callable[[], str]) -> list[str]:
    if isinstance(error, WorkflowError):
        return error.problems
    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        return [f"stopped{resume()}"]
    if _disk_full(error):
        return [f"the disk is full: {' '.join(str(error).split())}{resume()}"]
    said = " ".join(str(error).split())
    return [(said if isinstance(error, DanceGRPOError) else f"{type(error).__name__}: {said}") + resume()]


def _status(error: BaseException) -> int:
    default = Interrupted if isinstance(error, KeyboardInterrupt) else DanceGRPOError
    return getattr(error, "exit_status", default.exit_status)


def _disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: torch and safetensors wrap theirs, and say the system's words."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
