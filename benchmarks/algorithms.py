"""The algorithms side by side on the embedded policies: held-out reward, watch reward, spread over seeds, worst seed, collapses.

    python -m benchmarks.algorithms --json algorithms.json --table algorithms.md --plot algorithms.png --workers 2

Each algorithm trains on a small, a medium and the whole set of prompts, with several seeds, for the same number of denoiser calls (samples, padding
included, with backward counted as 3), at the learning rate that did best in a search of its own: a run for each of --rates on --search-prompts prompts,
with a seed that is not reported. What is reported, and searched by, are the validation captions, the same noises before and after training. What is
written is written after every run; a command that was interrupted goes on where its --json is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from comfy_dancegrpo.atomic import replacing
from comfy_dancegrpo.grpo.groups import BATCH_STD, LEARNED_VALUE, LEAVE_ONE_OUT, PER_PROMPT, RANK

from .iteration import add_changes, changes_of, machine
from .learning import captions
from .settings import EMBEDDED, Setting, published

SHORT = {"warmup": 3, "ema_decay": 0.95}  # of runs of a few dozen optimizer steps
_FLOW = ("embedded",)
_ONCE = {"optimizer_steps": 1}  # reinforce has no ratio, which a second step from one rollout would need
_FORWARD = {"eta": 0.0, "initial_noise": "independent", "estimator": BATCH_STD}  # sampled without noise in the steps


@dataclass(frozen=True)
class Algorithm:
    """What it changes in the settings of a policy, which are DanceGRPO's; and the policies that it is for."""

    changes: dict[str, Any]
    policies: tuple[str, ...] = tuple(EMBEDDED)


ALGORITHMS = {  # docs/algorithms.md has their papers
    "DanceGRPO": Algorithm({}),
    "Flow-GRPO": Algorithm({"transition": "flow_grpo_sde", "eta": 0.7, "kl_weight": 0.004}, _FLOW),
    "CPS": Algorithm({"transition": "cps", "eta": 0.9}, _FLOW),
    "GRPO-Guard": Algorithm({"objective": "grpo_guard", "clip_range": 7e-4}, _FLOW),  # 1e-3 times the std of a step, for its ratio's logarithm is as much larger
    "DDPO": Algorithm({"estimator": PER_PROMPT}),
    "DPOK": Algorithm({"objective": "reinforce", **_ONCE, "estimator": LEARNED_VALUE, "kl_weight": 0.001}),  # its published 0.01 to a reward's weight of 10
    "RLOO": Algorithm({"objective": "reinforce", **_ONCE, "estimator": LEAVE_ONE_OUT}),
    "rank": Algorithm({"estimator": RANK}),
    "DiffusionNFT": Algorithm({"objective": "diffusion_nft", **_FORWARD}),
    "AWM": Algorithm({"objective": "awm", "clip_range": 1.0, **_FORWARD}),
}


@dataclass(frozen=True)
class Job:
    """A run to be made. prompts: how many it trains on. calls: of the denoiser, to which it comes as near as whole iterations do.
    captions: evaluated on, `noises` pictures each. search: whether it is one of the search over the learning rate."""

    algorithm: str
    setting: Setting
    prompts: int
    seed: int
    calls: int
    captions: int
    noises: int
    search: bool = False


Made = dict[str, Any]
"""A job as a dictionary, and what `train` found: a line of the JSON."""
_starts: dict[tuple, dict[str, list[float]]] = {}  # the scores of this process's policies before training


def train(job: Job) -> Made:
    """Makes a run. broke: what it ended early with, or empty; reward (trained on) and exact (which watches): what `told` says of each."""
    from comfy_dancegrpo.errors import RunError
    from comfy_dancegrpo.grpo.update import NotFinite

    from .trial import Trial

    s, cost, broke = job.setting, 0, ""
    start = s.policy, s.steps, s.shift, s.guidance_scale, s.size, job.captions, job.noises  # all that an untrained policy's pictures depend on
    with Trial(s, job.seed, captions("train")[:job.prompts], captions("validation")[:job.captions], noises=job.noises) as trial:
        if start not in _starts:
            _starts[start] = {name: of_all.tolist() for name, of_all in trial.scores().items()}
        while not broke and trial.calls + cost / 2 < job.calls:
            done = trial.calls
            try:
                trial.iterate()
            except (NotFinite, RunError) as error:  # the policy is as the last good step left it; or its pictures are no numbers
                broke = str(error)
            cost = trial.calls - done
        try:
            after = {name: of_all.tolist() for name, of_all in trial.scores().items()}
        except RunError as error:
            broke, after = broke or str(error), {name: [math.nan] * len(before) for name, before in _starts[start].items()}
        found = {name: told(_starts[start][name], of_all) for name, of_all in after.items()}
        return {"job": asdict(job), "iterations": trial.iteration, "calls": trial.calls, "seconds": trial.seconds, "broke": broke, **found}


def told(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Of the scores of the captions: means before and after, the gain, and its standard error (of the difference, paired by caption)."""
    difference = [b - a for a, b in zip(before, after, strict=True)]
    return {"before": mean(before), "after": mean(after), "gain": mean(difference), "error": spread(difference) / math.sqrt(len(difference))}


def spread(values: Sequence[float]) -> float:
    """Their standard deviation; NaN of what are not all numbers."""
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def collapsed(run: Made, what: str = "reward") -> bool:
    """Whether it ended below its start by more than two standard errors, or with what is no number."""
    return bool(run["broke"]) or not run[what]["gain"] >= -2 * run[what]["error"]


# -- which runs, and making them -----------------------------------------------------------------------------------------
def search(options: argparse.Namespace) -> list[Job]:
    """A run for each algorithm and learning rate; none where there is one rate alone."""
    if len(options.rates) == 1:
        return []
    return [_job(options, policy, name, rate, options.search_prompts, options.search_seed, True)
            for policy, name in _pairs(options) for rate in options.rates]


def reported(options: argparse.Namespace, made: Sequence[Made]) -> list[Job]:
    """Seed after seed, so that an interrupted comparison has whole ones; of those whose rate was found."""
    rates = {pair: options.rates[0] if len(options.rates) == 1 else best_rate([run for run in made if _pair(run) == pair]) for pair in _pairs(options)}
    return [_job(options, *pair, rates[pair], prompts, seed) for seed in options.seeds for prompts in options.sizes for pair in _pairs(options) if rates[pair]]


def best_rate(made: Iterable[Made]) -> float | None:
    """The learning rate of the run of a search that gained the most of the trained reward, if there is one; of runs that all broke the first's."""
    best = max((run for run in made if run["job"]["search"]), key=lambda run: -math.inf if run["broke"] else run["reward"]["gain"], default=None)
    return best and best["job"]["setting"]["learning_rate"]


def _pairs(options: argparse.Namespace) -> list[tuple[str, str]]:
    return [(policy, name) for policy in options.policies for name in options.algorithms if policy in ALGORITHMS[name].policies]


def _pair(run: Made) -> tuple[str, str]:
    return run["job"]["setting"]["policy"], run["job"]["algorithm"]


def _job(options: argparse.Namespace, policy: str, name: str, rate: float, prompts: int, seed: int, search: bool = False) -> Job:
    setting = published(policy, "all", **(SHORT | ALGORITHMS[name].changes | changes_of(options)))
    return Job(name, replace(setting, learning_rate=rate), prompts, seed, options.calls, options.captions, options.noises, search)


def make(jobs: Sequence[Job], workers: int) -> Iterator[Made]:
    """Each as it ends; with several workers at once as many, in processes of one thread each."""
    if workers == 1:
        yield from map(train, jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        for future in as_completed([pool.submit(train, job) for job in jobs]):
            yield future.result()


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


# -- what is told ----------------------------------------------------------------------------------------------------------
def table(made: Sequence[Made]) -> list[str]:
    """Markdown, of the runs that are reported: a row for each policy, algorithm and set of prompts."""
    rows = ["| policy | algorithm | prompts | learning rate | seeds | reward gain | spread over seeds | worst seed | watch reward gain | collapses | of watch reward |",
            "|---|---|---|---|---|---|---|---|---|---|---|"]
    for (policy, name, prompts), runs in grouped(made).items():
        gains, count = [run["reward"]["gain"] for run in runs], len(runs)
        of_seeds = f"{spread(gains):.4f}" if count > 1 else "-"
        rates = ", ".join(f"{rate:g}" for rate in sorted({run["job"]["setting"]["learning_rate"] for run in runs}))
        rows.append(f"| {policy} | {name} | {prompts} | {rates} | {count} | {mean(gains):+.4f} | {of_seeds} | {min(gains):+.4f} | "
                    f"{mean(run['exact']['gain'] for run in runs):+.4f} | {sum(map(collapsed, runs))} | {sum(collapsed(run, 'exact') for run in runs)} |")
    return rows


def grouped(made: Sequence[Made]) -> dict[tuple[str, str, int], list[Made]]:
    """The runs that are reported by policy, algorithm and number of prompts, the seeds of each together; in the order of policies, algorithms and numbers."""
    found: dict[tuple[str, str, int], list[Made]] = {}
    for run in made:
        if not run["job"]["search"]:
            found.setdefault((*_pair(run), run["job"]["prompts"]), []).append(run)
    policies, names = list(EMBEDDED), list(ALGORITHMS)
    return {key: found[key] for key in sorted(found, key=lambda key: (policies.index(key[0]), names.index(key[1]), key[2]))}


def draw(made: Sequence[Made], path: Path) -> None:
    """A panel for each policy and reward: a point is a seed's gain with its standard error, a cross one that collapsed, a line the mean of the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = grouped(made)
    policies = list(dict.fromkeys(policy for policy, _, _ in cells))
    sizes = sorted({prompts for _, _, prompts in cells})
    figure = Figure(figsize=(11, 3.8 * len(policies)), layout="constrained")
    panels = figure.subplots(len(policies), 2, squeeze=False)
    for policy, row in zip(policies, panels):
        names = list(dict.fromkeys(name for of, name, _ in cells if of == policy))
        for axes, (what, title) in zip(row, (("reward", "held-out reward, trained on"), ("exact", "watch reward (exact)"))):
            axes.axhline(0, color="black", linewidth=0.8)
            for (of, name, prompts), runs in cells.items():
                if of != policy:
                    continue
                size = sizes.index(prompts)
                middle, colour = names.index(name) + 0.26 * (size - (len(sizes) - 1) / 2), f"C{size}"
                for k, run in enumerate(runs):
                    at = middle + 0.2 * ((k + 1) / (len(runs) + 1) - 0.5)
                    axes.errorbar(at, run[what]["gain"], run[what]["error"], color=colour, linewidth=0.7, zorder=3, markersize=8 if collapsed(run, what) else 4,
                                  markeredgewidth=2, fmt="x" if collapsed(run, what) else "o")
                of_seeds = mean(run[what]["gain"] for run in runs)
                axes.plot([middle - 0.11, middle + 0.11], [of_seeds, of_seeds], color=colour, linewidth=2.2, label=None if name != names[0] else f"{prompts} prompts")
            axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
            axes.set(title=f"{policy}: {title}", ylabel="gain on the validation captions (x: collapsed)")
        row[0].legend()
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, format="png")


# -- the command -----------------------------------------------------------------------------------------------------------
def parser() -> argparse.ArgumentParser:
    """Of all that `python -m benchmarks.algorithms` takes."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.algorithms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--algorithms", choices=list(ALGORITHMS), nargs="+", default=list(ALGORITHMS))
    add("--policies", choices=list(EMBEDDED), nargs="+", default=list(EMBEDDED))
    add("--sizes", type=int, nargs="+", default=[8, 64, 1120], help="how many prompts are trained on, the first of the embedded set's 1,120")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--calls", type=int, default=20_000, help="of the denoiser, for each run")
    add("--rates", type=float, nargs="+", default=[1e-3, 4e-3, 1.6e-2], help="learning rates to search; a single one is taken without a search")
    add("--search-prompts", type=int, default=64)
    add("--search-seed", type=int, default=1000)
    add("--captions", type=int, default=160, help="of the 160 for validation, how many are evaluated on")
    add("--noises", type=int, default=2, help="pictures of each")
    add("--workers", type=int, default=1, help="runs at once, in processes of one thread each")
    add("--json", type=Path, help="every run, written as it ends; those that are there already are not made again")
    add("--table", type=Path, help="a Markdown file")
    add("--plot", type=Path, help="a PNG")
    of_all = made.add_argument_group("settings of every algorithm, in place of its own")
    add_changes(of_all, besides=("learning_rate",))
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Raises `SystemExit` for seeds that are both searched and reported."""
    options = parser().parse_args(words)
    if options.search_seed in options.seeds:
        parser().error(f"--search-seed: found {options.search_seed}, accepted: one that is not in --seeds, for its runs are not to be reported")
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {"machine": machine("cpu"), "runs": []}
    asked: list[Made] = []
    for jobs_of in (lambda: search(options), lambda: reported(options, asked)):
        jobs = jobs_of()
        there = [next((run for run in known["runs"] if run["job"] == asdict(job)), None) for job in jobs]
        asked += [run for run in there if run]
        for run in make([job for job, run in zip(jobs, there) if not run], options.workers):
            known["runs"].append(run), asked.append(run)
            print(line(run), flush=True)
            tell(options, known, asked)
    tell(options, known, asked)
    print("\n".join(table(asked)))
    return 0


def line(run: Made) -> str:
    job, reward, exact = run["job"], run["reward"], run["exact"]
    what = "search: " if job["search"] else ""
    return (f"{what}{job['setting']['policy']}, {job['algorithm']}, {job['prompts']} prompts, learning rate {job['setting']['learning_rate']:g}, seed {job['seed']}: "
            f"{run['iterations']} iterations, {run['calls']} calls, {run['seconds']:.0f} s, reward {reward['gain']:+.4f} (error {reward['error']:.4f}), "
            f"watch reward {exact['gain']:+.4f}{'; BROKE: ' + run['broke'] if run['broke'] else ''}")


def tell(options: argparse.Namespace, known: dict[str, Any], asked: Sequence[Made]) -> None:
    """Writes what there is."""
    if options.json:
        with replacing(options.json) as beside:  # one that is broken off would lose the runs before
            beside.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if options.table:
        options.table.write_text("\n".join(table(asked)) + "\n", encoding="utf-8")
    if options.plot and any(not run["job"]["search"] for run in asked):
        draw(asked, options.plot)


if __name__ == "__main__":
    sys.exit(main())
