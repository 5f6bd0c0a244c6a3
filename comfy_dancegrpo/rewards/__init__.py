"""Rewards: one file each, and one line here. Importing this package imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import RunError
from ..workflow.host import host

if TYPE_CHECKING:
    from torch import Tensor

REWARDS: dict[str, str] = {
    # name -> module; the module has `load(folder: Path | None, device) -> RewardFunction` and NEEDS_MODEL
    "clip_score": "clip_score",
    "shapes_agreement": "shapes_agreement",
}
EMBEDDED = "embedded"


class RewardFunction(Protocol):
    """One number for each picture; larger is better."""

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """pictures [N, H, W, 3] float32 in 0..1, N prompts; returns [N] float32 on the CPU."""


@dataclass(frozen=True)
class Reward:
    """A loaded reward, as it travels on a wire. It is called in batches of `batch_size` pictures."""

    name: str
    function: RewardFunction
    batch_size: int = 32

    def __call__(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """[N] float32. Raises `RunError` on a wrong count, and on NaN or infinity with the prompt that got it."""
        import torch

        parts = [self._checked(pictures[i: i + self.batch_size], prompts[i: i + self.batch_size])
                 for i in range(0, len(prompts), self.batch_size)]
        return torch.cat(parts)

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


def load(name: str, model: str = EMBEDDED, batch_size: int = 32) -> Reward:
    """Raises `RunError` when the model is missing, `KeyError` on a name that is not in `REWARDS`."""
    module = importlib.import_module(f".{REWARDS[name]}", __name__)
    folder = find_model(model) if module.NEEDS_MODEL else None
    return Reward(name, module.load(folder), batch_size)
