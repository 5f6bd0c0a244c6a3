"""Which process this is, its device, and what processes tell each other; wraps accelerate, and nothing else knows how many there are.

Every process executes the same graph. Collectives are called by all of them, in the same order; with one process they cost nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import DanceGRPOError, RunError
from .workflow.host import host

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
_PATIENCE = datetime.timedelta(hours=12)  # whoever waits is not the one that hangs: the launcher watches for that, and a rollout may take an hour
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # of torchrun and accelerate launch, and of MPI's
_BUCKET = 2**25  # numbers in one reduction: few calls, and no second copy of a whole model


@functools.cache
def _state():
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    timeout = {"timeout": _PATIENCE} if int(os.environ.get("WORLD_SIZE", 1)) > 1 else {}
    # without being told, accelerate overlooks the other processes where there is no GPU
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not _accelerated(), **timeout)


def _accelerated() -> bool:
    import torch

    return torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()


def _alone() -> bool:
    """Known without asking accelerate, which takes seconds to load: no launcher speaks of others, or the host has a device of its own (ComfyUI)."""
    return host().device() is not None or all(os.environ.get(name, "1") in ("", "1") for name in SIZES)


def count() -> int:
    """How many processes there are."""
    return 1 if _alone() else _state().num_processes


def rank() -> int:
    """This process's number, from 0."""
    return 0 if _alone() else _state().process_index


def is_first() -> bool:
    """Whether this process is the one that reads the workflow, writes files and shows progress."""
    return rank() == 0


def device():
    """The `torch.device` of this process."""
    return host().device() or _state().device


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """ComfyUI runs nodes under `torch.inference_mode`; weights made there could never be trained through."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        yield


def end() -> None:
    """Leaves the group of processes, where there is one."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# -- shares of the work -------------------------------------------------------------------------------------------------------
def share(items: list[T]) -> list[T]:
    """This process's part of a list that all have alike: every `count()`-th, from its own number on."""
    return items[rank()::count()]


# -- collectives --------------------------------------------------------------------------------------------------------------
def broadcast(value: T) -> T:
    """The first process's value, in all of them (pickled between our own processes)."""
    if count() == 1:
        return value
    import torch.distributed as dist

    box = [value if is_first() else None]
    dist.broadcast_object_list(box, 0, group=_talk())
    return box[0]


def on_first(make: Callable[[], T], told: bool = True) -> T | None:
    """`make()`, called in the first process alone; all get its value, or with told=False None, and all raise its error.

    An error of this library keeps its class and words in the others; any other becomes a `RunError` there.
    """
    if count() == 1:
        return make()
    value, error = None, None
    if is_first():
        try:
            value = make()
        except BaseException as raised:  # the others wait, whatever it is
            error = raised
    outcome = broadcast((None, value if told else None) if error is None else (_sendable(error), None))
    if error is not None:
        raise error
    if outcome[0] is not None:
        outcome[0].from_first = True  # who shows errors need not show it again
        raise outcome[0]
    return value if is_first() else outcome[1]


def _sendable(error: BaseException) -> BaseException:
    if isinstance(error, (DanceGRPOError, KeyboardInterrupt)):
        return error.with_traceback(None)
    return RunError(f"{type(error).__name__}: {' '.join(str(error).split())}")


def sum_over_all(tensors: Iterable[Tensor]) -> None:
    """Adds up each tensor over all processes, in place. All have the same tensors, in the same order."""
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, group=_talk() if flat.device.type == "cpu" else None)
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
            tensor.copy_(total.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype and device, about `_BUCKET` numbers each."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        other = bucket and (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)
        if bucket and (other or sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def gathered(rows: Tensor, places: Tensor, total: int, everywhere: bool = True) -> Tensor | None:
    """[total, ...] on the CPU: its row `places[k]` is some process's `rows[k]`. Each place is held by one process.

    In every process, or with everywhere=False in the first alone, None in the others. Processes may hold different numbers of rows,
    also none, and then tell neither their shape nor their dtype.
    """
    if count() == 1:
        return _placed([(rows, places)], total)
    import torch
    import torch.distributed as dist

    kinds: list[Any] = [None] * count()
    dist.all_gather_object(kinds, (tuple(rows.shape), rows.dtype, places.tolist()), group=_talk())
    (shape, dtype, _), most = next((kind for kind in kinds if kind[0][0]), kinds[0]), max(kind[0][0] for kind in kinds)
    padded = torch.zeros((most, *shape[1:]), dtype=dtype)
    if len(rows):
        padded[: len(rows)] = rows.cpu()
    parts = [torch.empty_like(padded) for _ in kinds] if everywhere or is_first() else None
    dist.all_gather(parts, padded, group=_talk()) if everywhere else dist.gather(padded, parts, 0, group=_talk())
    if parts is None:
        return None
    return _placed([(part[: len(at)], torch.tensor(at, dtype=torch.int64)) for part, (_, _, at) in zip(parts, kinds)], total)


def _placed(parts: list[tuple[Tensor, Tensor]], total: int) -> Tensor:
    import torch

    first = next((rows for rows, _ in parts if len(rows)), parts[0][0])
    out = torch.empty((total, *first.shape[1:]), dtype=first.dtype)
    for rows, places in parts:
        if len(rows):
            out[places.cpu()] = rows.cpu()
    return out


def any_of(flag: bool) -> bool:
    """Whether it holds in any process."""
    return any(all_of(bool(flag)))


def all_of(value: T) -> list[T]:
    """The value of each process, in their order (pickled between our own processes)."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_talk())
    return values


@functools.cache
def _talk():
    """The group by which all but gradients travels: from and to the CPU, also where NCCL joins the GPUs. None: the one that there is."""
    import torch.distributed as dist

    return None if "gloo" in dist.get_backend() else dist.new_group(backend="gloo", timeout=_PATIENCE)
