"""Adapters on a denoiser, through peft."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from .. import processes
from ..grpo.noise import generator
from ..policies.base import Policy

_names = (f"dancegrpo_{i}" for i in itertools.count())


@dataclass(frozen=True)
class LoraSettings:
    """rank r and alpha (arXiv 2106.09685): the update is alpha / r * B A. targets: a name of the family's `lora_targets`."""

    rank: int = 16
    alpha: float = 16.0
    targets: str = "attention and feed-forward"

    def of_rank(self, rank: int) -> LoraSettings:
        """As strong, of another rank."""
        return replace(self, rank=rank, alpha=self.alpha * rank / self.rank)


@dataclass(frozen=True)
class LoraSnapshot:
    """An adapter's weights at one moment; never changed afterwards.

    tensors: `<denoiser's prefix><module>.lora_A.weight` [r, in] and `<module>.lora_B.weight` [out, r], float32 on the CPU, alpha not folded in.
    layout: of its file (`lora.layouts`). iterations: trained so far. averaged: whether they are the moving average. folder: of the run that made them,
    None where they were loaded from a file. prompts: that it was trained on, as far as known.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    settings: LoraSettings
    policy: str
    layout: str
    iterations: int
    averaged: bool
    folder: Path | None
    prompts: tuple[str, ...] = field(default=(), repr=False)

    def digest(self) -> str:
        """sha256 over the weights and how strong they are."""
        found = hashlib.sha256(repr((self.settings.alpha / self.settings.rank, sorted(self.tensors))).encode())
        for name in sorted(self.tensors):
            found.update(self.tensors[name].contiguous().numpy().tobytes())
        return found.hexdigest()

    @property
    def widest(self) -> int:
        """The largest rank of its modules."""
        return max((len(value) for name, value in self.tensors.items() if ".lora_A." in name), default=1)


class Adapter:
    """A LoRA attached to a policy's denoiser and active there, until `remove`."""

    def __init__(self, policy: Policy, settings: LoraSettings, seed: int = 0):
        if settings.targets not in policy.lora_targets:
            raise ValueError(f"found {settings.targets!r}, accepted: one of {', '.join(map(repr, policy.lora_targets))}")
        self.policy, self.settings, self.name = policy, settings, next(_names)
        self._below = list(policy.denoiser.active_adapters()) if _attached(policy.denoiser) else []
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=policy.lora_targets[settings.targets])
        self.parameters: dict[str, torch.nn.Parameter] = {}
        with processes.outside_inference_mode():
            for prefix, module in policy.denoisers.items():
                module.add_adapter(config, adapter_name=self.name)
                module.set_adapter(self.name)
                self.parameters |= {prefix + name.replace(f".{self.name}.", "."): p
                                    for name, p in module.named_parameters() if f".{self.name}." in name}
            self._initialise(seed)
        for p in self.parameters.values():
            p.requires_grad_(True)

    def _initialise(self, seed: int) -> None:
        """A uniform in +-1 / sqrt(in), B zero (as peft, but keyed by seed and name rather than drawn from the global state)."""
        for name, p in self.parameters.items():
            p.data = p.data.float()
            if ".lora_A." in name:
                bound = p[0].numel() ** -0.5
                p.copy_((torch.rand(p.shape, generator=generator("lora", seed, name)) * 2 - 1) * bound)
            else:
                p.zero_()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Raises `ValueError` when the names and shapes are not exactly the adapter's own."""
        if tensors.keys() != self.parameters.keys():
            odd = sorted(tensors.keys() ^ self.parameters.keys())
            raise ValueError(f"the LoRA does not fit this policy: {len(odd)} names differ, such as {odd[0]!r}")
        for name, value in tensors.items():
            if value.shape != self.parameters[name].shape:
                raise ValueError(f"the LoRA does not fit this policy: {name} is {list(value.shape)} in the one and "
                                 f"{list(self.parameters[name].shape)} in the other")
        with torch.no_grad():
            for name, value in tensors.items():
                self.parameters[name].copy_(value)

    def start_from(self, snapshot: LoraSnapshot) -> None:
        """Takes over another LoRA: the same update of the weights, at this one's rank and alpha.

        Where this rank is larger, what A has more stays random and what B has more zero. Modules that the other has not stay at their
        start. Raises `ValueError` where it has weights that this one has no place for.
        """
        if odd := sorted(snapshot.tensors.keys() - self.parameters.keys()):
            raise ValueError(f"the LoRA to start from does not fit: {len(odd)} of its {len(snapshot.tensors)} weights find no place in "
                             f"{self.settings.targets!r} of {self.policy.name!r}, such as {odd[0]!r}")
        strength = snapshot.settings.alpha / snapshot.settings.rank / (self.settings.alpha / self.settings.rank)
        with torch.no_grad():
            for name, value in snapshot.tensors.items():
                p = self.parameters[name]
                if value.ndim != p.ndim or any(theirs > ours for theirs, ours in zip(value.shape, p.shape)):
                    raise ValueError(f"the LoRA to start from does not fit: {name} is {list(value.shape)}, accepted: at most {list(p.shape)}")
                is_a = ".lora_A." in name
                outer = (value.shape[1:], p.shape[1:]) if is_a else (value.shape[:1], p.shape[:1])
                if outer[0] != outer[1]:
                    raise ValueError(f"the LoRA to start from does not fit: {name} is {list(value.shape)}, of a model of another size; here {list(p.shape)}")
                if is_a:
                    p[:len(value)] = value
                else:
                    p[:, :value.shape[1]] = value * strength

    def remove(self) -> None:
        """Takes the adapter off; the denoiser is then as it was before it was attached."""
        for module in self.policy.denoisers.values():
            if self._below:
                module.delete_adapters(self.name)
                module.set_adapter(self._below)
            else:
                module.unload_lora()


def _attached(module: torch.nn.Module) -> bool:
    return getattr(module, "_hf_peft_config_loaded", False)


@contextlib.contextmanager
def bare(policy: Policy) -> Iterator[None]:
    """The base model alone, while the block runs, also where an adapter is attached (in the middle of a loop)."""
    attached = [module for module in policy.denoisers.values() if _attached(module)]
    for module in attached:
        module.disable_adapters()
    try:
        yield
    finally:
        for module in attached:
            module.enable_adapters()


@contextlib.contextmanager
def applied(policy: Policy, snapshot: LoraSnapshot) -> Iterator[None]:
    """The policy with the snapshot's LoRA, while the block runs. Raises `ValueError` when it is of another policy."""
    adapter = Adapter(policy, snapshot.settings)
    try:
        adapter.load(snapshot.tensors)
        yield
    finally:
        adapter.remove()
