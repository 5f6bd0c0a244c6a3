"""The policy in training: its trainable parameters, optimizer and moving average."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import processes, sharding
from . import optimizers
from .protocol import Denoiser
from .schedules import share

_SLOT, _REST = "optimizer.", "optimizer"  # names in a state: of what is kept for a parameter, and of the rest
_REMEMBERED = ("history", "curriculum")  # a learner's own, of JSON


@dataclass(frozen=True)
class OptimizerSettings:
    """name: of the optimizer, one of `optimizers.OPTIMIZERS`. ema_decay: of the parameters' moving average, once an optimizer step; 0 turns it off.
    warmup: iterations over which the learning rate rises linearly to its full value; 0 begins with that. schedule: what it does then,
    one of `schedules.SCHEDULES`; length: of the run, in iterations; cycles, power and rules: of those that have them."""

    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    ema_decay: float = 0.0
    warmup: int = 0
    schedule: str = "constant"
    name: str = "adamw"
    length: int = 0
    cycles: int = 1
    power: float = 1.0
    rules: str = "1"


class Learner:
    """Holds the live policy. `version` (run, count of iterations trained) tells which rollouts are its own.

    written: called whenever the values of `parameters` have changed, where they are masters of what the policy computes with.
    reference: a context in which the policy is what it was before it was trained, where KL to that is asked for.
    """

    def __init__(self, policy: Denoiser, parameters: dict[str, torch.nn.Parameter], settings: OptimizerSettings, run: str,
                 written: Callable[[], None] = lambda: None, reference: Callable[[], contextlib.AbstractContextManager] | None = None):
        if not parameters:
            raise ValueError("there is nothing to train: no parameter was given")
        self.policy, self.parameters, self.settings, self._written, self.reference = policy, parameters, settings, written, reference
        self.version = (run, 0)
        self.skipped = 0  # optimizer steps in a row, up to now, that were left out
        self.history: Mapping[str, dict] = {}  # `Rollout.history` of the next rollout
        self.curriculum: Mapping[str, Any] = {}  # which prompts come next (`runs.prompt_order`)
        self.optimizer = optimizers.make(settings.name, parameters.values(), settings)
        self.ema = {name: p.detach().clone() for name, p in parameters.items()} if settings.ema_decay else None

    @property
    def learning_rate(self) -> float:
        """Of the iteration that is being trained: a function of its number (and of some schedules the run's length) alone, so that a run may be resumed."""
        s = self.settings
        return s.learning_rate * share(s.schedule, self.version[1] + 1, s.warmup, s.length, s.cycles, s.power, s.rules, s.learning_rate)

    def clip_grad_norm(self, limit: float) -> float:
        """Scales the gradient to at most `limit` in norm; returns the norm before."""
        return sharding.number(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def optimizer_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self._written()
        self.zero_grad()
        if self.ema is not None:
            for name, p in self.parameters.items():
                self.ema[name].lerp_(p, 1 - self.settings.ema_decay)

    def finish_iteration(self) -> None:
        """The policy has moved on: rollouts sampled before are stale from now on."""
        self.version = (self.version[0], self.version[1] + 1)

    def weights(self, averaged: bool = True) -> dict[str, Tensor]:
        """Copies of the trained tensors, float32 on the CPU: the moving average where it is on and asked for. Of sharded ones the first process's alone."""
        source = self.ema if averaged and self.ema is not None else self.parameters
        return _known({name: sharding.whole(value.float()) for name, value in source.items()})

    @contextlib.contextmanager
    def holding(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """The policy with these values of `parameters` while the block runs; and then with its own, bit for bit."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._put(weights)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            sharding.put(p, weights.get(name))
        self._written()

    # -- checkpoints ------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """Everything that the next iteration depends on, as one flat dictionary of tensors, in the first process; all must call it.

        The others have what `result` takes of it, and of what is sharded nothing: on one machine so many copies of a whole model would not fit.
        """
        values = {f"parameters.{name}": p for name, p in self.parameters.items()} | {f"ema.{name}": value for name, value in (self.ema or {}).items()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.state_dict()["param_groups"]]
        numbers: dict[str, dict] = {}  # what an optimizer keeps beside tensors, such as a count of its steps
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    values[f"{_SLOT}{key}.{name}"] = value
                else:
                    numbers.setdefault(name, {})[key] = value
        taken = self._result if not processes.is_first() else ""
        tensors = {name: sharding.whole(value) for name, value in values.items() if name.startswith(taken) or sharding.is_part(value)}
        tensors[_REST] = _packed({"groups": groups, "numbers": numbers})
        tensors["version"], tensors["skipped"] = torch.tensor(self.version[1]), torch.tensor(self.skipped)
        tensors |= {name: _packed(value) for name in _REMEMBERED if (value := getattr(self, name))}
        return _known(tensors)

    def result(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a state is saved and evaluated as, by parameter, float32: the moving average where it is on."""
        return {name.removeprefix(self._result): value.float() for name, value in state.items() if name.startswith(self._result)}

    @property
    def _result(self) -> str:
        return "ema." if self.ema is not None else "parameters."

    def strayed(self) -> list[int]:
        """The processes whose parameters are not the first's, bit for bit; those in parts are left out, and all must call it."""
        if processes.count() == 1:
            return []
        sums = processes.all_of([_bits(p) for p in self.parameters.values() if not sharding.is_part(p)])
        return [rank for rank, of_one in enumerate(sums) if of_one != sums[0]]

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, of the first process's; what others have is passed over. Raises `KeyError` when a parameter is missing from it."""
        slots: dict[str, dict] = {name: {} for name in self.parameters}
        shapes = processes.broadcast({name: value.shape for name, value in tensors.items()})

        def get(name: str, target: Tensor) -> Tensor | None:
            """As `target` is, of the same shape."""
            if name not in shapes:
                raise KeyError(name)
            value = tensors.get(name) if processes.is_first() else None
            return sharding.like(value, target) if sharding.is_part(target) and shapes[name] == target.shape else processes.broadcast(value)

        for name in shapes:
            if name.startswith(_SLOT):
                key, _, parameter = name.removeprefix(_SLOT).partition(".")
                slots[parameter][key] = get(name, self.parameters[parameter]).clone()
        state = self.optimizer.state_dict()
        if _REST in shapes:  # a checkpoint of an older version has none
            rest = processes.broadcast(_unpacked(tensors[_REST]) if processes.is_first() else None)
            for group, saved in zip(state["param_groups"], rest["groups"]):
                group |= {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items() if key != optimizers.FUSED}  # of this device
            for parameter, values in rest["numbers"].items():
                slots[parameter] |= values
        state["state"] = {i: slots[name] for i, name in enumerate(self.parameters) if slots[name]}
        self.optimizer.load_state_dict(state)
        for name, p in self.parameters.items():
            p.copy_(get(f"parameters.{name}", p))
            if self.ema is not None:
                self.ema[name].copy_(get(f"ema.{name}", p))
        self._written()
        self.version = (self.version[0], int(get("version", torch.tensor(0))))
        self.skipped = int(get("skipped", torch.tensor(0))) if "skipped" in shapes else 0
        for name in _REMEMBERED:
            setattr(self, name, processes.broadcast(_unpacked(tensors[name]) if processes.is_first() else None) if name in shapes else {})


def _known(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Without those that another process has."""
    return {name: value for name, value in tensors.items() if value is not None}


def _bits(tensor: Tensor) -> tuple[int, int]:
    """Of its numbers, as the integers that their bits are: the sum, and that of the squares, for changes may add up to nothing in the one."""
    bits = tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).long()
    return int(bits.sum()), int(bits.square().sum())


def _packed(value: Mapping) -> Tensor:
    """JSON as bytes: a checkpoint holds tensors alone, and Python writes its floats so that they read the same."""
    return torch.tensor(list(json.dumps(value, default=float).encode()), dtype=torch.uint8)


def _unpacked(tensor: Tensor) -> dict:
    return json.loads(bytes(tensor.tolist()))
