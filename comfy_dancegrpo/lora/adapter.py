"""Adapters on a denoiser, through peft; what trains all its weights has the same methods (`lora.full`)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from .. import processes
from ..grpo.noise import generator
from ..policies.base import Policy
from . import ALL_WEIGHTS

_names = (f"dancegrpo_{i}" for i in itertools.count())


@dataclass(frozen=True)
class LoraSettings:
    """rank r and alpha (arXiv 2106.09685): the update is alpha / r * B A. targets: a name of the family's `lora_targets`."""

    rank: int = 16
    alpha: float = 16.0
    targets: str = "attention and feed-forward"

    def starting_from(self, snapshot) -> LoraSettings:
        """With room for another LoRA, as strong. Raises `ValueError` for what is none."""
        if not isinstance(snapshot, LoraSnapshot):
            raise ValueError(f"a LoRA on {self.targets!r} cannot start from weights of a full fine-tuning, accepted: a LoRA; or \"lora_targets\" "
                             f"{ALL_WEIGHTS!r}, or those weights as the policy")
        rank = max(self.rank, snapshot.widest)
        return replace(self, rank=rank, alpha=self.alpha * rank / self.rank)

    def attach(self, policy: Policy, seed: int = 0) -> Adapter:
        return Adapter(policy, self, seed)


@dataclass(frozen=True)
class LoraSnapshot:
    """An adapter's weights at one moment; never changed afterwards.

    tensors: `<denoiser's prefix><module>.lora_A.weight` [r, in] and `<module>.lora_B.weight` [out, r], float32 on the CPU, alpha not folded in.
    layout: of its file (`lora.layouts`). iterations: trained so far. averaged: whether they are the moving average. folder: of the run that made them,
    None where they were loaded from a file. prompts: that it was trained on, as far as known. source: the file that they were loaded from.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    settings: LoraSettings
    policy: str
    layout: str
    iterations: int
    averaged: bool
    folder: Path | None
    prompts: tuple[str, ...] = field(default=(), repr=False)
    source: Path | None = None
    kind = "LoRA"  # what it is called in a line

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

    @contextlib.contextmanager
    def on(self, policy: Policy) -> Iterator[None]:
        """The policy with this LoRA, while the block runs. Raises `ValueError` when it is of another policy."""
        with _base_weights(policy):
            adapter = Adapter(policy, self.settings)
            try:
                adapter.load(self.tensors)
                yield
            finally:
                adapter.remove()


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
            try:
                for prefix, module in policy.denoisers.items():
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")  # of merging into quantised weights, which is not done
                        module.add_adapter(config, adapter_name=self.name)
                    module.set_adapter(self.name)
                    self.parameters |= {prefix + name.replace(f".{self.name}.", "."): p
                                        for name, p in module.named_parameters() if f".{self.name}." in name}
            except BaseException:
                self.remove()  # from those that have it, or a part of it
                raise
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

        What the other leaves free (modules, ranks) stays at its start: A random and B zero, for with both zero nothing would ever be
        learned there. Raises `ValueError` where it has weights that this one has no place for.
        """
        strength = snapshot.settings.alpha / snapshot.settings.rank / (self.settings.alpha / self.settings.rank)
        pairs = {name: (a, snapshot.tensors[name.replace(".lora_A.", ".lora_B.")]) for name, a in snapshot.tensors.items() if ".lora_A." in name}
        used = {name: a.flatten(1).any(1) & b.flatten(2).any(2).any(0) if b.ndim > 2 else a.any(1) & b.any(0) for name, (a, b) in pairs.items()}
        pairs = {name: pair for name, pair in pairs.items() if used[name].any()}
        if odd := sorted(pairs.keys() - self.parameters.keys()):
            raise ValueError(f"the LoRA to start from does not fit: {len(odd)} of its {len(pairs)} layers find no place in "
                             f"{self.settings.targets!r} of {self.policy.name!r}, such as {odd[0]!r}")
        with torch.no_grad():
            for name, (a, b) in pairs.items():
                ours, theirs = self.parameters[name], self.parameters[name.replace(".lora_A.", ".lora_B.")]
                a, b = a[used[name]].to(ours.device), b[:, used[name]].to(ours.device)
                if (a.shape[1:], b.shape[:1], b.shape[2:]) != (ours.shape[1:], theirs.shape[:1], theirs.shape[2:]) or len(a) > len(ours):
                    raise ValueError(f"the LoRA to start from does not fit: {name} is {list(a.shape)} with lora_B {list(b.shape)}, "
                                     f"accepted: {list(ours.shape)} with {list(theirs.shape)}")
                ours[:len(a)] = a
                theirs[:, :len(a)] = b * strength

    def written(self) -> None:
        """Nothing: `parameters` are what the denoiser computes with."""

    def snapshot(self, tensors: dict[str, Tensor], iterations: int, averaged: bool, folder: Path | None, prompts: tuple[str, ...]) -> LoraSnapshot:
        """Of these values of `parameters`."""
        return LoraSnapshot(tensors, self.settings, self.policy.name, self.policy.lora_layout, iterations, averaged, folder, prompts)

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


def _base_weights(policy: Policy) -> contextlib.AbstractContextManager:
    """The base model's own, while the block runs, also where all weights are in training."""
    return contextlib.nullcontext() if policy.full is None else policy.full.aside()


@contextlib.contextmanager
def bare(policy: Policy) -> Iterator[None]:
    """The base model alone, while the block runs, also in the middle of a loop."""
    attached = [module for module in policy.denoisers.values() if _attached(module)]
    for module in attached:
        module.disable_adapters()
    try:
        with _base_weights(policy):
            yield
    finally:
        for module in attached:
            module.enable_adapters()


def applied(policy: Policy, snapshot) -> contextlib.AbstractContextManager:
    """The policy with the snapshot's LoRA, or with all its weights, while the block runs. Raises `ValueError` when it is of another policy."""
    return snapshot.on(policy)
