"""Clipped policy-gradient steps on the transitions of a rollout."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import processes, sharding
from .forward import micro_batches, step
from .gaussian import Gaussian, log_prob
from .learner import Learner
from .noise import generator
from .noise_steps import whole_groups
from .objectives import OBJECTIVES
from .objectives.kl import kl
from .objectives.steps import Steps, ratio
from .protocol import Advantages, CallCount, Rollout
from .walk import noise_of


class StaleRollout(ValueError):
    """The rollout was sampled from another version of the policy than the one to be updated."""


class NotFinite(ArithmeticError):
    """Losses or gradients of more optimizer steps in a row than may be skipped are NaN or infinite; the policy was not changed by them."""


@dataclass(frozen=True)
class UpdateSettings:
    """clip_range: how far the objective's ratio may fall below 1 and, where clip_range_high is 0, rise above it; else that is how far. train_fraction: share
    of the trainable transitions that is trained, drawn anew for each sample. optimizer_steps: per rollout, each on its own share of the transitions.
    max_grad_norm: of the whole gradient. max_skipped_steps: how many optimizer steps in a row may be left out because their loss or gradient is NaN or
    infinite. objective: one of `objectives.OBJECTIVES`; kl_weight: of KL to the reference policy, added to it."""

    clip_range: float = 1e-4
    train_fraction: float = 0.6
    optimizer_steps: int = 1
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 3
    objective: str = "clipped"
    clip_range_high: float = 0.0
    kl_weight: float = 0.0


@dataclass(frozen=True)
class UpdateStats:
    """What an update did. ratio_deviation: largest |rho - 1| over the transitions of the first optimizer step (0 if none).
    clip_fraction: of the transitions whose ratio left the objective's range. approx_kl: to the policy that sampled them; reference_kl: mean KL to the
    reference policy, None where it was not asked for. skipped_steps: optimizer steps whose loss or gradient was no number; nothing else here is of them,
    but for finite ratios of the first."""

    loss: float
    ratio_deviation: float
    clip_fraction: float
    approx_kl: float
    grad_norm: float
    learning_rate: float
    transitions: int
    calls: CallCount
    seconds: float
    clip_range: float
    advantages: Advantages = field(repr=False)
    skipped_steps: int = 0
    reference_kl: float | None = None


class Seen(NamedTuple):
    """Of pairs that were replayed, detached [pairs] each: the losses, ratios, whether the objective's ratio left its range, and KL to the reference (or 0)."""

    losses: Tensor
    ratios: Tensor
    outside: Tensor
    kl: Tensor


def chosen_transitions(rollout: Rollout, sample: int, fraction: float) -> list[int]:
    """The steps trained for one sample, ascending: a share of those of 0..T-2 that had noise (the last is never trained), keyed by the sample."""
    group = int(rollout.groups[sample])
    trainable = rollout.noisy[group, :-1].nonzero()[:, 0]
    count = max(1, round(fraction * len(trainable)))
    source = generator("transitions", rollout.seed, rollout.iteration, group, int(rollout.indices[sample]))
    return sorted(trainable[torch.randperm(len(trainable), generator=source)[:count]].tolist())


Pair = tuple[int, int]
"""(sample, step)."""


def input_of(rollout: Rollout, pair: Pair) -> tuple[str, int, int]:
    """What the denoiser is given to replay a transition; equal for those that one call serves."""
    sample, t = pair
    group = int(rollout.groups[sample])
    return ("group", group, t) if t < rollout.common[group] else ("sample", sample, t)


def shares(rollout: Rollout, trained: Tensor, settings: UpdateSettings) -> list[list[Pair]]:
    """(sample, step) pairs of each optimizer step; samples that are not `trained` [N] bool are left out, and steps left empty by that.

    The shares are equal to within one pair, so that no step pays for a micro-batch of padding that its neighbour could fill; where groups are trained
    whole, by one call each, to within one group.
    """
    pairs = [(n, t) for n in rollout.order if trained[n] for t in chosen_transitions(rollout, n, settings.train_fraction)]
    whole = whole_groups(rollout.noisy, rollout.common)
    units = [list(unit) for _, unit in itertools.groupby(pairs, lambda pair: input_of(rollout, pair) if whole else pair)]
    parts = min(settings.optimizer_steps, len(units))
    return [[pair for unit in units[k * len(units) // parts:(k + 1) * len(units) // parts] for pair in unit] for k in range(parts)]


def update(learner: Learner, advantages: Advantages, settings: UpdateSettings,
           tick: Callable[[int, int], None] = lambda done, total: None) -> UpdateStats:
    """Trains the learner's policy on a scored rollout (arXiv 2505.07818, algorithm 1).

    Each optimizer step accumulates the gradient of the objective's mean over its (sample, step) pairs, in micro-batches of
    the rollout's shape: each process over the samples that it drew, in as many calls as any other, and the sum over the processes is what
    is stepped along.
    `tick(pairs done, pairs in all)`, of this process, is called after each; it may raise to stop.

    Raises:
        StaleRollout: the rollout is of another version of the policy. NotFinite: too many steps in a row whose loss or gradient is not a number.
        ValueError: the rollout has no noise, the objective is not for this kind of policy, or there is no reference to take KL to.
    """
    rollout, start = advantages.scores.rollout, time.perf_counter()
    if rollout.version != learner.version:
        raise StaleRollout(f"the rollout was sampled from version {rollout.version[1]} of {rollout.version[0]!r}, "
                           f"and the policy is at version {learner.version[1]} of {learner.version[0]!r}")
    if not bool(rollout.noisy[:, :-1].any()):
        raise ValueError("the rollout has no noise, so it has no log-probabilities to train on: "
                         "sample with a stochastic transition, eta above 0 and at least 2 steps")
    if learner.policy.process not in OBJECTIVES[settings.objective].processes:
        raise ValueError(f'input "objective": found {settings.objective!r}, accepted for this policy ({learner.policy.process}): '
                         + ", ".join(repr(o.name) for o in OBJECTIVES.values() if learner.policy.process in o.processes))
    if settings.kl_weight and learner.reference is None:
        raise ValueError(f'input "kl_weight": found {settings.kl_weight}, accepted here: 0, since there is no reference policy')
    parts, calls = shares(rollout, advantages.trained, settings), CallCount()
    here = {n: row for row, n in enumerate(rollout.places.tolist())}
    own = [_by_input(rollout, [(n, t) for n, t in pairs if n in here]) for pairs in parts]
    micro_batches_of = [max(column) for column in zip(*processes.all_of([-(-len(served) // rollout.micro_batch) for served in own]))]
    total, done = sum(len(pairs) for served in own for pairs in served), 0
    seen, norms, skipped = [[] for _ in parts], [], set()
    learner.zero_grad()  # of an update that was interrupted
    with torch.inference_mode(False), torch.enable_grad():
        for k, served in enumerate(own):
            for of_call in _accumulate(learner, advantages, parts[k], served, here, micro_batches_of[k], settings, calls, k > 0):
                seen[k].append(of_call)
                done += len(of_call.losses)
                tick(done, total)
            _sum_gradients(learner)
            norm = learner.clip_grad_norm(settings.max_grad_norm)
            if processes.any_of(not math.isfinite(norm) or not all(bool(of_call.losses.isfinite().all()) for of_call in seen[k])):
                _skip(learner, norm, settings.max_skipped_steps)
                skipped.add(k)
                continue
            norms.append(norm)
            learner.optimizer_step()
            learner.skipped = 0
    if advantages.history is not None:
        learner.history = advantages.history
    learning_rate = learner.learning_rate
    learner.finish_iteration()
    taken = [of_call for k, of_step in enumerate(seen) if k not in skipped for of_call in of_step]
    every = Seen(*(_of_all([getattr(of_call, name) for of_call in taken]) for name in Seen._fields))
    first = _of_all([of_call.ratios for of_call in seen[0]] if seen else [])
    first = first[first.isfinite()]
    calls = sum(processes.all_teams_of(calls), CallCount())
    deviation = (first - 1).abs().max().item() if len(first) else 0.0
    if not norms:
        return UpdateStats(0.0, deviation, 0.0, 0.0, 0.0, learning_rate, 0, calls, time.perf_counter() - start, settings.clip_range, advantages, len(skipped))
    return UpdateStats(
        loss=every.losses.mean().item(),
        ratio_deviation=deviation,
        clip_fraction=every.outside.mean().item(),
        approx_kl=(every.ratios - 1 - every.ratios.log()).mean().item(),
        grad_norm=sum(norms) / len(norms), learning_rate=learning_rate, transitions=len(every.losses), calls=calls,
        seconds=time.perf_counter() - start, clip_range=settings.clip_range, advantages=advantages, skipped_steps=len(skipped),
        reference_kl=every.kl.mean().item() if settings.kl_weight else None,
    )


def _skip(learner: Learner, norm: float, most: int) -> None:
    """Leaves out an optimizer step. Raises `NotFinite` where `most` in a row were left out already."""
    learner.zero_grad()
    if learner.skipped >= most:
        raise NotFinite(f"the loss or the gradient is NaN or infinite (the gradient's norm is {norm}) in optimizer step {learner.skipped + 1} in a row; "
                        f'input "max_skipped_steps" lets {most} be skipped. None of them was taken')
    learner.skipped += 1


def _sum_gradients(learner: Learner) -> None:
    """Over all processes; one that had no pair in this step has no gradient of its own. What is in parts was summed in the backward pass.

    A parameter that no process has a gradient of (the expert whose noise levels no pair has) keeps none: the optimizer leaves it alone, as with one process.
    """
    parameters = [p for p in learner.parameters.values() if not sharding.is_part(p)]
    having = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    processes.sum_over_all([having])
    if not having.any():  # the clip has silenced all of the step: its gradient is zero, and momentum goes on
        for p in parameters:
            p.grad = torch.zeros_like(p)
    elif processes.count() > 1:
        parameters = [p for p, anywhere in zip(parameters, having.tolist()) if anywhere]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        processes.sum_over_all([p.grad for p in parameters])


def _of_all(parts: list[Tensor]) -> Tensor:
    """[M] float64 on the CPU: those of every process, one after another; float32 has no digit left of rho - 1 - log(rho) where rho is near 1."""
    return torch.cat(processes.all_teams_of(torch.cat(parts).cpu().double() if parts else torch.zeros(0, dtype=torch.float64)))


def _by_input(rollout: Rollout, pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs that each input of the denoiser serves."""
    served: dict[tuple[str, int, int], list[Pair]] = {}
    for pair in pairs:
        served.setdefault(input_of(rollout, pair), []).append(pair)
    return list(served.values())


def _accumulate(learner: Learner, advantages: Advantages, pairs: list[Pair], served: list[list[Pair]], here: dict[int, int],
                calls_of_all: int, settings: UpdateSettings, calls: CallCount, moved: bool) -> Iterator[Seen]:
    """Adds this process's part of the gradient of the mean loss over `pairs`; yields what was seen of the pairs served, by micro-batch.

    served: this process's pairs, by the input that serves them. here: the row of the rollout's states by sample. calls_of_all: micro-batches that every
    process makes, where it needs fewer with rows that count nothing. moved: whether the policy has moved since the rollout, so that a clip may hold.
    """
    rollout, device = advantages.scores.rollout, advantages.scores.rollout.plan.grid.levels.device
    if not here:  # more processes than samples: zeros stand in
        states, log_probs = (tensor.new_zeros(1, *tensor.shape[1:]) for tensor in (rollout.states, rollout.log_probs))
        rollout = replace(rollout, states=states, log_probs=log_probs)
    inputs = [of_input[0] for of_input in served] or [(min(here, default=0), pairs[0][1])]
    for part, real in micro_batches(len(served), rollout.micro_batch, calls_of_all):
        samples, steps = torch.tensor([inputs[k] for k in part.tolist()]).T
        rows = torch.tensor([here.get(n, 0) for n in samples.tolist()])
        given = (rollout.states[rows, steps].to(device), steps.to(device), rollout.conditioning.rows(rollout.groups[samples].to(device)),
                 rollout.plan, torch.ones_like(steps, dtype=torch.bool).to(device), calls, real)
        reference = None
        if settings.kl_weight:
            with learner.reference(), torch.no_grad():  # before the call with gradient, whose weights must stay as they are until its backward pass
                reference = step(learner.policy, *given).mean
        gaussian = step(learner.policy, *given)
        mean = gaussian.mean.detach().requires_grad_()
        loss, of_call = _objective(advantages, rollout, replace(gaussian, mean=mean), reference, served[int(part[0]):][:real], here, settings)
        gradient, = torch.autograd.grad(loss / len(pairs), mean)
        if moved and not processes.sharded() and not bool(gradient.any()):  # the clip has silenced all of them
            calls.spared(len(part))
        else:
            gaussian.mean.backward(gradient)
        yield of_call


def _objective(advantages: Advantages, rollout: Rollout, gaussian: Gaussian, reference: Tensor | None, served: list[list[Pair]], here: dict[int, int],
               settings: UpdateSettings) -> tuple[Tensor, Seen]:
    """The sum of the losses of the pairs that the rows of a call serve, and what was seen of them. reference: [B, ...], the reference policy's means."""
    objective, levels, high = OBJECTIVES[settings.objective], rollout.plan.grid.levels, settings.clip_range_high or settings.clip_range
    pairs, device = [(row, *pair) for row, pairs in enumerate(served) for pair in pairs], gaussian.mean.device
    total, seen = gaussian.mean.sum() * 0.0, []  # a call of padding has a gradient too, of zeros
    for part, real in micro_batches(len(pairs), rollout.micro_batch):  # in the rollout's shape: kernels round by it
        of, samples, steps = torch.tensor([pairs[k] for k in part.tolist()]).T
        rows, of = torch.tensor([here[n] for n in samples.tolist()]), of.to(device)
        mean, std, x_next = gaussian.mean[of], gaussian.std[of], rollout.states[rows, steps + 1].to(device)
        replayed = Steps(
            log_prob(x_next, Gaussian(mean, std, gaussian.x0.detach()[of])), rollout.log_probs[rows.to(device), steps.to(device)],
            advantages.values[samples].to(device), mean, std, (levels[steps] - levels[steps + 1]).abs().to(device),
            x_next - std * torch.stack([noise_of(rollout, *pair) for pair in zip(samples.tolist(), steps.tolist())]).to(device) if objective.old_mean else None)
        loss, outside = objective.losses(replayed, settings.clip_range, high)
        divergence = torch.zeros_like(loss) if reference is None else kl(replayed, reference[of])
        loss = loss + settings.kl_weight * divergence if settings.kl_weight else loss
        total = total + loss[:real].sum()
        seen.append(Seen(*(value[:real].detach() for value in (loss, ratio(replayed), outside, divergence))))
    none = gaussian.mean.new_zeros(0)
    return total, Seen(*(torch.cat(column) for column in zip(*seen))) if seen else Seen(none, none, none, none)
