"""Which process this is, its device, and what processes tell each other; wraps accelerate, and nothing else knows how many there are.

Every process executes the same graph. Collectives are called by all of them, in the same order; with one process they cost nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from . import pulse
from .errors import DanceGRPOError, Interrupted, RunError, WorkflowError
from .workflow.host import host

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
AGAIN = 75  # exit status (sysexits.h: EX_TEMPFAIL) of one of several that ran out of memory: whoever started them is to start all again, with --resume
_PATIENCE = datetime.timedelta(hours=12)  # for what the others do: a rollout may take an hour
_MEETING = datetime.timedelta(minutes=15)  # until all that were announced are there
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
LAUNCHER = "DANCEGRPO_LAUNCHER"  # in the environment of a process that is to end with the one that started it: the latter's process id
_BUCKET = 2**25  # numbers in one reduction: few calls, and no second copy of a whole model


@functools.cache
def _state():
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise WorkflowError("accelerate's distributed_type: found DEEPSPEED, accepted: MULTI_GPU, or FSDP with fsdp_version 2, which shards weights "
                            "and optimizer as DeepSpeed's ZeRO stage 3 does")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers would leave the text encoders of all processes but the first empty
    announced = started() or 1
    timeout = {"timeout": _MEETING} if announced > 1 else {}
    # without being told, accelerate overlooks the other processes where there is no GPU
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not _accelerated(), **timeout)
    if state.num_processes != announced:  # each would train by itself, in one folder
        raise WorkflowError(f"the launcher announced {announced} processes, and {state.num_processes} came together; accepted: a launcher that sets "
                            "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun does")
    return state


def started() -> int | None:
    """How many processes a launcher says that it started, this one among them; None where none says anything."""
    if os.environ.get("WORLD_SIZE", "").isdigit():
        return int(os.environ["WORLD_SIZE"])
    by_mpi = max((int(os.environ[name]) for name in _MPI_SIZES if os.environ.get(name, "").isdigit()), default=1)
    if by_mpi > 1:  # one alone may just as well be a cluster's way to start a program
        return by_mpi
    return 1 if "ACCELERATE_MIXED_PRECISION" in os.environ else None  # accelerate launch, which says no number where it is one


def _accelerated() -> bool:
    import torch

    return torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()


def _alone() -> bool:
    """Known without asking accelerate, which takes seconds to load: no launcher speaks of others, or the host has a device of its own (ComfyUI)."""
    return host().device() is not None or (started() or 1) == 1


def count() -> int:
    """How many processes there are."""
    return 1 if _alone() else _state().num_processes


def rank() -> int:
    """This process's number, from 0; known before the processes have met."""
    return 0 if _alone() else next((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdigit()), 0)


def is_first() -> bool:
    """Whether this process is the one that reads the workflow, writes files and shows progress."""
    return rank() == 0


def sharded() -> bool:
    """Whether each process is to hold a part of the denoisers' weights alone (`sharding`), as accelerate's configuration says."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes", "on") and count() > 1


def device():
    """The `torch.device` of this process."""
    return host().device() or _state().device


def tell_accelerate() -> None:
    """For what of accelerate asks for its state: under a host with a device of its own nothing has made it."""
    _state()


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """ComfyUI runs nodes under `torch.inference_mode`; weights made there could never be trained through."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        yield


def empty_cache() -> None:
    """Gives the accelerator's memory back that torch keeps for what comes next."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()  # these two do nothing where they were never used
    torch.xpu.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def end() -> None:
    """Leaves the group of processes, where there is one."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


# -- shares of the work -------------------------------------------------------------------------------------------------------
def team_size() -> int:
    """How many processes draw each sample together (`context`); they follow one another in number."""
    return min(host().context_parallel, count())


def teams() -> int:
    """How many teams there are."""
    return count() // team_size()


def share(items: list[T]) -> list[T]:
    """This process's part of a list that all have alike, which is its team's: every `teams()`-th, from the team's own number on."""
    return items[rank() // team_size()::teams()]


# -- collectives --------------------------------------------------------------------------------------------------------------
class Lost(RunError):
    """Another process has ended; its own error tells why."""


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        with pulse.waiting():
            yield
    except RuntimeError as error:  # of torch.distributed, whose errors have this class in common
        said = re.sub(r"^\[.*?\] *", "", str(error)).partition("\n")[0].partition(". ")[0]  # without the source's place, and advice
        raise Lost(f"another process has ended ({said or type(error).__name__})") from error


def broadcast(value: T) -> T:
    """The first process's value, in all of them (pickled between our own processes)."""
    if count() == 1:
        return value
    import torch.distributed as dist

    box = [value if is_first() else None]
    with _talking():
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
    try:
        outcome = broadcast((None, value if told else None) if error is None else (_sendable(error), None))
    finally:
        if error is not None:  # before a `Lost`: it is what people are to read
            raise error
    if outcome[0] is not None:
        outcome[0].from_first = True  # who shows errors need not show it again
        raise outcome[0]
    return value if is_first() else outcome[1]


def _sendable(error: BaseException) -> BaseException:
    """A copy without what other processes have not: the traceback stays with the error itself."""
    if isinstance(error, (DanceGRPOError, KeyboardInterrupt)):
        try:
            return pickle.loads(pickle.dumps(error))
        except Exception:  # of a class that is made of other arguments than it keeps
            return RunError(str(error))
    return RunError(f"{type(error).__name__}: {' '.join(str(error).split())}")


def sum_over_all(tensors: Iterable[Tensor]) -> None:
    """Adds up each tensor over all processes, in place. All have the same tensors, in the same order."""
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with _talking():
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
    also none, and then tell neither their shape nor their dtype. Of a team the first tells. Raises `RunError`, in all, where a place is held by none or by several.
    """
    if count() == 1:
        return _placed([(rows, places)], total)
    if rank() % team_size():
        rows, places = rows[:0], places[:0]
    import torch
    import torch.distributed as dist

    kinds: list[Any] = [None] * count()
    with _talking():
        dist.all_gather_object(kinds, (tuple(rows.shape), rows.dtype, places.tolist()), group=_talk())
    held = [place for *_, at in kinds for place in at]
    if sorted(held) != list(range(total)):  # some rows would be whatever the memory held
        raise RunError(f"of {total} samples the processes hold {len(held)}, {len(set(held))} different ones; accepted: each in one of them")
    (shape, dtype, _), most = next((kind for kind in kinds if kind[0][0]), kinds[0]), max(kind[0][0] for kind in kinds)
    padded = torch.zeros((most, *shape[1:]), dtype=dtype)
    if len(rows):
        padded[: len(rows)] = rows.cpu()
    parts = [torch.empty_like(padded) for _ in kinds] if everywhere or is_first() else None
    with _talking():
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


def check_interrupt() -> None:
    """Raises `Interrupted` where any process was told to stop: in all, at the same call, so that none is left waiting. All call it equally often."""
    if count() == 1:
        return host().check_interrupt()
    try:
        host().check_together()
    except Interrupted:
        any_of(True)
        raise
    if any_of(False):
        raise Interrupted("stopped")


def all_of(value: T) -> list[T]:
    """The value of each process, in their order (pickled between our own processes)."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    with _talking():
        dist.all_gather_object(values, value, group=_talk())
    return values


def all_teams_of(value: T) -> list[T]:
    """Of each team the value of its first process, in their order: for what a team does together, and is to count once."""
    return all_of(value)[::team_size()]


@functools.cache
def _talk():
    """The group by which all but gradients on accelerators travels: from and to the CPU, also where NCCL joins the GPUs."""
    import torch.distributed as dist

    count()  # the processes have met
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
