"""What a run will need of memory, estimated from configurations and the headers of weights; no weight is loaded."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn

from . import headers, policies
from .grpo import optimizers
from .grpo.protocol import Size
from .lora.adapter import LoraSettings
from .lora.full import FullSettings
from .policies import places
from .policies.quantization import KINDS
from .policies.base import Policy
from .runs import prompt_cache

GIB = 2**30
MAIN = " (main memory)"  # what the names of the parts end in that are never on an accelerator
_PER_BLOCK = 17  # numbers kept for each token and channel of a block in training (arXiv 2205.05198, table 2: 34 bytes in 16 bits)


@dataclass(frozen=True)
class Wanted:
    """Of a workflow: what decides about memory."""

    policy: str
    parts: places.Parts
    dtype: str
    lora: LoraSettings | FullSettings
    optimizer: str
    ema: bool
    gradient_checkpointing: bool
    micro_batch: int
    samples: int
    steps: int
    size: Size
    quantized: str = "none"
    prompt_cache: str = "memory"


def estimate(wanted: Wanted) -> dict[str, float]:
    """Bytes by what they are for. Activations are rough: a count of what transformer blocks keep, without the attention's matrices."""
    path, given = policies.find(wanted.policy), wanted.parts.files()
    (module, cls), folders = policies.resolve(path, wanted.parts)
    family = getattr(importlib.import_module(f".policies.{module}", __package__), cls)
    policy = empty(family, folders[0], wanted.dtype)
    bytes_each = torch.finfo(getattr(torch, wanted.dtype)).bits // 8
    encoders = [name for name in places.components(folders[0]) if name.startswith(("text_encoder", "image_encoder"))]
    counts = {name: _count(given[name]) if name in given else _stored(folders[0], name) for name in encoders}
    numbers = sum(map(_numbers, policy.denoisers.values()))
    every = isinstance(wanted.lora, FullSettings)
    trained = numbers if every else lora_numbers(policy, wanted.lora)
    in_training = (2 if wanted.ema else 1) if every and wanted.dtype == "float32" else 3 if wanted.ema else 2  # in float32 the weights themselves are trained
    name = "masters, gradient and average of all weights" if every else "LoRA, its gradient and average"
    state = f"state of {wanted.optimizer}"
    return {
        "weights of the denoiser": numbers * bytes_each - saved(policy, wanted.quantized, bytes_each),
        "weights of the VAE": _numbers(policy.pipeline.vae) * bytes_each,
        "weights of the text encoders (while they encode)": sum(counts.values()) * bytes_each,
        name: trained * 4 * in_training,
        state: trained * optimizers.STATE[wanted.optimizer],
        "trajectories" + MAIN: wanted.samples * wanted.steps * _product(policy.latent_shape(wanted.size)) * 4,
        "activations in training (rough)": activations(policy, wanted) * bytes_each * (2 if policy.classifier_free else 1),
        **({"encoded prompts, at most" + MAIN: float(prompt_cache.IN_MEMORY)} if wanted.prompt_cache == "memory" else {}),
        "state to be saved, former and new" + MAIN: 2 * trained * ((8 if wanted.ema else 4) + optimizers.STATE[wanted.optimizer]),
        **({"the base's own weights" + MAIN: numbers * bytes_each} if every else {}),
    }


def report(wanted: Wanted) -> list[str]:
    """The estimate in lines, the largest first, and what dominates."""
    found = sorted(estimate(wanted).items(), key=lambda item: -item[1])
    on_device = [(what, size) for what, size in found if "text encoders" not in what and not what.endswith(MAIN)]
    lines = [f"{size / GIB:9.3f} GiB  {what}" for what, size in found]
    total, beside = sum(size for _, size in on_device), sum(size for what, size in found if what.endswith(MAIN))
    return [f"memory of {wanted.policy}, {wanted.samples} samples of {wanted.size}, {wanted.steps} steps, an estimate:", *lines,
            f"{beside / GIB:9.3f} GiB  in main memory",
            f"{total / GIB:9.3f} GiB  in training, without the text encoders; {on_device[0][0]} dominate with {on_device[0][1] / total:.0%}"]


def empty(family: type[Policy], folder: Path, dtype: str) -> Policy:
    """The policy without content: its denoisers and VAE on the meta device, its scheduler, and None for what encodes prompts."""
    made: dict[str, object] = {}
    for name, (library, cls) in ((n, places.index(folder)[n]) for n in places.components(folder)):
        component = getattr(importlib.import_module(library), cls, None) if library == "diffusers" else None
        if component is None:
            made[name] = None
        elif issubclass(component, nn.Module):
            with init_empty_weights():
                made[name] = component.from_config(component.load_config(folder / name, local_files_only=True))
        else:
            made[name] = component.from_pretrained(folder / name, local_files_only=True)
    settings = {name: value for name, value in places.index(folder).items() if not name.startswith("_") and not isinstance(value, list)}
    parts, options = family.pipeline_class._get_signature_keys(family.pipeline_class)
    pipeline = family.pipeline_class(**{**dict.fromkeys(parts), **made}, **{name: settings[name] for name in settings.keys() & set(options) - made.keys()})
    return family("", pipeline, getattr(torch, dtype))


def lora_numbers(policy: Policy, settings: LoraSettings) -> int:
    """How many numbers a LoRA of these settings has."""
    targets = re.compile(policy.lora_targets[settings.targets])
    return sum(settings.rank * (m.weight.shape[0] + m.weight[0].numel()) for denoiser in policy.denoisers.values()
               for name, m in denoiser.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and targets.fullmatch(name))


def saved(policy: Policy, quantized: str, bytes_each: int) -> float:
    """Bytes that quantisation saves: of the weights of linear layers."""
    if (kind := KINDS[quantized]) is None:
        return 0.0
    linear = sum(m.weight.numel() for denoiser in policy.denoisers.values() for m in denoiser.modules() if isinstance(m, nn.Linear))
    return linear * (bytes_each - kind.bits / 8)


def activations(policy: Policy, wanted: Wanted) -> float:
    """Numbers that are kept for one backward pass."""
    config, latent = policy.denoiser.config, policy.latent_shape(wanted.size)
    if "block_out_channels" in config:  # a UNet: each level at half the size, on its way down and up
        layers = config["layers_per_block"] if isinstance(config["layers_per_block"], int) else max(config["layers_per_block"])
        pixels = latent[-1] * latent[-2]
        blocks = [pixels / 4**level * channels * (2 * layers + 1) for level, channels in enumerate(config["block_out_channels"])]
        return wanted.micro_batch * (max(blocks) * _PER_BLOCK + sum(blocks) if wanted.gradient_checkpointing else sum(blocks) * _PER_BLOCK)
    patch = _product([config.get("patch_size") or 1] if not isinstance(config.get("patch_size"), (list, tuple)) else config["patch_size"])
    if isinstance(config.get("patch_size"), int) and len(latent) > 2:
        patch **= 2
    tokens = _product(latent) / ((latent[-1] if len(latent) == 2 else latent[0]) * (patch if len(latent) > 2 else 1))
    blocks = sum(len(m) for m in policy.denoiser.children() if isinstance(m, nn.ModuleList))
    width = max(m.in_features for m in policy.denoiser.modules() if isinstance(m, nn.Linear) and m.in_features == m.out_features)
    return wanted.micro_batch * tokens * width * (blocks + _PER_BLOCK if wanted.gradient_checkpointing else blocks * _PER_BLOCK)


def _product(numbers) -> int:
    found = 1
    for number in numbers:
        found *= number
    return found


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _count(file: Path) -> int:
    return sum(stored.count for stored in headers.read(file).values())


def _stored(folder: Path, component: str) -> int:
    """Numbers of a text encoder in its folder; of one within a checkpoint, the folder having none, 0."""
    return sum(_count(file) for file in (folder / component).glob("*.safetensors"))
