"""The run's micro-batch, found by trial: the most rows for which a denoiser call with its backward pass, and a decode, fit into memory.

accelerate's `find_executable_batch_size` has the idea: try, and where memory runs out take fewer. Here what lies between the last size that did not fit and the
first that did is searched too, among sizes whose kernels round a row alike at every place in the batch (DESIGN, rule 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from .. import processes
from ..errors import OutOfMemory
from . import optimizers
from .forward import step
from .learner import Learner
from .noise import generator
from .protocol import CallCount, Conditioning
from .rollout import Work, decoded

BY_TRIAL = 0  # the micro-batch that asks for it
ON_CPU = 32  # rows of a call get no cheaper beyond it
SPARE = 16  # of an accelerator's memory this part is left free, for rewards and for what fragments
MAIN_MEMORY = 2  # of the free main memory this part may be kept for a backward pass


class Found(NamedTuple):
    """size: rows of a call. too_many: the smallest that was tried and did not fit, 0 where the most that are of use did."""

    size: int
    too_many: int = 0

    def __str__(self) -> str:
        why = f"{self.too_many} did not fit into memory" if self.too_many else "more are of no use here"
        return f"micro-batch {self.size}, found by trial ({why}); this run keeps it"


def problem(size: int) -> str | None:
    """The line about processes that cannot search; None where they can."""
    if size == BY_TRIAL and (processes.sharded() or processes.team_size() > 1):
        return ('input "micro_batch": found 0, accepted where processes share the weights or the tokens of a sample: 1 or more, since one that ran out of memory by '
                "itself in a trial would leave the others waiting")
    return None


def sizes(most: int) -> list[int]:
    """Ascending: those up to `most` that are exact; 1 is always there."""
    return [1, *(n for n in (4, *range(8, most + 1, 8)) if n <= most)]


def largest(candidates: Sequence[int], fits: Callable[[int], bool]) -> tuple[int, int]:
    """Of ascending candidates the largest that fits (0: none), and the smallest that was found not to (0: none); tried from the last on, by halves."""
    least, most, k = -1, len(candidates), len(candidates) - 1  # known to fit, known not to, and what is tried
    while least + 1 < most:
        if fits(candidates[k]):
            least = k
            k = (least + most) // 2
        else:
            most = k
            half = max((j for j in range(k) if candidates[j] <= candidates[k] // 2), default=0)
            k = half if least < 0 else (least + most) // 2
    return candidates[least] if least >= 0 else 0, candidates[most] if most < len(candidates) else 0


def of_use(work: Work) -> int:
    """Rows of a call that are not all padding: the samples that a process draws; where a group trains by one input, its groups."""
    groups = work.request.groups[work.places]
    return max(1, *processes.all_of(len(groups.unique()) if work.whole_groups else len(groups)))


def find(learner: Learner, work: Work, conditioning: Conditioning) -> Found:
    """The micro-batch of a run whose first rollout is to be this work; the same in every process. Nothing of the learner changes, nor any random stream.

    conditioning: P rows. Raises `OutOfMemory`, one line, where not even one row fits.
    """
    most = of_use(work)
    if work.plan.grid.levels.device.type == "cpu":
        most = min(most, ON_CPU, *processes.all_of(_in_main_memory(learner, work, conditioning)))

    def fits(size: int) -> bool:
        processes.check_interrupt()
        enough = _suffices(lambda: _try(learner, work, conditioning, size))
        learner.zero_grad()
        processes.empty_cache()  # after the error, which holds what the call had made
        return not processes.any_of(not enough)

    size, too_many = largest(sizes(most), fits)
    if not size:
        raise OutOfMemory("memory does not suffice to train on one sample at a time; accepted: Loop Start's \"gradient_checkpointing\", Load Policy's "
                          "\"quantization\" or a smaller dtype, or smaller pictures")
    return Found(size, too_many)


def _suffices(call: Callable[[], object]) -> bool:
    """Whether memory does for it."""
    try:
        call()
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and not should_reduce_batch_size(error):
            raise
        return False
    return True


def _call(learner: Learner, work: Work, conditioning: Conditioning, size: int) -> Tensor:
    """The latents [size, ...] of a call as the replay makes it, of `size` rows at different steps, and its gradients."""
    grid, request, rows = work.plan.grid, work.request, torch.arange(size)
    x = torch.randn((size, *request.latent_shape), dtype=grid.levels.dtype, generator=generator("trial", request.seed)).to(grid.levels.device)
    index = (rows % max(1, grid.steps - 1)).to(x.device)
    of = conditioning.rows((rows % len(request.prompts)).to(x.device))
    with torch.inference_mode(False), torch.enable_grad():
        gaussian = step(learner.policy, x, index, of, work.plan, torch.ones_like(index, dtype=torch.bool), CallCount(), size)
        gaussian.mean.sum().backward()
    return x


def _try(learner: Learner, work: Work, conditioning: Conditioning, size: int) -> None:
    """Raises where memory does not suffice, beside what the optimizer will keep."""
    held = _held(learner)
    x = _call(learner, work, conditioning, size)
    with torch.no_grad():
        decoded(learner.policy, x, work.plan)
    del held


def _held(learner: Learner) -> list[Tensor]:
    """As much memory of accelerators as the optimizer's first step will take, and what is to stay free."""
    parameters = [p for p in learner.parameters.values() if p.device.type != "cpu"]
    each = optimizers.STATE[learner.settings.name]
    held = [torch.empty(int(p.numel() * each), dtype=torch.uint8, device=p.device) for p in parameters]
    for device in {p.device for p in parameters if p.is_cuda}:
        held.append(torch.empty(torch.cuda.get_device_properties(device).total_memory // SPARE, dtype=torch.uint8, device=device))
    return held


def _in_main_memory(learner: Learner, work: Work, conditioning: Conditioning) -> int:
    """For how many rows there is main memory, at least 1: where that runs out, processes are killed, and nothing is raised that a trial could catch."""
    import psutil  # accelerate brings it

    modules = getattr(learner.policy, "denoisers", {}).values()
    weights = {None, *map(_storage, learner.parameters.values()), *(_storage(p) for module in modules for p in module.parameters())}
    kept: dict[int | None, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        suffices = _suffices(lambda: _call(learner, work, conditioning, 1))
    learner.zero_grad()
    if not suffices:
        return 1
    return max(1, psutil.virtual_memory().available // MAIN_MEMORY // processes.count() // max(1, sum(kept.values())))


def _storage(tensor: Tensor) -> int | None:
    """Where its numbers lie; None of a quantised weight, which has no place of its own."""
    return tensor.untyped_storage().data_ptr() if type(tensor) in (Tensor, torch.nn.Parameter) else None
