"""The sides of the comparison: our iteration in a session of its own run folder, and the published algorithm; each in turn, on the same policy."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from comfy_dancegrpo import policies, rewards
from comfy_dancegrpo.embedded import PROMPTS
from comfy_dancegrpo.grpo.learner import Learner
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.pairs import shares
from comfy_dancegrpo.grpo.protocol import Advantages, CallCount, Column, Rollout, Scores
from comfy_dancegrpo.grpo.rollout import initial_noise, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.policies.base import Policy
from comfy_dancegrpo.prompts import PromptList
from comfy_dancegrpo.runs.prompt_order import prompts_of
from comfy_dancegrpo.runs.session import LoopSettings, Session
from comfy_dancegrpo.workflow.host import Host, use

from . import formulas, random_families, reference
from .formulas import Calls
from .probe import Clock, PeakMemory, Probe, Seen
from .settings import EMBEDDED, Setting

TRAIN = tuple((PROMPTS / "shapes_train.txt").read_text(encoding="utf-8").splitlines())
SEED = 0


@dataclass
class Turn:
    """One iteration. seconds: by phase, in all, and in the denoiser; seen: what its hooks counted; wanted: what the formulas say of that;
    silent: samples whose backward pass was left out because the clip had silenced them all. peak: bytes. cpu: seconds that the process computed, on all its
    threads, which other work beside it does not change much."""

    seconds: dict[str, float]
    denoiser: float
    seen: dict[str, Calls]
    wanted: dict[str, Calls]
    peak: int | None
    silent: int
    samples: int
    cpu: float


@dataclass
class Bench:
    """What all sides use: the policy with the session's LoRA on it, whose values each turn begins with."""

    policy: Policy
    session: Session
    reward: rewards.Reward
    encode: Callable
    clock: Clock
    peak: PeakMemory
    probe: Probe
    start: dict[str, torch.Tensor] = field(repr=False)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.session.trained.parameters

    @torch.no_grad()
    def begin(self) -> None:
        for name, p in self.parameters.items():
            p.copy_(self.start[name])
        self.peak.reset()
        self.probe.take()

    def sides(self, setting: Setting) -> int:
        """Denoiser calls for each input: two with classifier-free guidance."""
        return 2 if self.policy.guided(setting.plan(self.policy)) else 1

    def counted(self, seen: Seen, wanted: Calls) -> Calls:
        """Padding cannot be seen from outside: it is what the samples exceed the formula's inputs by."""
        return Calls(len(seen.calls), sum(seen.calls), sum(seen.calls) - (wanted.samples - wanted.padding))


class _Where(Host):
    """On one device, whatever else the machine has."""

    def __init__(self, folder: Path, device: torch.device):
        super().__init__(output=folder)
        self._device = device

    def device(self) -> torch.device:
        return self._device


@contextlib.contextmanager
def bench(setting: Setting, device: str, iterations: int, cut: random_families.Cut = random_families.Cut(), dtype: str = "") -> Iterator[Bench]:
    """iterations: how many the session will have, all sides of ours together. dtype: empty for float32 on a CPU and of the embedded policy, bfloat16 else."""
    where = torch.device(device)
    dtype = dtype or ("float32" if where.type == "cpu" or setting.policy in EMBEDDED else "bfloat16")
    with tempfile.TemporaryDirectory() as folder, use(_Where(Path(folder), where)):
        if setting.policy in EMBEDDED:
            policy, encode = policies.load(setting.policy, dtype), None
        else:
            policy, encode = random_families.make(setting.policy, getattr(torch, dtype), where, cut)
        reward = rewards.load("clip_score", batch_size=64) if encode is None else rewards.load("jpeg_size")
        options = LoopSettings("benchmark", iterations, setting.prompts_per_iteration, SEED, setting.micro_batch, 0, "restart", setting.lora,
                               setting.optimizer, gradient_checkpointing=setting.gradient_checkpointing)
        with Session(policy, PromptList(TRAIN), options, "benchmark") as session:
            parameters = session.trained.parameters
            with torch.no_grad():
                for name, p in parameters.items():  # from zero on one of a LoRA's two matrices would have no gradient
                    p.add_(0.01 * torch.randn(p.shape, generator=generator("benchmark", name)).to(p))
            clock = Clock(where)
            with Probe(policy.denoisers.values(), parameters.values(), clock) as probe:
                yield Bench(policy, session, reward, encode or (lambda prompts: session.live.encode(prompts, setting.size)), clock, PeakMemory(where), probe,
                            {name: p.detach().clone() for name, p in parameters.items()})


def scored(bench: Bench, setting: Setting, rollout: Rollout, start: float) -> Advantages:
    """start: when scoring began, by `perf_counter`."""
    column = Column(bench.reward.name, 1.0, bench.reward.of(rollout))
    return setting.advantages(Scores(rollout, (column,), time.perf_counter() - start))


def ours(bench: Bench, setting: Setting) -> Turn:
    """An iteration of the trainer, with all that a session does around it."""
    bench.begin()
    clock, policy, seconds = bench.clock, bench.policy, {}
    began = last = clock.now()
    cpu = time.process_time()

    def ended(phase: str) -> None:
        nonlocal last
        now = clock.now()
        seconds[phase], last = now - last, now

    live, prompts, number = bench.session.begin()
    conditioning, plan = bench.encode(prompts.prompts), setting.plan(policy)
    ended("prompts")
    rollout = sample(policy, setting.request(policy, prompts.prompts, SEED, number - 1), conditioning, plan, live.learner.version)
    ended("rollout")
    seen = {"rollout": bench.probe.take()}
    advantages = scored(bench, setting, rollout, last)
    ended("reward")
    stats = update(live.learner, advantages, setting.update)
    ended("replay")
    seen["replay"] = bench.probe.take()
    bench.session.end(stats)
    ended("records")
    cpu = time.process_time() - cpu
    decode = rollout.seconds["decode"]
    rolling = seconds.pop("rollout")
    seconds = {"prompts": seconds.pop("prompts"), "denoise": rolling - decode, "decode": decode, **seconds, "total": last - began}
    common, sides = rollout.common.tolist(), bench.sides(setting)
    pairs = shares(rollout, advantages.trained, setting.update)
    wanted = {"rollout": formulas.rollout(common, setting.group_size, setting.steps, setting.micro_batch).times(sides),
              "replay": formulas.replay(pairs, common, setting.group_size, setting.micro_batch).times(sides)}
    silent = sum(seen["replay"].calls) - sum(seen["replay"].backward)
    return Turn(seconds, clock.seconds(span for part in seen.values() for span in part.spans),
                {phase: bench.counted(seen[phase], wanted[phase]) for phase in seen}, wanted, bench.peak.read(), silent, rollout.size, cpu)


def published(bench: Bench, setting: Setting) -> Turn:
    """The same iteration as the paper has it: all steps with noise, embeddings computed before."""
    bench.begin()
    clock, policy, plan = bench.clock, bench.policy, setting.plan(bench.policy)
    prompts = prompts_of(0, TRAIN, setting.prompts_per_iteration, SEED)
    conditioning = bench.encode(prompts)
    optimizer = torch.optim.AdamW(bench.parameters.values(), lr=1e-6, weight_decay=setting.weight_decay)
    seconds = dict.fromkeys(("prompts", "denoise", "decode", "reward", "replay", "records"), 0.0)
    began = last = clock.now()
    cpu = time.process_time()

    def ended(phase: str) -> None:
        nonlocal last
        now = clock.now()
        seconds[phase] += now - last
        last = now

    request = setting.request(policy, prompts, SEED, 0)
    noises = initial_noise(request, torch.arange(len(request.groups))).to(plan.grid.levels.device)
    trajectories, scores = [], []
    for n, group in enumerate(request.groups.tolist()):
        row = conditioning.rows(torch.tensor([group], device=plan.grid.levels.device))
        trajectories.append(reference.draw(policy, noises[n:n + 1], row, plan, generator("reference", n), ended))
        scores.append(bench.reward(trajectories[-1].picture, (prompts[group],)).item())
        ended("reward")
    seen = {"rollout": bench.probe.take()}
    of_sample = reference.advantages(scores, setting.group_size)
    trained = max(1, round(setting.train_fraction * (setting.steps - 1)))
    pairs = [(n, t) for n in range(len(scores)) for t in torch.randperm(setting.steps - 1, generator=generator("trained", n))[:trained].sort().values.tolist()]
    for k in range(setting.optimizer_steps):
        part = pairs[k * len(pairs) // setting.optimizer_steps:(k + 1) * len(pairs) // setting.optimizer_steps]
        found = reference.gradient(policy, bench.parameters, (_loss(bench, setting, plan, conditioning, request.groups, trajectories, of_sample, pair)
                                                              for pair in part), len(part))
        for name, p in bench.parameters.items():
            p.grad = found[name]
        torch.nn.utils.clip_grad_norm_(bench.parameters.values(), setting.max_grad_norm)
        optimizer.step()
    ended("replay")
    cpu = time.process_time() - cpu
    seen["replay"] = bench.probe.take()
    sides = bench.sides(setting)
    wanted = dict(zip(("rollout", "replay"), formulas.reference(setting.prompts_per_iteration, setting.group_size, setting.steps, setting.train_fraction)))
    wanted = {phase: calls.times(sides) for phase, calls in wanted.items()}
    silent = sum(seen["replay"].calls) - sum(seen["replay"].backward)
    return Turn({**seconds, "total": last - began}, clock.seconds(span for part in seen.values() for span in part.spans),
                {phase: bench.counted(seen[phase], wanted[phase]) for phase in seen}, wanted, bench.peak.read(), silent, len(scores), cpu)


def _loss(bench, setting, plan, conditioning, groups, trajectories, of_sample, pair):
    n, t = pair
    device = plan.grid.levels.device
    return lambda: reference.loss(bench.policy, trajectories[n].latents[t], trajectories[n].latents[t + 1], t, conditioning.rows(groups[n:n + 1].to(device)),
                                  plan, trajectories[n].log_probs[t], of_sample[n], setting.clip_range)


class _Kept(Learner):
    """Keeps the gradient of each optimizer step, and takes none."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.gradients: list[dict[str, torch.Tensor]] = []

    def optimizer_step(self) -> None:
        self.gradients.append({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in self.parameters.items()})
        self.zero_grad()


def gradients(bench: Bench, setting: Setting) -> dict[str, float]:
    """Ours against the reference's, of the same stored trajectories and advantages: |ours - reference| / |reference| of each optimizer step's gradient."""
    bench.begin()
    policy, plan = bench.policy, setting.plan(bench.policy)
    prompts = prompts_of(0, TRAIN, setting.prompts_per_iteration, SEED)
    conditioning = bench.encode(prompts)
    learner = _Kept(policy, bench.parameters, setting.optimizer, "gradients")
    rollout = sample(policy, setting.request(policy, prompts, SEED, 0), conditioning, plan, learner.version)
    advantages = scored(bench, setting, rollout, time.perf_counter())
    settings: UpdateSettings = replace(setting.update, max_grad_norm=float("inf"))
    stats = update(learner, advantages, settings)
    device, worst = plan.grid.levels.device, 0.0

    def loss(n: int, t: int) -> Callable:
        x, x_next = (rollout.states[n:n + 1, step].to(device) for step in (t, t + 1))
        return lambda: reference.loss(policy, x, x_next, t, rollout.conditioning.rows(rollout.groups[n:n + 1].to(device)), plan,
                                      rollout.log_probs[n, t].item(), advantages.values[n].item(), setting.clip_range)

    for pairs, found in zip(shares(rollout, advantages.trained, settings), learner.gradients, strict=True):
        wanted = reference.gradient(policy, bench.parameters, (loss(n, t) for n, t in pairs), len(pairs))
        difference, size = (sum(value.double().square().sum().item() for value in values) ** 0.5
                            for values in ((found[name] - wanted[name] for name in wanted), wanted.values()))
        worst = max(worst, difference / size)
    calls: CallCount = stats.calls
    return {"relative_difference": worst, "ratio_deviation": stats.ratio_deviation, "transitions": stats.transitions, "backward_samples": calls.backward}
