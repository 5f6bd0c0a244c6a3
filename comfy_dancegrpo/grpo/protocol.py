"""What the algorithm asks of a policy, and the values that pass between its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


NEGATIVE = "negative."


@dataclass(frozen=True)
class Size:
    """Of a sample, in pixels. frames: 1 for a picture."""

    height: int
    width: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f" pixels in {self.frames} frames" if self.frames > 1 else " pixels")


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: each tensor is [P, ...], one row a prompt.

    Those whose names begin with "negative." are what classifier-free guidance leads away from.
    """

    tensors: dict[str, Tensor]

    @classmethod
    def join(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts in order. Where they differ in length (their second dimension), short ones end in zeros."""
        return cls({name: _stacked([part.tensors[name] for part in parts]) for name in parts[0].tensors})

    @property
    def positive(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.tensors.items() if not name.startswith(NEGATIVE)}

    @property
    def negative(self) -> dict[str, Tensor]:
        """Without the "negative." of their names."""
        return {name.removeprefix(NEGATIVE): value for name, value in self.tensors.items() if name.startswith(NEGATIVE)}

    def rows(self, index: Tensor) -> Conditioning:
        """The rows of `index` [B] int64, in that order."""
        return Conditioning({name: value[index] for name, value in self.tensors.items()})


def _stacked(rows: list[Tensor]) -> Tensor:
    if rows[0].ndim < 2 or len({row.shape[1] for row in rows}) == 1:
        return torch.cat(rows)
    length = max(row.shape[1] for row in rows)
    return torch.cat([torch.cat([row, row.new_zeros(len(row), length - row.shape[1], *row.shape[2:])], 1) for row in rows])


@dataclass(frozen=True)
class TimeGrid:
    """The noise levels of a sampling run.

    levels: [T + 1] float; for flows sigma from 1 to 0, for diffusion the cumulative product alpha_bar from noise to 1.
    timesteps: [T] float, what the denoiser is told at each level but the last.
    """

    levels: Tensor
    timesteps: Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def levels_at(self, timesteps: Tensor) -> Tensor:
        """[B]: the level at each of `timesteps` [B], which are some of the grid's."""
        return self.levels[(self.timesteps == timesteps[:, None]).int().argmax(1)]


class Denoiser(Protocol):
    """A model family as the algorithm sees it."""

    process: str
    """"flow" (predict gives the velocity noise - data) or "diffusion" (predict gives epsilon)."""

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, plan: SamplingPlan) -> Tensor:
        """One denoiser call. latents [B, ...] float32, timesteps [B], conditioning with B rows; returns [B, ...] float32."""

    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        """Pictures [B, H, W, 3], or with more frames than one videos [B, F, H, W, 3], float32 in 0..1, from latents [B, ...]."""


@dataclass
class CallCount:
    """Denoiser calls in samples: `forward` without and `backward` with gradient; `padded` of them were padding."""

    forward: int = 0
    backward: int = 0
    padded: int = 0

    def add(self, samples: int, real: int, backward: bool) -> None:
        if backward:
            self.backward += samples
        else:
            self.forward += samples
        self.padded += samples - real

    def spared(self, samples: int) -> None:
        """The backward half of a call that was counted with it."""
        self.backward -= samples
        self.forward += samples

    def __add__(self, other: CallCount) -> CallCount:
        return CallCount(self.forward + other.forward, self.backward + other.backward, self.padded + other.padded)


@dataclass(frozen=True)
class SamplingPlan:
    """How trajectories are sampled, and replayed alike. ode_solver: one of `ode_solvers.ODE_SOLVERS`, after a group's last step with noise."""

    grid: TimeGrid
    transition: str = "dance_sde"
    eta: float = 0.3
    guidance_scale: float = 3.5
    size: Size = Size(512, 512)
    ode_solver: str = "euler"


@dataclass(frozen=True)
class Rollout:
    """One iteration's samples, N of them in P groups, of which a process draws n and knows what all are.

    prompts: N texts. groups: [N] int64, the group (prompt slot) of each sample. indices: [N] int64, its place in the group.
    places: [n] int64 ascending, which of the N were drawn here (all, with one process). order: in which Update takes the N. conditioning: P rows.
    noisy: [P, T] bool, which steps had noise. common: [P] int64, how many of the first steps had one input for the whole group, and so one
    denoiser call: up to the first with noise, where the group began from one noise.
    states: [n, T, ...] float32 on the CPU, the latents before each step; latents: [n, ...], those that were decoded. log_probs: [n, T - 1] float32,
    of the transitions that may be trained (all but the last), 0 where there was no noise. pictures: [n, H, W, 3] (videos [n, F, H, W, 3])
    float32, 0..1, on the CPU; every_picture: those of all N, in the first process; None in the others. version: of the policy that it was sampled from.
    iteration: from 0.
    early: the scores that rewards gave while it was drawn (`rewards.early.Early`), where there are such.
    history: of each reward, what an estimator of advantages remembers of former iterations (`estimators.REMEMBERING`).
    over_the_run: of (input, start, end), where this iteration is between them (`LivePolicy.over_the_run`); outside a run at the start.
    """

    prompts: tuple[str, ...]
    groups: Tensor
    indices: Tensor
    places: Tensor
    order: tuple[int, ...]
    noisy: Tensor
    common: Tensor
    conditioning: Conditioning
    plan: SamplingPlan
    states: Tensor
    latents: Tensor
    log_probs: Tensor
    pictures: Tensor
    every_picture: Tensor | None
    version: tuple[str, int]
    seed: int
    iteration: int
    micro_batch: int
    calls: CallCount = field(compare=False)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    early: Any = field(default=None, compare=False, repr=False)
    history: Mapping[str, dict[str, list[float]]] = field(default_factory=dict, compare=False, repr=False)
    over_the_run: Callable[[str, float, float], float] = field(default=lambda input, start, end: start, compare=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.prompts)

    @property
    def own_prompts(self) -> tuple[str, ...]:
        """Of the n samples that were drawn here."""
        return tuple(self.prompts[n] for n in self.places.tolist())


@dataclass(frozen=True)
class Column:
    """The scores of a rollout by one reward.

    raw: [N] float32, as the reward gave them; people are shown these. adjusted: [N] float32, what is trained on in their place.
    """

    name: str
    weight: float
    raw: Tensor
    adjusted: Tensor | None = None

    @property
    def used(self) -> Tensor:
        return self.raw if self.adjusted is None else self.adjusted


@dataclass(frozen=True)
class Scores:
    """The scores of a rollout, a column a reward."""

    rollout: Rollout
    columns: tuple[Column, ...]
    seconds: float = 0.0

    @property
    def total(self) -> Tensor:
        """[N] float32: the weighted sum of the raw scores, as people are shown it; `advantages.combine` says what training takes."""
        return sum(column.weight * column.raw for column in self.columns)


@dataclass(frozen=True)
class Advantages:
    """values: [N] float32. flat: [P] bool, the groups without spread, which train nothing. trained: [N] bool, the samples that do.
    history: the rollout's, with these scores, where an advantage is taken from them; else None. below_threshold: how many samples do not train because
    their advantage is too near to 0."""

    scores: Scores
    values: Tensor
    flat: Tensor
    trained: Tensor
    history: Mapping[str, dict[str, list[float]]] | None = None
    below_threshold: int = 0


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
