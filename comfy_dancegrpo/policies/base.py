"""What all model families share. A family subclasses `Policy`; the algorithm sees it as `grpo.protocol.Denoiser`."""

from __future__ import annotations

import abc
import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL.Image import Image
from torch import Tensor

from .. import context, embedded, processes, sharding
from ..errors import RunError
from ..grpo.protocol import NEGATIVE, Conditioning, SamplingPlan, Size, TimeGrid
from ..workflow.host import host
from . import places

_DTYPE_ARGUMENT = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
_ENCODERS = ("text_encoder", "image_encoder")  # what the names of their components begin with


class Policy(abc.ABC):
    """A loaded base model, its weights frozen. A family implements `encode`, `latent_shape`, `denoise` and `decode`.

    name: as the workflow names it. process: "flow" or "diffusion". classifier_free: whether guidance is a second call without
    the prompt (and not an input of the model), with `negative_text`. lora_targets: choices of modules that take a LoRA, by name, as
    regular expressions. lora_layout: the key names of its LoRA files, one of `lora.layouts`. load_options: more for the pipeline's `from_pretrained`.
    diffusers_from: the first version that calls its model as we do. needs_picture: whether every prompt must have one.
    context_parallel: whether its tokens may be spread over processes (`context`), which diffusers must have a plan for. may_lack: components that
    its pipeline draws without, though it does not say so itself.
    """

    process = "flow"
    classifier_free = False
    negative_text = ""
    lora_layout = "diffusers"
    lora_targets: dict[str, str]
    pipeline_class: type
    load_options: dict = {}
    diffusers_from = "0.35"
    needs_picture = False
    context_parallel = False
    may_lack: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()  # the folders and files that it was loaded from
    prompt_cache = "memory"
    quantized = "none"  # how the denoisers are, one of quantization.KINDS
    compiled = False  # whether the blocks of the denoisers are (`kernels.compile_blocks`)
    full = None  # lora.full.FullWeights, while all weights are in training

    def __init__(self, name: str, pipeline, dtype: torch.dtype):
        self.name, self.pipeline, self.dtype = name, pipeline, dtype
        for module in self.modules:
            module.requires_grad_(False).eval()
        vae = getattr(pipeline, "vae", None)
        if vae is not None and not any(p.ndim == 5 for p in vae.parameters()):
            vae.to(memory_format=torch.channels_last)  # convolutions of pictures are a quarter faster on a CPU, and faster in half precision elsewhere

    @classmethod
    def load(cls, name: str, folder: Path, dtype: str, **components) -> Policy:
        """From a diffusers folder; safetensors only, nothing is downloaded. components: take the place of the folder's own.

        Raises `RunError` for a folder that was saved without a part that its pipeline cannot do without.
        """
        with processes.outside_inference_mode():
            torch_dtype = getattr(torch, dtype)
            without = dict.fromkeys(set(cls.may_lack) - set(places.components(folder)))
            options = cls.load_options | without | embedded.shared(folder, torch_dtype) | components
            needed = set(cls.pipeline_class._get_signature_keys(cls.pipeline_class)[0]) - set(cls.pipeline_class._optional_components)
            if lacking := sorted(needed - options.keys() - set(places.components(folder))):
                raise RunError(f'input "policy": found {folder / places.INDEX} without {", ".join(lacking)}, accepted: a diffusers folder with all parts of its pipeline')
            pipeline = from_folder(cls.pipeline_class, folder, torch_dtype, variant=places.variant(folder, options), **options)
            pipeline.set_progress_bar_config(disable=True)
            policy = cls(name, pipeline, torch_dtype)
            sharding.shard(policy)  # before a whole denoiser is on a device
            context.split(policy)
        host().load(policy)
        return policy

    def to(self, device: torch.device) -> None:
        """Moves the weights, adapters among them; every parameter stays the object that it is, so that optimizers keep theirs."""
        with processes.outside_inference_mode():
            for module in self.modules:  # each by itself: a quantised one may have been loaded onto the accelerator before the others
                if (device.type == "cpu" or module not in self.encoders) and any(p.device != device for p in module.parameters()):
                    module.to(device)

    def leave(self) -> None:
        """Moves the weights to main memory, until the next `to`."""
        self.to(torch.device("cpu"))

    @property
    def encoders(self) -> list[torch.nn.Module]:
        """What encodes prompts and nothing else: it is on an accelerator only while it does."""
        return [m for name, m in self.pipeline.components.items() if name.startswith(_ENCODERS) and isinstance(m, torch.nn.Module)]

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """The encoders are on the policy's device while the block runs, also a block around others."""
        outer, self._encoding = getattr(self, "_encoding", False), True
        try:
            if not outer:
                self._move_encoders(self.device)
            yield
        finally:
            self._encoding = outer
            if not outer:
                self._move_encoders(torch.device("cpu"))

    def _move_encoders(self, device: torch.device) -> None:
        with processes.outside_inference_mode():
            for module in self.encoders:
                module.to(device)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """All that `to` moves."""
        return [m for m in self.pipeline.components.values() if isinstance(m, torch.nn.Module)]

    @property
    def denoiser(self) -> torch.nn.Module:
        """The module that is trained through, or the first of them."""
        return self.pipeline.transformer

    @property
    def denoisers(self) -> dict[str, torch.nn.Module]:
        """Every module that is trained through, by what is put before its parameters' names."""
        return {"": self.denoiser}

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def checkpoint_gradients(self, on: bool) -> None:
        """Whether training keeps the denoiser's activations, or computes them again: the same gradient for less memory."""
        for module in self.denoisers.values():
            module.enable_gradient_checkpointing() if on else module.disable_gradient_checkpointing()

    # -- prompts ----------------------------------------------------------------------------------------------------
    def check(self, prompts: Sequence[str]) -> None:
        """Raises `RunError`, before any is encoded, where the family cannot take the prompts of one call: one lacks the picture that it needs."""
        for prompt in prompts:
            if self.needs_picture and getattr(prompt, "picture", None) is None:
                reference(prompt, self.name)

    @abc.abstractmethod
    def encode(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        """What the denoiser needs of each prompt: tensors [P, ...]; those of texts of varying length have it in dimension 1.

        A prompt may be a `prompts.Prompt` with a reference picture.
        """

    def encode_negative(self, prompts: list[str], size: Size) -> dict[str, Tensor]:
        """The same for the side that guidance leads away from: `negative_text`, beside the same reference picture."""
        text = self.negative_text
        return self.encode([prompt.with_text(text) if hasattr(prompt, "with_text") else text for prompt in prompts], size)

    def picture(self, prompt: str, size: Size) -> Image:
        """The prompt's reference picture as the pipeline is given it, RGB. Raises `RunError` when it has none."""
        return reference(prompt, self.name)

    def condition(self, prompts: list[str], size: Size) -> Conditioning:
        """Both sides of guidance for each prompt, one row a prompt."""
        with self.encoding():
            tensors = self.encode(prompts, size)
            if self.classifier_free:
                tensors = {**tensors, **{NEGATIVE + name: value for name, value in self.encode_negative(prompts, size).items()}}
        return Conditioning(tensors)

    def pipeline_for(self, prompt: str):
        """The pipeline of diffusers that draws such a prompt."""
        return self.pipeline

    def takes(self, prompt: str) -> Mapping[str, inspect.Parameter]:
        """What that pipeline may be called with, by name."""
        return inspect.signature(self.pipeline_for(prompt).__call__).parameters

    def unseen(self, prompts: Sequence[str]) -> str | None:
        """A line about the prompts whose reference pictures this policy does not see; None where there are none."""
        pictured = [prompt for prompt in prompts if getattr(prompt, "picture", None) is not None]
        if not pictured or "image" in self.takes(pictured[0]):
            return None
        return f"{self.name!r} sees no pictures: those of {len(pictured)} of {len(prompts)} prompts are ignored, and their texts alone count"

    def pipeline_options(self) -> dict:
        """What the pipeline itself must be called with besides, to draw as `encode` and `denoise` do."""
        return {}

    # -- the time grid ----------------------------------------------------------------------------------------------
    def time_grid(self, steps: int, shift: float, size: Size) -> TimeGrid:
        """Sigmas of `steps` steps. With a shift s, linspace(1, 0, T + 1) shifted by s t / (1 + (s - 1) t) (arXiv 2403.03206,
        eq. 23); 0 takes the family's own scheduler as its configuration says."""
        if shift:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=self.device)
        else:
            scheduler = self.own_schedule(steps, size)
        return TimeGrid(levels=scheduler.sigmas.to(self.device), timesteps=scheduler.timesteps.to(self.device))

    def own_schedule(self, steps: int, size: Size):
        """The family's scheduler, its timesteps set as its pipeline sets them."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def schedule_by_tokens(self, steps: int, tokens: int):
        """The same for pipelines that give linspace(1, 1 / T, T), and mu for the number of latent tokens, to their schedulers."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=dynamic_shift(scheduler, tokens), device=self.device)
        return scheduler

    # -- pictures ---------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Of one sample. Raises `ValueError` when the family cannot make pictures of that size."""

    def patch(self, frames: int = 1) -> int:
        """Pixels along an edge of the smallest sample that the family makes: the period of a grid that its patches or its decoder may leave."""
        for pixels in range(1, 129):
            with contextlib.suppress(ValueError):
                self.latent_shape(Size(pixels, pixels, frames))
                return pixels
        raise ValueError("the family makes no sample of up to 128x128 pixels")

    @abc.abstractmethod
    def denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Tensor], plan: SamplingPlan) -> Tensor:
        """One call of the model on one side of guidance: latents [B, ...], timesteps [B], tensors with B rows; returns [B, ...].

        The velocity noise - data of a flow, epsilon of a diffusion.
        """

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, plan: SamplingPlan) -> Tensor:
        """As `Denoiser.predict`: with guidance where the family is guided by a second call and the scale is above 1."""
        wanted = torch.is_grad_enabled()
        with torch.set_grad_enabled(wanted or self.compiled):  # torch compiles one function with a gradient, and without it another, which rounds otherwise
            found = self._predict(latents, timesteps, conditioning, plan)
        return found if wanted else found.detach()

    def _predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, plan: SamplingPlan) -> Tensor:
        positive = self.denoise(latents, timesteps, conditioning.positive, plan).to(latents.dtype)
        if not self.guided(plan):
            return positive
        negative = self.denoise(latents, timesteps, conditioning.negative, plan).to(latents.dtype)
        return self.guide(positive, negative, self.guidance_of(timesteps, plan))  # in float32: the difference of two half-precision outputs is all rounding

    def guided(self, plan: SamplingPlan) -> bool:
        return self.classifier_free and plan.guidance_scale > 1

    def guidance_of(self, timesteps: Tensor, plan: SamplingPlan) -> float | Tensor:
        """The scale at timesteps [B]: one, or [B, 1, ...]."""
        return plan.guidance_scale

    def guide_low_noise(self, scale: float) -> None:
        """Gives a second expert, that of low noise, a guidance of its own. Raises `RunError` where there is none."""
        raise RunError(f'input "guidance_scale_2": found {scale}, accepted by {self.name!r}: 0, since it has one expert')

    def guide(self, positive: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598, in the form of diffusers: scale 1 is none)."""
        return negative + scale * (positive - negative)

    @abc.abstractmethod
    def decode(self, latents: Tensor, plan: SamplingPlan) -> Tensor:
        """As `Denoiser.decode`."""


MIXED = "found prompts with a picture beside prompts without, accepted: a picture for every prompt, or for none"


def all_or_none(prompts: Sequence[str]) -> None:
    """Raises `RunError` where some of the prompts have a picture and others have none."""
    if len({getattr(prompt, "picture", None) is None for prompt in prompts}) > 1:
        raise RunError(MIXED)


def from_folder(pipeline_class: type, folder: Path, dtype: torch.dtype, **options):
    """A pipeline of diffusers, from safetensors on this machine alone."""
    return pipeline_class.from_pretrained(folder, local_files_only=True, use_safetensors=True, **{_DTYPE_ARGUMENT: dtype}, **options)


def dynamic_shift(scheduler, tokens: int, max_shift: float = 1.15) -> float:
    """mu of a scheduler that shifts by size: linear in the number of latent tokens. max_shift: where its configuration has none."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # other families' pipelines hold copies of it

    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": max_shift}
    return calculate_shift(tokens, *(scheduler.config.get(name, value) for name, value in defaults.items()))


def multiple_of(size: Size, pixels: int, frames: int | None = None) -> None:
    """Raises `ValueError` unless height and width are multiples of `pixels`, and frames one more than a multiple of `frames`.

    frames: None of a family of pictures, which have one.
    """
    wrong = size.frames != 1 if frames is None else (size.frames - 1) % frames
    if size.height % pixels or size.width % pixels or wrong:
        more = f", {frames} n + 1 frames" if frames else " in one frame" if wrong else ""
        raise ValueError(f"found {size}, accepted: multiples of {pixels}{more}")


def pictures(pixels: Tensor) -> Tensor:
    """A VAE's output in -1..1, [B, 3, H, W] or [B, 3, F, H, W], as [B, H, W, 3] or, of more frames than one, [B, F, H, W, 3]
    float32 in 0..1."""
    shown = (pixels.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    return shown[:, 0] if shown.ndim == 5 and shown.shape[1] == 1 else shown


def reference(prompt: str, policy: str) -> Image:
    """The prompt's picture, RGB. Raises `RunError` when it has none."""
    if getattr(prompt, "picture", None) is None:
        raise RunError(f"found the prompt {str(prompt)!r} without a picture, accepted by {policy!r}: prompts with one each "
                       '(a .jsonl file of {"prompt": ..., "image": "path"})')
    return prompt.picture.image()
