"""What a denoiser does, seen from outside: hooks on its module and on the parameters in training."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


class Clock:
    """Marks in time: on a GPU events in its stream, which cost no wait; elsewhere seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self):
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def seconds(self, spans: Iterable[tuple]) -> float:
        self.now()
        return sum(a.elapsed_time(b) / 1000 if self._device.type == "cuda" else b - a for a, b in spans)


@dataclass
class Seen:
    """calls: samples in each call of the denoiser's forward. backward: samples in each of those that a backward pass went through."""

    calls: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)
    spans: list[tuple] = field(default_factory=list, repr=False)


class Probe:
    """Counts and times calls of the denoisers while it is entered; `take` gives what was seen since it was last asked.

    The backward pass of a call begins when its output is given a gradient, and has ended when the last parameter has its own.
    """

    def __init__(self, denoisers: Iterable[torch.nn.Module], parameters: Iterable[Tensor], clock: Clock) -> None:
        self._denoisers, self._parameters, self._clock = list(denoisers), list(parameters), clock
        self._seen, self._began, self._ended, self._start = Seen(), None, None, None

    def __enter__(self) -> Probe:
        self._hooks = [p.register_post_accumulate_grad_hook(self._accumulated) for p in self._parameters]
        for module in self._denoisers:
            self._hooks += [module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after, with_kwargs=True)]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> Seen:
        self._end_backward()
        found, self._seen = self._seen, Seen()
        return found

    def _before(self, module, arguments) -> None:
        self._end_backward()
        self._start = self._clock.mark()

    def _after(self, module, arguments, named, output) -> None:
        self._seen.spans.append((self._start, self._clock.mark()))
        samples = len(next(v for v in (*arguments, named.get("hidden_states")) if isinstance(v, Tensor)))
        self._seen.calls.append(samples)
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(lambda gradient: self._backward(samples))

    def _backward(self, samples: int) -> None:
        self._seen.backward.append(samples)
        self._began = self._began or self._clock.mark()

    def _accumulated(self, parameter: Tensor) -> None:
        self._ended = self._clock.mark()

    def _end_backward(self) -> None:
        if self._began is not None and self._ended is not None:
            self._seen.spans.append((self._began, self._ended))
        self._began = self._ended = None


class PeakMemory:
    """The largest amount of memory since `reset`, in bytes: the device's, or this process's main memory; None where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif (path := Path("/proc/self/clear_refs")).exists():
            path.write_text("5")  # proc(5): sets VmHWM to what is resident now

    def read(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not (path := Path("/proc/self/status")).exists():
            return None
        return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith("VmHWM"))
