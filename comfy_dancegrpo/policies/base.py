"""What all model families share. A family subclasses `Policy`; the algorithm sees it as `grpo.protocol.Denoiser`."""

from __future__ import annotations

import abc
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from .. import processes
from ..grpo.protocol import Conditioning, SamplingPlan, TimeGrid
from ..workflow.host import host

_DTYPE_ARGUMENT = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"


class Policy(abc.ABC):
    """A loaded base model, its weights frozen.

    name: as the workflow names it. denoiser: the module that is trained through. lora_prefix: put before the denoiser's
    module names in a saved LoRA. lora_targets: choices of modules that take a LoRA, by name, as regular expressions.
    """

    process = "flow"
    lora_prefix = "transformer."
    lora_targets: dict[str, str]
    pipeline_class: type

    def __init__(self, name: str, pipeline, dtype: torch.dtype):
        self.name, self.pipeline, self.dtype = name, pipeline, dtype
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()

    @classmethod
    def load(cls, name: str, folder: Path, dtype: str) -> Policy:
        """From a diffusers folder; safetensors only, nothing is downloaded."""
        with processes.outside_inference_mode():
            torch_dtype = getattr(torch, dtype)
            pipeline = cls.pipeline_class.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, **{_DTYPE_ARGUMENT: torch_dtype})
            pipeline.set_progress_bar_config(disable=True)
            policy = cls(name, pipeline, torch_dtype)
        host().load(policy)
        return policy

    def to(self, device: torch.device) -> None:
        """Moves the weights, adapters among them; every parameter stays the object that it is, so that optimizers keep theirs."""
        if device != self.device:
            with processes.outside_inference_mode():
                self.pipeline.to(device)

    @property
    def denoiser(self) -> torch.nn.Module:
        return self.pipeline.transformer

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @abc.abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Conditioning with one row a prompt."""

    @abc.abstractmethod
    def time_grid(self, steps: int, shift: float, height: int, width: int) -> TimeGrid:
        """From the family's own scheduler; shift 0 keeps what its configuration says."""

    @abc.abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Of one sample. Raises `ValueError` when the family cannot make pictures of that size."""

    @abc.abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, plan: SamplingPlan) -> Tensor:
        """As `Denoiser.predict`."""

    @abc.abstractmethod
    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        """As `Denoiser.decode`."""
