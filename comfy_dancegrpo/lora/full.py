"""Full fine-tuning: all weights of a policy's denoisers are trained themselves, in place of a LoRA."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from .. import processes, sharding
from ..atomic import replacing
from ..errors import RunError
from ..policies import quantization
from ..policies.base import Policy
from . import ALL_WEIGHTS
from .adapter import Adapter, LoraSettings, LoraSnapshot, bare

_WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers names a component's file


@dataclass(frozen=True)
class FullSettings:
    """As `LoraSettings`, of a training of all weights."""

    targets: str = ALL_WEIGHTS

    def attach(self, policy: Policy, seed: int = 0) -> FullWeights:
        return FullWeights(policy, self)

    def starting_from(self, snapshot: LoraSnapshot | FullSnapshot) -> FullSettings:
        return self


def settings(rank: int, alpha: float, targets: str) -> LoraSettings | FullSettings:
    """Of what Loop Start's inputs ask for."""
    return FullSettings() if targets == ALL_WEIGHTS else LoraSettings(rank, alpha, targets)


@dataclass(frozen=True)
class FullSnapshot:
    """The denoisers' weights at one moment; never changed afterwards. As `LoraSnapshot`, and in its place wherever one is taken.

    tensors: `<denoiser's prefix><name>`, all of its state, in the policy's own dtypes on the CPU. components: of each prefix the component's name in
    a diffusers folder, and its config.json.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    settings: FullSettings
    policy: str
    components: dict[str, tuple[str, str]] = field(repr=False)
    iterations: int
    averaged: bool
    folder: Path | None
    prompts: tuple[str, ...] = field(default=(), repr=False)
    source: Path | None = None
    kind = "weights"

    def digest(self) -> str:
        """sha256 over the weights; of sharded ones the first process's count, and all must call it."""
        return processes.on_first(self._digest) if processes.sharded() else self._digest()

    def _digest(self) -> str:
        found = hashlib.sha256(repr(sorted(self.tensors)).encode())
        for name in sorted(self.tensors):
            found.update(self.tensors[name].reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    @contextlib.contextmanager
    def on(self, policy: Policy) -> Iterator[None]:
        """The policy with these weights, while the block runs. Raises `ValueError` when they are of another policy."""
        with bare(policy), swapped(policy, self.tensors):
            yield

    def parts(self) -> list[dict[str, Tensor]]:
        """The state of each denoiser, in diffusers' names; of two experts that of high noise first."""
        return [self._own(prefix) for prefix in self.components]

    def _own(self, prefix: str) -> dict[str, Tensor]:
        others = tuple(other for other in self.components if other and other != prefix)
        return {name.removeprefix(prefix): value.contiguous() for name, value in self.tensors.items() if name.startswith(prefix) and not name.startswith(others)}

    def save(self, folder: Path, metadata: dict[str, str]) -> list[Path]:
        """Writes `folder/<component>` for each denoiser, as diffusers' `from_pretrained` reads it; returns the files of weights."""
        return [self._save(prefix, folder / component, config, metadata) for prefix, (component, config) in self.components.items()]

    def _save(self, prefix: str, folder: Path, config: str, metadata: dict[str, str]) -> Path:
        with replacing(folder / "config.json") as beside:
            beside.write_text(config, encoding="utf-8")
        with replacing(folder / _WEIGHTS) as beside:
            save_file(self._own(prefix), beside, metadata=metadata)
        return folder / _WEIGHTS


class FullWeights:
    """All weights of a policy's denoisers in training, until `remove` brings the base's back. Used as an `Adapter` is.

    parameters: float32. They are the denoiser's own where those are float32; of others they are masters, whose gradient is accumulated in float32
    and which `written` rounds into the denoiser: it computes in its own dtype, as it does without.
    """

    def __init__(self, policy: Policy, settings: FullSettings):
        if policy.full is not None:
            raise ValueError(f"all weights of {policy.name!r} are in training already, accepted: one training of them at a time")
        if policy.quantized != quantization.NONE:
            raise ValueError(f"the weights of {policy.name!r} are quantised ({policy.quantized}), and cannot be trained themselves; accepted: a LoRA, "
                             'or Load Policy\'s "quantization" none')
        self.policy, self.settings = policy, settings
        self._live = weights(policy)
        with processes.outside_inference_mode():
            self._base = _copies(self._live)
            self.parameters = {name: p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float()) for name, p in self._live.items()}
        self._fixed = {name: value.detach().to("cpu", copy=True) for name, value in _state(policy).items() if name not in self._live}
        self._masters = {name: p for name, p in self.parameters.items() if p is not self._live[name]}
        self._train(True)
        self._hooks = [self._live[name].register_post_accumulate_grad_hook(_gradient_to(master)) for name, master in self._masters.items()]
        try:
            sharding.trains(policy.denoisers.values())
        except RunError:
            self._train(False)
            raise
        policy.full = self

    def _train(self, on: bool) -> None:
        for p in self._live.values():
            p.requires_grad_(on)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Raises `ValueError` when the names and shapes are not exactly the denoisers' own; what is fixed in them is passed over."""
        _copy({name: value for name, value in tensors.items() if name not in self._fixed}, self.parameters)
        self.written()

    @torch.no_grad()
    def written(self) -> None:
        """Brings changed `parameters` into the denoisers."""
        for name, master in self._masters.items():
            self._live[name].copy_(master)

    def start_from(self, snapshot: LoraSnapshot | FullSnapshot) -> None:
        """Takes over other weights, or merges a LoRA into them. Raises `ValueError` where it is of another policy."""
        if isinstance(snapshot, FullSnapshot):
            return self.load(snapshot.tensors)
        with torch.no_grad():
            for name, change in _changes(self.policy, snapshot).items():
                self.parameters[name].add_(sharding.like(change, self.parameters[name]))
        self._train(True)  # peft has frozen all
        self.written()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """The base's weights, while the block runs."""
        try:
            with _restoring(self._live):
                with processes.outside_inference_mode():
                    _back(self._base, self._live)
                yield
        finally:
            self._train(True)  # a LoRA that was attached meanwhile has frozen them

    def snapshot(self, tensors: dict[str, Tensor], iterations: int, averaged: bool, folder: Path | None, prompts: tuple[str, ...]) -> FullSnapshot:
        """Of these values of `parameters`; of sharded ones the first process's alone have any."""
        own = {name: value.to(self._base[name].dtype) for name, value in tensors.items()}
        return FullSnapshot(own | self._fixed, self.settings, self.policy.name, _components(self.policy), iterations, averaged, folder, prompts)

    def remove(self) -> None:
        """The denoisers are then as they were before."""
        with processes.outside_inference_mode():
            _back(self._base, self._live)
        for hook in self._hooks:
            hook.remove()
        self._train(False)
        for p in self._live.values():
            p.grad = None
        self.policy.full = None


def _gradient_to(master: torch.nn.Parameter):
    """A hook that adds a parameter's gradient to its master's, in float32: a sum of many micro-batches has no room in half precision."""
    def move(p: torch.nn.Parameter) -> None:
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad.add_(p.grad)
        p.grad = None
    return move


# -- a policy's weights by name -----------------------------------------------------------------------------------------------
def _own_name(name: str) -> str:
    """Also where peft has wrapped the module that it belongs to."""
    return name.replace(".base_layer.", ".")


def weights(policy: Policy) -> dict[str, torch.nn.Parameter]:
    """The parameters of the denoisers, without those of adapters: `<denoiser's prefix><name>`."""
    return {prefix + _own_name(name): p for prefix, module in policy.denoisers.items() for name, p in module.named_parameters() if ".lora_" not in name}


def _state(policy: Policy) -> dict[str, Tensor]:
    """The same with what else belongs to the denoisers' state, such as tables of positions."""
    return {prefix + _own_name(name): value for prefix, module in policy.denoisers.items() for name, value in module.state_dict().items()
            if ".lora_" not in name}


def _copies(live: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU; of what is sharded this process's part."""
    return {name: sharding.own(p).to("cpu", copy=True) for name, p in live.items()}


def _back(copies: dict[str, Tensor], live: dict[str, Tensor]) -> None:
    for name, p in live.items():
        sharding.own(p).copy_(copies[name])


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    if any(map(sharding.is_part, target.values())):  # the first process's weights count, and the others may have none
        processes.on_first(lambda: _check(source, target))
    else:
        _check(source, target)
    for name, value in target.items():
        sharding.put(value, source.get(name))


def _check(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    if odd := sorted(source.keys() ^ target.keys()):
        raise ValueError(f"the weights do not fit this policy: {len(odd)} names differ, such as {odd[0]!r}")
    for name, value in source.items():
        if value.shape != target[name].shape:
            raise ValueError(f"the weights do not fit this policy: {name} is {list(value.shape)} in the one and {list(target[name].shape)} in the other")


@contextlib.contextmanager
def _restoring(live: dict[str, Tensor]) -> Iterator[None]:
    """The parameters are afterwards what they were before."""
    with processes.outside_inference_mode():
        kept = _copies(live)
    try:
        yield
    finally:
        with processes.outside_inference_mode():
            _back(kept, live)


@contextlib.contextmanager
def swapped(policy: Policy, tensors: dict[str, Tensor]) -> Iterator[None]:
    """The denoisers with these weights while the block runs; what else the tensors hold is passed over. Raises `ValueError` where they do not fit."""
    live = weights(policy)
    fixed = _state(policy).keys() - live.keys()
    with _restoring(live):
        with processes.outside_inference_mode():
            _copy({name: value for name, value in tensors.items() if name not in fixed}, live)
        yield


def _changes(policy: Policy, snapshot: LoraSnapshot) -> dict[str, Tensor]:
    """What a LoRA adds to each weight, float32."""
    adapter = Adapter(policy, snapshot.settings)
    try:
        adapter.load(snapshot.tensors)
        return {f"{prefix}{name}.weight": layer.get_delta_weight(adapter.name) for prefix, module in policy.denoisers.items()
                for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer) and adapter.name in layer.r}
    finally:
        adapter.remove()


def _components(policy: Policy) -> dict[str, tuple[str, str]]:
    """Of each denoiser's prefix, the component's name and its configuration, without where it was loaded from."""
    names = {id(module): name for name, module in policy.pipeline.components.items()}
    found = {}
    for prefix, module in policy.denoisers.items():
        config = {key: value for key, value in json.loads(module.to_json_string()).items() if key != "_name_or_path"}
        found[prefix] = names[id(module)], json.dumps(config, indent=2, sort_keys=True) + "\n"
    return found
