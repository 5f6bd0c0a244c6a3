"""What a reward is: a function from pictures (or videos) and prompts to one number each, and how it is called."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import processes
from ..errors import RunError, is_stop
from ..quiet import quiet_loading
from ..workflow.host import host
from .faults import Given, RewardFault, cause, fault, may_pass, out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..grpo.protocol import Rollout

FPS = 8.0  # at which DanceGRPO shows its videos to their reward
FRAME_SCORES = ("mean", "worst")  # of a video's scored frames, what is its score


class RewardFunction(Protocol):
    """One number for each picture; larger is better. One with weights is a `torch.nn.Module`: the host decides where they are."""

    def __call__(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """N pictures [H, W, 3] float32 in 0..1 on the CPU (as one tensor where all are of one size), N prompts; returns [N].

        A prompt that came with a reference picture is a `prompts.Prompt`, which has it. The function of a `Kind` with
        `whole_videos`, or that has such an attribute itself, is given N videos [F, H, W, 3] instead; a picture is then a video of one frame.
        """


@dataclass(frozen=True)
class Source:
    """What a reward is made of. model: a file or a folder, None for a reward without one. base: the folder of the published model
    that the weights were tuned from, which has the configuration and the tokenizer; None for a kind without one. part: of its `Kind`.
    fps: frames a second, of whole videos."""

    model: Path | None = None
    base: Path | None = None
    part: str = ""
    fps: float = FPS


@dataclass(frozen=True)
class Kind:
    """A reward's line in the registry: what can be told of it without loading anything.

    module: in this package, with `load(source: Source) -> RewardFunction`.
    part: which of the numbers that the module gives.
    model_type: of config.json, where it takes a transformers folder. suffixes: of names, where it takes a single file of weights.
    contains: a file's name, where it takes a folder that is known by it.
    base, base_type: the hub id and the model_type of the published model that a single file, or such a folder, leans on.
    base_whole: its weights are needed too, not its configuration and tokenizer alone.
    embedded: the embedded model serves it.
    published: the weights' published name and where they come from, for whoever lacks them.
    whole_videos: scores a video as a whole; others score a video's frames one by one.
    extra, packages: of comfy-dancegrpo, that it needs, and what that installs.
    """

    module: str
    part: str = ""
    model_type: str | None = None
    suffixes: tuple[str, ...] = ()
    contains: str = ""
    base: str = ""
    base_type: str | None = None
    base_whole: bool = False
    embedded: bool = False
    published: str = ""
    whole_videos: bool = False
    extra: str = ""
    packages: tuple[str, ...] = ()

    takes_any = False  # not described here, so that any model will do, or none

    def imported(self) -> Any:
        """What has the `load`."""
        return importlib.import_module(f".{self.module}", __package__)

    def check(self) -> None:
        """Raises `RunError` where `imported`, or its `load`, is known to fail."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise RunError(f'input "reward": found {self.module!r}, which needs {" and ".join(missing)}; pip install "comfy-dancegrpo[{self.extra}]"')

    def state(self) -> str:
        """Differs when what `imported` gives may differ, while the program runs."""
        return ""

    @property
    def has_model(self) -> bool:
        return self.model_type is not None or bool(self.suffixes or self.contains)

    @property
    def accepted(self) -> str:
        """What `model` may be, in words."""
        forms = [f"a transformers folder of model_type {self.model_type!r}"] if self.model_type else []
        forms += [f"a folder with {self.contains}"] if self.contains else []
        return " or ".join(forms + [f"a {suffix} file" for suffix in self.suffixes])


class Deferred:
    """A reward function that is loaded when it is first needed, once."""

    def __init__(self, make: Callable[[], RewardFunction]):
        self._make, self._made, self._lock = make, None, threading.Lock()

    def get(self) -> RewardFunction:
        with self._lock:
            if self._made is None:
                with processes.outside_inference_mode(), quiet_loading():
                    self._made = self._make()
            return self._made

    @property
    def made(self) -> bool:
        return self._made is not None


@dataclass(frozen=True)
class Reward:
    """A reward as it travels on a wire. It is called in batches of `batch_size` pictures.

    frames: of a video that are scored, evenly spread from its first to its last; `frame_score` of them is the video's score.
    device: where it computes ("cuda:1", "cpu"); "" leaves that to the host. waits: of one that another program computes, and that splits what it is
    given itself, how many samples a call has; else 0. at_once: calls of such a one that may be under way. offload: its weights leave the device after each scoring.
    """

    name: str
    function: RewardFunction | Deferred
    batch_size: int = 32
    frames: int = 8
    frame_score: str = "mean"
    whole_videos: bool = False
    device: str = ""
    waits: int = 0
    at_once: int = 1
    offload: bool = False

    @property
    def loaded(self) -> RewardFunction:
        """The function, loaded now where it was not yet."""
        return self.function.get() if isinstance(self.function, Deferred) else self.function

    @property
    def modules(self) -> list[torch.nn.Module]:
        """All that `to` moves; none for a reward without weights."""
        import torch

        return [self.loaded] if isinstance(self.loaded, torch.nn.Module) else []

    def to(self, device: torch.device) -> None:
        """Moves the weights, or where the reward has a device of its own, to that."""
        self.move(self.device or device)

    def move(self, device: torch.device | str) -> None:
        """Moves the weights there, whatever its own device is."""
        with processes.outside_inference_mode():
            for module in self.modules:
                module.to(device)

    def is_beside(self, device: torch.device) -> bool:
        """Whether it has a device of its own, other than this one."""
        import torch

        own = torch.device(self.device or device)
        return own.type != device.type or None not in (own.index, device.index) and own.index != device.index

    def leave(self) -> None:
        """Moves the weights to main memory, until the next `to`; those that are not loaded yet are nowhere."""
        if not isinstance(self.function, Deferred) or self.function.made:
            self.move("cpu")

    def __call__(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """[N] float32, of N pictures [H, W, 3] or videos [F, H, W, 3] in 0..1.

        Raises `RunError` where the function gives a wrong count, or twice fails or gives NaN or infinity; what it was given is then in the run's folder.
        """
        import torch

        if not len(prompts):  # a process that drew none
            return torch.zeros(0)
        host().load(self)
        try:
            return self._scores(pictures, prompts)
        finally:
            self.done()

    def done(self) -> None:
        """It scores nothing more until it is loaded again."""
        if self.offload:
            host().unload(self)

    def _scores(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        import torch

        videos = len(pictures) > 0 and pictures[0].ndim == 4
        if self._whole:
            return self._batches(pictures if videos else [picture[None] for picture in pictures], prompts)
        if videos:
            chosen = [video[spread(len(video), self.frames)] for video in pictures]
            owners = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(frames) for frames in chosen]))
            values = self._batches([frame for frames in chosen for frame in frames], [prompts[i] for i in owners.tolist()])
            of_video = {"mean": torch.mean, "worst": torch.min}[self.frame_score]
            return torch.stack([of_video(values[owners == i]) for i in range(len(chosen))])
        return self._batches(pictures, prompts)

    def of(self, rollout: Rollout, pictures: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """[N] float32 in every process, of all N samples of a rollout, each scored where it was drawn. pictures: in place of this process's own."""
        own = rollout.early.of(self) if pictures is None and rollout.early is not None else None
        if own is None:
            own = self(rollout.pictures if pictures is None else pictures, rollout.own_prompts)
        return processes.gathered(own, rollout.places, rollout.size)

    @property
    def _whole(self) -> bool:
        return self.whole_videos or getattr(self.loaded, "whole_videos", False)

    def piece(self, sample: Tensor) -> int:
        """After how many samples like this one its batches begin anew: scored in such pieces, numbers are the same bit for bit."""
        frames = 1 if sample.ndim == 3 or self._whole else min(len(sample), self.frames)
        return self.waits or self.batch_size // math.gcd(self.batch_size, frames)

    def calls_at_once(self, count: int) -> int:
        """To another program, for so many samples; 0 where it computes here."""
        return min(self.at_once, -(-count // self.waits)) if self.waits else 0

    def _batches(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        import torch

        return torch.cat([self._checked(pictures[i: i + self.batch_size], prompts[i: i + self.batch_size])
                          for i in range(0, len(prompts), self.batch_size)])

    def _checked(self, pictures, prompts: Sequence[str], again: bool = True) -> Tensor:
        """Of one batch. What may pass is tried once more, and where memory was short in halves, each of which may be halved again."""
        import torch

        values = None
        try:
            bad = next((i for i, picture in enumerate(pictures) if not bool(picture.isfinite().all())), None)
            if bad is not None:  # in 8 bits it would be black, and have a score
                raise RewardFault(f"found a picture with NaN or infinite values for the prompt {str(prompts[bad])!r}; accepted: finite numbers "
                                  "(the policy has run away, or its VAE overflows in float16)")
            with torch.no_grad():
                values = torch.as_tensor(self.loaded(pictures, prompts)).detach().float().cpu().reshape(-1)
            if len(values) != len(prompts):
                raise RewardFault(f"found {len(values)} scores for {len(prompts)} pictures")
            if not bool(values.isfinite().all()):
                bad = int((~values.isfinite()).nonzero()[0])
                raise RewardFault(f"found {values[bad].item()} for the prompt {str(prompts[bad])!r}; accepted: finite numbers", may_pass=True)
            return values
        except Exception as error:
            if is_stop(error):
                raise
            if not (again and may_pass(error)):
                given = Given(pictures, prompts, "" if values is None else str(values.tolist()))
                raise fault(self.name, error, given, tries=1 if again else 2) from (None if isinstance(error, RunError) else error)
            short, said = out_of_memory(error), cause(error)
        # only here, without the error, is free what its traceback holds
        host().check_interrupt()
        half = len(prompts) // 2 if short else 0
        host().say(f"reward {self.name!r}: {said}; it is tried again{f' with {half} at once' if half else ''}")
        if short:
            processes.empty_cache()
        if not half:
            return self._checked(pictures, prompts, again=False)
        return torch.cat([self._checked(pictures[at], prompts[at]) for at in (slice(half), slice(half, None))])


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
