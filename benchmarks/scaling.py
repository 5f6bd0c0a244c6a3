"""What several processes gain, and what they tell each other: measured on the embedded policy with 1 and 2, and on paper for FLUX.1 with 8 and 64.

    python benchmarks/scaling.py                # both tables
    python benchmarks/scaling.py --json         # the same as JSON
    python benchmarks/scaling.py --paper        # what is computed alone

Measured: seconds of an iteration (rollout, scores, update, the state that a checkpoint takes) at fixed work, each process with one thread, the sides in turn,
the first iteration of each start left out; medians. Communication is what passes in collectives, waiting for the others included. docs/scaling.md has the
formulas of what is on paper.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
SHARDING = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as accelerate launch sets it
FLUX = {"guidance_embeds": True}  # FLUX.1-dev's own configuration beside diffusers' defaults
LINKS = {"NVLink 4": (450e9, 8), "InfiniBand NDR 400": (50e9, 1024), "100 GbE": (12.5e9, 1024)}  # bytes/s each way of a GPU, and the most GPUs that it joins
FLOAT32 = 4


@dataclass(frozen=True)
class Work:
    """An iteration. weights: bytes of one of the denoiser's numbers. moments: numbers of state by one that is trained."""

    prompts: int
    group: int
    steps: int
    train_fraction: float
    optimizer_steps: int
    micro_batch: int
    pixels: int
    weights: int
    moments: int = 3  # AdamW's two, and the weights' own

    @property
    def samples(self) -> int:
        return self.prompts * self.group

    @property
    def pairs(self) -> int:
        """Of a sample and a step, that are trained."""
        return self.samples * max(1, round(self.train_fraction * (self.steps - 1)))

    def calls(self, count: int) -> tuple[int, int]:
        """Denoiser calls of each of `count` processes: in the rollout, and in the replay, which has a backward pass too.

        The processes' shares are as even as can be. A group begins from one noise: its first step is one row of a call, for those of its samples that a process has.
        """
        own = math.ceil(self.samples / count)
        groups = min(self.prompts, own)  # whose first step is computed here; at most so many
        first = math.ceil(groups / self.micro_batch)
        replays = math.ceil(self.pairs / self.optimizer_steps / count)
        return first + math.ceil(own / self.micro_batch) * (self.steps - 1), self.optimizer_steps * math.ceil(replays / self.micro_batch)


@dataclass(frozen=True)
class Mode:
    """What is trained, and how the processes hold it. held: numbers of the denoiser. trained: of them, or of its LoRA."""

    name: str
    held: int
    trained: int
    full: bool
    sharded: bool


def traffic(mode: Mode, work: Work, count: int, calls: tuple[int, int] | None = None) -> dict[str, float]:
    """Bytes that a process sends in an iteration, by what they are; `docs/scaling.md` has the formulas. calls: where they are known better than by `work`."""
    rollout, replay = calls or work.calls(count)
    others = (count - 1) / count
    gathered = others * work.weights * mode.held * (rollout + 2 * replay) if mode.sharded else 0.0
    scattered = others * FLOAT32 * mode.trained * replay if mode.sharded and mode.full else 0.0
    reduced = 0.0 if mode.sharded and mode.full else 2 * others * FLOAT32 * mode.trained * work.optimizer_steps
    state = others * FLOAT32 * mode.trained * work.moments if mode.sharded and mode.full else 0.0
    pictures = FLOAT32 * 3 * work.pixels * work.samples / count
    return {"gradients": reduced, "weights": gathered + scattered, "state": state, "pictures": pictures}


# -- on paper ---------------------------------------------------------------------------------------------------------------------
def flux_modes(rank: int, targets: str) -> list[Mode]:
    """Of FLUX.1's transformer, made without memory."""
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(**FLUX)
    held, lora = sum(p.numel() for p in denoiser.parameters()), lora_numbers(denoiser, rank, targets)
    return [Mode(f"LoRA of rank {rank}, whole base", held, lora, False, False), Mode(f"LoRA of rank {rank}, sharded base", held, lora, False, True),
            Mode("all weights, whole", held, held, True, False), Mode("all weights, FSDP2", held, held, True, True)]


def lora_numbers(denoiser, rank: int, targets: str) -> int:
    """r * (in + out) of each linear layer that takes one."""
    import re

    from comfy_dancegrpo.policies.flux import Flux

    layers = [module for name, module in denoiser.named_modules() if re.fullmatch(Flux.lora_targets[targets], name)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def flux_workflow() -> tuple[Work, int, str]:
    """What workflows/flux_dev.json does in an iteration (the published settings), its LoRA's rank and targets."""
    from comfy_dancegrpo import nodes
    from comfy_dancegrpo.workflow.convert import to_prompt
    from comfy_dancegrpo.workflow.read import read_workflow
    from comfy_dancegrpo.workflow.schema import object_info

    registry = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}
    prompt = to_prompt(read_workflow(ROOT / "workflows/flux_dev.json"), object_info(registry, nodes.NODE_DISPLAY_NAME_MAPPINGS))
    loop, drawn, update = (next(node["inputs"] for node in prompt.values() if node["class_type"] == f"DanceGRPO{name}")
                           for name in ("LoopStart", "GroupSample", "Update"))
    work = Work(loop["prompts_per_iteration"], drawn["group_size"], drawn["steps"], update["train_fraction"], update["optimizer_steps"], loop["micro_batch"],
                drawn["height"] * drawn["width"], weights=2)
    return work, loop["lora_rank"], loop["lora_targets"]


def paper(counts: tuple[int, ...] = (8, 64)) -> dict:
    work, rank, targets = flux_workflow()
    rows = []
    for mode in flux_modes(rank, targets):
        for count in counts:
            sent = traffic(mode, work, count)
            total = sum(sent.values())
            rows.append({"mode": mode.name, "trained": mode.trained, "processes": count, "calls": work.calls(count), "sent": sent, "total": total,
                         "seconds": {name: total / speed if count <= most else None for name, (speed, most) in LINKS.items()}})
    return {"work": asdict(work), "targets": targets, "held": flux_modes(rank, targets)[0].held, "rows": rows}


# -- measured ---------------------------------------------------------------------------------------------------------------------
CASES = {"LoRA": ("lora", False), "all weights": ("full", False), "all weights, FSDP2": ("full", True), "LoRA, FSDP2": ("lora", True)}
SIDES = ("LoRA", "all weights", "all weights, FSDP2")  # that are timed
SMALL = Work(2, 8, 4, 1.0, 2, 4, 64 * 64, weights=4)


class Meter:
    """Seconds that collectives take, and bytes that they send, by what they are for. Everything of this process passes it from its making on."""

    def __init__(self) -> None:
        import torch.distributed as dist

        from comfy_dancegrpo import processes, sharding

        self.seconds, self.sent, self._kind = Counter(), Counter(), "rest"
        self._count, self._first = processes.count(), processes.is_first()
        self._wrap(processes, "sum_over_all", "gradients", timed=False)
        talking = processes._talking

        @contextlib.contextmanager
        def timed() -> Iterator[None]:
            with self._during(self._kind), talking():
                yield

        processes._talking = timed
        others = (self._count - 1) / self._count
        self._wrap(dist, "all_reduce", None, lambda tensor, **_: 2 * others * nbytes(tensor) if tensor.is_floating_point() else 0)
        gather, scatter = ("all_gather_single", "reduce_scatter_single") if hasattr(dist, "all_gather_single") else ("all_gather_into_tensor", "reduce_scatter_tensor")
        self._wrap(dist, gather, "weights", lambda output, *_, **__: others * nbytes(output))
        self._wrap(dist, scatter, "weights", lambda output, input, **_: others * nbytes(input))
        self._wrap(sharding, "whole", "state", lambda tensor: others * nbytes(tensor) if sharding.is_part(tensor) else 0)
        self._wrap(sharding, "number", "rest")
        self._wrap(dist, "gather", "pictures", lambda padded, *_, **__: nbytes(padded), timed=False)  # within processes._talking

    @contextlib.contextmanager
    def _during(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - start

    def _wrap(self, module, name: str, kind: str | None, sends: Callable[..., float] = lambda *_, **__: 0, timed: bool = True) -> None:
        function = getattr(module, name)

        def wrapped(*given, **named):
            former, self._kind = self._kind, kind or self._kind
            self.sent[self._kind] += sends(*given, **named)
            try:
                with self._during(self._kind) if timed and kind else contextlib.nullcontext():
                    return function(*given, **named)
            finally:
                self._kind = former

        setattr(module, name, wrapped)


def nbytes(tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measure(settings: dict, iterations: int, cases: list[str]) -> dict[str, dict]:
    """In each process: of each case the seconds of its iterations, those of them in collectives, the bytes that it sent, and the denoiser's calls.

    settings: of `Work`.
    """
    import torch

    from comfy_dancegrpo import processes

    torch.set_num_threads(1)
    meter = Meter() if processes.count() > 1 else None
    return {case: _case(Work(**settings), iterations, *CASES[case], meter) for case in cases}


def _case(work: Work, iterations: int, kind: str, sharded: bool, meter: Meter | None) -> dict:
    from comfy_dancegrpo import policies
    from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
    from comfy_dancegrpo.grpo.protocol import SamplingPlan, Size
    from comfy_dancegrpo.grpo.update import UpdateSettings
    from comfy_dancegrpo.lora.adapter import LoraSettings
    from comfy_dancegrpo.lora.full import FullSettings

    for name, value in SHARDING.items():
        os.environ[name] = value if sharded else "false"
    policy, size = policies.load("embedded"), Size(math.isqrt(work.pixels), math.isqrt(work.pixels))
    held = sum(p.numel() for p in policy.denoiser.parameters())
    attached = (FullSettings() if kind == "full" else LoraSettings(16, 16.0, "attention and feed-forward")).attach(policy, 0)
    learner = Learner(policy, attached.parameters, OptimizerSettings(1e-4), "scaling", attached.written)
    plan = SamplingPlan(policy.time_grid(work.steps, 3.0, size), "dance_sde", 0.7, 0.0, size)
    settings = UpdateSettings(train_fraction=work.train_fraction, optimizer_steps=work.optimizer_steps)
    found = {"seconds": [], "communication": [], "held": held, "trained": sum(p.numel() for p in learner.parameters.values())}
    for iteration in range(1 + iterations):
        if meter is not None:
            meter.seconds.clear(), meter.sent.clear()
        start = time.perf_counter()
        calls = _iteration(policy, learner, plan, work, settings, iteration)
        if iteration:
            found["seconds"].append(time.perf_counter() - start)
            if sharded and meter is not None and not meter.sent["weights"]:
                raise RuntimeError("torch gathers sharded weights by other calls than those that are measured here")
            found["communication"].append(dict(meter.seconds) if meter is not None else {})
            found |= {"sent": dict(meter.sent) if meter is not None else {}, "calls": calls}
    attached.remove()
    return found


def _iteration(policy, learner, plan, work: Work, settings, iteration: int) -> tuple[int, int]:
    """The denoiser's calls of a process, in the rollout and in the replay."""
    from comfy_dancegrpo import processes
    from comfy_dancegrpo.grpo.advantages import combine
    from comfy_dancegrpo.grpo.protocol import Column, Scores
    from comfy_dancegrpo.grpo.rollout import Request, sample
    from comfy_dancegrpo.grpo.update import update
    from comfy_dancegrpo.runs.prompt_cache import encode

    prompts = ("a red circle", "a blue square", "a small green triangle", "a large star")[:work.prompts]
    request = Request(prompts, work.group, policy.latent_shape(plan.size), 0, iteration, True, work.micro_batch)
    rollout = sample(policy, request, encode(policy, prompts, plan.size), plan, learner.version, tick=lambda done, total: processes.check_interrupt())
    values = processes.gathered(rollout.pictures.double().mean((1, 2, 3)).float(), rollout.places, rollout.size)
    stats = update(learner, combine(Scores(rollout, (Column("brightness", 1.0, values),))), settings, tick=lambda done, total: processes.check_interrupt())
    learner.state()
    return tuple(samples // work.micro_batch // processes.count() for samples in (rollout.calls.forward, stats.calls.forward + stats.calls.backward))


def measured(rounds: int, iterations: int) -> list[dict]:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from spmd import in_processes

    found: dict[tuple[str, int], list[list[dict]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for count in (1, 2):
                cases = [case for case in SIDES if count > 1 or not CASES[case][1]]
                of_all = in_processes(count, measure, Path(folder), asdict(SMALL), iterations, cases)
                for case in cases:
                    found.setdefault((case, count), []).append([of_one[case] for of_one in of_all])
    alone = {case: _median(found[case, 1]) for case, count in found if count == 1}
    rows = []
    for (case, count), starts in found.items():
        seconds, one = _median(starts), alone.get(case, alone["all weights"])
        kinds = sorted({kind for start in starts for process in start for part in process["communication"] for kind in part})
        shares = {kind: mean(part.get(kind, 0.0) / whole for start in starts for process in start
                             for part, whole in zip(process["communication"], process["seconds"])) for kind in kinds}
        rows.append({"case": case, "processes": count, "trained": starts[0][0]["trained"], "seconds": seconds, "speedup": one / seconds,
                     "communication": sum(shares.values()), "by": shares, "sent": starts[0][0]["sent"],
                     "every": [second for start in starts for second in start[0]["seconds"]]})
    return rows


def _median(starts: list[list[dict]]) -> float:
    return median(second for start in starts for second in start[0]["seconds"])


# -- the tables -------------------------------------------------------------------------------------------------------------------
def show_measured(rows: list[dict], machine: dict) -> None:
    print(f"{SMALL.samples} pictures of {math.isqrt(SMALL.pixels)} pixels, {SMALL.steps} steps, {SMALL.optimizer_steps} optimizer steps, float32; one thread a process, "
          f"{machine['cores']} cores, load {machine['load before']:.1f} before and {machine['load after']:.1f} after (this benchmark's own included)\n")
    print(f"{'what is trained':20} {'numbers':>10} {'processes':>9} {'s/iteration':>12} {'fastest':>8} {'speed-up':>8} {'communication':>13}  of which")
    for row in rows:
        by = ", ".join(f"{kind} {share:.1%}" for kind, share in sorted(row["by"].items(), key=lambda item: -item[1]))
        print(f"{row['case']:20} {row['trained']:>10,} {row['processes']:>9} {row['seconds']:>12.2f} {min(row['every']):>8.2f} {row['speedup']:>8.2f} "
              f"{row['communication']:>13.1%}  {by}")


def show_paper(found: dict) -> None:
    work = found["work"]
    print(f"FLUX.1-dev, {found['held']:,} numbers in bfloat16; an iteration of {work['prompts'] * work['group']} pictures, {work['steps']} steps, "
          f"{work['optimizer_steps']} optimizer steps, micro-batches of {work['micro_batch']} (workflows/flux_dev.json)\n")
    print(f"{'what is trained':34} {'GPUs':>4} {'calls':>9} " + " ".join(f"{kind:>10}" for kind in found["rows"][0]["sent"]) + f" {'GB sent':>10}  "
          + "  ".join(f"{name:>18}" for name in LINKS))
    for row in found["rows"]:
        times = [f"{seconds:,.2f} s" if seconds is not None else "-" for seconds in row["seconds"].values()]
        print(f"{row['mode']:34} {row['processes']:>4} {'{}+{}'.format(*row['calls']):>9} " + " ".join(f"{sent / 1e9:>10,.2f}" for sent in row["sent"].values())
              + f" {row['total'] / 1e9:>10,.2f}  " + "  ".join(f"{text:>18}" for text in times))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="starts of each side")
    parser.add_argument("--iterations", type=int, default=3, help="measured in each start")
    parser.add_argument("--paper", action="store_true", help="without what is measured")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    found: dict = {"paper": paper()}
    if not asked.paper:
        before = os.getloadavg()[0]
        found["measured"] = measured(asked.rounds, asked.iterations)
        found["machine"] = {"cores": os.cpu_count(), "load before": before, "load after": os.getloadavg()[0]}
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    if "measured" in found:
        show_measured(found["measured"], found["machine"])
        print()
    show_paper(found["paper"])


if __name__ == "__main__":
    main()
