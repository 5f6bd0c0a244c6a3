"""An iteration of training, counted and timed, against DanceGRPO as published: denoiser calls, seconds by phase, memory, and the gradient itself.

    python -m benchmarks.iteration --policy embedded --device cpu --mode all --against reference
    python -m benchmarks.iteration --formula --policy flux
    python -m benchmarks.iteration --sweep          # seconds against group, steps, prompts and pixels
    python -m benchmarks.iteration --learning       # held-out reward against denoiser calls and seconds, by mode

Settings are those of the bundled workflow of the policy's family, unless they are given here; docs/speed.md explains the numbers. Real families have random
weights in the published shapes, random prompt embeddings, and the size of a JPEG as their reward; --depth, --heads, --tokens make them small enough to try.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from . import formulas
from .settings import MODES, WORKFLOWS, Setting, published

PHASES = ("prompts", "denoise", "decode", "reward", "replay", "records", "total")
LIMITS = {"embedded": 1e-5}  # of the gradients' relative difference, in float32
_WHOLE = ("prompts_per_iteration", "group_size", "steps", "micro_batch", "optimizer_steps", "lora_rank", "window_size", "window_interval", "warmup", "best_of")
_REAL = ("train_fraction", "noise_share", "eta", "clip_range", "learning_rate", "ema_decay")
OTHER = 1e-3  # of random weights, where guidance and DDIM's division by a small alpha magnify what kernels round


def parser() -> argparse.ArgumentParser:
    """Of all that `python -m benchmarks.iteration` takes."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.iteration", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--policy", choices=list(WORKFLOWS), default="embedded")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    add("--mode", choices=list(MODES), default="all", help="of Group Sample's noise_steps")
    add("--against", choices=["reference", "all", "none"], nargs="*", default=["reference"], help="reference: as published; all: ours with noise in all steps")
    add("--repeats", type=int, default=3, help="of each side, in turn, after one that is not counted")
    add("--no-gradients", action="store_true", help="do not compare the gradients")
    add("--json", type=Path, help="where to write what was measured")
    add("--dtype", choices=["float32", "bfloat16"], default="", help="else bfloat16 for real families on an accelerator, float32 otherwise")
    add_changes(made)
    for name in ("depth", "heads", "tokens"):
        add(f"--{name}", type=int, help="of a real family, smaller than published")
    add("--formula", action="store_true", help="the denoiser's inputs for each prompt in every mode, by the formulas alone; nothing is loaded")
    add("--sweep", action="store_true")
    add("--learning", action="store_true")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of --learning")
    add("--modes", choices=list(MODES), nargs="+", default=["all", "branch"], help="of --learning")
    add("--iterations", type=int, help="of --learning, in every mode; else those of benchmarks/settings.py")
    add("--every", type=int, default=5, help="iterations between two evaluations of --learning")
    add("--from", dest="sources", type=Path, nargs="+", help="of --learning: JSON files to draw and compare, in place of training")
    add("--plot", type=Path, help="of --learning: a PNG")
    return made


def add_changes(made: argparse._ActionsContainer, besides: Sequence[str] = ()) -> None:
    """What `changes_of` reads. besides: names that are left out."""
    for names, kind in ((_WHOLE, int), (_REAL, float)):
        for name in names:
            if name not in besides:
                made.add_argument(f"--{name.replace('_', '-')}", type=kind)
    made.add_argument("--initial-noise", choices=["shared", "independent"])
    made.add_argument("--lora-targets", help="as Loop Start's input; also 'all weights (no LoRA)'")
    made.add_argument("--size", help="HEIGHTxWIDTH in pixels, or HEIGHTxWIDTHxFRAMES")


def changes_of(options: argparse.Namespace) -> dict[str, Any]:
    """Of the settings, by the command line."""
    changes = {name: value for name in (*_WHOLE, *_REAL, "initial_noise", "lora_targets") if (value := getattr(options, name, None)) is not None}
    if options.size:
        changes |= dict(zip(("height", "width", "frames"), map(int, options.size.split("x"))))
    return changes


def setting_of(options: argparse.Namespace, mode: str) -> Setting:
    """The workflow's, with what the command line says."""
    return published(options.policy, mode, **changes_of(options))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every side in turn, `repeats` times after one that is not counted."""
    from . import sides
    from .random_families import Cut

    setting = setting_of(options, options.mode)
    others = [name for name in dict.fromkeys(options.against) if name != "none"]
    run = {"ours": lambda bench: sides.ours(bench, setting)}
    if "all" in others:
        run["all"] = lambda bench: sides.ours(bench, setting_of(options, "all"))
    if "reference" in others:
        run["reference"] = lambda bench: sides.published(bench, setting)
    turns: dict[str, list[sides.Turn]] = {name: [] for name in run}
    per_session = (options.repeats + 1) * sum(name != "reference" for name in run)
    with sides.bench(setting, options.device, per_session, Cut(options.depth, options.heads, options.tokens), options.dtype) as bench:
        for repeat in range(options.repeats + 1):
            for name, turn in run.items():
                found = turn(bench)
                if repeat:
                    turns[name].append(found)
        compared = None if options.no_gradients or "reference" not in others else sides.gradients(bench, setting)
        dtype = str(bench.policy.dtype).removeprefix("torch.")
    result = {"setting": asdict(setting), "dtype": dtype, "machine": machine(options.device), "repeats": options.repeats,
              **{name: summary(found) for name, found in turns.items()}}
    if compared:
        result["gradient"] = compared
    result["ratio"] = {name: ratio(result["ours"], result[name]) for name in run if name != "ours"}
    return result


def by_formula(options: argparse.Namespace) -> tuple[dict[str, Any], list[str], list[str]]:
    """For each prompt, on average over what is drawn, without padding; with one optimizer step and one process."""
    found: dict[str, Any] = {}
    setting = setting_of(options, "all")
    rollout, replay = formulas.reference(1, setting.group_size, setting.steps, setting.train_fraction)
    found["as published"] = rollout.calls, replay.calls
    for mode in MODES:
        s = setting_of(options, mode)
        for noise in ("shared",) if mode == "branch" else ("shared", "independent"):
            found[f"{mode}, {noise} noise"] = formulas.expected(mode, s.group_size, s.steps, noise == "shared", s.train_fraction, s.window_size, s.noise_share)
    whole = rollout.calls + 3 * replay.calls
    text = [f"{setting.policy}: {setting.group_size} samples a prompt, {setting.steps} steps, fraction {setting.train_fraction}, window of {setting.window_size}, share "
            f"{setting.noise_share}", f"{'inputs for each prompt':28}{'forward':>12}{'with backward':>16}{'backward as 3':>16}{'of published':>14}"]
    text += [f"{name:28}{a:>12.1f}{b:>16.1f}{a + 3 * b:>16.1f}{(a + 3 * b) / whole:>14.1%}" for name, (a, b) in found.items()]
    return found, text, []


def machine(device: str) -> dict[str, Any]:
    """What the numbers were taken on, and how busy it was with other work."""
    import diffusers
    import torch

    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"device": f"{device}: {name}", "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "load": load, "python": platform.python_version(),
            "torch": torch.__version__, "diffusers": diffusers.__version__}


def summary(turns: Sequence) -> dict[str, Any]:
    """Medians of the seconds; counts of the first turn, and whether all turns' are as the formulas say."""
    first = turns[0]
    seconds = {phase: median(turn.seconds[phase] for turn in turns) for phase in PHASES}
    return {
        "calls": {phase: asdict(first.seen[phase]) for phase in first.seen}, "formula": {phase: asdict(first.wanted[phase]) for phase in first.wanted},
        "as_the_formula_says": all(turn.seen == turn.wanted for turn in turns), "without_backward": first.silent,
        "seconds": seconds, "cpu_seconds": median(turn.cpu for turn in turns), "samples_per_second": first.samples / seconds["total"],
        "peak_memory": max((turn.peak for turn in turns if turn.peak is not None), default=None),
        "share_in_denoiser": median(turn.denoiser / turn.seconds["total"] for turn in turns),
    }


def ratio(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of one side's figures to another's."""
    weighted = [side["calls"]["rollout"]["samples"] + 3 * side["calls"]["replay"]["samples"] for side in (one, other)]
    return {"seconds": {phase: one["seconds"][phase] / other["seconds"][phase] for phase in PHASES if other["seconds"][phase]},
            "cpu_seconds": one["cpu_seconds"] / other["cpu_seconds"],
            "forward_calls": one["calls"]["rollout"]["calls"] / other["calls"]["rollout"]["calls"],
            "forward_backward_calls": one["calls"]["replay"]["calls"] / other["calls"]["replay"]["calls"],
            "samples_counting_backward_thrice": weighted[0] / weighted[1]}


def lines(result: dict[str, Any]) -> list[str]:
    """The table that is printed."""
    names = [name for name in ("ours", "all", "reference") if name in result]
    setting = result["setting"]
    size = f"{setting['width']}x{setting['height']}" + (f"x{setting['frames']}" if setting["frames"] > 1 else "")
    text = [f"{setting['policy']}, {setting['noise_steps']}: {setting['prompts_per_iteration']} prompts x {setting['group_size']}, {setting['steps']} steps, {size}, "
            f"micro-batch {setting['micro_batch']}, {setting['optimizer_steps']} optimizer steps, fraction {setting['train_fraction']}, {result['dtype']}, "
            f"{result['machine']['device']}, {result['machine']['threads']} threads, load {result['machine']['load']}"]
    rows: list[tuple[str, list[str]]] = []
    for phase, what in (("rollout", "forward"), ("replay", "forward-backward")):
        for key in ("calls", "samples", "padding"):
            rows.append((f"{what} {key}", [str(result[n]["calls"][phase][key]) for n in names]))
            rows.append(("  by the formula", [str(result[n]["formula"][phase][key]) for n in names]))
    rows += [("samples without backward", [str(result[n]["without_backward"]) for n in names])]
    rows += [(f"seconds: {phase}", [f"{result[n]['seconds'][phase]:.3f}" for n in names]) for phase in PHASES]
    rows += [("CPU seconds", [f"{result[n]['cpu_seconds']:.3f}" for n in names]), ("samples a second", [f"{result[n]['samples_per_second']:.2f}" for n in names]),
             ("peak memory, MiB", ["-" if result[n]["peak_memory"] is None else f"{result[n]['peak_memory'] / 2**20:.0f}" for n in names]),
             ("share in the denoiser", [f"{result[n]['share_in_denoiser']:.1%}" for n in names])]
    for heading, cells in [(f"median of {result['repeats']}", names), *rows]:
        text.append(f"{heading:28}" + "".join(f"{cell:>14}" for cell in cells))
    for name, found in result["ratio"].items():
        text.append(f"ours / {name}: seconds {found['seconds']['total']:.3f} (CPU {found['cpu_seconds']:.3f}), denoise {found['seconds']['denoise']:.3f}, replay {found['seconds']['replay']:.3f}; calls "
                    f"{found['forward_calls']:.3f} forward, {found['forward_backward_calls']:.3f} forward-backward; samples (backward counted as 3) "
                    f"{found['samples_counting_backward_thrice']:.3f}")
    if "gradient" in result:
        text.append(f"gradient against the reference's, same trajectories and advantages: relative difference {result['gradient']['relative_difference']:.1e}, "
                    f"ratio deviation {result['gradient']['ratio_deviation']:.1e}")
    return text


def faults(result: dict[str, Any]) -> list[str]:
    """What should be and is not."""
    found = [f"{name}: the calls counted are not those of the formula" for name in ("ours", "all", "reference")
             if name in result and not result[name]["as_the_formula_says"]]
    limit, gradient = LIMITS.get(result["setting"]["policy"], OTHER), result.get("gradient")
    if gradient and result["dtype"] == "float32" and not gradient["relative_difference"] < limit:
        found.append(f"the gradients differ by {gradient['relative_difference']:.1e}, accepted: below {limit:g}")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a count is not the formula's, or the gradients differ."""
    options = parser().parse_args(words)
    if options.formula:
        result, text, wrong = by_formula(options)
    elif options.learning:
        from . import learning

        result, text, wrong = learning.run(options)
    elif options.sweep:
        from . import sweep

        result, text, wrong = sweep.run(options)
    else:
        result = measure(options)
        text, wrong = lines(result), faults(result)
    print("\n".join([*text, *(f"FAULT: {line}" for line in wrong)]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
