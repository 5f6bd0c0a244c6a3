"""Held-out reward against denoiser calls and seconds, for each mode and several seeds, of the embedded policy. The captions are the validation set's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from .settings import BACKWARD, ITERATIONS, Setting


def captions(split: str) -> list[str]:
    """Of the embedded set: "train", or "validation", which neither trains nor is what a result is told of ("test")."""
    from comfy_dancegrpo.embedded import PROMPTS

    return (PROMPTS / f"shapes_{split}.txt").read_text(encoding="utf-8").splitlines()


def train(setting: Setting, seed: int, iterations: int, every: int, device: str) -> Iterator[dict[str, Any]]:
    """The points of one run, the first before training: iteration, calls and seconds as `Trial` counts them, reward, exact; each as it is measured."""
    from .trial import Trial

    with Trial(setting, seed, captions("train"), captions("validation"), device) as trial:
        for iteration in range(iterations + 1):
            if iteration % every == 0 or iteration == iterations:
                found = trial.scores()
                yield {"iteration": iteration, "calls": trial.calls, "seconds": trial.seconds, **{name: of_all.mean().item() for name, of_all in found.items()}}
            if iteration < iterations:
                trial.iterate()


def reached(points: Sequence[dict[str, Any]], target: float, what: str) -> float | None:
    """Calls or seconds at which the reward first is the target, between two evaluations in proportion; None where it never is."""
    for before, after in zip(points, points[1:]):
        if after["reward"] >= target:
            share = (target - before["reward"]) / (after["reward"] - before["reward"]) if before["reward"] < target else 0.0
            return before[what] + share * (after[what] - before[what])
    return None


def compare(runs: Sequence[dict[str, Any]], target_mode: str = "all") -> dict[str, Any]:
    """Of each other mode: calls and seconds to the reward that `target_mode` ends with on average, as shares of what that takes, a value for each seed
    (None: not reached); `of_mean` the same of the mean over the seeds."""
    end = [run["points"][-1] for run in runs if run["mode"] == target_mode]
    if not end:
        return {}
    target, whole = mean(point["reward"] for point in end), {what: mean(point[what] for point in end) for what in ("calls", "seconds")}
    found: dict[str, Any] = {"target": target, "spread": stdev([p["reward"] for p in end]) if len(end) > 1 else None, **whole, "modes": {}}
    for mode in dict.fromkeys(run["mode"] for run in runs):
        if mode != target_mode:
            curves = [run["points"] for run in runs if run["mode"] == mode]
            shares = {what: [None if (at := reached(points, target, what)) is None else at / whole[what] for points in curves] for what in whole}
            at_mean = {what: reached(averaged(curves), target, what) for what in whole}
            found["modes"][mode] = {**shares, "of_mean": {what: None if at is None else at / whole[what] for what, at in at_mean.items()}}
    return found


def averaged(curves: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The mean of each number, evaluation by evaluation, up to where the shortest ends."""
    return [{key: mean(point[key] for point in points) for key in points[0]} for points in zip(*curves)]


def lines(runs: Sequence[dict[str, Any]], compared: dict[str, Any]) -> list[str]:
    """The table."""
    text = [f"{'mode':8}{'iteration':>10}{'calls':>10}{'seconds':>10}{'reward':>10}{'its std over seeds':>20}{'exact':>10}"]
    for mode in dict.fromkeys(run["mode"] for run in runs):
        curves = [run["points"] for run in runs if run["mode"] == mode]
        for points in zip(*curves):
            spread = f"{stdev([p['reward'] for p in points]):.4f}" if len(points) > 1 else "-"
            at = averaged([points[k:k + 1] for k in range(len(points))])[0]
            text.append(f"{mode:8}{at['iteration']:>10.0f}{at['calls']:>10.0f}{at['seconds']:>10.1f}{at['reward']:>10.4f}{spread:>20}{at['exact']:>10.4f}")
    for mode, found in compared.get("modes", {}).items():
        text.append(f"{mode}: the held-out reward {compared['target']:.4f}, which all steps reach in {compared['calls']:.0f} calls and {compared['seconds']:.0f} s, takes")
        for what in ("calls", "seconds"):
            known = [share for share in found[what] if share is not None]
            middle = f"; median {median(known):.3f}" if known else ""
            text.append(f"  of these {what}: " + ", ".join("not reached" if share is None else f"{share:.3f}" for share in found[what]) + f" (a seed each){middle}; "
                        f"by the mean of the seeds {'not reached' if found['of_mean'][what] is None else format(found['of_mean'][what], '.3f')}")
    return text


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: the reward against calls and against seconds; thin a seed, thick the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, mode in enumerate(dict.fromkeys(run["mode"] for run in runs)):
        curves = [run["points"] for run in runs if run["mode"] == mode]
        for axes, what in zip(panels, ("calls", "seconds")):
            for points in curves:
                axes.plot([p[what] for p in points], [p["reward"] for p in points], color=f"C{number}", linewidth=0.7, alpha=0.4)
            whole = averaged(curves)
            axes.plot([p[what] for p in whole], [p["reward"] for p in whole], color=f"C{number}", linewidth=2.2, label=f"{mode} ({len(curves)} seeds)")
    panels[0].set(xlabel=f"denoiser calls (samples; with backward counted as {BACKWARD})", ylabel="held-out reward")
    panels[1].set(xlabel="seconds of training")
    panels[0].legend()
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[str], list[str]]:
    """Trains, or reads what was trained; (all runs and their comparison, the table, nothing)."""
    from .iteration import machine, setting_of

    if options.sources:
        read = [json.loads(path.read_text(encoding="utf-8")) for path in options.sources]
        told, runs = read[0]["machine"], [run for content in read for run in content["runs"]]
    else:
        told, runs = machine(options.device), []
        for seed in options.seeds:
            for mode in options.modes:
                setting = setting_of(options, mode)
                points = []
                for point in train(setting, seed, options.iterations or ITERATIONS[mode], options.every, options.device):
                    points.append(point)
                    print(f"{mode} seed {seed}: iteration {point['iteration']}, {point['calls']} calls, {point['seconds']:.1f} s, reward {point['reward']:.4f}, "
                          f"exact {point['exact']:.4f}", flush=True)
                runs.append({"mode": mode, "seed": seed, "setting": asdict(setting), "points": points})
                if options.json:  # what is there already is not lost with what comes
                    options.json.write_text(json.dumps({"machine": told, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    compared = compare(runs)
    if options.plot:
        draw(runs, options.plot)
    return {"machine": told, "runs": runs, "compared": compared}, lines(runs, compared), []
