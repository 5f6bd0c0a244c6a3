"""Denoisers of whose weights each process holds a part (FSDP2: torch's `fully_shard`), as accelerate's configuration asks for it.

Every block is gathered before it computes and let go after; its gradient is summed over the processes, each of which keeps its part.
A parameter is then a DTensor, and so is what is made of it (masters, moving average, the optimizer's state); a LoRA stays whole in every process.
Outside this file a whole tensor is the first process's, on the CPU, and None in the others: so files are the same however many processes there are.

accelerate's own `prepare` is not used: it averages gradients where ours are a sum, keeps the weights in float32, and wants the optimizer made by it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import processes
from .errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .policies.base import Policy

_TORCH = (2, 8)  # the first whose fully_shard can sum gradients on every backend
# what accelerate passes on of its configuration -> (its name there, what we do); what is not here is without effect
_SETTINGS = {"FSDP_VERSION": ("fsdp_version", ("2",)), "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", ("", "false")),
             "FSDP_RESHARD_AFTER_FORWARD": ("fsdp_reshard_after_forward", ("", "true", "full_shard")),
             "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing (Loop Start has gradient_checkpointing)", ("", "false"))}


def problem() -> str | None:
    """The line about a configuration that asks for another sharding than this."""
    for variable, (name, accepted) in _SETTINGS.items():
        found = os.environ.get(variable, "").strip().lower()
        if found not in accepted:
            return f"accelerate's {name}: found {found or 'none'}, accepted: {accepted[-1] if len(accepted) == 1 else accepted[1]}"
    if tuple(map(int, torch.__version__.split(".")[:2])) < _TORCH:
        return f"sharding (FSDP2) needs torch {'.'.join(map(str, _TORCH))} or newer, found {torch.__version__}"
    return None


def shard(policy: Policy) -> None:
    """Where it is asked for: each denoiser's weights are from now on in parts on the processes' devices, block by block.

    Raises `RunError`, one line, for a configuration that is not supported, or a denoiser that cannot be sharded.
    """
    if not processes.sharded():
        return
    if line := problem():
        raise RunError(line)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(processes.device().type, (processes.count(),))
    options = {"mesh": mesh, "reshard_after_forward": True, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    for denoiser in policy.denoisers.values():
        _check(policy, denoiser)
        for module in [*_blocks(denoiser), denoiser]:
            fully_shard(module, **options)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            module.set_gradient_divide_factor(1.0)  # a sum
        _settle(denoiser)


def _check(policy: Policy, denoiser: nn.Module) -> None:
    for name, p in denoiser.named_parameters():
        if not p.is_floating_point() or type(p) is not nn.Parameter:
            raise RunError(f"the weights of {policy.name!r} are quantised ({name}), and cannot be sharded; accepted: Load Policy's \"quantization\" none, "
                           "or processes that each hold the whole model")
        if p.ndim == 0:
            raise RunError(f"{policy.name!r} cannot be sharded: its {name} is a single number")


def _blocks(denoiser: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the members of the denoiser's lists of modules."""
    return [block for child in denoiser.children() if isinstance(child, nn.ModuleList) for block in child]


def trains(modules: Iterable[nn.Module]) -> None:
    """To be called when parameters of these denoisers, sharded or not, have begun to require a gradient. Raises `RunError` where torch cannot reduce it."""
    for denoiser in modules:
        if any(is_part(p) for p in denoiser.parameters()):
            dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in denoiser.parameters() if p.requires_grad})
            if len(dtypes) > 1:
                raise RunError(f"all weights of a sharded denoiser can be trained where they have one dtype, found: {' and '.join(dtypes)}; "
                               'set Load Policy\'s "dtype" to float32')
            _settle(denoiser)


def _settle(denoiser: nn.Module) -> None:
    """Gathers each part once: only then does torch note which dtypes are trained."""
    for module in [*_blocks(denoiser), denoiser]:
        module.unshard()
        module.reshard()


# -- tensors in parts -----------------------------------------------------------------------------------------------------------
def is_part(tensor: object) -> bool:
    """Whether each process holds a part of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor | None:
    """A copy on the CPU; of one in parts in the first process alone, None in the others, and all must call it."""
    if not is_part(tensor):
        return tensor.detach().to("cpu", copy=True)
    full = tensor.detach().full_tensor()
    return full.to("cpu", copy=True) if processes.is_first() else None


def own(tensor: Tensor) -> Tensor:
    """This process's part, or all of what is not in parts; it shares its memory."""
    return tensor.detach().to_local() if is_part(tensor) else tensor.detach()


def like(value: Tensor | None, target: Tensor) -> Tensor | None:
    """The value as `target` is: in parts where that is, by its device and dtype, and all must call it; the first process's value counts."""
    if not is_part(target) or is_part(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    full = torch.empty(target.shape, dtype=target.dtype, device=target.device) if value is None else value.detach().to(target.device, target.dtype).contiguous()
    return distribute_tensor(full, target.device_mesh, target.placements)


@torch.no_grad()
def put(target: Tensor, value: Tensor | None) -> None:
    """Copies a value into `target`, as `like` has it."""
    target.copy_(like(value, target))


def number(tensor: Tensor) -> float:
    """Of a tensor with one."""
    return (tensor.full_tensor() if is_part(tensor) else tensor).item()
