"""(sample, step) pairs: what an update trains of a rollout, and in which optimizer step."""

from __future__ import annotations

import abc
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .noise import generator
from .noise_steps import whole_groups
from .objectives import OBJECTIVES
from .protocol import Advantages, CallCount, Denoiser, Rollout

if TYPE_CHECKING:
    from .update import UpdateSettings

Pair = tuple[int, int]
"""(sample, step)."""


class Seen(NamedTuple):
    """Of pairs that were trained, detached [pairs] each: the losses, ratios, whether the objective's ratio left its range, and KL to the reference (or 0)."""

    losses: Tensor
    ratios: Tensor
    outside: Tensor
    kl: Tensor


class Pairs(abc.ABC):
    """The pairs of a rollout as an objective takes them: what the denoiser is given for them, and what is minimised.

    rollout: which steps may be trained (`noisy`), and have one input for a group (`common`). here: by sample, the rows of the rollout's own tensors.
    """

    def __init__(self, advantages: Advantages, settings: UpdateSettings):
        self.advantages, self.settings, self.rollout = advantages, settings, advantages.scores.rollout
        self.objective, self.high = OBJECTIVES[settings.objective], settings.clip_range_high or settings.clip_range
        self.here = {n: row for row, n in enumerate(self.rollout.places.tolist())}
        self.device = self.rollout.plan.grid.levels.device

    def own(self, tensor: Tensor) -> Tensor:
        """[n, ...], of the samples of this process; of one that has none a row of zeros, that stands in."""
        return tensor if self.here else tensor.new_zeros(1, *tensor.shape[1:])

    def indices(self, pairs: list[Pair]) -> tuple[Tensor, Tensor, Tensor]:
        """(samples, steps, rows in `own`) [B] int64, on the CPU."""
        samples, steps = torch.tensor(pairs).T
        return samples, steps, torch.tensor([self.here.get(n, 0) for n in samples.tolist()])

    @abc.abstractmethod
    def given(self, pairs: list[Pair]) -> Any:
        """The inputs of a denoiser call that serves B pairs."""

    @abc.abstractmethod
    def predict(self, policy: Denoiser, given: Any, calls: CallCount, real: int) -> tuple[Tensor, Any]:
        """The call: what losses and their gradients are of [B, ...], and what else they need of it. real: how many of the rows are not padding."""

    @abc.abstractmethod
    def losses(self, output: Tensor, rest: Any, reference: Tensor | None, served: list[list[Pair]]) -> tuple[Tensor, Seen]:
        """The sum of the losses of the pairs that the real rows of a call serve, and what was seen of them. reference: as `output`, of the reference policy."""


def chosen_transitions(rollout: Rollout, sample: int, fraction: float) -> list[int]:
    """The steps trained for one sample, ascending: a share of those of 0..T-2 that had noise (the last is never trained), keyed by the sample."""
    group = int(rollout.groups[sample])
    trainable = rollout.noisy[group, :-1].nonzero()[:, 0]
    count = max(1, round(fraction * len(trainable)))
    source = generator("transitions", rollout.seed, rollout.iteration, group, int(rollout.indices[sample]))
    return sorted(trainable[torch.randperm(len(trainable), generator=source)[:count]].tolist())


def input_of(rollout: Rollout, pair: Pair) -> tuple[str, int, int]:
    """What the denoiser is given to train a pair; equal for those that one call serves."""
    sample, t = pair
    group = int(rollout.groups[sample])
    return ("group", group, t) if t < rollout.common[group] else ("sample", sample, t)


def by_input(rollout: Rollout, pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs that each input of the denoiser serves."""
    served: dict[tuple[str, int, int], list[Pair]] = {}
    for pair in pairs:
        served.setdefault(input_of(rollout, pair), []).append(pair)
    return list(served.values())


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
