"""Optimizer steps on a scored rollout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import processes, sharding
from .forward import micro_batches
from .forward_process import Forward
from .learner import Learner
from .objectives import OBJECTIVES
from .pairs import Pair, Pairs, Seen, by_input, shares
from .protocol import Advantages, CallCount
from .reverse_process import Reverse


class StaleRollout(ValueError):
    """The rollout was sampled from another version of the policy than the one to be updated."""


class NotFinite(ArithmeticError):
    """Losses or gradients of more optimizer steps in a row than may be skipped are NaN or infinite; the policy was not changed by them."""


@dataclass(frozen=True)
class UpdateSettings:
    """clip_range: how far the objective's ratio may fall below 1 and, where clip_range_high is 0, rise above it; else that is how far. train_fraction: share
    of the trainable transitions that is trained, drawn anew for each sample. optimizer_steps: per rollout, each on its own share of the transitions.
    max_grad_norm: of the whole gradient. max_skipped_steps: how many optimizer steps in a row may be left out because their loss or gradient is NaN or
    infinite. objective: one of `objectives.OBJECTIVES`; kl_weight: of KL to the reference policy, added to it. nft_beta: of `diffusion_nft`."""

    clip_range: float = 1e-4
    train_fraction: float = 0.6
    optimizer_steps: int = 1
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 3
    objective: str = "clipped"
    clip_range_high: float = 0.0
    kl_weight: float = 0.0
    nft_beta: float = 1.0


@dataclass(frozen=True)
class UpdateStats:
    """What an update did. ratio_deviation: largest |rho - 1| over the transitions of the first optimizer step (0 if none).
    clip_fraction: of the transitions whose ratio left the objective's range. approx_kl: to the policy that sampled them; reference_kl: mean KL to the
    reference policy, None where it was not asked for. Of an objective of the forward process transitions are noised samples, the ratio is what it takes
    for one (1 where it takes none), and reference_kl the mean square of what the outputs differ by. skipped_steps: optimizer steps whose loss or gradient
    was no number; nothing else here is of them, but for finite ratios of the first."""

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


def update(learner: Learner, advantages: Advantages, settings: UpdateSettings,
           tick: Callable[[int, int], None] = lambda done, total: None) -> UpdateStats:
    """Trains the learner's policy on a scored rollout (arXiv 2505.07818, algorithm 1).

    Each optimizer step accumulates the gradient of the objective's mean over its (sample, step) pairs, in micro-batches of
    the rollout's shape: each process over the samples that it drew, in as many calls as any other, and the sum over the processes is what
    is stepped along.
    `tick(pairs done, pairs in all)`, of this process, is called after each; it may raise to stop.

    Raises:
        StaleRollout: the rollout is of another version of the policy. NotFinite: too many steps in a row whose loss or gradient is not a number.
        ValueError: the rollout has no noise and the objective needs some, the objective is not for this kind of policy, or there is no reference to take KL to.
    """
    rollout, start = advantages.scores.rollout, time.perf_counter()
    if rollout.version != learner.version:
        raise StaleRollout(f"the rollout was sampled from version {rollout.version[1]} of {rollout.version[0]!r}, "
                           f"and the policy is at version {learner.version[1]} of {learner.version[0]!r}")
    objective = OBJECTIVES[settings.objective]
    if not objective.forward and not bool(rollout.noisy[:, :-1].any()):
        raise ValueError("the rollout has no noise, so it has no log-probabilities to train on: "
                         "sample with a stochastic transition, eta above 0 and at least 2 steps, or take an objective that needs none: "
                         + ", ".join(repr(o.name) for o in OBJECTIVES.values() if o.forward))
    if learner.policy.process not in objective.processes:
        raise ValueError(f'input "objective": found {settings.objective!r}, accepted for this policy ({learner.policy.process}): '
                         + ", ".join(repr(o.name) for o in OBJECTIVES.values() if learner.policy.process in o.processes))
    if settings.kl_weight and learner.reference is None:
        raise ValueError(f'input "kl_weight": found {settings.kl_weight}, accepted here: 0, since there is no reference policy')
    process, calls = _process(advantages, settings), CallCount()
    parts = shares(process.rollout, advantages.trained, settings)
    own = [by_input(process.rollout, [(n, t) for n, t in pairs if n in process.here]) for pairs in parts]
    micro_batches_of = [max(column) for column in zip(*processes.all_of([-(-len(served) // rollout.micro_batch) for served in own]))]
    total, done = sum(len(pairs) for served in own for pairs in served), 0
    seen, norms, skipped = [[] for _ in parts], [], set()
    learner.zero_grad()  # of an update that was interrupted
    with torch.inference_mode(False), torch.enable_grad():
        for k in range(1, len(own) if objective.forward else 0):
            for pairs, output in _outputs(learner, process, parts[k], own[k], micro_batches_of[k], calls):
                process.remember(pairs, output)
                tick(0, total)
        for k, served in enumerate(own):
            references = []
            if settings.kl_weight:  # of all its calls, since it may take a move of all weights; and before those whose weights a backward pass needs
                with learner.reference():
                    for _, output in _outputs(learner, process, parts[k], served, micro_batches_of[k], calls):
                        references.append(output.cpu())
                        tick(done, total)
            for of_call in _accumulate(learner, process, parts[k], served, micro_batches_of[k], calls, references, k > 0):
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


def _process(advantages: Advantages, settings: UpdateSettings) -> Pairs:
    """As the objective takes them."""
    return Forward(advantages, settings) if OBJECTIVES[settings.objective].forward else Reverse(advantages, settings)


def _micro_batches(pairs: Pairs, share: list[Pair], served: list[list[Pair]], calls_of_all: int) -> Iterator[tuple[list[Pair], int, list[list[Pair]]]]:
    """The denoiser calls of an optimizer step: a pair for each input, real ones, and what the real inputs serve.

    share: the pairs of all processes. served: this process's, by the input that serves them. calls_of_all: micro-batches that every process makes, where
    it needs fewer with rows that count nothing.
    """
    inputs = [of_input[0] for of_input in served] or [(min(pairs.here, default=0), share[0][1])]
    for part, real in micro_batches(len(served), pairs.rollout.micro_batch, calls_of_all):
        yield [inputs[k] for k in part.tolist()], real, served[int(part[0]):][:real]


@torch.no_grad()
def _outputs(learner: Learner, pairs: Pairs, share: list[Pair], served: list[list[Pair]], calls_of_all: int,
             calls: CallCount) -> Iterator[tuple[list[Pair], Tensor]]:
    """What the policy says now, without gradient: of each denoiser call of `_micro_batches` its real inputs, and the output of all."""
    for inputs, real, _ in _micro_batches(pairs, share, served, calls_of_all):
        yield inputs[:real], pairs.predict(learner.policy, pairs.given(inputs), calls, real)[0]


def _accumulate(learner: Learner, pairs: Pairs, share: list[Pair], served: list[list[Pair]], calls_of_all: int, calls: CallCount,
                references: list[Tensor], moved: bool) -> Iterator[Seen]:
    """Adds this process's part of the gradient of the mean loss over `share`; yields what was seen of the pairs served, by micro-batch.

    The rest as of `_micro_batches`. references: of each call what the reference policy says, or none at all. moved: whether the policy has moved since
    the rollout, so that a clip may hold.
    """
    for k, (inputs, real, of_call) in enumerate(_micro_batches(pairs, share, served, calls_of_all)):
        output, rest = pairs.predict(learner.policy, pairs.given(inputs), calls, real)
        leaf = output.detach().requires_grad_()
        loss, seen = pairs.losses(leaf, rest, references[k].to(output.device) if references else None, of_call)
        gradient, = torch.autograd.grad(loss / len(share), leaf)
        if moved and not processes.sharded() and not bool(gradient.any()):  # the clip has silenced all of them
            calls.spared(len(inputs))
        else:
            output.backward(gradient)
        yield seen
