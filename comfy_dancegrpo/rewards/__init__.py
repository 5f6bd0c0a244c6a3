"""Rewards: one file each, and one line here. Importing this package imports none of them."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .. import processes
from ..errors import RunError
from ..quiet import quiet_loading
from ..workflow.host import host

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REWARDS: dict[str, tuple[str, str | None]] = {
    # name -> (module with `load(folder) -> RewardFunction`, the `model_type` of its model's config.json; None: it has no model)
    "clip_score": ("clip_score", "clip"),
    "shapes_agreement": ("shapes_agreement", None),
}
EMBEDDED = "embedded"


class RewardFunction(Protocol):
    """One number for each picture; larger is better. One with weights is a `torch.nn.Module`: the host decides where they are."""

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """pictures [N, H, W, 3] float32 in 0..1, N prompts; returns [N] float32 on the CPU."""


@dataclass(frozen=True)
class Reward:
    """A loaded reward, as it travels on a wire. It is called in batches of `batch_size` pictures.

    frames: of a video that are scored, evenly spread from its first to its last; the video's score is their mean.
    """

    name: str
    function: RewardFunction
    batch_size: int = 32
    frames: int = 8

    @property
    def modules(self) -> list[torch.nn.Module]:
        """All that `to` moves; none for a reward without weights."""
        import torch

        return [self.function] if isinstance(self.function, torch.nn.Module) else []

    def to(self, device: torch.device) -> None:
        """Moves the weights."""
        with processes.outside_inference_mode():
            for module in self.modules:
                module.to(device)

    def __call__(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """[N] float32, of N pictures [H, W, 3] or videos [F, H, W, 3] in 0..1.

        Raises `RunError` on a wrong count, and on NaN or infinity with the prompt that got it.
        """
        import torch

        host().load(self)
        if len(pictures) and pictures[0].ndim == 4:
            chosen = [video[spread(len(video), self.frames)] for video in pictures]
            owners = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(frames) for frames in chosen]))
            values = self._batches([frame for frames in chosen for frame in frames], [prompts[i] for i in owners.tolist()])
            return torch.stack([values[owners == i].mean() for i in range(len(chosen))])
        return self._batches(pictures, prompts)

    def _batches(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        import torch

        return torch.cat([self._checked(pictures[i: i + self.batch_size], prompts[i: i + self.batch_size])
                          for i in range(0, len(prompts), self.batch_size)])

    def _checked(self, pictures, prompts: Sequence[str]) -> Tensor:
        import torch

        values = torch.as_tensor(self.function(pictures, prompts)).detach().float().cpu().reshape(-1)
        if len(values) != len(prompts):
            raise RunError(f"reward {self.name!r}: found {len(values)} scores for {len(prompts)} pictures")
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).nonzero()[0])
            raise RunError(f"reward {self.name!r}: found {values[bad].item()} for the prompt {prompts[bad]!r}; "
                           "accepted: finite numbers")
        return values


def spread(count: int, most: int) -> list[int]:
    """At most `most` places in 0..count - 1, evenly spread, the first and the last among them; of one the middle."""
    if most == 1:
        return [count // 2]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)] if count > most else list(range(count))


def distinct(name: str, taken: Collection[str]) -> str:
    """The name, or name_2, name_3 … where it is taken: two CLIP scores by different models are told apart."""
    if name not in taken:
        return name
    return next(f"{name}_{k}" for k in itertools.count(2) if f"{name}_{k}" not in taken)


def available_models() -> list[str]:
    """Names that a reward's `model` may take: the embedded one, and what lies in `reward_models`."""
    return [EMBEDDED, *host().list_models("reward_models")]


def find_model(name: str) -> Path:
    """Raises `RunError` naming the folders searched."""
    if name == EMBEDDED:
        from ..embedded import REWARD
        return REWARD
    if path := host().find_model("reward_models", name):
        return path
    searched = ", ".join(map(str, host().model_folders("reward_models")))
    raise RunError(f'input "model": found {name!r}, which is in none of the folders searched ({searched})')


def _folder(name: str, model: str) -> Path | None:
    """The folder of a reward's model, None for a reward without one. Raises `RunError` when it is missing or of another kind."""
    wanted = REWARDS[name][1]
    if wanted is None:
        return None
    folder = find_model(model)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != wanted:
        raise RunError(f'input "model": found {folder} (model_type {found!r}), accepted for {name}: a transformers folder of model_type {wanted!r}')
    return folder


def problem(name: str, model: str) -> str | None:
    """Why `load` would fail, in one line, found without loading anything; None when it would not."""
    try:
        _folder(name, model)
    except RunError as error:
        return str(error)
    return None


def load(name: str, model: str = EMBEDDED, batch_size: int = 32) -> Reward:
    """Raises `RunError` where `problem` names one, `KeyError` on a name that is not in `REWARDS`."""
    with quiet_loading():
        module = importlib.import_module(f".{REWARDS[name][0]}", __name__)
        return Reward(name, module.load(_folder(name, model)), batch_size)
