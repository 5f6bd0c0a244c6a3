"""Samples that a team of processes draws and trains on together, each with a part of the tokens (context parallelism), for videos whose activations do not
fit a GPU.

diffusers does it, by its denoisers' own plans: the tokens are split before the first block and gathered after the last, and in between attention alone
needs those of the others (Ulysses, arXiv 2309.14509: all tokens, for a part of the heads). Every process of a team makes the same calls, and
has the whole output; in the backward pass each has its tokens' part of every gradient, so that their sum over all processes is what it is without teams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from . import processes
from .errors import RunError
from .workflow.host import host

if TYPE_CHECKING:
    from diffusers import ContextParallelConfig

    from .policies.base import Policy

OPTION = "--context-parallel"


def split(policy: Policy) -> None:
    """Where teams are asked for: each denoiser's tokens are from now on split over the processes of a team. Raises `RunError`, one line, where they cannot be."""
    size = host().context_parallel
    if size == 1:
        return
    if line := problem(policy, size):
        raise RunError(line)
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ContextParallelOutput
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(processes.device().type, (processes.teams(), 1, size), mesh_dim_names=("teams", "ring", "ulysses"))
    for denoiser in policy.denoisers.values():
        config = ContextParallelConfig(ulysses_degree=size, mesh=mesh["ring", "ulysses"])
        ends = {name: end.gather_dim for name, end in denoiser._cp_plan.items() if isinstance(end, ContextParallelOutput)}
        denoiser.enable_parallelism(config=config, cp_plan={name: begin for name, begin in denoiser._cp_plan.items() if name not in ends})
        _gather(policy, denoiser, config, ends)


def problem(policy: Policy, size: int) -> str | None:
    """The line about what cannot be split in so many parts."""
    if processes.count() % size:
        return f"{OPTION}: found {size}, and the number of processes is {processes.count()}; accepted: a number that divides theirs"
    if processes.sharded():
        return f"{OPTION}: found {size}, and accelerate's configuration shards the weights (FSDP); accepted: one of the two"
    if not hasattr(torch, "accelerator") or not torch.accelerator.device_count():  # diffusers divides by it
        return f"{OPTION}: found {size}, and no GPU that torch {torch.__version__} counts; accepted: GPUs, and torch 2.6 or newer"
    for denoiser in policy.denoisers.values():
        if not policy.context_parallel or getattr(denoiser, "_cp_plan", None) is None:
            return f"{OPTION}: found {size}, and the tokens of {policy.name!r} ({type(denoiser).__name__}) cannot be split; accepted: Wan, FLUX.1 and FLUX.2, with a diffusers that has a plan for them"
        heads = getattr(denoiser.config, "num_attention_heads", size)
        if heads % size:
            return f"{OPTION}: found {size}, and {policy.name!r} has {heads} heads of attention; accepted: a number that divides theirs"
    return None


def _gather(policy: Policy, denoiser: nn.Module, config: ContextParallelConfig, ends: dict[str, int]) -> None:
    """The tokens come together behind these modules, by dimension: diffusers' own hook would sit inside the LoRA around one, whose part it would leave out."""
    from diffusers.hooks.context_parallel import EquipartitionSharder

    forward = denoiser.forward

    def gathering(*arguments, **named):
        hooks = [denoiser.get_submodule(name).register_forward_hook(
            lambda module, given, out, dim=dim: EquipartitionSharder.unshard(out, dim, config._flattened_mesh)) for name, dim in ends.items()]
        try:
            return forward(*arguments, **named)
        except AssertionError as error:  # so diffusers tells it
            raise RunError(f"{OPTION}: the tokens of {policy.name!r} at this size, or those of its text, cannot be divided by {config.ulysses_degree} "
                           f"({error}); accepted: another size or number of frames, or fewer processes a team") from error
        finally:
            for hook in hooks:
                hook.remove()

    denoiser.forward = gathering
